"""Sound bounds of a network over a ball ∩ [0, 1]: intervals, CROWN's linear bounds, and Lipschitz constants.

Axes: B = images, S = linear functions of the output, C = outputs; the shape of one example is (…). Double precision.

Interval bounds: Gowal et al. 2018. CROWN: Zhang et al. 2018, every ReLU between two lines: from above the chord, from
below 0 or x, whichever leaves the smaller triangle, carried back from the output to the pixels. A ReLU's own input is
bounded by both, and the tighter of the two counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.certify.layers import Affine, Dense, Layer, ReLU, Residual
from bench.spec import ABSOLUTE_BOX, ThreatModel

#: A layer of more neurons than this is bounded by intervals alone: carrying each of them back would take too long.
MAX_NEURONS = 1024
#: Numbers that one backward pass may hold.
_CHUNK = 2**18


@dataclass(frozen=True)
class Region:
    """The ball ∩ [0, 1] around x (B, …), float64, with the tolerance that a verdict leaves an attack in both."""

    x: Tensor
    threat: ThreatModel

    @property
    def low(self) -> Tensor:
        return (self.x - self.threat.reach).clamp_min(-ABSOLUTE_BOX)

    @property
    def high(self) -> Tensor:
        return (self.x + self.threat.reach).clamp_max(1 + ABSOLUTE_BOX)

    def least(self, a: Tensor) -> Tensor:
        """At most the minimum of a·x' (B, S) over the region, a (B, S, …): exact for Linf.

        An L2 or L1 ball lies in the box x ± ε, and is bounded without [0, 1] as well; the better bound counts.
        """
        a = a.flatten(2)
        low, high, x = (part.flatten(1)[:, :, None] for part in (self.low, self.high, self.x))
        box = (a.clamp_min(0) @ low + a.clamp_max(0) @ high)[:, :, 0]
        if self.threat.norm == "Linf":
            return box
        return torch.maximum(box, (a @ x)[:, :, 0] - self.threat.reach * self.dual_norm(a))

    def dual_norm(self, a: Tensor) -> Tensor:
        """‖a‖_q (B, S), a (B, S, D): what a step of length 1 can change of a·x."""
        return torch.linalg.vector_norm(a, {"Linf": 1, "L2": 2, "L1": torch.inf}[self.threat.norm], dim=2)


@dataclass(frozen=True)
class _Interval:
    low: Tensor
    high: Tensor

    def through(self, layer: Affine | Dense) -> "_Interval":
        centre, radius = layer.forward((self.low + self.high) / 2), layer.magnitude((self.high - self.low) / 2)
        return _Interval(centre - radius, centre + radius)


@dataclass(frozen=True)
class _AffineStep:
    layer: Affine | Dense
    shape: torch.Size

    def back(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.transpose(a, self.shape)

    def slopes(self, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.transpose(centre, self.shape)[0], self.layer.transpose_magnitude(radius, self.shape)


@dataclass(frozen=True)
class _ReLUStep:
    """A ReLU whose inputs (B, …) lie in an interval."""

    inputs: _Interval

    def back(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Functions a (B, S, …) of the output that are at least the returned ones of the input."""
        low, high = self.inputs.low.clamp_max(0), self.inputs.high.clamp_min(0)
        chord = high / (high - low).clamp_min(1e-300)  # 1 where low ≥ 0, 0 where high ≤ 0
        below = ((high > -low) & (high > 0)).to(a)
        positive = a.clamp_min(0)
        constant = (positive - a).flatten(2) @ (chord * low).flatten(1)[:, :, None]
        return a * chord[:, None] + positive * (below - chord)[:, None], constant[:, :, 0]

    def slopes(self, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        low, high = centre - radius, centre + radius
        on, off = (self.inputs.low > 0)[:, None], (self.inputs.high <= 0)[:, None]
        low = torch.where(off, 0.0, torch.where(on, low, low.clamp_max(0)))
        high = torch.where(off, 0.0, torch.where(on, high, high.clamp_min(0)))
        return (low + high) / 2, (high - low) / 2


@dataclass(frozen=True)
class _SumStep:
    body: "_Steps"
    shortcut: "_Steps"

    def back(self, a: Tensor) -> tuple[Tensor, Tensor]:
        (one, c), (other, d) = _back(self.body, a), _back(self.shortcut, a)
        return one + other, c + d

    def slopes(self, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        (one, c), (other, d) = _slopes(self.body, centre, radius), _slopes(self.shortcut, centre, radius)
        return one + other, c + d


_Steps = Sequence[Any]


def _back(steps: _Steps, a: Tensor) -> tuple[Tensor, Tensor]:
    constant = torch.zeros(a.shape[:2], dtype=a.dtype)
    for step in reversed(steps):
        a, more = step.back(a)
        constant = constant + more
    return a, constant


def _slopes(steps: _Steps, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    for step in reversed(steps):
        centre, radius = step.slopes(centre, radius)
    return centre, radius


class Bounds:
    """What a network (B, …) → (B, C), given by its layers, can say over a region."""

    def __init__(self, network: Sequence[Layer], x: Tensor, threat: ThreatModel) -> None:
        self.region = Region(x.detach().cpu().double(), threat)
        self._steps, self.outputs = self._run(network, _Interval(self.region.low, self.region.high), prefix=[])

    def least(self, a: Tensor) -> Tensor:
        """At most the minimum (B, S) of the functions a (B, S, C) of the outputs, the tighter of both methods."""
        interval = a.clamp_min(0) @ self.outputs.low[:, :, None] + a.clamp_max(0) @ self.outputs.high[:, :, None]
        return torch.maximum(interval[:, :, 0], self._carried(self._steps, a))

    def lipschitz(self, a: Tensor) -> Tensor:
        """At least the Lipschitz constant (B, S), in the region's norm, of the functions a (B, S, C) over the region.

        Each partial derivative lies in an interval, in which a ReLU that can be on and off counts as both.
        """
        centre, radius = _slopes(self._steps, a, torch.zeros_like(a))
        return self.region.dual_norm((centre.abs() + radius).flatten(2)).expand(len(self.region.x), -1)

    def _run(self, todo: Sequence[Layer], inputs: _Interval, prefix: _Steps) -> tuple[list[Any], _Interval]:
        """The steps of these layers and the interval of their outputs; `prefix` leads from the pixels to them."""
        steps: list[Any] = []
        for layer in todo:
            if isinstance(layer, Affine | Dense):
                steps.append(_AffineStep(layer, inputs.low.shape[1:]))
                inputs = inputs.through(layer)
            elif isinstance(layer, ReLU):
                inputs = self._tightened(inputs, [*prefix, *steps])
                steps.append(_ReLUStep(inputs))
                inputs = _Interval(inputs.low.clamp_min(0), inputs.high.clamp_min(0))
            else:
                assert isinstance(layer, Residual)
                body, one = self._run(layer.body, inputs, [*prefix, *steps])
                shortcut, other = self._run(layer.shortcut, inputs, [*prefix, *steps])
                steps.append(_SumStep(body, shortcut))
                inputs = _Interval(one.low + other.low, one.high + other.high)
        return steps, inputs

    def _tightened(self, inputs: _Interval, steps: _Steps) -> _Interval:
        """The interval of a ReLU's inputs, cut with the linear bounds of the neurons that it leaves undecided."""
        shape, images = inputs.low.shape[1:], len(inputs.low)
        size = shape.numel()
        exact = self.region.threat.norm == "Linf" and len(steps) == 1 and isinstance(steps[0], _AffineStep)
        if size > MAX_NEURONS or not images or exact:
            return inputs
        low, high = inputs.low.flatten(1).clone(), inputs.high.flatten(1).clone()
        undecided = (low < 0) & (high > 0)
        for chosen in torch.split(undecided.any(0).nonzero()[:, 0], max(1, _CHUNK // (images * size))):
            a = torch.zeros(len(chosen), size, dtype=torch.double)
            a[torch.arange(len(chosen)), chosen] = 1
            a = a.view(1, len(chosen), *shape)  # the same for all images, until a ReLU tells them apart
            mine = undecided[:, chosen]  # other images' neurons keep their intervals: no image depends on another
            low[:, chosen] = torch.where(mine, self._carried(steps, a).maximum(low[:, chosen]), low[:, chosen])
            high[:, chosen] = torch.where(mine, (-self._carried(steps, -a)).minimum(high[:, chosen]), high[:, chosen])
        # both are sound, but for rounding, which may leave them crossed
        return _Interval(torch.minimum(low, high).view(images, *shape), torch.maximum(low, high).view(images, *shape))

    def _carried(self, steps: _Steps, a: Tensor) -> Tensor:
        back, constant = _back(steps, a)
        return self.region.least(back) + constant

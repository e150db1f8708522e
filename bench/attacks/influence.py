"""An attack on the parts of a user's own network that its answers depend on least: mixtures that show no gate.

Axes: B = examples of the block, m = rows that are attacked, C = classes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bench.attacks.deployed import OPENED, smoothly
from bench.attacks.gradients import by_name
from bench.attacks.search import Search, losses, margin
from bench.models.unused import MOST_STACKED, Stacks
from bench.pgd import finite

#: So many parts are led to, those with the least influence on the block's images.
PARTS = 4
#: Below it an influence is none.
NONE = 1e-30
#: Two whose logarithms differ by less have the same influence.
SAME = 1e-3
#: What gives an expert's logits, whatever module or name it has; and other layers of units, their second axis.
_LAST = {
    F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm, Tensor.addmm,
    torch.einsum, torch.cdist,
}  # fmt: skip
_CONVOLVES = {F.conv1d, F.conv2d, F.conv3d}  # which are torch.conv1d … as well
_LAYERS = _LAST | _CONVOLVES
#: So many units of layers are driven up and down, of those whose influence is below this share of the units' mean.
UNITS, HARDLY = 8, 1e-2


class _Logits(TorchFunctionMode):
    """Keeps what may be the logits of experts: (m, C) of a last layer, or of several in one tensor, (m, E, C) or
    (m, C, E), or what is cut into several (m, C).

    `found`: each with the axis of its experts, if it has one.
    """

    def __init__(self, shape: torch.Size) -> None:
        """shape: of the logits, (m, C)."""
        super().__init__()
        self.shape = shape
        self.found: list[tuple[Tensor, int | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if by_name(func, _LAST) in _LAST and result.shape == self.shape:
            self.found.append((result, None))
        elif isinstance(result, Tensor) and result.dim() == 3 and result.requires_grad:
            for axis in (1, 2):
                others = torch.Size(size for place, size in enumerate(result.shape) if place != axis)
                if others == self.shape and 2 <= result.shape[axis] <= MOST_STACKED:
                    self.found.append((result, axis))
        elif isinstance(result, tuple | list) and len(result) > 1:
            pieces = [one for one in result if isinstance(one, Tensor) and one.shape == self.shape]
            self.found.extend((one, None) for one in pieces)
        return result


class _Layers(TorchFunctionMode):
    """Keeps what layers give, (m, T, units): `found`, in the order of their calls."""

    def __init__(self, count: int) -> None:
        """count: the images, m."""
        super().__init__()
        self.count = count
        self.found: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        func = by_name(func, _LAYERS)
        if func in _LAYERS and result.requires_grad and result.dim() > 1:
            axis = 1 if func in _CONVOLVES else -1
            units = result.movedim(axis, -1)
            if units.numel() and units[..., 0].numel() % self.count == 0:
                self.found.append(units.reshape(self.count, -1, units.shape[-1]))
                return self.found[-1].view(units.shape).movedim(-1, axis)  # what is kept goes on, so it has a gradient
        return result


@contextmanager
def _answers(model: nn.Module, shape: torch.Size) -> Iterator[list[tuple[Tensor, int | None]]]:
    """Holds, once left, what experts may have answered, or several in one tensor, with the axis that tells them apart.

    They are what modules of a list give, what `torch.stack` takes, and what has the shape of logits.
    """
    found: list[tuple[Tensor, int | None]] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((output, None))

    listed = [
        one for owner in model.modules() if isinstance(owner, nn.ModuleList | nn.ModuleDict) for one in owner.children()
    ]
    hooks = [module.register_forward_hook(keep) for module in listed]
    try:
        with Stacks() as stacks, _Logits(shape) as logits:
            yield found
        found.extend((one, None) for call in stacks.calls for one in call)
        found.extend(logits.found)
    finally:
        for hook in hooks:
            hook.remove()


def _influences(model: nn.Module, z: Tensor, side: Tensor) -> tuple[list[Tensor], Tensor]:
    """How much logits depend on each answer (m, …), log ‖∂(side · logits)/∂answer‖ (m,); and the logits (m, C)."""
    with _answers(model, side.shape) as found:
        logits = smoothly(model, z)
    parts = [(one, axis) for one, axis in found if one.requires_grad and one.dim() > 1 and len(one) == len(z)]
    if not logits.requires_grad or not parts:
        return [], logits
    whole = [one for one, _ in parts]
    given = torch.autograd.grad((side * logits).sum(), whole, create_graph=True, allow_unused=True)
    pieces: list[Tensor | None] = []
    for gradient, (one, axis) in zip(given, parts, strict=True):
        if gradient is None:
            pieces += [None] * (1 if axis is None else one.shape[axis])
        else:
            pieces += [each.flatten(1) for each in ([gradient] if axis is None else gradient.unbind(axis))]
    total: dict[int, Any] = {}
    for piece in pieces:
        if piece is not None:
            total[piece.shape[1]] = total.get(piece.shape[1], 0) + piece.detach()
    return [logits.new_zeros(len(z)) if one is None else _size(one, total[one.shape[1]]) for one in pieces], logits


def _size(gradient: Tensor, along: Tensor) -> Tensor:
    """The log length (m,) of a gradient (m, d), and where it has none what still has a slope: its part along another.

    along: (m, d), the sum of the gradients by all answers of this size, which differ by their weights in a mixture.
    """
    length = gradient.norm(dim=1)
    part = (gradient * along).sum(1) / along.norm(dim=1).clamp_min(NONE) / NONE
    none = length < NONE
    return torch.where(none, math.log(NONE) + part, length.masked_fill(none, 1).log())


def least_used(search: Search, steps: int) -> None:
    """Leads to parts, then to units, that the answers for the block's images depend on least."""
    side = torch.randn(len(search.block.y), search.block.num_classes).to(search.block.x.device)
    _parts(search, steps, side)
    _units(search, steps, side)


def _units(search: Search, steps: int, side: Tensor) -> None:
    """Drives up, then down, units of layers that have next to no influence, whatever takes it from them.

    A function that is flat on images may be written in any way, and need not be flat in all of the ball.
    """
    block, model = search.block, search.block.model
    for layer, unit in _quiet(model, block.x, side):
        for sign in (1, -1):

            def drive(
                z: Tensor, rows: Tensor, layer: int = layer, unit: int = unit, sign: int = sign
            ) -> tuple[Tensor, Tensor]:
                with _Layers(len(z)) as layers:
                    logits = model(z)
                # other images may take other layers, which are then driven as well as any
                found = layers.found[layer] if layer < len(layers.found) else logits[:, None]
                return sign * found[..., min(unit, found.shape[-1] - 1)].mean(1), margin(logits, block.y[rows]) > 0

            search.climb(drive, block.x, steps // OPENED, search.rows)


def _quiet(model: nn.Module, x: Tensor, side: Tensor) -> list[tuple[int, int]]:
    """UNITS of them, at most, by their layer and their place in it: of each layer in turn, the quietest layer first.

    The influence of a unit u is ‖∂(side · logits)/∂u‖ · ‖u‖ over the images.
    """
    with torch.enable_grad(), _Layers(len(x)) as layers:
        value = (side * model(x.detach().requires_grad_())).sum()
    if not value.requires_grad or not layers.found:
        return []
    given = torch.autograd.grad(value, layers.found, allow_unused=True)
    influence = []
    for gradient, one in zip(given, layers.found, strict=True):
        known = torch.zeros_like(one) if gradient is None else finite(gradient)
        influence.append((known.flatten(0, 1).norm(dim=0) * one.flatten(0, 1).norm(dim=0)).detach())
    mean = torch.cat(influence).mean()
    turns = sorted(range(len(influence)), key=lambda layer: float(influence[layer].mean()))
    # of a router alone, where all other layers get some of the images each, no unit has any influence
    low = {n: [u for u in influence[n].argsort().tolist() if influence[n][u] <= HARDLY * mean] for n in turns}
    in_turn = [(n, units[place]) for place in range(UNITS) for n, units in low.items() if place < len(units)]
    return in_turn[:UNITS]


def _parts(search: Search, steps: int, side: Tensor) -> None:
    """Raises the influence of a part that images hardly use, by its gradient, then the loss from where that led to.

    The weight that a mixture gives an expert is the gradient of its answer by the expert's, however it is computed; so
    a route that no gate shows, such as by distances to prototypes, is followed all the same. It is a flag where torch
    cannot differentiate a network twice, which is then not attacked so.
    """
    block, model = search.block, search.block.model
    try:
        order = _by_influence(model, block.x, side)
    except RuntimeError as error:
        block.flags.append(f"adaptive: no influence of parts was raised: {str(error).splitlines()[0]}")
        return

    def loss(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits, y = model(z), block.y[rows]
        return losses(logits, y)[:, 0], margin(logits, y) > 0

    for number in order[:PARTS]:

        def lead(z: Tensor, rows: Tensor, number: int = number) -> tuple[Tensor, Tensor]:
            found, logits = _influences(model, z, side[rows])
            value = found[number] if number < len(found) else logits.new_zeros(len(z))
            return value, margin(logits, block.y[rows]) > 0

        search.climb(lead, block.x, steps // OPENED, search.rows)
        search.climb(loss, search.x_adv.clone(), steps // OPENED, search.rows, first=0.5)


def _by_influence(model: nn.Module, x: Tensor, side: Tensor) -> list[int]:
    """The numbers of the answers, that of the least influence first; RuntimeError where it cannot be differentiated.

    Of those with the same influence, as the logits of an expert before and after they are moved, the first alone.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found, _ = _influences(model, x, side)
        if len(found) < 2:  # one part alone is no mixture
            return []
        whole = torch.stack(found)
        if whole.requires_grad:
            torch.autograd.grad(whole.sum(), x, allow_unused=True)
    whole = whole.detach()
    order: list[int] = []
    for number in whole.mean(1).argsort().tolist():
        if not any(torch.allclose(whole[number], whole[other], atol=SAME) for other in order):
            order.append(number)
    return order

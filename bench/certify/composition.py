"""Is a model what was read of it? Its own forward passes are held to the layers that were read, and to its parts.

What is certified is the function that the layers and the parts define. Exact classes, hooks and methods are looked at
as they are read (`certify.layers`); here the numbers have to agree as well, within the margin for rounding.

Axes: B = images, E = experts, C = outputs or classes, K = selected experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.certify.layers import Layer, NotSupported, check_untouched, evaluate, joined, read
from bench.certify.rounding import Arithmetic, margins
from bench.models.dependence import same_logits
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.parts import is_dual, is_moe
from bench.spec import ABSOLUTE_BOX

#: Random images of each kind that a network is tried on.
_TRIED = 8


@dataclass(frozen=True)
class Network:
    """A network whose own outputs agree with its layers.

    parts: one layer for each step of its forward pass, for the rounding. layers: the same with affine ones joined.
    experts: of how many it is one, since a gate's weight of at least one in so many comes on top.
    """

    name: str
    parts: list[Layer]
    layers: list[Layer]
    arithmetic: Arithmetic
    experts: int

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, x: Tensor, experts: int = 1) -> "Network":
        """Read, and tried on the images x (B, …) and on random ones.

        NotSupported for a layer that is not known, values that can leave the number format's finite range anywhere in
        [0, 1], a forward pass that fails, or outputs that differ from what the layers give.
        """
        name, parts = type(module).__name__, read(module)
        found = cls(name, parts, joined(parts, x.shape[1:]), Arithmetic.used(module, x), experts)
        if not bool(found.margins(torch.full_like(x[:1], 1 + ABSOLUTE_BOX, dtype=torch.double)).isfinite().all()):
            raise NotSupported(
                f"{name}, whose values can leave the finite range of its number format, or its precision"
            )
        images = torch.cat([x, _random_images(x)])
        try:
            outputs = module(images.clone())
        except Exception as error:  # whatever a user's module raises
            raise NotSupported(f"{name}, whose forward pass fails: {type(error).__name__}") from None
        expected = evaluate(found.layers, images.cpu().double())
        if not isinstance(outputs, Tensor) or outputs.shape != expected.shape or expected.ndim != 2:
            raise NotSupported(f"{name}, whose outputs have another shape than its layers give")
        difference = (outputs.detach().cpu().double() - expected).abs()
        if not bool((difference <= found.margins(images.abs())).all()):  # nor where one is not a number
            raise NotSupported(f"{name}, whose outputs are not what its layers give")
        return found

    def margins(self, size: Tensor) -> Tensor:
        """The rounding margin of each output (B, C) for images of magnitude at most `size` (B, …)."""
        return margins(self.parts, size, self.arithmetic, self.experts)


def _random_images(x: Tensor) -> Tensor:
    """Images in [0, 1] of x's shape: uniform at several scales, black, white, and black and white."""
    g = torch.Generator().manual_seed(0)
    uniform = torch.rand(5, _TRIED, *x.shape[1:], generator=g)
    for images, scale in zip(uniform, (1.0, 0.1, 1e-3, 1e-6), strict=False):
        images *= scale
    uniform[4] = uniform[4].round()
    ends = torch.stack([torch.zeros(x.shape[1:]), torch.ones(x.shape[1:])])
    return torch.cat([uniform.flatten(0, 1), ends]).to(x)


@torch.no_grad()
def check_composition(model: Any, x: Tensor) -> None:
    """That an MoE or a dual of ours answers x (B, …) as its parts do, each asked by itself with a copy of the images.

    NotSupported for another class, hooks and methods of its own, an unknown gate or way to combine, a forward pass
    that fails, or answers that differ by more than rounding can explain.
    """
    name = type(model).__name__
    if type(model) not in (MoE, DualModel):
        way = "branches" if is_dual(model) else "experts"
        raise NotSupported(f"{name}, whose way of mixing its {way} is not known")
    check_untouched(model)
    words = {"combine": (model.combine, ("logits", "probs"))}
    if type(model) is MoE:
        if model.num_selected_experts == 1 and model.combine == "probs":  # as none is made, but may be set later
            raise NotSupported(
                f"{name} of one expert with combine 'probs', whose logarithms are rounded: take 'logits'"
            )
        words["gate"] = (model.gate, ("softmax", "argmax"))
    for word, (value, known) in words.items():
        if value not in known:
            raise NotSupported(f"{name} with {word} '{value}', which is none of {' and '.join(known)}")
    try:
        found = model(x.clone())
        expected = _mixed(model, x) if type(model) is MoE else _joined_branches(model, x)
    except Exception as error:  # whatever a user's part raises
        raise NotSupported(f"{name}, whose forward pass fails: {type(error).__name__}") from None
    unit = Arithmetic.used(model, x).unit
    if not same_logits(found, expected, unit**0.5, 16 * unit):
        raise NotSupported(f"{name}, whose answers are not what its parts give")


def check_finite(model: Any, x: Tensor) -> None:
    """NotSupported unless a network, or an MoE of such, is known to give finite logits everywhere in [0, 1]."""
    if not is_moe(model):
        Network.of(model, x)
        return
    check_composition(model, x)
    for part in (model.router, *model.experts):
        Network.of(part, x)


def _mixed(moe: MoE, x: Tensor) -> Tensor:
    """F(x) (B, C) of all experts' outputs on all images, in double precision."""
    scores = moe.router(x.clone())
    chosen = scores.topk(moe.num_selected_experts, dim=1).indices
    scores = scores.double()
    chosen_scores = scores.gather(1, chosen)
    every = torch.stack([expert(x.clone()) for expert in moe.experts], 1).double()
    outputs = every.gather(1, chosen[:, :, None].expand(-1, -1, every.shape[2]))
    if moe.gate == "argmax":
        logs = torch.zeros_like(chosen_scores).log_softmax(1)
    elif moe.num_selected_experts > 1:
        logs = chosen_scores.log_softmax(1)
    else:
        logs = scores.log_softmax(1).gather(1, chosen)
    if moe.combine == "logits":
        return (logs.exp()[:, :, None] * outputs).sum(1)
    return (logs[:, :, None] + outputs.log_softmax(2)).logsumexp(1)


def _joined_branches(dual: DualModel, x: Tensor) -> Tensor:
    """F_D(x) (B, C) of both branches' own answers, in double precision."""
    standard, robust = dual.standard(x.clone()).double(), dual.robust(x.clone()).double()
    alpha = float(dual.alpha)
    if dual.combine == "logits":
        return (1 - alpha) * standard + alpha * robust
    if alpha in (0, 1):
        return (robust if alpha else standard).log_softmax(1)
    mixed = (math.log(1 - alpha) + standard.log_softmax(1), math.log(alpha) + robust.log_softmax(1))
    return torch.logaddexp(*mixed)

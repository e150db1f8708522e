"""How far a network's floating-point outputs may be from those that real numbers would give (Higham 2002, chapter 3).

A sum of products, each of whose terms goes through at most n roundings, is off by at most γ_n Σ |terms| with
γ_n = n·u / (1 − n·u), in whatever order a kernel adds. Over layers in a row γ_a and γ_b make γ_{a+b}, and the terms are
|M| m + |b| for inputs of magnitude m: what cancels counts in full. Beside that, every product, sum, weight or input
below the format's normal range may be flushed to zero.

Axes: B = batch; the shape of one example is (…).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from bench.certify.layers import Affine, Layer, Residual

#: Roundings that every output goes through beside its network's own: the gate's weight, the cast to float32, and ours
#: in double precision, of which 2^29 are one of float32's.
_OWN = 4
#: What softmax, its logarithm and a mixture of probabilities take beside their sums: exp and log of a few units each.
_SOFTMAX = 100


@dataclass(frozen=True)
class Arithmetic:
    """The coarsest number format in a computation: u, its smallest normal number, its largest one."""

    unit: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, *formats: torch.dtype) -> "Arithmetic":
        """The coarsest of these and of float32, in which logits are compared."""
        found = [torch.finfo(dtype) for dtype in {torch.float32, *formats}]
        return cls(
            max(one.eps for one in found) / 2, max(one.smallest_normal for one in found), min(one.max for one in found)
        )

    @classmethod
    def used(cls, network: nn.Module, x: Tensor) -> "Arithmetic":
        """That of a network's weights and its images."""
        tensors = chain([x], network.parameters(), network.buffers())
        return cls.of(*(tensor.dtype for tensor in tensors if tensor.is_floating_point()))

    def gamma(self, roundings: int) -> float:
        """γ_n of n roundings; inf where it would be above 1, since then nothing is known."""
        error = roundings * self.unit
        return error / (1 - error) if error <= 0.5 else torch.inf

    def of_probabilities(self, classes: int, experts: int = 1) -> float:
        """What a probability may be off, beside its logits' errors, once it is normalised and mixed."""
        return 2 * self.gamma(2 * (classes + experts) + _SOFTMAX)


@dataclass(frozen=True)
class _Error:
    """terms (B, …): the magnitude of what is summed; lost (B, …): what flushing to zero takes; roundings in a row."""

    terms: Tensor
    lost: Tensor
    roundings: int


def margins(parts: Sequence[Layer], size: Tensor, arithmetic: Arithmetic, experts: int = 1) -> Tensor:
    """The most (B, C) that each output may be off, for inputs of magnitude at most `size` (B, …), ready to be compared.

    `parts` are the layers as the network computes them, none joined. `experts`: a gate's weight, at least one in so
    many, comes on top. inf where values can leave the format's finite range, or it has no bound for so many additions.
    """
    size = size.detach().cpu().double()
    error = _through(parts, _Error(size, torch.zeros_like(size), 0), arithmetic)
    gamma = arithmetic.gamma(error.roundings + _OWN)
    # each rounding acts on what was lost before as well: at most 1 + γ ≤ 2 times
    found = gamma * error.terms + 2 * (error.lost + 4 * experts * arithmetic.smallest)
    return found.nan_to_num(torch.inf, torch.inf)


def _through(parts: Sequence[Layer], error: _Error, arithmetic: Arithmetic) -> _Error:
    tiny = arithmetic.smallest
    for layer in parts:
        if isinstance(layer, Residual):
            one, other = _through(layer.body, error, arithmetic), _through(layer.shortcut, error, arithmetic)
            terms, lost = one.terms + other.terms, one.lost + other.lost + tiny
            lost = torch.where(2 * (terms + lost) <= arithmetic.largest, lost, torch.inf)
            error = _Error(terms, lost, max(one.roundings, other.roundings) + 1)
        elif isinstance(layer, Affine):
            terms = layer.magnitude(error.terms) + layer.forward(torch.zeros_like(error.terms[:1])).abs()
            roundings = layer.roundings + (error.terms[0, 0].numel() if layer.pooled else 0)
            if roundings:
                # flushed: an input (|M| tiny), a weight (tiny times the largest input), each product and each sum
                largest = (error.terms + error.lost).flatten(1).amax(1).view(-1, *[1] * (terms.ndim - 1))
                lost = layer.magnitude(error.lost + tiny) + tiny * roundings * (layer.flushed * largest + 2)
            else:
                lost = layer.magnitude(error.lost)
            # mean pooling sums before it divides
            inside = (roundings + 2) * (terms + lost) <= arithmetic.largest
            error = _Error(terms, torch.where(inside, lost, torch.inf), error.roundings + roundings)
    return error

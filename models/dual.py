"""The dual model F_D(x) = (1 − α) F_S(x) + α F_R(x) (paper, section 5)."""

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bench.errors import UnusableInput, did_you_mean
from bench.models.routing import RoutingTrace
from bench.spec import Combine


class DualModel(nn.Module):
    """A standard and a robust model, mixed: (B, c, H, W) in [0, 1] → logits (B, C).

    Args:
        standard, robust: S and R, modules from pixels to logits (B, C).
        alpha: R's weight, in [0, 1]; the paper studies [0.5, 1].
        combine: `probs` mixes probabilities, as the paper's theorem does, and returns their logarithm, since attack
            suites expect logits; `logits` mixes raw logits, as the released code does.

    Raises:
        UnusableInput: α outside [0, 1], or an unknown way to combine.

    Each branch has a copy of the images of its own: one may be written to work in place.
    """

    def __init__(self, standard: Any, robust: Any, alpha: float = 0.7, combine: Combine = "probs") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UnusableInput(f"α {alpha} must be in [0, 1]")
        if combine not in get_args(Combine):
            raise UnusableInput(f"unknown combine '{combine}': {did_you_mean(combine, get_args(Combine))}")
        # Any: an nn.Module has no `trace` for the type checker, and a user's branches need not be MoEs
        self.standard: Any = standard
        self.robust: Any = robust
        self.alpha = alpha
        self.combine: Combine = combine

    def mix(self, standard: Tensor, robust: Tensor) -> Tensor:
        """F_D's logits (B, C) from the branches' logits (B, C)."""
        if self.combine == "logits":
            return (1 - self.alpha) * standard + self.alpha * robust
        if self.alpha in (0, 1):  # log 0 has no finite gradient
            return (robust if self.alpha else standard).log_softmax(dim=1)
        return torch.logaddexp(
            math.log(1 - self.alpha) + standard.log_softmax(dim=1), math.log(self.alpha) + robust.log_softmax(dim=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.standard(x.clone()), self.robust(x.clone()))

    def trace(self, x: Tensor) -> tuple[Tensor, RoutingTrace]:
        """The logits (B, C) and how the robust branch, the one that matters under attack, routed the batch."""
        robust, trace = self.robust.trace(x.clone())
        return self.mix(self.standard(x.clone()), robust), trace

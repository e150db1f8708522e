"""The mixture of experts F(x) = Σ_i a_i(x) f_i(x) (paper, section 3)."""

from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn

from bench.errors import UnusableInput, did_you_mean
from bench.models.routing import RoutingTrace, dispatch, route
from bench.spec import Combine, Gate


class MoE(nn.Module):
    """E whole networks behind a router: (B, c, H, W) in [0, 1] → logits (B, C).

    Args:
        experts: E modules from pixels to logits (B, C).
        router: a module from pixels to scores (B, E).
        num_selected_experts: K ≤ E, the experts that each image is sent to.
        gate: `softmax` (the paper's formula: the router trains) or `argmax` (the released code: it cannot).
        combine: what is mixed with the gate's weights: `logits`, or `probs`, which returns log-probabilities.

    Raises:
        UnusableInput: an unknown gate or way to combine; K out of 1 … E; `combine=probs` with K = 1, since
            cross-entropy normalises log(a·p) over the classes, where the gate's weight a cancels: the router would get
            no gradient.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        router: nn.Module,
        num_selected_experts: int = 1,
        gate: Gate = "softmax",
        combine: Combine = "logits",
    ) -> None:
        super().__init__()
        for name, word, known in (("gate", gate, get_args(Gate)), ("combine", combine, get_args(Combine))):
            if word not in known:
                raise UnusableInput(f"unknown {name} '{word}': {did_you_mean(word, known)}")
        self.experts = nn.ModuleList(experts)
        self.router = router
        if not 1 <= num_selected_experts <= len(self.experts):
            raise UnusableInput(f"num_selected_experts {num_selected_experts} must be in 1 … {len(self.experts)}")
        if combine == "probs" and num_selected_experts == 1:
            raise UnusableInput(
                "combine=probs needs num_selected_experts above 1: with one expert its weight cancels in the"
                " cross-entropy, and the router gets no gradient; take combine=logits"
            )
        self.num_selected_experts = num_selected_experts
        self.gate: Gate = gate
        self.combine: Combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.trace(x)[0]

    def trace(self, x: Tensor) -> tuple[Tensor, RoutingTrace]:
        """The logits (B, C) and how the batch was routed."""
        trace = self.route(x)
        return self.mix(trace, dispatch(list(self.experts), x, trace.selected_experts)), trace

    def route(self, x: Tensor) -> RoutingTrace:
        """Which experts the images (B, c, H, W) go to, and with what weight.

        The router has a copy of its own, as the experts have by `dispatch`: one may be written to work in place.
        """
        return route(self.router(x.clone()), self.num_selected_experts, self.gate)

    def mix(self, trace: RoutingTrace, outputs: Tensor) -> Tensor:
        """The logits (B, C) from the selected experts' outputs (B, K, C)."""
        if self.combine == "logits":
            weights = trace.combine_weights.gather(1, trace.selected_experts).unsqueeze(2)
            return (weights * outputs).sum(dim=1)
        # The weights' logarithms, from the scores: a weight that underflows to 0 would make every gradient NaN.
        scores = trace.gate_logits.gather(1, trace.selected_experts)
        log_weights = (scores if self.gate == "softmax" else torch.zeros_like(scores)).log_softmax(dim=1).unsqueeze(2)
        return torch.logsumexp(log_weights + outputs.log_softmax(dim=2), dim=1)

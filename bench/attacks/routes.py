"""Route-aware PGD: make each expert that an input may be sent to wrong, and the router send the input there.

Axes: B = examples of the block, m = rows that are attacked, E = experts, K = selected experts, D = pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.attacks.scores import PROBE, differentiable, has_gradient, logarithms, stand_in
from bench.attacks.search import Search, halved, margin
from bench.models.moe import MoE
from bench.models.parts import routed_branches
from bench.models.routing import RoutingTrace, dispatch
from bench.pgd import ascend_once
from bench.spec import ThreatModel


def affine_map(router: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(W (E, D), b (E,), how far it was off) of a router r(x) = W·vec(x) + b in pixel units; None if it is not affine.

    Found by its gradients at one image and checked at random ones, at the images x (B, C, H, W) and near them, so that
    a user's own class need not say so. What it may be off by is measured by how the scores vary: a saturated router
    hardly does, and is not affine.
    """
    if not has_gradient(router, x[:1]):
        return None
    point = torch.full_like(x[:1], 0.5).requires_grad_()
    with torch.enable_grad():
        scores = router(point)[0]
        rows = [torch.autograd.grad(score, point, retain_graph=True)[0].flatten() for score in scores]
    weight = torch.stack(rows)
    bias = scores.detach() - weight @ point.detach().flatten()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        random = torch.rand(8, *x.shape[1:], generator=generator).to(x)
        probe = torch.cat([random, x, (x + PROBE * signs).clamp(0, 1)])
        there, expected = router(probe), probe.flatten(1) @ weight.T + bias
    spread, off = (there - there.mean(0)).abs().amax(), (there - expected).abs().amax()
    return (weight, bias, float(off)) if bool(off < 1e-3 * spread) else None


def reachable_affine(weight: Tensor, bias: Tensor, off: float, x: Tensor, threat: ThreatModel, k: int = 1) -> Tensor:
    """Which experts (B, E) a router can rank among its first k inside the ball ∩ [0, 1] around x, at most.

    It is affine but for `off`, by which each score may differ.

    Expert i is out where k others, each by itself, beat it at every point of the ball. A superset of what can really be
    reached, so that no expert is missed. L2: the ball alone.
    """
    flat, num_experts = x.flatten(1), len(bias)
    scores = flat @ weight.T + bias
    possible = torch.zeros(len(x), num_experts, num_experts, dtype=torch.bool, device=x.device)
    for i in range(num_experts):
        for other in range(num_experts):
            d = weight[i] - weight[other]
            if threat.norm == "Linf":
                gain = torch.where(d > 0, (1 - flat).clamp_max(threat.eps), flat.clamp_max(threat.eps)) @ d.abs()
            else:
                gain = threat.eps * d.norm()
            slack = (1e-5 * scores.abs().amax(1).clamp_min(1)).clamp_min(4 * off)
            possible[:, i, other] = scores[:, i] - scores[:, other] + gain >= -slack
    return (~possible).sum(2) < k


@dataclass
class Routes:
    """One router of a block's model, as attacks see it: of a dual, that of the branch that is named `R` or `S`."""

    search: Search
    branch: str = ""
    by_slopes: bool = False  # do not believe the router's own gradient

    @property
    def moe(self) -> Any:
        return routed_branches(self.search.block.model)[self.branch]

    @property
    def k(self) -> int:
        """K, 1 for a user's own class that does not say."""
        return int(getattr(self.moe, "num_selected_experts", 1))

    @cached_property
    def router(self) -> Callable[[Tensor], Tensor]:
        """From images (m, C, H, W) to scores (m, E); of a router that gives probabilities, their logarithms."""
        return logarithms(self.moe.router, self.search.block.x)

    @cached_property
    def scores(self) -> Callable[[Tensor], Tensor]:
        """The router with a gradient: its own, or one that stands in."""
        return (stand_in if self.by_slopes else differentiable)(self.router, self.search.block.x)

    @cached_property
    def affine(self) -> tuple[Tensor, Tensor, float] | None:
        """`affine_map` of the router."""
        return affine_map(self.router, self.search.block.x)

    def gap(self, scores: Tensor, experts: Tensor) -> Tensor:
        """By how much each row's expert (m,) is ahead of the K-th best other, (m,), from scores (m, E)."""
        own = torch.nn.functional.one_hot(experts, scores.shape[1]).bool()
        others = scores.masked_fill(own, -torch.inf)
        return scores[own] - others.topk(self.k, dim=1).values[:, -1]

    def logits(self, z: Tensor, said: Tensor) -> Tensor:
        """F's logits (m, C) if this branch said `said` (m, C)."""
        model: Any = self.search.block.model
        if not self.branch:
            return said
        return mixture(model, model.standard(z), said) if self.branch == "R" else mixture(model, said, model.robust(z))

    def of_expert(self, z: Tensor, experts: Tensor) -> Tensor:
        """F's logits (m, C) with each row sent to its own expert (m,); of several selected ones, as it is deployed.

        An MoE's are without the gate's weight, which changes no class of it; in a dual it does, by what it leaves to
        the other branch.
        """
        if self.k > 1:
            return self.search.block.model(z)
        outputs = dispatch(list(self.moe.experts), z, experts[:, None])
        if not self.branch or not isinstance(self.moe, MoE):
            return self.logits(z, outputs[:, 0])
        scores = self.scores(z)
        weights = scores.softmax(1) if self.moe.gate == "softmax" else torch.ones_like(scores)
        return self.logits(z, self.moe.mix(RoutingTrace(scores, weights, experts[:, None]), outputs))

    @cached_property
    def scale(self) -> Tensor:
        """The median gap between the two best scores of the clean images: what temperatures are relative to."""
        with torch.no_grad():
            gaps = self.scores(self.search.block.x).topk(2, dim=1).values.diff().abs()
        return gaps.median().clamp_min(1e-6)

    @cached_property
    def margins(self) -> Tensor:
        """The margin of each expert on the clean images, (B, E): the higher, the weaker."""
        block = self.search.block
        with torch.no_grad():
            every = [margin(self.logits(block.x, expert(block.x)), block.y) for expert in self.moe.experts]
        return torch.stack(every, 1)

    def aimed(self, experts: Tensor) -> Tensor:
        """From each image of the block, a step of ε up its expert's score over the mean of all: (B, C, H, W).

        For an affine router x + ε sign(W_i − mean W), where i is as far ahead as it gets.
        """
        block = self.search.block
        z = block.x.detach().requires_grad_()
        with torch.enable_grad():
            scores = self.scores(z)
            lead = scores.gather(1, experts[:, None])[:, 0] - scores.mean(1)
            (gradient,) = torch.autograd.grad(lead.sum(), z)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        return ascend_once(block.x, gradient, block.x, block.threat_model, block.threat_model.eps)

    @cached_property
    def reachable(self) -> Tensor:
        """Which experts (B, E) each image may be sent to: of an affine router at least all, of any other every one.

        Whether another router reaches an expert only the attack on it can tell, by its starts.
        """
        block = self.search.block
        if self.affine is None:
            return torch.ones(len(block.x), len(self.moe.experts), dtype=torch.bool, device=block.x.device)
        return reachable_affine(*self.affine, block.x, block.threat_model, self.k)


def mixture(dual: Any, standard: Tensor, robust: Tensor) -> Tensor:
    """A dual's logits (m, C) from its branches' logits; a user's own that does not show how it mixes: probabilities."""
    if hasattr(dual, "mix"):
        return dual.mix(standard, robust)
    alpha = float(dual.alpha)
    if getattr(dual, "combine", "probs") == "logits":
        return (1 - alpha) * standard + alpha * robust
    return ((1 - alpha) * standard.softmax(1) + alpha * robust.softmax(1)).clamp_min(1e-30).log()


def route_aware(routes: Routes, steps: int, starts: int, push: float, ahead: float) -> None:
    """Each reachable expert in turn, the weakest on the clean image first, from `starts` points.

    The loss is F's margin with the image sent to that expert, minus push · relu(ahead − its gap to the best other).
    The first start is a step of ε towards the expert, the others are uniform.
    """
    search, block = routes.search, routes.search.block
    order = routes.margins.argsort(1, descending=True)
    for turn in range(order.shape[1]):
        experts = order[:, turn]
        can = routes.reachable.gather(1, experts[:, None])[:, 0]

        def loss(z: Tensor, rows: Tensor, experts: Tensor = experts) -> Tensor:
            gap = routes.gap(routes.scores(z), experts[rows])
            return margin(routes.of_expert(z, experts[rows]), block.y[rows]) - push * (ahead - gap).relu()

        for number in range(starts):
            start = routes.aimed(experts) if number == 0 else search.uniform()
            rows = (search.standing & can).nonzero()[:, 0]
            search.climb(loss, start, halved(block.threat_model.eps, steps), rows)

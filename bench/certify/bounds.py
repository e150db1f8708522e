"""Class certificates by sound bounds: every point of the ball ∩ [0, 1] has the class that F gives to its centre.

Axes: B = images, E = experts, C = classes, j = another class than the certified y. z_i are expert i's logits, p_i its
probabilities, g_ij = p_iy − p_ij its probability margin, a_i the gate's weights. The derivations, each with its test,
are in docs/certificates.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.certify.base import Certifier, Claim, Examples
from bench.certify.composition import Network, check_composition, check_finite
from bench.certify.layers import NotSupported
from bench.certify.linear import Bounds
from bench.certify.rounding import Arithmetic
from bench.models.moe import MoE
from bench.models.parts import is_dual, is_moe, routed_branches
from bench.registry import CERTIFIERS
from bench.spec import ThreatModel

#: Where the constants of the paper's formula come from: the `reason` of its rows.
_CONSTANTS = (
    "no certificate: equation 8 of the soft reading, a = softmax(r); s and L_i = ¼ max Lip(z_ia − z_ib) are from bounds"
    " of the router's and the experts' derivatives over this ball, and the competitor's constant is missing"
)


class NotApplicable(Exception):
    """A model that the method has no certificate for; the message names it."""


@dataclass(frozen=True)
class Margins:
    """What one network's logits can do over the region.

    logits: at most min over the region of z_y − z_j, (B, C), inf at y, less both rounding margins. rounding: the margin
    of each logit, (B, C).
    """

    bounds: Bounds
    logits: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, experts: int = 1) -> "Margins":
        """Of one of so many experts; NotSupported where the network is not known, or is not what was read of it."""
        bounds, rounding = _bounded(network, x, threat, experts)
        eye = torch.eye(size_of(bounds), dtype=torch.double)
        y = y.cpu()
        least = bounds.least(eye[y][:, None, :] - eye) - rounding.gather(1, y[:, None]) - rounding
        return cls(bounds, least.scatter(1, y[:, None], torch.inf), rounding)

    def probabilities(self, scale: Tensor | float = 1.0) -> Tensor:
        """At most min over the region of p_y − p_j (B, C), of the softmax of `scale` (B, 1) in (0, 1] times the logits.

        With m_j ≥ L_j: p_y ≥ 1 / (1 + Σ exp(−L_k)) and p_j / p_y ≤ exp(−L_j); where L_j < 0, p_y − p_j ≥ tanh(L_j / 2).
        A margin that can be negative is at its worst where the scale is 1.
        """
        least = torch.where(self.logits < 0, 1.0, scale) * self.logits
        own = 1 / (1 + (-least).exp().sum(1, keepdim=True))
        return torch.where(least >= 0, own * -torch.expm1(-least), (least / 2).tanh())

    def lipschitz(self) -> Tensor:
        """At least max_{a,b} of the Lipschitz constant of z_a − z_b over the region, (B,)."""
        return self.bounds.lipschitz(pairs(size_of(self.bounds))).amax(1)


def _bounded(module: nn.Module, x: Tensor, threat: ThreatModel, experts: int = 1) -> tuple[Bounds, Tensor]:
    """A network's bounds, and the rounding margin of each of its outputs (B, C) in the region."""
    network = Network.of(module, x, experts)
    bounds = Bounds(network.layers, x, threat)
    region = bounds.region
    return bounds, network.margins(torch.maximum(region.low.abs(), region.high.abs()))


def size_of(bounds: Bounds) -> int:
    """The number of a network's outputs."""
    return bounds.outputs.low.shape[1]


def pairs(count: int) -> Tensor:
    """All e_a − e_b with a ≤ b, (1, S, count): 0 is among them, so that a single output has one as well."""
    eye = torch.eye(count, dtype=torch.double)
    a, b = torch.triu_indices(count, count)
    return (eye[a] - eye[b])[None]


@dataclass(frozen=True)
class Router:
    """What a router's scores can do over the region.

    lead: at most min over the region of r_i − r_k, (B, i, k), less both rounding margins. lipschitz: at least
    s = max_{i,k} of the Lipschitz constant of r_i − r_k, (B,). scores: at the centre, (B, E). rounding: the margin of
    each score, (B, E).
    """

    lead: Tensor
    lipschitz: Tensor
    scores: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, moe: MoE, x: Tensor, threat: ThreatModel) -> "Router":
        """NotSupported where there is not one score for each expert."""
        bounds, rounding = _bounded(moe.router, x, threat)
        count = size_of(bounds)
        if count != len(moe.experts):
            raise NotSupported(f"a router that gives {count} scores for {len(moe.experts)} experts")
        eye = torch.eye(count, dtype=torch.double)
        every = (eye[:, None] - eye[None]).flatten(0, 1)[None]
        lead = bounds.least(every).view(len(x), count, count) - rounding[:, :, None] - rounding[:, None]
        scores = moe.router(x.clone()).double().cpu()
        return cls(lead, bounds.lipschitz(pairs(count)).amax(1), scores, rounding)

    @property
    def reachable(self) -> Tensor:
        """S(ε) at most (B, E): not those that another one leads everywhere."""
        return ~(self.lead > 0).any(1)

    @property
    def top_weights(self) -> Tensor:
        """At most min of the gate's probability of expert i (B, E), where i has the highest score."""
        others = ~torch.eye(self.lead.shape[1], dtype=torch.bool)
        return 1 / (1 + ((-self.lead.clamp_min(0)).exp() * others).sum(2))

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The least and the most that the softmax gate's probability of expert i can be, (B, E) each."""
        others = ~torch.eye(self.lead.shape[1], dtype=torch.bool)
        behind = (-self.lead).exp() * others  # at least exp(r_k − r_i)
        ahead = self.lead.transpose(1, 2).exp() * others  # at most that
        return 1 / (1 + behind.sum(2)), 1 / (1 + ahead.sum(2))


def least_mixture(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The minimum (B, C) of Σ a_i v_ij over a in the simplex with low_i ≤ a_i ≤ high_i: values (B, E, C), (B, E) twice.

    The least values get as much weight as there is.
    """
    order = values.argsort(1)
    value = values.gather(1, order)
    room = (high - low)[:, :, None].expand_as(values).gather(1, order)
    free = (1 - low.sum(1))[:, None, None]
    before = room.cumsum(1) - room
    return (
        (low[:, :, None].expand_as(values).gather(1, order) + (free - before).clamp_min(0).minimum(room)) * value
    ).sum(1)


def soft_radius(gap: Tensor, lipschitz: Tensor, alpha: float = 1.0) -> Tensor:
    """min_j (α G_j + α − 1) / (α D) (B,), at least 0, of gaps G_j (B, C) and the constant D (B,) of each of them.

    α = 1: an MoE alone. G_j is inf where j is the certified class.
    """
    return ((alpha * gap.amin(1) + alpha - 1) / (alpha * lipschitz)).clamp_min(0)


@CERTIFIERS.register("bounds")
class ClassBounds(Certifier):
    """Interval and linear bounds of every expert, combined over the routes that the ball allows."""

    version: ClassVar[int] = 3
    first: ClassVar[str] = "network"

    def claims(self, block: Examples) -> list[Claim]:
        try:
            return list(self._claims(block))
        except NotSupported as layer:
            inside = f", with the gates {', '.join(block.gates)}" if block.gates else ""
            return [Claim.nothing(block, self.first, "not_supported", f"{layer}{inside}")]
        except NotApplicable as reason:
            return [Claim.nothing(block, self.first, "not_applicable", str(reason))]

    def _claims(self, block: Examples) -> Sequence[Claim]:
        model, alpha = block.model, 1.0
        if is_dual(model):
            model, alpha = _robust_branch(model, block.x)
        threshold = (1 - alpha) / alpha if alpha > 0 else torch.inf
        threshold += self._of_probabilities(block) * (block.model is not model)
        if not is_moe(model):
            margins = self._margins(block, model)
            # of a dual, R's probability margin has to outweigh S
            least = margins.logits if block.model is model else margins.probabilities()
            return [self._claim(block, "network", (least > threshold * (block.model is not model)).all(1))]
        moe: Any = model
        check_composition(moe, block.x)
        if moe.num_selected_experts == 1:
            return self._top1(block, moe, threshold if block.model is not moe else None, alpha)
        if moe.num_selected_experts == len(moe.experts) and moe.combine == "probs":
            return self._soft(block, moe, threshold, alpha)
        raise NotApplicable(
            f"{moe.num_selected_experts} of {len(moe.experts)} experts, combine={moe.combine}: there is a"
            " certificate for top-1, and for all experts with combine=probs"
        )

    def _top1(self, block: Examples, moe: MoE, threshold: float | None, alpha: float) -> Sequence[Claim]:
        router = Router.of(moe, block.x, block.threat_model)
        every = [self._margins(block, expert, len(moe.experts)) for expert in moe.experts]
        if threshold is None:  # a positive weight changes no class
            fine = torch.stack([(margins.logits > 0).all(1) for margins in every], 1)
        else:
            scale = torch.ones_like(router.scores)
            if moe.gate == "softmax":
                scale = router.top_weights - self._of_probabilities(block)
            least = [margins.probabilities(scale[:, [i]]) for i, margins in enumerate(every)]
            fine = torch.stack([(margin > threshold).all(1) for margin in least], 1)
        reachable = router.reachable
        union, stable = (fine | ~reachable).all(1), reachable.sum(1) == 1
        return [
            self._claim(block, "union", union, reachable),
            self._claim(block, "route-stable", union & stable, reachable),
            self._paper(block, moe, every, router, alpha),
        ]

    def _soft(self, block: Examples, moe: MoE, threshold: float, alpha: float) -> Sequence[Claim]:
        router = Router.of(moe, block.x, block.threat_model)
        every = [self._margins(block, expert, len(moe.experts)) for expert in moe.experts]
        values = torch.stack([margins.probabilities() for margins in every], 1)
        weights = router.scores.softmax(1)
        if moe.gate == "argmax":
            weights = torch.full_like(weights, 1 / weights.shape[1])
        gap = _gap(block, moe, weights)
        bend = torch.stack([margins.lipschitz() for margins in every], 1) / 2
        if moe.gate == "softmax":
            low, high = router.weights
            steep = router.lipschitz / 2 + (weights * bend).sum(1)
        else:
            low = high = weights
            steep = (weights * bend).sum(1)
        own = torch.nn.functional.one_hot(block.predicted.clamp_min(0), gap.shape[1]).bool()
        direct = least_mixture(values.masked_fill(own[:, None], 1.0), low, high)
        # scores and logits that are off by their margins move G by no more than that; here and at the other point
        off = router.rounding.amax(1) + torch.stack([margins.rounding.amax(1) for margins in every]).amax(0)
        along = gap - 2 * off[:, None] - block.threat_model.reach * steep[:, None]
        least = (torch.maximum(direct, along) - self._of_probabilities(block)).masked_fill(own, torch.inf)
        return [
            self._claim(block, "soft", (least > threshold).all(1)),
            self._paper(block, moe, every, router, alpha),
        ]

    def _paper(self, block: Examples, moe: MoE, every: Sequence[Margins], router: Router, alpha: float) -> Claim:
        """The paper's equation 8, with p_iy's constant alone, of the experts' soft mixture: no certificate.

        |∇p_y| ≤ ¼ max_{a,b} Lip(z_a − z_b), half of what bounds p_y − p_j. The constants hold over the block's ball.
        """
        weights = router.scores.softmax(1)  # the paper's gate, whatever the model's own
        gap = _gap(block, moe, weights)
        slope = torch.stack([margins.lipschitz() for margins in every], 1) / 4
        radius = soft_radius(gap, router.lipschitz / 2 + (weights * slope).sum(1), alpha)
        nothing = torch.zeros_like(radius, dtype=torch.bool)
        return Claim.of(block, "paper-formula", nothing, radius, reason=_CONSTANTS)

    def _margins(self, block: Examples, network: nn.Module, experts: int = 1) -> Margins:
        return Margins.of(network, block.x, block.predicted.clamp_min(0), block.threat_model, experts)

    def _of_probabilities(self, block: Examples) -> float:
        """The rounding margin of F's probabilities."""
        experts = max((len(moe.experts) for moe in routed_branches(block.model).values()), default=1)
        return Arithmetic.used(block.model, block.x).of_probabilities(block.num_classes, experts)

    def _claim(self, block: Examples, method: str, certified: Tensor, reachable: Tensor | None = None) -> Claim:
        sizes = None if reachable is None else reachable.sum(1)
        return Claim.of(block, method, certified, certified.double() * block.threat_model.eps, sizes)


def _robust_branch(dual: Any, x: Tensor) -> tuple[Any, float]:
    """R and α of a dual that mixes probabilities; NotSupported unless S's are probabilities everywhere."""
    check_composition(dual, x)
    if dual.combine != "probs":
        raise NotApplicable("a dual that mixes logits: S's logits are not bounded by R's")
    check_finite(dual.standard, x)
    return dual.robust, float(dual.alpha)


def _gap(block: Examples, moe: MoE, weights: Tensor) -> Tensor:
    """G_j = Σ a_i g_ij at the centre (B, C), inf at y, of the weights a (B, E) of all experts."""
    y = block.predicted.clamp_min(0)
    p = torch.stack([expert(block.x.clone()).double().cpu().softmax(1) for expert in moe.experts], 1)
    mean = (weights[:, :, None] * p).sum(1)
    return (mean.gather(1, y[:, None]) - mean).scatter(1, y[:, None], torch.inf)

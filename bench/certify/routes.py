"""Route certificates: the ball inside which the router of an MoE sends an image to the same expert.

Axes: B = images, E = experts, D = pixels. The router is r(x) = W x + b, in pixels of [0, 1] and double precision.
"""

from typing import ClassVar

import torch
from scipy.optimize import linprog
from torch import Tensor

from bench.certify.base import CERTIFIERS, Block, Certifier, Claim
from bench.certify.layers import NotSupported, affine_map
from bench.parts import routed_branch
from bench.registry import UnusableInput
from bench.spec import Norm, ThreatModel

#: Of the magnitude of a score's terms, how far a float32 router may be from the exact one, and the double one from it:
#: above γ_n = n·2⁻²⁴ for the ~100 additions in a row that a blocked dot product of 3,072 terms has.
SLACK = 1e-5
#: Several ε for the share of stable routes and for |S(ε)|, as fractions of the run's own.
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
#: Newton steps of `distance`; each iterate is a sound lower bound, so a cap costs tightness alone.
_STEPS = 100
#: Images whose distances are computed together, so that they stay in the processor's cache.
_CHUNK = 256


def distance(d: Tensor, gap: Tensor, x: Tensor, norm: Norm, box: bool) -> Tensor:
    """The least ‖δ‖ (B,) with d·δ ≥ gap: d (D,), gap (B,), x (B, D) in [0, 1]; inf where there is no such δ.

    With `box`, x + δ stays in [0, 1]. Then δ_j = sign(d_j) min(t s_j, room_j), with s = 1 (Linf) or |d| (L2); d·δ is
    concave, increasing and piecewise linear in t: Newton's method from 0 never oversteps the root, and ends in it once
    it is on the root's piece. UnusableInput for another norm.
    """
    if norm not in ("Linf", "L2"):
        raise UnusableInput(f"the distance to a routing boundary is known for Linf and L2, not for {norm}")
    size = d.abs()
    slope = torch.ones_like(d) if norm == "Linf" else size
    if not box:
        dual = size.sum() if norm == "Linf" else size.norm()
        return torch.where(gap > 0, gap / dual, 0.0)  # d = 0: gap / 0 = inf
    found = torch.where(gap > 0, torch.inf, 0.0).to(gap)
    rows = (gap > 0).nonzero()[:, 0]
    room, gap = torch.where(d > 0, 1 - x[rows], x[rows]), gap[rows]
    t = torch.zeros_like(gap)
    for _ in range(_STEPS):
        step = t[:, None] * slope
        missing = gap - torch.minimum(step, room) @ size
        rate = (step < room).to(d) @ (size * slope)
        moving = (missing > 1e-12 * gap) & (rate > 0)
        ended = ~moving & ((missing <= 1e-12 * gap) | (rate > 0))
        found[rows[ended]] = t[ended] if norm == "Linf" else torch.minimum(step, room)[ended].norm(dim=1)
        rows, room, gap = rows[moving], room[moving], gap[moving]
        t = t[moving] + missing[moving] / rate[moving]
        if not len(rows):
            return found
    found[rows] = t if norm == "Linf" else torch.minimum(t[:, None] * slope, room).norm(dim=1)
    return found


def pair_distances(weight: Tensor, bias: Tensor, x: Tensor, norm: Norm, box: bool = True) -> Tensor:
    """How near (B, i, k) expert i gets at least as high a score as k, rounded down: weight (E, D), bias (E,), x (B, D).

    Ties count as reached, and so does what is within the rounding of a float32 router.
    """
    count = len(bias)
    terms = SLACK * (weight.abs().sum(1) + bias.abs())
    found = torch.zeros(len(x), count, count, dtype=torch.double)
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = x[rows] @ weight.T + bias
        for i in range(count):
            for k in range(count):
                if i != k:
                    gap = (scores[:, k] - scores[:, i] - terms[i] - terms[k]).clamp_min(0)
                    found[rows, i, k] = distance(weight[i] - weight[k], gap, x[rows], norm, box)
    return found


def route_radius(distances: Tensor, top: Tensor) -> Tensor:
    """Inside which radius (B,), strictly, expert `top` (B,) keeps the highest score; distances (B, E, E).

    inf where no image can be sent elsewhere.
    """
    away = distances.gather(2, top[:, None, None].expand(-1, distances.shape[1], 1))[:, :, 0]
    return away.scatter(1, top[:, None], torch.inf).amin(1)


def reachable(distances: Tensor, eps: float) -> Tensor:
    """S(ε) (B, E) at most: the experts that beat each single other one somewhere in the ball; distances (B, E, E)."""
    return distances.amax(2) <= eps


def reachable_exactly(weight: Tensor, bias: Tensor, x: Tensor, eps: float, candidates: Tensor) -> Tensor:
    """S(ε) (B, E) in Linf and the box, by a linear program for each of the candidates (B, E).

    Expert i is reachable where some x + δ has r_i ≥ r_k for all k at once; what the program cannot decide stays in.
    """
    found = candidates.clone()
    terms = SLACK * (weight.abs().sum(1) + bias.abs())
    for row, i in candidates.nonzero().tolist():
        others = [k for k in range(len(bias)) if k != i]
        # maximise t: (W_k − W_i) z + t ≤ b_i − b_k + rounding, over the z of the ball ∩ box
        matrix = torch.cat([weight[others] - weight[i], torch.ones(len(others), 1).double()], 1)
        limits = bias[i] - bias[others] + terms[i] + terms[others]
        low, high = (x[row] - eps).clamp_min(0), (x[row] + eps).clamp_max(1)
        bounds = [*zip(low.tolist(), high.tolist(), strict=True), (None, 0.0)]
        cost = [0.0] * x.shape[1] + [-1.0]
        solved = linprog(cost, A_ub=matrix.numpy(), b_ub=limits.numpy(), bounds=bounds, method="highs")
        if solved.status == 0 and -float(solved.fun or 0) < -1e-7 * float(terms.max()) / SLACK:
            found[row, i] = False
    return found


@CERTIFIERS.register("routes")
class Routes(Certifier):
    """Of an affine router, the radius inside which the top-1 route stays, and the experts that can be reached.

    `exact`: S(ε) by a linear program as well (Linf), which takes minutes where images are large.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    exact: bool = False

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        super().check(name, dataset, threat_model)
        if self.exact and threat_model.norm != "Linf":
            raise UnusableInput(f"--set exact=true is a linear program in Linf, not in {threat_model.norm}: drop it")

    def certify(self, block: Block) -> list[Claim]:
        moe = routed_branch(block.model)
        if moe is None:
            return [Claim.nothing(block, "routes", "not_applicable", "no router to be seen")]
        try:
            weight, bias = affine_map(moe.router, block.x.shape[1:])
        except NotSupported as layer:
            return [Claim.nothing(block, "routes", "not_supported", str(layer))]
        x, threat = block.x.cpu().double().flatten(1), block.threat_model
        top = moe.router(block.x).argmax(1).cpu()
        claims = []
        for method, box in (("routes", True), ("routes-ball", False)):
            distances = pair_distances(weight, bias, x, threat.norm, box)
            radius = route_radius(distances, top)
            for fraction in FRACTIONS:
                ball = ThreatModel(norm=threat.norm, eps=fraction * threat.eps)
                sizes = reachable(distances, ball.reach).sum(1)
                claims.append(Claim.of(block, method, radius > ball.reach, radius, sizes, ball.eps, top))
        if self.exact:
            found = reachable_exactly(
                weight, bias, x, threat.reach, reachable(pair_distances(weight, bias, x, "Linf"), threat.reach)
            )
            alone = found.sum(1) == 1
            claims.append(Claim.of(block, "routes-lp", alone, alone.double() * threat.eps, found.sum(1), predicted=top))
        return claims

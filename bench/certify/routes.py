"""Route certificates: the ball inside which the router of an MoE sends an image to the same expert.

Axes: B = images, E = experts, D = pixels. The router is r(x) = W x + b, in pixels of [0, 1] and double precision.
"""

from typing import Any, ClassVar

import torch
from scipy.optimize import linprog
from torch import Tensor

from bench.certify.base import Certifier, Claim, Examples
from bench.certify.composition import Network, check_composition
from bench.certify.layers import Affine, NotSupported, affine_map
from bench.certify.rounding import Arithmetic, margins
from bench.errors import UnusableInput
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.parts import routed_branch
from bench.registry import CERTIFIERS
from bench.spec import Norm, ThreatModel

#: Several ε for the share of stable routes and for |S(ε)|, as fractions of the run's own.
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
#: Newton steps of `distance`; each iterate is a sound lower bound, so a cap costs tightness alone.
_STEPS = 100
#: Images whose distances are computed together, so that they stay in the processor's cache.
_CHUNK = 256


def distance(d: Tensor, gap: Tensor, x: Tensor, norm: Norm, box: bool, rising: float = 0.0) -> Tensor:
    """The least ‖δ‖ (B,) with d·δ ≥ gap: d (D,), gap (B,), x (B, D) in [0, 1]; inf where there is no such δ.

    Without the box pixels are as large as the step makes them, and so is their rounding: the gap falls by `rising` for
    each unit of ‖δ‖. With `box`, x + δ stays in [0, 1]. Then δ_j = sign(d_j) min(t s_j, room_j), with s = 1 (Linf) or
    |d| (L2); d·δ is concave, increasing and piecewise linear in t: Newton's method from 0 never oversteps the root, and
    ends in it once it is on the root's piece. UnusableInput for another norm.
    """
    if norm not in ("Linf", "L2"):
        raise UnusableInput(f"the distance to a routing boundary is known for Linf and L2, not for {norm}")
    size = d.abs()
    slope = torch.ones_like(d) if norm == "Linf" else size
    if not box:
        dual = size.sum() if norm == "Linf" else size.norm()
        return torch.where(gap > 0, gap / (dual + rising), 0.0)  # d = 0: gap / 0 = inf
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


def rounding(weight: Tensor, bias: Tensor) -> Tensor:
    """The rounding margin of each score (E,) of a float32 router that computes W x + b in one step."""
    step = Affine(lambda x: x @ weight.T + bias, lambda x: x @ weight.abs().T, weight.shape[1] + 2)
    return margins([step], torch.ones_like(weight[:1]), Arithmetic.of())[0]


def pair_distances(
    weight: Tensor, bias: Tensor, x: Tensor, norm: Norm, box: bool = True, margin: Tensor | None = None
) -> Tensor:
    """How near (B, i, k) expert i gets at least as high a score as k, rounded down: weight (E, D), bias (E,), x (B, D).

    Ties count as reached, and so does what is within the rounding of a float32 router: `margin` (E,), which is
    `rounding` unless it is given.
    """
    count = len(bias)
    margin = rounding(weight, bias) if margin is None else margin
    found = torch.zeros(len(x), count, count, dtype=torch.double)
    for start in range(0, len(x), _CHUNK):
        rows = slice(start, start + _CHUNK)
        scores = x[rows] @ weight.T + bias
        for i in range(count):
            for k in range(count):
                if i != k:
                    both = float(margin[i] + margin[k])
                    gap = (scores[:, k] - scores[:, i] - both).clamp_min(0)
                    found[rows, i, k] = distance(weight[i] - weight[k], gap, x[rows], norm, box, both)
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


def reachable_exactly(
    weight: Tensor, bias: Tensor, x: Tensor, eps: float, candidates: Tensor, margin: Tensor | None = None
) -> Tensor:
    """S(ε) (B, E) in Linf and the box, by a linear program for each of the candidates (B, E).

    Expert i is reachable where some x + δ has r_i ≥ r_k for all k at once; what the program cannot decide stays in. The
    solver is not believed: its multipliers are a proof, which is checked here.
    """
    found = candidates.clone()
    margin = rounding(weight, bias) if margin is None else margin
    size = weight.abs().amax().clamp_min(torch.finfo(torch.double).tiny)  # a solver's tolerances are absolute
    weight, bias, margin = weight / size, bias / size, margin / size
    for row, i in candidates.nonzero().tolist():
        others = [k for k in range(len(bias)) if k != i]
        # maximise t: (W_k − W_i) z + t ≤ b_i − b_k + rounding, over the z of the ball ∩ box
        behind = weight[others] - weight[i]
        limits = bias[i] - bias[others] + margin[i] + margin[others]
        low, high = (x[row] - eps).clamp_min(0), (x[row] + eps).clamp_max(1)
        bounds = [*zip(low.tolist(), high.tolist(), strict=True), (None, 0.0)]
        cost = [0.0] * x.shape[1] + [-1.0]
        matrix = torch.cat([behind, torch.ones(len(others), 1).double()], 1)
        if not (matrix.isfinite().all() and limits.isfinite().all()):
            continue
        solved = linprog(cost, A_ub=matrix.numpy(), b_ub=limits.numpy(), bounds=bounds, method="highs")
        if solved.status == 0:
            # whoever obeys all limits obeys their sum, whatever the weights: does any z of the ball ∩ box?
            share = torch.from_numpy(-solved.ineqlin.marginals).clamp_min(0)
            line = share @ behind
            found[row, i] = not bool(line.clamp_min(0) @ low + line.clamp_max(0) @ high > share @ limits)
    return found


@CERTIFIERS.register("routes")
class Routes(Certifier):
    """Of an affine router, the radius inside which the top-1 route stays, and the experts that can be reached.

    `exact`: S(ε) by a linear program as well (Linf), which takes minutes where images are large.
    """

    version: ClassVar[int] = 3
    first: ClassVar[str] = "routes"
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    exact: bool = False

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        super().check(name, dataset, threat_model)
        if self.exact and threat_model.norm != "Linf":
            raise UnusableInput(f"--set exact=true is a linear program in Linf, not in {threat_model.norm}: drop it")

    def claims(self, block: Examples) -> list[Claim]:
        moe = routed_branch(block.model)
        if moe is None:
            return [Claim.nothing(block, self.first, "not_applicable", "no router to be seen, or one expert")]
        try:
            return self._claims(block, moe)
        except NotSupported as reason:
            return [Claim.nothing(block, self.first, "not_supported", str(reason))]

    def _claims(self, block: Examples, moe: Any) -> list[Claim]:
        weight, bias = affine_map(moe.router, block.x.shape[1:])
        margin = Network.of(moe.router, block.x).margins(torch.ones_like(block.x[:1], dtype=torch.double))[0]
        if len(bias) != len(moe.experts):
            raise NotSupported(f"a router that gives {len(bias)} scores for {len(moe.experts)} experts")
        x, threat = block.x.cpu().double().flatten(1), block.threat_model
        top = moe.router(block.x.clone()).argmax(1).cpu()
        reason = _assumed(block, moe, top)
        claims = []
        for method, box in (("routes", True), ("routes-ball", False)):
            distances = pair_distances(weight, bias, x, threat.norm, box, margin)
            radius = route_radius(distances, top)
            for fraction in FRACTIONS:
                ball = ThreatModel(norm=threat.norm, eps=fraction * threat.eps)
                sizes = reachable(distances, ball.reach).sum(1)
                claims.append(Claim.of(block, method, radius > ball.reach, radius, sizes, ball.eps, top, reason))
        if self.exact:
            pairs = pair_distances(weight, bias, x, "Linf", margin=margin)
            found = reachable_exactly(weight, bias, x, threat.reach, reachable(pairs, threat.reach), margin)
            alone = (found.sum(1) == 1) & found.gather(1, top[:, None])[:, 0]
            radius = alone.double() * threat.eps
            claims.append(Claim.of(block, "routes-lp", alone, radius, found.sum(1), predicted=top, reason=reason))
        return claims


def _assumed(block: Examples, moe: Any, top: Tensor) -> str:
    """What is taken for granted of classes that are not ours, `top` (B,) being the router's choice; "" of our own.

    NotSupported where an MoE's own trace of these images disagrees, or there is none.
    """
    found = []
    if moe is not block.model:
        if type(block.model) is DualModel:
            check_composition(block.model, block.x)
        else:
            dual: Any = block.model
            if callable(getattr(dual, "trace", None)) and not _agrees(dual, block, top):
                raise NotSupported(f"{type(dual).__name__}, which does not route as its R does")
            found.append(f"{type(dual).__name__} is assumed to give R the image as it is")
    if type(moe) is MoE:
        check_composition(moe, block.x)
    else:
        name = type(moe).__name__
        if not callable(getattr(moe, "trace", None)):
            raise NotSupported(f"{name}, which has no `trace` that shows how it routes")
        if not _agrees(moe, block, top):
            raise NotSupported(f"{name}, which does not route to the highest score")
        found.append(f"{name} is assumed to route to the highest score everywhere, as it does here")
    return "; ".join(found)


def _agrees(model: Any, block: Examples, top: Tensor) -> bool:
    """Whether the model's trace of the block's images selects `top` (B,) first."""
    return bool((model.trace(block.x.clone())[1].selected_experts[:, 0].cpu() == top).all())

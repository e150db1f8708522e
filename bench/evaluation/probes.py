"""What a model shows of itself before it is attacked: signs that an attack on it may find less than there is.

Each is found on a few images of the run's first block, whatever the suite, and becomes a flag of the model's row. After
Athalye, Carlini, Wagner (ICML 2018) and Carlini et al. ("On Evaluating Adversarial Robustness", 2019); what is about
routers is ours: no published check looks whether the router's gradient is missing while the experts' is there.
Axes: B = probed images, C = classes, E = experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.attacks.block import Block, PassCounter
from bench.attacks.deployed import OPENED, deployed, stand_ins
from bench.attacks.gradients import differentiable, has_gradient
from bench.attacks.grid import on_grid
from bench.attacks.influence import PARTS, UNITS, least_used
from bench.attacks.search import RAISED, TRIED, Search, margin, raised
from bench.models.dependence import spread
from bench.models.exchanges import are_probabilities
from bench.models.foreign import Guarded, bare
from bench.models.moe import MoE
from bench.models.parts import is_dual, parts, routed_branches
from bench.models.sites import Site, intercepted, sites
from bench.pgd import ascend_once, default_step_size, pgd, random_start
from bench.results.flags import ROUTES_INSIDE
from bench.spec import NO_GRADIENT, ThreatModel

#: How many images are looked at.
PROBED = 32
#: The largest share of how far logits lie apart that rounding may take.
COARSE = 0.01
#: Steps of the probes' own PGD.
STEPS = 40
#: Of PGD on what is deployed, beside what opens parts that are off; and of Square on the grid of pixel values.
_RESTARTS, QUERIES = 5, 400
#: The balls in which PGD's success must grow, in ε; the last one holds every image.
_TIMES = (1, 2, 4)


def probe(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, attacked: bool) -> list[str]:
    """The flags of a model in eval mode with frozen parameters, from images x (B, C, H, W) that it gets right.

    `attacked`: whether the suite attacks at all; what takes an attack of its own is left out otherwise. Draws from
    torch's global random numbers. A probe that the model makes fail is a flag, too.
    """
    probes = {"outputs": _outputs(model, x), "router gradient": _router_gradients(model, x, y)}
    if attacked and threat.norm != "L1":  # the probes' own PGD has no L1 ball
        probes |= {"gradients": _gradients(model, x, y, threat), "what is off": _opens(model, x, y, threat)}
        probes |= {"routes": _routes(model, x, threat), "growth": _growth(model, x, y, threat)}
    flags = []
    for name, found in probes.items():
        try:
            flags += list(found)
        except Exception as error:  # a user's model may fail in any way: what the other probes find is kept
            flags.append(f"probe of {name} failed: {type(error).__name__}")
    return flags


def passes(model: nn.Module) -> int:
    """About how many forward and backward passes an image that is probed takes, where a suite attacks; a forward pass
    alone is a third."""
    found = (len(_TIMES) + 1) * STEPS  # `_growth`
    if isinstance(model, Guarded) and not sites(model) and not parts(model):  # `_opens`
        found += (_RESTARTS + 3) * STEPS + (4 + 2 * (PARTS + UNITS)) * (STEPS // OPENED) + QUERIES // 3
    return found


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Iterator[str]:
    logits = model(x)
    if are_probabilities(logits):
        yield "outputs are probabilities"
    rounded, apart = torch.finfo(torch.float32).eps * float(logits.amax(1).abs().median()), spread(logits)
    if rounded > COARSE * apart:
        yield f"logits so far from 0 that float32 rounds them by {rounded / apart:.0%} of what they lie apart"


def _gradients(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Iterator[str]:
    """Whether gradients are finite, and a small step along them brings images nearer to wrong, with known gates held.

    Hidden routes, rounding and saturation keep them from that.
    """
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        lead = margin(model(z), y).sum()
        gradient = torch.autograd.grad(lead, z, allow_unused=True)[0] if lead.requires_grad else None
    if gradient is not None and (infinite := (~gradient.isfinite()).flatten(1).any(1)).any():
        yield f"gradients not finite at pixels of {infinite.float().mean():.0%} of images"
    inside = sites(model)
    if (share := raised(_held(model, inside, x) if inside else model, x, y, threat)) < RAISED:
        step = f"a step of ε/{1 / TRIED:.0f} along them"
        yield f"gradients do not lower the margin: {step} does for {share:.0%} of images"


def _held(model: nn.Module, inside: Sequence[Site], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model for as many images as x, each with the scores that its own of x has at the gates."""
    kept: dict[str, list[Tensor]] = {site.name: [] for site in inside}

    def note(name: str, scores: Tensor) -> Tensor:
        kept[name].append(scores.detach().clone())
        return scores

    def in_turn(own: Iterator[Tensor], scores: Tensor) -> Tensor:
        return next(own, scores)

    def held(z: Tensor) -> Tensor:
        with ExitStack() as stack:
            for site in inside:
                stack.enter_context(intercepted(site, partial(in_turn, iter(kept[site.name]))))
            logits: Tensor = model(z)
        return logits

    with ExitStack() as stack, torch.no_grad():
        for site in inside:
            stack.enter_context(intercepted(site, partial(note, site.name)))
        model(x)
    return held


def _opens(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Iterator[str]:
    """Of a user's own model without routes that can be seen: whether parts that no image uses open within the ball.

    Then stand-ins for gradients, and what raises the influence of a part, break images that the model's own gradients
    leave, at about the same cost. Suite `adaptive` follows them to the end.
    """
    if not isinstance(model, Guarded) or sites(model) or parts(model):
        return
    left = []
    with PassCounter(model) as passes, torch.no_grad():
        num_classes = model(x[:1]).shape[1]
        for opening in (False, True):
            block = Block(model, x.clone(), y, torch.ones_like(y, dtype=torch.bool), num_classes, "", threat, 0, passes)
            search = Search(block)
            if opening:
                stand_ins(search, 1, STEPS)
                least_used(search, STEPS)
                on_grid(search, 1, STEPS, QUERIES)
            else:
                deployed(search, _RESTARTS, STEPS)
            search.confirm(torch.arange(len(x), device=x.device))
            left.append(search.unbroken)
    more = int((left[0] & ~left[1]).sum())
    if more > max(2, len(x) / 10):
        opens = f"{ROUTES_INSIDE}parts that are off open within the ball, and"
        what = "stand-ins for its gradients" if NO_GRADIENT in model.seen else opens
        yield f"{what} break {more} of {len(x)} images more"


@dataclass(frozen=True)
class _Routed:
    """An MoE that a model shows; `scores`: images (B, …) → (B, E), which its router gives alone or in a tuple."""

    router: Any
    num_experts: int

    def pick(self, output: Any) -> Tensor | None:
        """The scores in the router's output; None where there are none, as where it gives chosen indices."""
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, Tensor) and part.is_floating_point() and part.shape[1:] == (self.num_experts,):
                return part
        return None

    def scores(self, x: Tensor) -> Tensor:
        found = self.pick(self.router(x))
        assert found is not None  # it gave some before
        return found


def _means_all(moe: object) -> bool:
    """Whether it is the mean of all its experts (`@ensemble`), whose router decides nothing."""
    return isinstance(moe, MoE) and moe.gate == "argmax" and moe.num_selected_experts == len(moe.experts)


def _routed(model: object, x: Tensor) -> dict[str, _Routed]:
    """The MoEs that a model shows, by what their flags begin with; S only where something of it is in F.

    One whose router gives no scores is left out: it is a hidden route unless its gate is named, and said as such.
    """
    branches = routed_branches(model)
    if is_dual(model) and float(model.alpha) == 1:
        branches.pop("S", None)
    with torch.no_grad():
        found = {name: _Routed(moe.router, len(moe.experts)) for name, moe in branches.items() if not _means_all(moe)}
        scored = {name: moe for name, moe in found.items() if moe.pick(moe.router(x[:1])) is not None}
    return {f"{name}: " if name else "": scored[name] for name in sorted(scored, reverse=True)}


def _router_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """Whether the loss's gradient reaches the routers' scores: AutoAttack looks at the pixels' alone."""
    yield from _gate_gradients(model, x, y)
    for name, moe in _routed(model, x).items():
        gradients = _gradient_at(moe, model, x, y)
        if gradients is None:
            yield f"{name}router gradient cannot be seen"
        elif not gradients.isfinite().all():
            yield f"{name}router gradient not finite"
        elif (zero := (gradients == 0).all(1).float().mean()) > 0:
            yield f"{name}router gradient zero on {zero:.0%} of images"
        if not has_gradient(moe.scores, x):
            yield f"{name}router has no gradient by the pixels"


def _gate_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[str]:
    """The same of gates inside a network, in one flag: the share of images at the gate that lacks most gradients.

    A gate that chooses itself may weigh by other numbers than it chooses by (DeepSeek-V3's have a bias for the choice
    alone): then what it gives is asked for gradients as well.
    """
    if not (inside := [site for site in sites(model) if not site.whole]):
        return
    added: dict[str, list[list[Tensor]]] = {site.name: [] for site in inside}  # by site, of each call

    def shifted(name: str, scores: Tensor) -> Tensor:
        added[name].append([torch.zeros_like(scores, requires_grad=True)])
        return scores + added[name][-1][0]

    def note(site: Site, module: nn.Module, inputs: object, output: Any) -> None:
        given = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        weights = [leaf for leaf in given if leaf.dim() > 1 and leaf.shape[-1] in (site.k, site.num_experts)]
        if calls := added[site.name]:
            calls[-1] += [leaf for leaf in weights if not leaf.numel() % len(calls[-1][0])]

    with ExitStack() as stack, torch.enable_grad():
        for site in inside:
            stack.enter_context(intercepted(site, partial(shifted, site.name)))
            if site.call is not None and isinstance(site.gate, nn.Module):
                stack.callback(site.gate.register_forward_hook(partial(note, site)).remove)
        loss = F.cross_entropy(model(x.detach().requires_grad_()), y, reduction="sum")
    every = [tensor for calls in added.values() for call in calls for tensor in call]
    found = torch.autograd.grad(loss, every, allow_unused=True) if every and loss.requires_grad else [None] * len(every)
    gradients = iter(found)
    without = []
    for calls in filter(None, added.values()):
        missing = []
        for call in calls:
            own = [g.reshape(len(call[0]), -1) for g in islice(gradients, len(call)) if g is not None]
            missing += [(torch.cat(own, 1) == 0).all(1).float().cpu() if own else torch.ones(len(call[0]))]
        without.append(float(torch.cat(missing).mean()))
    if count := sum(share > 0 for share in without):
        yield f"router gradient zero on {max(without):.0%} of images at {count} of {len(inside)} gates inside"


def _gradient_at(moe: _Routed, model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """The cross-entropy's gradient by the router's scores (B, E); None where it is no module, or never called."""
    router = bare(moe.router)
    if not isinstance(router, nn.Module):
        return None
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: Any) -> None:
        if (scores := moe.pick(output)) is not None:
            seen.append(scores)

    handle = router.register_forward_hook(note)
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(x.detach().requires_grad_()), y, reduction="sum")
    finally:
        handle.remove()
    if not seen:
        return None
    scores = seen[-1]
    if not (scores.requires_grad and loss.requires_grad):
        return torch.zeros_like(scores)
    (gradient,) = torch.autograd.grad(loss, scores, allow_unused=True)
    return torch.zeros_like(scores) if gradient is None else gradient


def _routes(model: nn.Module, x: Tensor, threat: ThreatModel) -> Iterator[str]:
    """For how many images another expert was found to come first inside the ball."""
    for name, moe in _routed(model, x).items():
        flipped = _flipped(moe.scores, x, threat)
        if flipped.any():
            yield f"{name}routes flip within the ball for {flipped.float().mean():.0%} of images"


def _flipped(router: Callable[[Tensor], Tensor], x: Tensor, threat: ThreatModel) -> Tensor:
    """Where gradient ascent on the best other score has come past that of the first expert: (B,)."""
    with torch.no_grad():
        first = router(x).argmax(1)
    router = differentiable(router, x, threat.eps)
    flipped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    z = random_start(x, threat, 2 * torch.rand(x.shape).to(x.device) - 1)
    for _ in range(STEPS):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            scores = router(z)
            own = F.one_hot(first, scores.shape[1]).bool()
            lead = scores.masked_fill(own, -torch.inf).amax(1) - scores[own]
            (gradient,) = torch.autograd.grad(lead.sum(), z)
        flipped |= lead.detach() > 0
        z = ascend_once(z.detach(), gradient, x, threat, default_step_size(threat.eps, STEPS))
    return flipped


def _growth(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Iterator[str]:
    """PGD's success must grow with ε, and break everything where the ball is the whole box."""
    box = 1.0 if threat.norm == "Linf" else math.sqrt(x[0].numel())
    radii = [eps for times in _TIMES if (eps := times * threat.eps) < box]
    broken = []
    for eps in [*radii, box]:
        ball = ThreatModel(norm=threat.norm, eps=eps)
        start = random_start(x, ball, 2 * torch.rand(x.shape).to(x.device) - 1)

        def loss(z: Tensor) -> Tensor:
            return F.cross_entropy(model(z), y, reduction="none")

        z = pgd(loss, x, ball, STEPS, default_step_size(eps, STEPS), start)
        with torch.no_grad():
            broken.append(int((model(z).argmax(1) != y).sum()))
    if broken[-1] < len(x):
        yield f"gradients masked: PGD breaks {broken[-1]} of {len(x)} in a ball that holds every image"
    drop = max((before - after for before, after in pairwise(broken)), default=0)
    if drop > len(x) / 10:
        yield "gradients masked: PGD breaks fewer in a larger ball"

"""`components`: what attacks on the experts and on the router do to F, and what each part withstands alone.

The paper reports RA-E and RA-R without a definition that could be repeated; these are ours, each by PGD:

- RA-E-fixed: on the expert f_i* that the clean image is routed to, scored on F;
- RA-E-any: on every expert, worst case, scored on F;
- RA-R: on the router, for a change of route, scored on F; the share of routes that it changes is reported with it;
- each expert's and branch's own accuracy, clean and under PGD on that part alone.

Of a gate inside a network, RA-R is of PGD that leaves its clean experts at all tokens, and a part is the whole model
with one expert forced at every token (Pavlitska et al. 2025 saw single paths that are more robust than the whole). Its
load, entropy and share of changed routes are in the result's `gates`.

Of a dual, i* and the route are those of its robust branch R, and the experts those of both branches.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bench.attacks.block import Attempt, Block
from bench.attacks.gradients import differentiable, logarithms
from bench.attacks.prepared import on_copy
from bench.errors import UnusableInput
from bench.models.foreign import bare
from bench.models.parts import is_dual, parts, routed_branch
from bench.models.sites import Site, intercepted, selected, single_paths, sites
from bench.pgd import pgd, random_start
from bench.registry import SUITES
from bench.spec import NOT_FORCED, Norm
from bench.suites.base import Cost, Suite


@SUITES.register("components")
class Components(Suite):
    """`step_size` is in pixels of [0, 1]; unset, it is ε/4. All examples are attacked, not only those F gets right.

    A model without visible parts has no rows but the clean ones.
    """

    version: ClassVar[int] = 3
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    needs: ClassVar[tuple[str, ...]] = ("routes",)
    every: ClassVar[bool] = True

    steps: int = Field(default=50, gt=0, description="gradient steps of each PGD")
    step_size: float | None = Field(default=None, gt=0, description="in pixels of [0, 1]; None: ε/4")

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost | None:
        attacked = 4 if model is None else len(parts(model)) + sum(s.num_experts for s in sites(model) if not s.whole)
        passes = self.steps * (attacked + 1)  # the route as well
        return Cost(passes, passes) if attacked else None

    def attack(self, block: Block) -> Iterator[Attempt]:
        block = on_copy(block)
        yield from self._whole(block)
        for site in sites(block.model):
            if site.k and not (site.whole or site.soft):
                yield from self._gate(block, site)

    def _whole(self, block: Block) -> Iterator[Attempt]:
        """The experts and branches that are whole networks, and the router."""
        model, every = block.model, torch.arange(len(block.y), device=block.y.device)
        classifiers = parts(model)
        if not classifiers:
            return
        found: dict[str, Tensor] = {}
        for name, part in classifiers.items():
            block.on_attack(f"pgd on {name}", len(every), len(every))
            with block.passes.also(part):
                found[name] = self._pgd(block, _cross_entropy(part, block.y))
            yield block.attempt("pgd", every, found[name], target=name)
            if "expert" in name:
                yield block.attempt(f"expert-any:{name}", every, found[name])
        moe = routed_branch(model)
        if moe is None:
            return
        with torch.no_grad():
            scores = moe.router(block.x)
        if not isinstance(scores, Tensor) or scores.shape != (len(every), len(moe.experts)):
            if any(site.gate is bare(moe.router) for site in sites(model) if not site.whole):
                return  # named by the user: its scores are read inside
            raise UnusableInput(
                "components needs a router that gives scores (images, experts), and this one gives none: name it, such"
                " as --gates router, so that the scores inside it are read"
            )
        chosen = scores.argmax(1)
        prefix = "R." if is_dual(model) else ""
        experts = torch.stack([found[f"{prefix}expert:{i}"] for i in range(len(moe.experts))])
        yield block.attempt("expert-fixed", every, experts[chosen, every])
        ascended = differentiable(moe.router, block.x, block.threat_model.eps)
        with block.passes.also(*([moe.router] if isinstance(moe.router, nn.Module) else [])):
            x_route = self._pgd(block, _flip(ascended, chosen))
        yield block.attempt("route", every, x_route)

    def _gate(self, block: Block, site: Site) -> Iterator[Attempt]:
        """A gate inside the network: its route, and each of its experts forced at every token."""
        model, every = block.model, torch.arange(len(block.y), device=block.y.device)
        if (clean := _read(model, site, block.x)) is None or len(clean) != len(every):
            block.flags.append(f"components: {site.name}: {NOT_FORCED}")
            return
        own = selected(clean, site.k)

        def leaves(x: Tensor) -> Tensor:
            scores = _read(model, site, x)
            assert scores is not None
            weakest = scores.masked_fill(~own, torch.inf).amin(-1)
            return (scores.masked_fill(own, -torch.inf).amax(-1) - weakest).clamp_max(0).mean(1)

        x_route = self._pgd(block, leaves)
        after = _read(model, site, x_route)
        assert after is not None
        flipped = (selected(after, site.k) != own).flatten(1).any(1)
        block.gates[site.name] = {"load": own.sum((0, 1)).tolist(), "flipped": [int(flipped.sum())]}
        yield block.attempt(f"route:{site.name}", every, x_route)
        for name, part in single_paths(model, site).items():
            block.on_attack(f"pgd on {name}", len(every), len(every))
            yield block.attempt("pgd", every, self._pgd(block, _cross_entropy(part, block.y)), target=name)

    def _pgd(self, block: Block, loss: Callable[[Tensor], Tensor]) -> Tensor:
        threat = block.threat_model
        noise = 2 * torch.rand(block.x.shape).to(block.x.device) - 1
        start = random_start(block.x, threat, noise)
        return pgd(loss, block.x, threat, self.steps, self.step_size or threat.eps / 4, start)


def _read(model: nn.Module, site: Site, x: Tensor) -> Tensor | None:
    """A gate's scores for images x, (m, T, E), with their gradient; None where they cannot be seen."""
    seen: list[Tensor] = []

    def note(scores: Tensor) -> Tensor:
        seen.append(scores)
        return scores

    with intercepted(site, note), torch.set_grad_enabled(x.requires_grad):
        model(x)
    return logarithms(seen[0]) if len(seen) == 1 else None


def _cross_entropy(part: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(part(x), y, reduction="none")


def _flip(router: Callable[[Tensor], Tensor], chosen: Tensor) -> Callable[[Tensor], Tensor]:
    """By how much the best other expert's score exceeds that of the chosen one."""

    def loss(x: Tensor) -> Tensor:
        scores = router(x)
        own = F.one_hot(chosen, scores.shape[1]).bool()
        return scores.masked_fill(own, -torch.inf).amax(1) - scores[own]

    return loss

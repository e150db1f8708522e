"""Attacks on gates inside a network that force no path: leave the clean one, blur the choice, soften the mixture.

Axes: B = examples of the block, m = rows that are attacked, T = tokens, E = experts, K = selected experts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from bench.attacks.gradients import logarithms
from bench.attacks.paths import Paths
from bench.attacks.search import Search, losses, margin, standardised
from bench.models.sites import Site, intercepted

#: How far the clean experts are pushed behind, in median gaps, and how hard once the loss counts too: exponents of ten.
BEHIND, PUSH = 0.5, (-1.0, 1.0)
#: The first step, in ε, with which the loss is climbed from where the route was left.
FINE = 0.25
#: The spread of the noise on the scores, in median gaps, in turn.
NOISE = (0.25, 1.0)
#: By how many of their spreads the scores of a soft mixture are divided, in turn.
TEMPERATURES = (1.0, 4.0)

Change = Callable[[Tensor], Tensor]


def _changed(search: Search, changes: Sequence[tuple[Site, Change]], z: Tensor) -> Tensor:
    with ExitStack() as stack:
        for site, change in changes:
            stack.enter_context(intercepted(site, change))
        logits: Tensor = search.block.model(z)
    return logits


def left_routes(paths: Paths, restarts: int, steps: int) -> None:
    """Away from the clean experts at as many tokens of as many gates as possible; then the loss, from there."""
    search, block = paths.search, paths.search.block
    sites = [site for site in paths.sites if not site.whole]
    clean = {site.name: paths.clean(site).topk(site.k, dim=-1).indices for site in sites}

    def asked(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and how far the clean experts are from being BEHIND, the mean over gates and tokens (m,)."""
        stays: list[Tensor] = []

        def note(site: Site, scores: Tensor) -> Tensor:
            known = logarithms(scores)
            own = torch.zeros_like(known, dtype=torch.bool).scatter_(-1, clean[site.name][rows], True)
            weakest = known.masked_fill(~own, torch.inf).amin(-1)
            lead = (weakest - known.masked_fill(own, -torch.inf).amax(-1)) / paths.gap_of(site)
            stays.append((lead + BEHIND).relu().mean(1))
            return scores

        logits = _changed(search, [(site, partial(note, site)) for site in sites], z)
        return logits, torch.stack(stays).mean(0)

    for _ in range(restarts):
        which = torch.randint(3, (len(block.y),)).to(block.x.device)
        push = 10 ** torch.empty(len(block.y)).uniform_(*PUSH).to(block.x.device)

        def away(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, stays = asked(z, rows)
            return -stays, margin(logits, block.y[rows]) > 0

        def wrong(z: Tensor, rows: Tensor, which: Tensor = which, push: Tensor = push) -> tuple[Tensor, Tensor]:
            logits, stays = asked(z, rows)
            value = losses(logits, block.y[rows]).gather(1, which[rows, None])[:, 0]
            return value - push[rows] * stays, margin(logits, block.y[rows]) > 0

        search.climb(away, search.uniform(), steps, search.rows)
        search.climb(wrong, search.x_adv.clone(), steps, search.rows, FINE)


def blurred(paths: Paths, draws: int, steps: int) -> None:
    """The margin averaged over noise on the scores: near a tie a hard choice has no gradient, its mean has one."""
    search, block = paths.search, paths.search.block
    sites = [site for site in paths.sites if not site.whole]

    def add(site: Site, spread: float, scores: Tensor) -> Tensor:
        return scores + spread * paths.gap_of(site) * torch.randn(scores.shape).to(scores)

    for spread in NOISE:

        def objective(z: Tensor, rows: Tensor, spread: float = spread) -> tuple[Tensor, Tensor]:
            noisy = [(site, partial(add, site, spread)) for site in sites]
            found = [margin(standardised(_changed(search, noisy, z)), block.y[rows]) for _ in range(draws)]
            return torch.stack(found).mean(0), torch.zeros_like(rows, dtype=torch.bool)

        search.climb(objective, search.uniform(), steps, search.rows)


def softened(search: Search, sites: Sequence[Site], steps: int) -> None:
    """The margin of soft mixtures at a higher temperature, where a decided softmax has a gradient again."""
    block = search.block

    def change(temperature: float, scores: Tensor) -> Tensor:
        known = logarithms(scores)
        cooler = known / (temperature * known.detach().std(-1, keepdim=True, correction=0).clamp_min(1.0))
        return cooler if known is scores else cooler.softmax(-1)

    for temperature in TEMPERATURES:

        def objective(z: Tensor, rows: Tensor, temperature: float = temperature) -> tuple[Tensor, Tensor]:
            logits = _changed(search, [(site, partial(change, temperature)) for site in sites], z)
            return margin(standardised(logits), block.y[rows]), torch.zeros_like(rows, dtype=torch.bool)

        search.climb(objective, search.uniform(), steps, search.rows)

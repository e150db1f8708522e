"""What a gate chooses by, from a model's answers as the gate's scores are exchanged and raised.

How many experts a gate selects is found out by exchanging neighbouring scores that are nearly alike: the model's answer
jumps where one of them is selected and the other is not, and nowhere in a soft mixture. A bias for the selection alone
moves the jump away from equal scores, so it is looked for between them as well. Whether something else than an expert
is taken where no score is high enough shows as each rises from where all are about alike.

Axes: m = images, T = tokens of an image, E = experts, K = selected experts, C = classes.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from bench.models.dependence import spread
from bench.models.foreign import Guarded
from bench.models.sites import Site, intercepted, opened, read

#: How far logits may differ from rounding, as a share of how far they lie apart; and at least so many ε of the type of
#: the gate's scores, since in half precision weights that are normalised over the selected experts are rounded as well.
ROUNDING, _ROUNDED = 1e-5, 4
#: Where a bias decides, the scores are spread so many times as widely, and the place of a jump is halved so often.
SPREADS, _HALVED = (1.0, 12.0), 10
#: Scores below this one are masks'.
_MASK = -1e4
#: Scores that are about alike differ by so much of what one is raised by, at most so many are, and halved so often.
_SLOPE, _RAISED, _FINELY = 1e-4, 8, 16


class Exchanges:
    """A site's experts in a random order at each token, and the model's answer as neighbours of it are exchanged.

    others: sites whose scores are drawn at random meanwhile, so that they choose alike whatever this one does: those
    of `sites` within the same network.
    """

    def __init__(self, guard: Guarded, site: Site, x: Tensor, sites: Sequence[Site] = ()) -> None:
        self.guard, self.site, self.x = guard, site, x
        self.others = [other for other in sites if other is not site and not other.whole]
        self.order: Tensor | None = None
        self.widest = 1e-12  # how far the logits of an answer so far lie apart
        self.eps = torch.finfo(torch.float32).eps  # of the type of the gate's scores
        self.far = 0.8 / (site.num_experts - 1)

    def _ranked(self, rank: int, apart: float, spread: float, scores: Tensor) -> Tensor:
        """Scores in the order; that of `rank` is ahead of the next by `apart`."""
        values = 0.6 + spread * torch.linspace(0.4, -0.4, self.site.num_experts)
        middle = (values[rank - 1] + values[rank]) / 2
        values[rank - 1], values[rank] = middle + apart / 2, middle - apart / 2
        if self.order is None:
            self.order = _drawn(scores, 0).argsort(-1)
        return torch.empty_like(scores).scatter_(-1, self.order, _instead(scores, values))

    def _answer(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = [(other, partial(_drawn, seed=1 + number)) for number, other in enumerate(self.others)]

        def noted(scores: Tensor) -> Tensor:
            self.eps = torch.finfo(scores.dtype).eps
            return change(scores)

        found = _answer(self.guard, self.x, [(self.site, noted), *drawn])
        self.widest = max(self.widest, spread(found))
        return found

    @property
    def rounding(self) -> float:
        """How far answers may differ from rounding, as a share of how far logits lie apart."""
        return max(ROUNDING, _ROUNDED * self.eps)

    def _at(self, rank: int, apart: float, spread: float = 1.0) -> Tensor:
        """The answer where the expert of `rank` leads by so much."""
        return self._answer(partial(self._ranked, rank, apart, spread))

    def _changed(self, rank: int, apart: float) -> float:
        """How much the answer changes between a lead of the expert of `rank` and as much of the next."""
        return self._share(self._at(rank, apart), self._at(rank, -apart))

    def _share(self, first: Tensor, second: Tensor) -> float:
        """Of how far logits lie apart."""
        return float((first - second).abs().max()) / self.widest

    def effects(self) -> dict[int, float]:
        """The change by each rank's exchange with the next."""
        return {rank: self._changed(rank, self.far) for rank in range(1, self.site.num_experts)}

    def jumps(self, effects: dict[int, float], near: float) -> list[int]:
        """The ranks at which the answer jumps where the scores are equal."""
        near = max(1e-3 * self.far, near)
        return [
            rank
            for rank, effect in effects.items()
            if effect > self.rounding and self._changed(rank, near) > effect / 2
        ]

    def jumps_between(self, rank: int, spread: float) -> bool:
        """Whether the answer jumps somewhere else than at equal scores: a bias may be added for the choice alone."""
        far = spread * self.far
        finer = max(0, math.ceil(math.log2(far / (max(SPREADS) * 0.4))))  # as finely as of three experts
        return self._jumps(partial(self._at, rank, spread=spread), -far, far, _HALVED + finer)

    def spreads(self, scores: Tensor) -> tuple[float, ...]:
        """Those at which a bias is looked for that is no more than twice as far as the scores themselves lie apart."""
        known = scores[scores > _MASK]
        own = 2 * float(known.max() - known.min()) / self.far if len(known) else 0.0
        return (*SPREADS, own) if own > max(SPREADS) else SPREADS

    def falls_back(self, scores: Tensor) -> bool:
        """Whether something else than an expert is taken where all scores are about alike, low or high ones.

        Then the answer jumps as any of them rises. It does not where the expert that is taken anyway is raised: the
        first, or the one that a bias for the selection favours. scores: the site's own.
        """
        if are_probabilities(scores):
            return self._falls_back(1 / self.site.num_experts, 1.0)
        known, self.eps = opened(scores), torch.finfo(scores.dtype).eps
        low, middle, high = float(known.min()), float((known.min() + known.max()) / 2), float(known.max())
        width = max(high - low, max(SPREADS))
        return any(self._falls_back(level, 3 * width) for level in (low - width, middle, high + width))

    def _falls_back(self, level: float, far: float) -> bool:
        count = self.site.num_experts

        def raised(expert: int, by: float) -> Tensor:
            apart = max(_SLOPE * far, 2 * self.eps * (count - 1))  # else half precision makes ties of them
            values = level + apart * torch.linspace(1, 0, count)
            values[expert] += by
            return self._answer(partial(_instead, values=values))

        def jumps(expert: int) -> bool:
            return self._jumps(partial(raised, expert), 0.0, far, _FINELY)

        flat = raised(0, 0.0)
        tried = 0
        for expert in range(count):
            if tried < _RAISED and self._share(raised(expert, -far), flat) > self.rounding:  # it is taken
                if not jumps(expert):
                    return False
                tried += 1
        return tried > 0 or all(map(jumps, range(min(count, _RAISED))))

    def _jumps(self, answer: Callable[[float], Tensor], low: float, high: float, halved: int) -> bool:
        """Whether the answer, which changes between low and high, does so at one place."""
        below, above = answer(low), answer(high)
        effect = self._share(above, below)
        if effect <= self.rounding:
            return False
        for _ in range(halved):
            middle = (low + high) / 2
            there = answer(middle)
            lower, upper = self._share(there, below), self._share(above, there)
            if max(lower, upper) <= effect / 8:
                return False
            if lower > upper:
                high, above = middle, there
            else:
                low, below = middle, there
        return self._share(above, below) > effect / 8


def measured_k(guard: Guarded, site: Site, x: Tensor) -> int:
    """How many experts a site selects, by where the model's answer jumps; its own K where it jumps nowhere.

    Were more forced at a time, the model would take the best of them; were fewer, it would add one that is not forced.
    """
    if site.num_experts < 2:
        return site.k
    exchanges = Exchanges(guard, site, x)
    with torch.no_grad():
        jumps = exchanges.jumps(exchanges.effects(), 0.0)
    return max(jumps, default=site.k)


def misshown(guard: Guarded, site: Site, sites: Sequence[Site], x: Tensor) -> str:
    """What is not as a model's attributes show it of one of its sites, and what to do; nothing where all is.

    What is forced is the order of the scores: experts that are chosen by anything beside it are led to by nothing.
    """
    if site.num_experts < 2:
        return ""
    exchanges = Exchanges(guard, site, x, sites)
    with torch.no_grad():
        if (scores := read(guard, [site], x).scores.get(site.name)) is None:
            return ""  # it cannot be forced, which is told elsewhere
        effects = exchanges.effects()
        if jumps := exchanges.jumps(effects, 2 * torch.finfo(scores.dtype).eps):
            if (count := max(jumps)) != site.k:
                known = f"selects {count} of {site.num_experts}, where num_selected_experts is {site.k}"
                return f"{site.name} {known}: correct num_selected_experts"
        elif site.soft:
            return ""
        elif any(exchanges.jumps_between(rank, spread) for spread in exchanges.spreads(scores) for rank in effects):
            return f"{site.name}: the choice is by more than the order of its scores: let it give what is compared"
        elif max(effects.values()) > exchanges.rounding:
            known = f"mixes all of its {site.num_experts} experts, where num_selected_experts is {site.k}"
            return f"{site.name} {known}: correct num_selected_experts"
    return thresholded(guard, site, sites, x)


def thresholded(guard: Guarded, site: Site, sites: Sequence[Site], x: Tensor) -> str:
    """That a choice among some of the experts is by more than the order of their scores, and what to do; else nothing.

    What is taken where no score is high enough, or none stands out, is an expert that no path leads to.
    """
    if site.soft or not site.k or site.choosers or site.num_experts < 2:
        return ""
    exchanges = Exchanges(guard, site, x, sites)
    with torch.no_grad():
        if (scores := read(guard, [site], x).scores.get(site.name)) is None:
            return ""
        if exchanges.falls_back(scores):
            return f"{site.name}: the choice compares its scores with a threshold: show what is taken then as an expert"
    return ""


def are_probabilities(scores: Tensor) -> bool:
    """Whether scores (…, E) look like probabilities: none is negative, and those of each row add up to 1."""
    return bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < 1e-3).all())


def _instead(scores: Tensor, values: Tensor) -> Tensor:
    """Values (E,) at each token in place of scores (m, T, E); of probabilities as probabilities."""
    if are_probabilities(scores):
        values = values.clamp_min(0) / values.clamp_min(0).sum()
    return values.to(scores).expand_as(scores)


def _drawn(scores: Tensor, seed: int) -> Tensor:
    """Random scores in their place."""
    return torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores)


def _answer(guard: Guarded, x: Tensor, changes: Sequence[tuple[Site, Callable[[Tensor], Tensor]]]) -> Tensor:
    guard.reseed(0)  # a gate may draw
    with ExitStack() as stack:
        for site, change in changes:
            stack.enter_context(intercepted(site, change))
        logits = guard(x).nan_to_num(0.0)
    return logits - logits.median(1, keepdim=True).values  # a score may be added to all; one may be masked by −1e9

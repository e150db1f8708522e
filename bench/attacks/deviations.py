"""Deviations: paths of gates inside a network that leave the clean path at few places.

Where tokens are routed, or many gates in turn, there are too many paths to force each. A deviation forces one gate: all
tokens to an expert or to a set of K, each token to its runner-up, or one expert among those of some tokens: of the
nearest to it, of those that matter most by the margin's gradient. Deviations of several gates are combined greedily,
the weakest first. Where experts choose tokens the two change places, and a token may also be taken from all of them.

Axes: B = examples of the block, m = rows that are attacked, N = sites, T = tokens, E = experts, K = selected experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.models.sites import Site, selected, wanted

#: Tokens that a deviation forces: all, each to its runner-up, the one nearest to the expert, the one that matters most,
#: the quarter that does; or, counted from TOKEN on, one by its number.
ALL, RUNNER_UP, NEAREST, FIRST, QUARTER, TOKEN = range(6)
#: A choice is an expert's number and SCOPE times the tokens.
SCOPE = 1 << 16
#: The scope of a token that every expert loses.
LOST = 1 << 20
#: Tokens are forced one by one where an image has at most so many; sets of K where a site has at most so many.
FEW_TOKENS, FEW_SETS = 8, 16


@dataclass(frozen=True)
class Deviations:
    """What can be forced at each site, of the block's images.

    scores: (B, T, E) of each site on the clean images. matter: how much each token matters (B, T) there.
    """

    sites: list[Site]
    scores: list[Tensor]
    matter: list[Tensor]

    def singles(self, number: int) -> list[list[int]]:
        """The choices (K,) of the deviations at one site."""
        site, tokens = self.sites[number], self.scores[number].shape[1]
        width = max(one.k for one in self.sites)
        scopes = [ALL]
        if tokens > 1:
            scopes += [TOKEN + t for t in range(tokens)] if tokens <= FEW_TOKENS else [NEAREST, FIRST, QUARTER]
        found = [[SCOPE * scope + expert] * width for scope in scopes for expert in range(site.num_experts)]
        found += [[SCOPE * RUNNER_UP] * width]
        if site.choosers:
            found += [[SCOPE * LOST + token] * width for token in range(site.num_experts)]
        if site.k > 1 and comb(site.num_experts, site.k) <= FEW_SETS:
            sets = combinations(range(site.num_experts), site.k)
            found += [[*chosen, *chosen[-1:] * (width - site.k)] for chosen in sets]
        return found

    @cached_property
    def _nearest(self) -> list[Tensor]:
        """At each site the token (B, E) that lacks least to an expert, of those that do not have it."""
        found = []
        for site, scores in zip(self.sites, self.scores, strict=True):
            best = scores.topk(site.k, dim=-1).values
            lack = (best[..., :1] - scores).masked_fill(scores >= best[..., -1:], torch.inf)
            found.append(lack.argmin(1))
        return found

    @cached_property
    def _places(self) -> list[Tensor]:
        """At each site the place of each token (B, T) in the order in which they matter."""
        return [matter.argsort(1, descending=True).argsort(1) for matter in self.matter]

    @cached_property
    def _runners(self) -> list[Tensor]:
        """At each site the best expert that is not selected, (B, T)."""
        pairs = zip(self.sites, self.scores, strict=True)
        return [scores.topk(site.k + 1, dim=-1).indices[..., -1] for site, scores in pairs]

    def forced(self, number: int, chosen: Tensor, rows: Tensor) -> Tensor:
        """Which experts (m, T, E) the choices (m, K) at a site make win, for rows (m,) of the block."""
        tokens, experts = self.scores[number].shape[1:]
        scope, expert = chosen[:, 0].div(SCOPE, rounding_mode="floor"), (chosen % SCOPE).masked_fill(chosen < 0, 0)
        nearest = one_hot(self._nearest[number][rows].gather(1, expert[:, :1])[:, 0], tokens).bool()
        place = self._places[number][rows]
        where = torch.ones_like(nearest)
        for which, mask in (
            (scope == NEAREST, nearest),
            (scope == FIRST, place < 1),
            (scope == QUARTER, place < -(-tokens // 4)),
            (scope >= TOKEN, one_hot((scope - TOKEN).clamp(0, tokens - 1), tokens).bool()),
        ):
            where = torch.where(which[:, None], mask, where)
        mine = wanted(torch.where(chosen < 0, chosen, expert), experts)[:, None] & where[..., None]
        runners = one_hot(self._runners[number][rows], experts).bool()
        mine = torch.where((scope == RUNNER_UP)[:, None, None], runners, mine)
        if not self.sites[number].choosers:
            return mine
        others = self.scores[number][rows].masked_fill(wanted(expert[:, :1], experts)[:, None], -torch.inf)
        return torch.where((scope == LOST)[:, None, None], selected(others, self.sites[number].k), mine)


#: The choices (K,) of a path at each site (N,); −1 is none.
Path = list[list[int]]


def alone(number: int, chosen: list[int], sites: int) -> Path:
    """The path that makes this choice at one of so many sites, and none at the others."""
    free = [-1] * len(chosen)
    return [free] * number + [chosen] + [free] * (sites - number - 1)


def joined(first: Path, second: Path) -> Path | None:
    """What both paths choose; None where they choose differently at a site."""
    pairs = list(zip(first, second, strict=True))
    if any(one != two and one[0] >= 0 and two[0] >= 0 for one, two in pairs):
        return None
    return [one if two[0] < 0 else two for one, two in pairs]


def combined(singles: Sequence[Sequence[Path]], limit: int, weakness: Callable[[Path], float]) -> list[Path]:
    """At most `limit` paths (N, K): single deviations and combinations of them, the weakest first.

    singles: the paths that each site begins. weakness: of a path, the larger the weaker. Half of the paths, at least,
    are single deviations, of each site in turn; the rest are combinations, each begun by the next of these: what
    weakens the path most is added, site by site, as long as it weakens it.
    """
    known = [sorted(((weakness(path), path) for path in paths), key=lambda one: -one[0]) for paths in singles]
    turns = [found[turn] for turn in range(max(map(len, known))) for found in known if turn < len(found)]
    room = limit if len(singles) == 1 else limit - limit // 2
    kept = [path for _, path in turns[:room]]
    for start in sorted(turns, key=lambda one: -one[0]) if len(singles) > 1 else ():
        value, path = start
        while len(kept) < limit:
            both = (joined(path, found[0][1]) for found in known)
            more = [(weakness(one), one) for one in both if one is not None and one != path]
            best = max(more, key=lambda one: one[0], default=None)
            if best is None or best[0] <= value or best[1] in kept:
                break
            value, path = best
            kept.append(path)
    return kept

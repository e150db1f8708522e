"""Attacks on paths: make the experts of a path wrong, and the model take that path.

A path is a choice at every routing site (`bench.models.sites`): a set of K experts for an MoE, a pair of such sets for
a dual. Axes: B = examples of the block, m = rows that are attacked, P = paths, N = sites, T = tokens, E = experts,
K = selected experts of the site with the most, D = pixels.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations, islice, product
from math import comb, prod
from typing import Literal

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor

from bench.attacks.affine import affine_map, reachable_pairs
from bench.attacks.gradients import StraightThrough, logarithms, slopes
from bench.attacks.search import Objective, Search, losses, margin, standardised
from bench.models import sites as routing
from bench.models.parts import parts
from bench.models.sites import Site
from bench.pgd import ascend_once, project

#: Whose gradient a restart follows: the model's own; that of a smooth stand-in (`StraightThrough`) for what has none,
#: in the gates alone or in the whole model; the mean slopes of the scores; the mean over Gaussian neighbours.
Gradient = Literal["own", "gates", "slopes", "through", "neighbours"]

#: How many sets of experts are tried at one site with more: the likeliest by the router.
MOST_SETS = 64
#: How far ahead the path is pushed, in median gaps of the natural route, and how hard: exponents of ten, from … to.
AHEAD, PUSH = (-2.0, 0.0), (-1.0, 2.0)
#: A push that outweighs every loss, in every sixth restart: the route comes first, and the loss where it is won.
ROUTE_FIRST, EVERY = 1e3, 6
#: Where restarts begin, after the first on a path, which is aimed at it: cumulated probabilities of an aimed point, a
#: uniform one, the nearest to being broken so far; the rest begin at other images that take the path.
AIMED, UNIFORM, NEAREST = 0.35, 0.65, 0.85
#: The first steps of a restart, in ε: Auto-PGD's own, and finer ones from the nearest point so far.
COARSE, FINE = 2.0, (1 / 4, 1 / 32)
#: How far slopes are measured, in ε, in turn; how many Gaussian neighbours are averaged, and how far they lie, in ε.
DISTANCES, NEIGHBOURS, SPREAD = (1.0, 0.25), 4, 0.125


@dataclass
class Paths:
    """The paths of a block's model: which there are, which can be reached, which are promising.

    limit: how many are attacked at most. possible: how many there are. choices (P, N, K): the experts of each path at
    each site, -1 where it is free. notes: in words, what attacks on these paths leave out.
    """

    search: Search
    limit: int
    sites: list[Site] = field(init=False)
    choices: Tensor = field(init=False)
    possible: int = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        block, every = self.search.block, routing.sites(self.search.block.model)
        with torch.no_grad():
            _, found, inputs = routing.read(block.model, every, block.x)
            for site in every:  # an expert that is routed itself may not be asked about every image
                if site.name not in found and (host := routing.host(site, every)) and host[0].name in found:
                    with routing.intercepted(host[0], partial(_sent, host[1])):
                        _, more, seen = routing.read(block.model, [site], block.x)
                    found, inputs = found | more, inputs | seen
        self.sites = [site for site in every if site.name in found]
        self.notes += [f"{site.name}: its scores cannot be forced" for site in every if site.name not in found]
        hosts = {site.name: routing.host(site, self.sites) for site in self.sites}
        #: for a site inside an expert: the number of the site that chooses that expert, and the expert's
        self._inside = {
            number: (self.sites.index(host[0]), host[1])
            for number, site in enumerate(self.sites)
            if (host := hosts[site.name]) is not None
        }
        self._scores = {name: logarithms(scores) for name, scores in found.items()}
        #: gates of whole images that see them as they are, so that they can be asked alone
        self._direct = {
            name
            for name, seen in inputs.items()
            if found[name].shape[1] == 1 and seen.shape == block.x.shape and torch.equal(seen, block.x)
        }
        self._maps = {site.name: self._affine(site) for site in self.sites}
        self._scales = {site.name: self._scale(site) for site in self.sites}
        self._slopes: dict[tuple[str, float], Tensor] = {}
        self.choices = self._enumerated().to(block.x.device)
        self.possible = self._count()
        if len(self.choices) < self.possible:
            self.notes.append(f"{len(self.choices):,} of {self.possible:,} paths attacked")

    def _affine(self, site: Site) -> tuple[Tensor, Tensor] | None:
        return affine_map(site.gate, self.search.block.x) if site.name in self._direct else None

    def _scale(self, site: Site) -> Tensor:
        """The median gap of the site's natural route on the clean images."""
        best = self._scores[site.name].topk(site.k + 1, dim=-1).values
        return (best[..., site.k - 1] - best[..., site.k]).median().clamp_min(1e-6)

    # --- which paths there are ----------------------------------------------------------------------------------------

    def _options(self, site: Site) -> list[tuple[int, ...]]:
        """The sets of K experts of a site that are tried."""
        order = self._scores[site.name].mean((0, 1)).argsort(descending=True).tolist()
        return list(islice(combinations(order, site.k), MOST_SETS))

    def _enumerated(self) -> Tensor:
        """The choices of all paths; where they are too many, of those that force one site, then two.

        A site inside an expert is free where that expert is not chosen.
        """
        width = max((site.k for site in self.sites), default=1)
        options = [
            [(*chosen, *chosen[-1:] * (width - site.k)) for chosen in self._options(site)] for site in self.sites
        ]
        if not options:
            return torch.zeros(0, 0, width, dtype=torch.long)
        free = (-1,) * width
        every = [[free, *sets] if number in self._inside else sets for number, sets in enumerate(options)]
        whole = list(islice((path for path in product(*every) if self._fits(path)), self.limit + 1))
        if len(whole) <= self.limit:
            return torch.tensor(whole)
        some = [[free, *sets] for sets in options]
        forced = (path for count in (1, 2) for path in product(*some) if sum(one[0] >= 0 for one in path) == count)
        fitting = (path for path in forced if all(path[n][0] < 0 or i in path[o] for n, (o, i) in self._inside.items()))
        return torch.tensor(list(islice(fitting, self.limit)))

    def _fits(self, path: Sequence[tuple[int, ...]]) -> bool:
        """Whether sites inside experts are forced where their expert is chosen, and only there."""
        return all((path[n][0] >= 0) == (i in path[o]) for n, (o, i) in self._inside.items())

    def _count(self) -> int:
        """How many paths there are."""
        if not self.sites:
            return 0
        counts = [comb(site.num_experts, site.k) for site in self.sites]
        for number, (outer, _) in sorted(self._inside.items(), reverse=True):  # inner sites come after their hosts
            site = self.sites[outer]
            with_it = comb(site.num_experts - 1, site.k - 1)
            counts[outer] += with_it * (counts[number] - 1)
        return prod(count for number, count in enumerate(counts) if number not in self._inside)

    def reachable(self) -> Tensor:
        """Which paths (B, P) an image can be led to: of affine gates at least all that are, of others every one."""
        block = self.search.block
        can = torch.ones(len(block.x), len(self.choices), dtype=torch.bool, device=block.x.device)
        for number, site in enumerate(self.sites):
            if (found := self._maps[site.name]) is not None:
                ahead = reachable_pairs(*found, block.x, block.threat_model)
                for path, chosen in enumerate(self.choices[:, number]):
                    if chosen[0] >= 0:
                        mine = routing.wanted(chosen[None], site.num_experts)[0]
                        can[:, path] &= ahead[:, mine][:, :, ~mine].flatten(1).all(1)
        return can

    @torch.no_grad()
    def order(self) -> tuple[Tensor, Tensor]:
        """The paths of each row, (B, P), the weakest on the clean image first, and how many can be reached, (B,)."""
        block, rows, can = self.search.block, self.search.rows, self.reachable()
        weakness = torch.full(can.shape, -torch.inf, device=can.device)
        for path in range(len(self.choices)):
            mine = rows[can[rows, path]]
            if len(mine):
                logits, _ = self.on_path(block.x[mine], self.choices[path].expand(len(mine), -1, -1))
                weakness[mine, path] = margin(standardised(logits), block.y[mine]).nan_to_num(-1e9).clamp_min(-1e9)
        return weakness.argsort(1, descending=True), can.sum(1).clamp_min(1)

    def kinds(self) -> list[tuple[Gradient, bool]]:
        """What restarts do in turn: the gradient that they follow, and whether they begin at other images.

        The model's own alone where gradients are right. A gate that is not affine by its structure may have a gradient
        that is zero or leads astray.
        """
        kinds: list[tuple[Gradient, bool]] = [("own", False)]
        if any(found is None for found in self._maps.values()):
            kinds += [("gates", False), ("slopes", False), ("own", True)]
        if self.blind:
            kinds += [("through", False), ("neighbours", False)]
        return kinds

    @cached_property
    def blind(self) -> bool:
        """Whether gradients do not show what the experts do: some are zero, or functions without one are in the way."""
        block, rows = self.search.block, self.search.rows
        for part in (block.model, *parts(block.model).values()):
            z = block.x[rows].detach().requires_grad_()
            with torch.enable_grad(), StraightThrough() as watched:
                part(z[:1])
            with torch.enable_grad():
                value = margin(part(z), block.y[rows]).sum()
            if watched.hard or not value.requires_grad:
                return True
            (gradient,) = torch.autograd.grad(value, z)
            if bool((gradient == 0).flatten(1).all(1).any()):
                return True
        return False

    # --- the model on a path ------------------------------------------------------------------------------------------

    def on_path(self, z: Tensor, chosen: Tensor, gradient: Gradient = "own", turn: int = 0) -> tuple[Tensor, Tensor]:
        """The logits (m, C) for z (m, …) on the paths chosen (m, N, K), and by how much each path leads there (m,).

        A path's lead is the least over its sites, each in median gaps of the site's natural route; above 0 the model
        takes the path by itself, and the logits are its own.
        """
        if not self._inside:
            return self._along(z, chosen, gradient, turn)
        # an expert is not asked about all rows, so that its own site can be forced on rows of one path alone
        different, which = torch.unique(chosen.flatten(1), dim=0, return_inverse=True)
        groups = [(which == number).nonzero()[:, 0] for number in range(len(different))]
        found = [self._along(z[rows], chosen[rows], gradient, turn) for rows in groups]
        back = torch.cat(groups).argsort()
        return torch.cat([logits for logits, _ in found])[back], torch.cat([lead for _, lead in found])[back]

    def _along(self, z: Tensor, chosen: Tensor, gradient: Gradient, turn: int) -> tuple[Tensor, Tensor]:
        """`on_path`, where every site is asked about all rows, or all rows are on one path."""
        leads: list[Tensor] = [torch.full((len(z),), torch.inf, device=z.device)]
        by_slopes = [site for site in self.sites if gradient == "slopes" and site.name in self._direct]
        lines = {site.name: (z.flatten(1) @ self._slopes_of(site, turn).to(z).T)[:, None] for site in by_slopes}

        def change(number: int, scores: Tensor) -> Tensor:
            site = self.sites[number]
            if len(scores) != len(z):  # some rows of a path that does not lead here
                return routing.forced(scores, chosen[:1, number].expand(len(scores), -1))
            known = logarithms(scores)
            if (line := lines.get(site.name)) is not None:
                known = line + (known - line).detach()
            leads.append(routing.gap(known, chosen[:, number]) / self._scales[site.name])
            return routing.forced(scores, chosen[:, number])

        around: Callable[[], AbstractContextManager[object]] = StraightThrough if gradient == "gates" else nullcontext
        with ExitStack() as stack:
            if gradient == "through":
                stack.enter_context(StraightThrough())
            for number, site in enumerate(self.sites):
                stack.enter_context(routing.intercepted(site, partial(change, number), around))
            logits = self.search.block.model(z)
        return logits, torch.stack(leads).amin(0)

    def _slopes_of(self, site: Site, turn: int) -> Tensor:
        distance = DISTANCES[turn % len(DISTANCES)] * self.search.block.threat_model.eps

        def scores(x: Tensor) -> Tensor:
            found = routing.scores_of(site.gate(x), len(x), site.num_experts)
            assert found is not None  # it was read before
            return logarithms(found)[:, 0]

        if (key := (site.name, distance)) not in self._slopes:
            self._slopes[key] = slopes(scores, self.search.block.x, distance)
        return self._slopes[key]

    # --- where restarts begin -----------------------------------------------------------------------------------------

    def aimed(self, chosen: Tensor, gradient: Gradient, turn: int) -> Tensor:
        """From each image a step of ε towards its path of those chosen (B, N, K): (B, C, H, W)."""
        block, rows = self.search.block, self.search.rows
        z = block.x[rows].detach().requires_grad_()
        with torch.enable_grad():
            _, lead = self.on_path(z, chosen[rows], gradient, turn)
        start = block.x.clone()
        if lead.requires_grad:
            (ascent,) = torch.autograd.grad(lead.sum(), z)
            ascent = ascent.nan_to_num(0.0, 0.0, 0.0)
            start[rows] = ascend_once(block.x[rows], ascent, block.x[rows], block.threat_model, block.threat_model.eps)
        return start

    def others(self, chosen: Tensor) -> Tensor:
        """For each row the clean image of another, brought into the row's ball: (B, C, H, W).

        By chance one of those that take its path, chosen (B, N, K), where there are any, else one of another class.
        """
        block = self.search.block
        alike = torch.ones(len(block.x), len(block.x), dtype=torch.bool, device=block.x.device)
        for number, site in enumerate(self.sites):
            scores = self._scores[site.name]
            lead = [routing.gap(scores, one.expand(len(scores), -1)) for one in chosen[:, number]]
            alike &= torch.stack(lead) > 0
        alike = torch.where(alike.any(1, keepdim=True), alike, block.y[:, None] != block.y)
        draw = torch.rand(alike.shape).to(alike.device).masked_fill(~alike, -1)
        return project(block.x[draw.argmax(1)], block.x, block.threat_model)


def _sent(expert: int, scores: Tensor) -> Tensor:
    """Scores that send every image to an expert."""
    return routing.forced(scores, torch.full((len(scores), 1), expert, device=scores.device))


def forced_paths(paths: Paths, restarts: int, steps: int) -> None:
    """Auto-PGD on the paths that each image can be led to, in turn, the weakest first.

    The objective of a restart is a loss of the model on the path (margin, cross-entropy or DLR) minus
    push · relu(ahead − the path's lead); which loss, how hard and how far is drawn for each row. Every reachable path
    is met by every gradient at least once, however few the restarts.
    """
    search, block = paths.search, paths.search.block
    count, device = len(block.y), block.x.device
    order, many = paths.order()
    kinds = paths.kinds()
    if search.rows.numel():
        restarts = max(restarts, len(kinds) * int(many[search.rows].max()))
    for number in range(restarts):
        rows = search.rows
        if not len(rows):
            return
        (kind, elsewhere), turn = kinds[number % len(kinds)], number // len(kinds)
        path = order.gather(1, (turn % many)[:, None])[:, 0]
        chosen = paths.choices[path]
        which = torch.randint(3, (count,)).to(device)
        ahead, push = (10 ** torch.empty(count).uniform_(*bounds).to(device) for bounds in (AHEAD, PUSH))
        if number % EVERY == EVERY - 1:
            push = torch.full_like(push, ROUTE_FIRST)
        draw = torch.rand(count).to(device)
        draw = torch.ones_like(draw) if elsewhere else torch.where(turn < many, 0, draw)  # at first aimed at the path
        start, first = _start(paths, chosen, kind, turn, draw)
        objective = _objective(paths, chosen, kind, turn, which, push, ahead)
        search.climb(objective, start, steps, rows, first)


def _start(paths: Paths, chosen: Tensor, kind: Gradient, turn: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Where a restart begins (B, C, H, W), and its first step (B,), by a number draw (B,) in [0, 1]."""
    search = paths.search
    fine = torch.tensor(FINE)[torch.randint(len(FINE), draw.shape)].to(draw.device)
    start = paths.others(chosen)
    for least, most, points in ((UNIFORM, NEAREST, search.nearest), (AIMED, UNIFORM, search.uniform())):
        here = (draw >= least) & (draw < most)
        start = torch.where(here.view(-1, 1, 1, 1), points, start)
    here = draw < AIMED
    if bool(here[search.rows].any()):
        start = torch.where(here.view(-1, 1, 1, 1), paths.aimed(chosen, kind, turn), start)
    return start, torch.where((draw >= UNIFORM) & (draw < NEAREST), fine, torch.full_like(fine, COARSE))


def _objective(
    paths: Paths, chosen: Tensor, kind: Gradient, turn: int, which: Tensor, push: Tensor, ahead: Tensor
) -> Objective:
    search = paths.search
    y, spread = search.block.y, SPREAD * search.block.threat_model.eps
    near = spread * torch.randn(NEIGHBOURS, *search.block.x.shape).to(search.block.x) if kind == "neighbours" else None

    def once(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits, lead = paths.on_path(z, chosen[rows], kind, turn)
        value = losses(logits, y[rows]).gather(1, which[rows, None])[:, 0]
        return value - push[rows] * (ahead[rows] - lead).relu(), (margin(logits, y[rows]) > 0) & (lead > 0)

    def objective(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if near is None:
            return once(z, rows)
        values, hits = (torch.stack(several) for several in zip(*(once(z + d[rows], rows) for d in near), strict=True))
        return values.mean(0), hits.all(0)

    return objective


def square_on_paths(paths: Paths, queries: int) -> None:
    """Square (Andriushchenko et al. 2020), by pyautoattack, on each path, where gradients do not show what experts do.

    What it maximises is the least of the path's margin and its lead: a point where both are positive breaks the model.
    """
    search, block = paths.search, paths.search.block
    if not paths.blind:
        return
    can = paths.reachable()
    for number, path in enumerate(paths.choices):
        rows = search.rows[can[search.rows, number]]
        if not len(rows):
            continue
        attack = SquareAttack(
            block.model, norm=block.threat_model.norm, eps=block.threat_model.eps, n_queries=queries,
            seed=(block.seed + 104729 * (number + 1)) % 2**32, device=block.x.device,
        )  # fmt: skip

        def asked(x: Tensor, y: Tensor, path: Tensor = path) -> tuple[Tensor, Tensor]:
            logits, lead = paths.on_path(x, path.expand(len(x), -1, -1))
            value = -torch.minimum(margin(standardised(logits), y), lead)
            return value, value

        attack.margin_and_loss = asked
        search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

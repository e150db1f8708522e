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
from bench.attacks.block import Block
from bench.attacks.gradients import StraightThrough, logarithms, slopes
from bench.attacks.search import Objective, Search, losses, margin, standardised
from bench.models import sites as routing
from bench.models.foreign import Guarded
from bench.models.parts import parts
from bench.models.sites import Site
from bench.pgd import ascend_once, project
from bench.spec import NOT_FORCED

#: Whose gradient a restart follows: the model's own; that of a smooth stand-in (`StraightThrough`) for what has none,
#: in the gates alone or in the whole model; the slopes of the scores, their mean over the block or each image's own;
#: the mean over Gaussian neighbours.
Gradient = Literal["own", "gates", "slopes", "local", "through", "neighbours"]

#: How many sets of experts are tried at one site with more: the likeliest by the router and the weakest by the experts'
#: margins, in turn; and how many are compared for that.
MOST_SETS, COMPARED = 64, 5000
#: How far ahead the path is pushed, in median gaps of the natural route, and how hard: exponents of ten, from … to.
AHEAD, PUSH = (-2.0, 0.0), (-1.0, 2.0)
#: A push that outweighs every loss, in every sixth restart: the route comes first, and the loss where it is won.
ROUTE_FIRST, EVERY = 1e3, 6
#: Where restarts begin, after the first on a path, which is aimed at it: cumulated probabilities of an aimed point, a
#: uniform one, the nearest to being broken so far; the rest begin at other images that take the path.
AIMED, UNIFORM, NEAREST = 0.15, 0.3, 0.9
#: The first steps of a restart, in ε: Auto-PGD's own, and finer ones from the nearest point so far.
COARSE, FINE = 2.0, (1 / 4, 1 / 32)
#: How far slopes are measured, in ε, in turn; how many Gaussian neighbours are averaged, and how far they lie, in ε.
DISTANCES, NEIGHBOURS, SPREAD = (1.0, 0.25), 4, 0.125
#: Pairs of corners of the ball that an image's own slopes are taken from, where the gates can be asked alone, and else.
CORNERS, FEW_CORNERS = 256, 16
#: Passes that a model which answers by chance is averaged over on a path.
EXPECTED = 5
#: A path's other classes that a restart may aim at, the likeliest first.
TARGETS = 5
#: The step, in ε, that a gradient has to raise a margin by, in this share of images, to be believed.
TRIED, RAISED = 1 / 16, 0.75
#: The share of Square's queries that paths get where gradients can be believed.
SOME_QUERIES = 1 / 4


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
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        block, every = self.search.block, routing.sites(self.search.block.model)
        self._pass: Callable[[Tensor], Tensor] = block.model
        self._passes = 1
        if isinstance(block.model, Guarded) and block.model.draws > 1:
            self._pass, self._passes = block.model.once, EXPECTED
        with torch.no_grad():
            _, found, inputs = routing.read(self._pass, every, block.x)
            found = {name: scores for name, scores in found.items() if len(scores) == len(block.x)}
            for site in every:  # an expert that is routed itself may not be asked about every image
                if site.name not in found and (host := routing.host(site, every)) and host[0].name in found:
                    with routing.intercepted(host[0], partial(_sent, host[1])):
                        _, more, seen = routing.read(self._pass, [site], block.x)
                    found, inputs = found | more, inputs | seen
            found = {name: scores for name, scores in found.items() if len(scores) == len(block.x)}
        self.sites = [site for site in every if site.name in found]
        self.notes += [f"{site.name}: {NOT_FORCED}" for site in every if site.name not in found]
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
            if name in found
            and found[name].shape[1] == 1
            and seen.shape == block.x.shape
            and torch.equal(seen, block.x)
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
        """The sets of K experts of a site that are tried, the most promising first."""
        likely = self._scores[site.name].mean((0, 1))
        if comb(site.num_experts, site.k) <= MOST_SETS:
            return list(combinations(range(site.num_experts), site.k))
        ranked = [self._best_sets(likely, site.k)]
        if site.whole:
            ranked.append(self._best_sets(self._weakness(site), site.k))
        mixed = dict.fromkeys(chosen for several in zip(*ranked, strict=True) for chosen in several)
        return list(islice(mixed, MOST_SETS))

    def _best_sets(self, values: Tensor, k: int) -> list[tuple[int, ...]]:
        """The sets of k experts with the largest sums of values (E,): of the best that can be compared."""
        pool = k
        while pool < len(values) and comb(pool + 1, k) <= COMPARED:
            pool += 1
        best = values.argsort(descending=True)[:pool].sort().values.tolist()
        sums = {chosen: sum(values[i].item() for i in chosen) for chosen in combinations(best, k)}
        return sorted(sums, key=lambda chosen: -sums[chosen])[:MOST_SETS]

    @torch.no_grad()
    def _weakness(self, site: Site) -> Tensor:
        """The mean margin of each expert alone on the clean images, (E,)."""
        x, y = self.search.block.x, self.search.block.y
        return torch.stack([margin(standardised(expert(x)), y).mean() for expert in site.owner.experts])

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
        """The paths of each row, (B, P), the weakest on the clean image first, and how many can be reached, (B,).

        Notes the likeliest other classes of each path, (B, P, TARGETS), in `self.targets`.
        """
        block, rows, can = self.search.block, self.search.rows, self.reachable()
        count = min(TARGETS, block.num_classes - 1)
        self.targets = torch.zeros(*can.shape, count, dtype=torch.long, device=can.device)
        weakness = torch.full(can.shape, -torch.inf, device=can.device)
        for path in range(len(self.choices)):
            mine = rows[can[rows, path]]
            if len(mine):
                logits, _ = self.on_path(block.x[mine], self.choices[path].expand(len(mine), -1, -1))
                weakness[mine, path] = margin(standardised(logits), block.y[mine]).nan_to_num(-1e9).clamp_min(-1e9)
                own = torch.nn.functional.one_hot(block.y[mine], logits.shape[1]).bool()
                others = logits.nan_to_num(-torch.inf).masked_fill(own, -torch.inf)
                self.targets[mine, path] = others.topk(count).indices
        return weakness.argsort(1, descending=True), can.sum(1).clamp_min(1)

    def kinds(self) -> list[tuple[Gradient, bool]]:
        """What restarts do in turn: the gradient that they follow, and whether they begin at other images.

        The model's own alone where gradients are right. A gate that is not affine by its structure may have a gradient
        that is zero or leads astray.
        """
        kinds: list[tuple[Gradient, bool]] = [("own", False)]
        if any(found is None for found in self._maps.values()):
            kinds += [("gates", False), ("slopes", False), ("local", False), ("own", True)]
        if self.blind:
            kinds += [("through", False), ("neighbours", False)]
        return kinds

    @cached_property
    def blind(self) -> bool:
        """Whether gradients do not show what the model and its parts do: functions without one are in the way, or a
        small step along them raises the margin of too few images.
        """
        block, rows = self.search.block, self.search.rows
        x, y, eps = block.x[rows], block.y[rows], block.threat_model.eps
        for part in (block.model, *parts(block.model).values()):
            z = x.detach().requires_grad_()
            with torch.enable_grad(), StraightThrough() as watched:
                part(z[:1])
            with torch.enable_grad():
                before = margin(part(z), y)
            if watched.hard or not before.requires_grad:
                return True
            (gradient,) = torch.autograd.grad(before.sum(), z)
            with torch.no_grad():
                after = margin(part(ascend_once(x, gradient, x, block.threat_model, TRIED * eps)), y)
            if float((after > before).float().mean()) < RAISED:
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
        found = [self._one_pass(z, chosen, gradient, turn) for _ in range(self._passes)]
        if len(found) == 1:
            return found[0]
        logits, lead = (torch.stack(several) for several in zip(*found, strict=True))
        return logits.mean(0), lead.mean(0)

    def _one_pass(self, z: Tensor, chosen: Tensor, gradient: Gradient, turn: int) -> tuple[Tensor, Tensor]:
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
            logits = self._pass(z)
        return logits, torch.stack(leads).amin(0)

    def _slopes_of(self, site: Site, turn: int) -> Tensor:
        distance = DISTANCES[turn % len(DISTANCES)] * self.search.block.threat_model.eps
        if (key := (site.name, distance)) not in self._slopes:
            self._slopes[key] = slopes(partial(self._asked, site), self.search.block.x, distance)
        return self._slopes[key]

    @torch.no_grad()
    def local_slopes(self, chosen: Tensor) -> Tensor:
        """Of each image's lead on its path of those chosen (B, N, K) the slopes (B, D), from corners of its ball.

        Without a gradient, and of each image alone: a router may be led elsewhere by each, or answer in steps.
        """
        block, rows = self.search.block, self.search.rows
        x, threat, generator = block.x[rows], block.threat_model, torch.Generator().manual_seed(block.seed)
        direct = all(site.name in self._direct for site in self.sites)
        total = torch.zeros_like(x)
        for _ in range(CORNERS if direct else FEW_CORNERS):
            signs = (torch.randint(0, 2, block.x.shape, generator=generator) * 2 - 1).to(block.x)[rows]
            ends = [ascend_once(x, side * signs, x, threat, threat.eps) for side in (1, -1)]
            high, low = (self._lead(end, chosen[rows], direct) for end in ends)
            total += (high - low).nan_to_num(0.0, 0.0, 0.0).view(-1, 1, 1, 1) * signs
        slopes = torch.zeros(len(block.x), x[0].numel(), device=x.device)
        slopes[rows] = total.flatten(1)
        return slopes

    def _lead(self, z: Tensor, chosen: Tensor, direct: bool) -> Tensor:
        if not direct:
            return self.on_path(z, chosen)[1]
        found = [
            routing.gap(self._asked(site, z)[:, None], chosen[:, number]) / self._scales[site.name]
            for number, site in enumerate(self.sites)
        ]
        return torch.stack(found).amin(0)

    def _asked(self, site: Site, x: Tensor) -> Tensor:
        """The scores (m, E) of a gate that sees the images as they are."""
        found = routing.scores_of(site.gate(x), len(x), site.num_experts)
        assert found is not None  # it was read before
        return logarithms(found)[:, 0]

    # --- where restarts begin -----------------------------------------------------------------------------------------

    def aimed(self, restart: "Restart") -> Tensor:
        """From each image a step of ε towards its path: (B, C, H, W)."""
        block, rows = self.search.block, self.search.rows
        z = block.x[rows].detach().requires_grad_()
        with torch.enable_grad():
            _, lead = restart.on_path(z, rows)
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

    Every reachable path is met by every kind of restart at least once, however few the restarts.
    """
    search, order = paths.search, paths.order()
    kinds = paths.kinds()
    if search.rows.numel():
        restarts = max(restarts, len(kinds) * int(order[1][search.rows].max()))
    for number in range(restarts):
        rows = search.rows
        if not len(rows):
            return
        kind, elsewhere = kinds[number % len(kinds)]
        restart = Restart.drawn(paths, order, kind, number // len(kinds), route_first=number % EVERY == EVERY - 1)
        start, first = restart.start(elsewhere)
        search.climb(restart.objective(), start, steps, rows, first)


@dataclass(frozen=True)
class Restart:
    """One restart on one path for each row, (B, …) each: the objective is

        loss(model on the path) − push · relu(ahead − the path's lead).

    which: 0 … 2, the loss of `losses`, 3 the logit of a target class minus the true one. new: whether the path is met
    for the first time. local: the image's own slopes, where these are followed.
    """

    paths: Paths
    kind: Gradient
    turn: int
    chosen: Tensor
    which: Tensor
    target: Tensor
    push: Tensor
    ahead: Tensor
    new: Tensor
    local: Tensor | None

    @classmethod
    def drawn(
        cls, paths: Paths, order: tuple[Tensor, Tensor], kind: Gradient, turn: int, route_first: bool
    ) -> "Restart":
        """With the loss, its target, the push and how far ahead it goes drawn for each row."""
        block, (ranked, many) = paths.search.block, order
        count, device = len(block.y), block.x.device
        path = ranked.gather(1, (turn % many)[:, None])[:, 0]
        chosen, others = paths.choices[path], paths.targets[torch.arange(count, device=device), path]
        which = torch.randint(4, (count,)).to(device)
        target = others.gather(1, torch.randint(others.shape[1], (count, 1)).to(device))[:, 0]
        ahead, push = (10 ** torch.empty(count).uniform_(*bounds).to(device) for bounds in (AHEAD, PUSH))
        if route_first:
            push = torch.full_like(push, ROUTE_FIRST)
        local = paths.local_slopes(chosen) if kind == "local" else None
        return cls(paths, kind, turn, chosen, which, target, push, ahead, turn < many, local)

    def on_path(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`Paths.on_path` for rows (m,), by this restart's gradient."""
        logits, lead = self.paths.on_path(z, self.chosen[rows], self.kind, self.turn)
        if self.local is not None:
            line = (z.flatten(1) * self.local[rows]).sum(1)
            lead = line + (lead - line).detach()
        return logits, lead

    def start(self, elsewhere: bool) -> tuple[Tensor, Tensor]:
        """Where it begins (B, C, H, W), and its first step (B,).

        Aimed at the path where that is new; else at an aimed, a uniform, the nearest point so far, or another image.
        """
        search, device = self.paths.search, self.new.device
        draw = torch.rand(self.new.shape).to(device)
        draw = torch.ones_like(draw) if elsewhere else draw.masked_fill(self.new, 0)
        fine = torch.tensor(FINE)[torch.randint(len(FINE), draw.shape)].to(device)
        start = self.paths.others(self.chosen)
        for least, most, points in ((UNIFORM, NEAREST, search.nearest), (AIMED, UNIFORM, search.uniform())):
            here = (draw >= least) & (draw < most)
            start = torch.where(here.view(-1, 1, 1, 1), points, start)
        here = draw < AIMED
        if bool(here[search.rows].any()):
            start = torch.where(here.view(-1, 1, 1, 1), self.paths.aimed(self), start)
        return start, torch.where((draw >= UNIFORM) & (draw < NEAREST), fine, torch.full_like(fine, COARSE))

    def objective(self) -> Objective:
        """What is climbed; it believes the model to be broken where the path is taken and its class is wrong."""
        block = self.paths.search.block
        near = None
        if self.kind == "neighbours":
            near = SPREAD * block.threat_model.eps * torch.randn(NEIGHBOURS, *block.x.shape).to(block.x)

        def once(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, lead = self.on_path(z, rows)
            y, shape = block.y[rows], standardised(logits)
            aimed = shape.gather(1, self.target[rows, None]) - shape.gather(1, y[:, None])
            value = torch.cat([losses(logits, y), aimed], 1).gather(1, self.which[rows, None])[:, 0]
            return value - self.push[rows] * (self.ahead[rows] - lead).relu(), (logits.argmax(1) != y) & (lead > 0)

        def objective(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            if near is None:
                return once(z, rows)
            values, hits = (torch.stack(many) for many in zip(*(once(z + d[rows], rows) for d in near), strict=True))
            return values.mean(0), hits.all(0)

        return objective


def square_attack(block: Block, queries: int, shift: int) -> SquareAttack:
    """Square (Andriushchenko et al. 2020), by pyautoattack, with the block's seed shifted."""
    threat, seed = block.threat_model, (block.seed + shift) % 2**32
    return SquareAttack(
        block.model, norm=threat.norm, eps=threat.eps, n_queries=queries, seed=seed, device=block.x.device
    )


def square_on_paths(paths: Paths, queries: int) -> None:
    """Square on each path: `queries` where gradients cannot be believed,
    else SOME_QUERIES of them on all paths together.

    What it maximises is the least of the path's margin and its lead: a point where both are positive breaks the model.
    """
    search, block = paths.search, paths.search.block
    can = paths.reachable()
    if not paths.blind:
        queries = max(1, int(SOME_QUERIES * queries / max(1, int(can[search.rows].sum(1).max()))))
    for number, path in enumerate(paths.choices):
        rows = search.rows[can[search.rows, number]]
        if not len(rows):
            continue
        attack = square_attack(block, queries, 104729 * (number + 1))

        def asked(x: Tensor, y: Tensor, path: Tensor = path) -> tuple[Tensor, Tensor]:
            logits, lead = paths.on_path(x, path.expand(len(x), -1, -1))
            value = -torch.minimum(margin(standardised(logits), y), lead)
            return value, value

        attack.margin_and_loss = asked
        search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

"""The paths of a block's model: which there are, which can be reached, and the model led along one.

A path is a choice at every routing site (`bench.models.sites`): a set of K experts for an MoE, a pair of such sets for
a dual. A mixture of all experts has paths too, one to each of them, since a decided softmax hides the others from
gradients; they are a matter of their own (`Paths.mixed`), so that they take no path away from what chooses.

Axes: B = examples of the block, m = rows that are attacked, P = paths, N = sites, T = tokens, E = experts, K = selected
experts of the site with the most, D = pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, combinations, islice, product
from math import comb, prod
from typing import Literal

import torch
from torch import Tensor, nn

from bench.attacks.affine import affine_map, reachable_pairs
from bench.attacks.deviations import Deviations, Path, alone, combined, joined
from bench.attacks.gradients import StraightThrough, in_place_allowed, logarithms, readable, slopes
from bench.attacks.search import RAISED, Search, climbs, margin, raised, standardised
from bench.models import sites as routing
from bench.models.foreign import Guarded, behind
from bench.models.parts import parts
from bench.models.sites import Site
from bench.spec import NOT_FORCED

#: Whose gradient is followed: the model's own; that of a smooth stand-in (`StraightThrough`) for what has none, in the
#: gates alone or in the whole model; the slopes of the scores, their mean over the block or each image's own; the mean
#: over Gaussian neighbours; that of the path's experts, whatever the model makes of what they say, beside that of the
#: gates' stand-ins or each image's own slopes.
Gradient = Literal["own", "gates", "slopes", "local", "through", "neighbours", "experts", "experts-local"]

#: How many sets of experts are tried at one site with more: the likeliest by the router and the weakest by the experts'
#: margins, in turn; and how many are compared for that.
MOST_SETS, COMPARED = 64, 5000
#: How many choices at single sites are compared, by a pass each, where there are too many paths for all.
SINGLES = 256
#: How far slopes are measured, in ε, in turn.
DISTANCES = (1.0, 0.25)
#: From which score on the lowest one can be a mask's: that of code for half precision is the largest in use.
CLOSED = -1e4
#: Passes that a model which answers by chance is averaged over on a path.
EXPECTED = 5


@dataclass
class Paths:
    """The paths of a block's model.

    limit: how many are attacked at most. mixed: the paths of soft mixtures, led to one expert at a time, instead
    of those of the sites that choose. possible: how many there are. choices (P, N, K): the experts of each path
    at each site, -1 where it is free. deviations: what a choice then means, where the sites are gates inside a network
    of more paths than can be forced. notes: in words, what attacks on these paths leave out.
    """

    search: Search
    limit: int
    mixed: bool = False
    sites: list[Site] = field(init=False)
    choices: Tensor = field(init=False)
    possible: int = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)
    deviations: Deviations | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        block, known = self.search.block, routing.sites(self.search.block.model)
        every = asked = [site for site in known if not site.soft]
        if self.mixed:
            asked = [site for site in known if site.soft and not site.choosers]
            every = [site for site in every if any(routing.host(one, [site]) for one in asked)]
            every += [replace(site, k=1) for site in asked]
        every = [site for site in every if site.k]
        self._pass: Callable[[Tensor], Tensor] = block.model
        self._passes = 1
        if isinstance(block.model, Guarded) and block.model.draws > 1:
            self._pass, self._passes = block.model.once, EXPECTED
        with torch.no_grad():
            nothing = routing.Reading(block.x, {}, {})
            seen = routing.read(self._pass, every, block.x) if every else nothing
            self._apart, inputs = seen.apart, seen.inputs
            found = {name: scores for name, scores in seen.scores.items() if len(scores) == len(block.x)}
            for site in every:  # an expert that is routed itself may not be asked about every image
                if site.name not in found and (host := routing.host(site, every)) and host[0].name in found:
                    with routing.intercepted(host[0], partial(_sent, host[1])):
                        seen = routing.read(self._pass, [site], block.x)
                    found, inputs = found | seen.scores, inputs | seen.inputs
            found = {name: scores for name, scores in found.items() if len(scores) == len(block.x)}
        self.sites = [site for site in every if site.name in found]
        if self.mixed and not any(site.name in found for site in asked):
            self.sites = []
        self.notes += [f"{one.name}: {NOT_FORCED}" for one in asked if one.name not in found]
        hosts = {site.name: routing.host(site, self.sites) for site in self.sites}
        #: for a site inside an expert: the number of the site that chooses that expert, and the expert's
        self._inside = {
            number: (self.sites.index(host[0]), host[1])
            for number, site in enumerate(self.sites)
            if (host := hosts[site.name]) is not None
        }
        self._hosts_first = sorted(range(len(self.sites)), key=self._depth)
        #: by site: the score of experts that the gate closes, where it closes any
        self._closed = {name: at for name, scores in found.items() if (at := closed_score(scores)) is not None}
        self._scores = {name: self._readable(name, scores) for name, scores in found.items()}
        alone = {site.name for site in self.sites if site.calls == 1 and (site.whole or site.call is None)}
        #: gates of whole images that see them as the model, or what it wraps, does, so that they can be asked alone
        self._direct = {
            name
            for name, seen in inputs.items()
            if name in found
            and found[name].shape[1] == 1
            and name in alone
            and seen.shape == block.x.shape
            and torch.equal(seen, self._given)
        }
        self._maps = {site.name: self._affine(site) for site in self.sites}
        self._scales = {site.name: self._scale(site) for site in self.sites}
        self._slopes: dict[tuple[str, float], Tensor] = {}
        tokens = max((len(one[0]) for one in self._scores.values()), default=1)
        many = prod(comb(site.num_experts, site.k) for site in self.sites) > self.limit
        if self.sites and not any(site.whole for site in self.sites) and (many or tokens > 1):
            clean = [self._scores[site.name] for site in self.sites]
            self.deviations = Deviations(self.sites, clean, self._matter())
        self.choices = self._enumerated().to(block.x.device)
        self.possible = self._count()
        if len(self.choices) < self.possible:
            possible = f"{self.possible:,}" if self.possible < 10**9 else f"{float(self.possible):.0e}"
            self.notes.append(f"{len(self.choices):,} of {possible} paths attacked")

    def _affine(self, site: Site) -> tuple[Tensor, Tensor] | None:
        x = self.search.block.x
        shown = site.name in self._direct and site.call is None and self._given is x
        return affine_map(site.gate, x) if shown else None

    @cached_property
    def _given(self) -> Tensor:
        """The block's images (B, …) as an MoE or dual is given them: behind what wraps it, if anything does."""
        model, x = self.search.block.model, self.search.block.x
        if not isinstance(model, Guarded) or model.shown.wrapped is None:
            return x
        with torch.no_grad():
            found: Tensor = behind(model, nn.Identity(), scores=True)(x)
        return found

    def _scale(self, site: Site) -> Tensor:
        """The median gap of the site's natural route on the clean images."""
        best = self._scores[site.name].topk(site.k + 1, dim=-1).values
        return (best[..., site.k - 1] - best[..., site.k]).median().clamp_min(1e-6)

    def _depth(self, number: int) -> int:
        """How many sites lead to one."""
        return 1 + self._depth(self._inside[number][0]) if number in self._inside else 0

    # --- which paths there are ----------------------------------------------------------------------------------------

    def _options(self, site: Site) -> list[tuple[int, ...]]:
        """The sets of K experts of a site that are tried, the most promising first."""
        likely = self._scores[site.name].mean((0, 1))
        if comb(site.num_experts, site.k) <= min(MOST_SETS, self.limit):
            return list(combinations(range(site.num_experts), site.k))
        by, never = [likely], self._never_first(site)
        if site in self.among_classifiers:
            by.append(self._weakness(site))
        ranked = [self._best_sets(values.masked_fill(never, -torch.inf), site.k) for values in by]
        mixed = dict.fromkeys(chosen for several in zip(*ranked, strict=True) for chosen in several)
        return list(islice(mixed, MOST_SETS))

    def _never_first(self, site: Site) -> Tensor:
        """Which experts (E,) no image of the block can be led to alone: known of an affine gate that selects one."""
        if site.k > 1 or (found := self._maps[site.name]) is None:
            return torch.zeros(site.num_experts, dtype=torch.bool, device=self.search.block.x.device)
        ahead = reachable_pairs(*found, self.search.block.x, self.search.block.threat_model)
        return ~ahead.all(2).any(0)

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
        experts = [behind(self.search.block.model, expert) for expert in site.owner.experts]
        return torch.stack([margin(standardised(expert(x)), y).mean() for expert in experts])

    def _enumerated(self) -> Tensor:
        """The choices of all paths; where they are too many, of those that force few sites, the weakest first.

        A site inside an expert is free where that expert is not chosen.
        """
        width = max((site.k for site in self.sites), default=1)
        options = [
            [[*chosen, *chosen[-1:] * (width - site.k)] for chosen in self._options(site)] for site in self.sites
        ]
        if not options:
            return torch.zeros(0, 0, width, dtype=torch.long)
        if self.deviations is not None:
            options = [self.deviations.singles(number) for number in range(len(options))]
        else:
            whole = list(islice(self._whole(options, [[-1] * width] * len(options)), self.limit + 1))
            if len(whole) <= self.limit:
                return torch.tensor(whole)
            if len(options) == 1:
                return torch.tensor(whole[: self.limit])
            options = [sets[: max(2, SINGLES // len(options))] for sets in options]
        singles = [[self._led(number, chosen, options) for chosen in sets] for number, sets in enumerate(options)]
        found = combined(singles, self.limit, self._weakness_of)
        if self.deviations is None:  # few forced sites are more than one of them made weaker
            pairs = (joined(*both) for some in combinations(singles, 2) for both in product(*some))
            for path in chain(*singles, pairs):
                if path is not None and path not in found and len(found) < self.limit:
                    found.append(path)
        return torch.tensor(found)

    def _whole(self, options: Sequence[Sequence[list[int]]], path: Path, at: int = 0) -> Iterator[Path]:
        """The paths that choose at every site, but for those inside an expert that is not chosen."""
        if at == len(options):
            yield path
            return
        number = self._hosts_first[at]
        outer, expert = self._inside.get(number, (number, -1))
        for chosen in options[number] if expert < 0 or expert in path[outer] else [path[number]]:
            yield from self._whole(options, [*path[:number], chosen, *path[number + 1 :]], at + 1)

    def _led(self, number: int, chosen: list[int], options: Sequence[Sequence[list[int]]]) -> Path:
        """The path that makes a choice at one site, and those at the sites around it which lead there."""
        path = alone(number, chosen, len(self.sites))
        while number in self._inside:
            number, expert = self._inside[number]
            path[number] = next((sets for sets in options[number] if expert in sets), [expert] * len(chosen))
        return path

    def _readable(self, name: str, scores: Tensor) -> Tensor:
        """A site's scores as leads are measured in: of probabilities the logarithms, of closed experts finite ones."""
        at = self._closed.get(name)
        return logarithms(scores) if at is None else readable(scores, at)

    def clean(self, site: Site) -> Tensor:
        """The site's scores on the clean images of the block, (B, T, E)."""
        return self._scores[site.name]

    def gap_of(self, site: Site) -> Tensor:
        """The median gap of the site's natural route on the clean images."""
        return self._scales[site.name]

    def _matter(self) -> list[Tensor]:
        """How much each token matters at each site, (B, T): the margin's gradient by its scores."""
        block, seen = self.search.block, dict[str, Tensor]()

        def keep(name: str, scores: Tensor) -> Tensor:
            seen[name] = scores if scores.requires_grad else scores.requires_grad_()
            return seen[name].clone()  # the model may work on them in place

        with torch.enable_grad(), ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(routing.intercepted(site, partial(keep, site.name)))
            value = margin(self._pass(block.x.detach().requires_grad_()), block.y).sum()
            known = [seen[site.name] for site in self.sites]
            found = torch.autograd.grad(value, known, allow_unused=True) if value.requires_grad else [None] * len(known)
        pairs = zip(found, known, strict=True)
        return [(torch.zeros_like(s) if g is None else g).detach().nan_to_num(0.0).abs().sum(-1) for g, s in pairs]

    @torch.no_grad()
    def _weakness_of(self, path: list[list[int]]) -> float:
        """The mean margin of the model on a path on the clean images."""
        block, rows = self.search.block, self.search.rows
        logits, _ = self.on_path(block.x[rows], torch.tensor(path).to(rows).expand(len(rows), -1, -1), rows=rows)
        return float(margin(standardised(logits), block.y[rows]).nan_to_num(-1e9).mean())

    def _count(self) -> int:
        """How many paths there are."""
        if not self.sites:
            return 0
        counts = [comb(site.num_experts, site.k) ** self._scores[site.name].shape[1] for site in self.sites]
        if any(site.whole for site in self.sites):
            counts = [comb(site.num_experts, site.k) for site in self.sites]
        for number in reversed(self._hosts_first):
            if number in self._inside:
                outer, _ = self._inside[number]
                with_it = comb(self.sites[outer].num_experts - 1, self.sites[outer].k - 1)
                counts[outer] += with_it * (counts[number] - 1)
        return prod(count for number, count in enumerate(counts) if number not in self._inside)

    @cached_property
    def reachable(self) -> Tensor:
        """Which paths (B, P) an image can be led to: of affine gates at least all that are, of others every one."""
        block = self.search.block
        can = torch.ones(len(block.x), len(self.choices), dtype=torch.bool, device=block.x.device)
        for number, site in enumerate(self.sites):
            if (found := self._maps[site.name]) is not None:
                ahead = reachable_pairs(*found, block.x, block.threat_model)
                for path, chosen in enumerate(self.choices[:, number]):
                    if chosen[0] >= 0 and self.deviations is None:
                        mine = routing.wanted(chosen[None], site.num_experts)[0]
                        can[:, path] &= ahead[:, mine][:, :, ~mine].flatten(1).all(1)
        return can

    @property
    def affine(self) -> bool:
        """Whether every gate is affine in the pixels by its structure."""
        return all(found is not None for found in self._maps.values())

    @property
    def direct(self) -> bool:
        """Whether every gate sees the images as they are, so that leads cost no pass through the experts."""
        return all(site.name in self._direct for site in self.sites)

    @cached_property
    def blind(self) -> bool:
        """Whether gradients do not show what the model and its parts do: functions without one are in the way, or a
        small step along them raises the margin of too few images.
        """
        block, rows = self.search.block, self.search.rows
        x, y = block.x[rows], block.y[rows]
        for part in (block.model, *parts(block.model).values()):
            with torch.enable_grad(), StraightThrough() as watched:
                part(x[:1].detach().requires_grad_())
            if watched.hard or raised(part, x, y, block.threat_model) < RAISED:
                return True
        return False

    @cached_property
    def cut(self) -> bool:
        """Whether no gradient by the pixels reaches the lead of a path, though gates have stand-ins for what has none:
        something before a gate keeps it, as `no_grad` does.
        """
        block, chosen = self.search.block, self.choices[:MOST_SETS]
        rows = torch.zeros(len(chosen), dtype=torch.long, device=block.x.device)
        z = block.x[rows].detach().requires_grad_()
        with torch.enable_grad():
            _, lead = self.on_path(z, chosen, "gates", rows=rows)
            if not lead.requires_grad:
                return True
            (gradient,) = torch.autograd.grad(lead.sum(), z, allow_unused=True)
        return gradient is None or bool((gradient == 0).flatten(1).all(1).any())

    def led_by(self, gradient: Gradient) -> bool:
        """Whether a small step along a gradient raises the leads of paths, each of nearly all images."""
        block, rows = self.search.block, self.search.rows

        def lead(chosen: Tensor, z: Tensor) -> Tensor:
            return self.on_path(z, chosen.expand(len(rows), -1, -1), gradient, rows=rows)[1]

        every = (climbs(partial(lead, path), block.x[rows], block.threat_model) for path in self.choices[:MOST_SETS])
        return len(rows) > 0 and min(every) >= RAISED

    # --- the model on a path ------------------------------------------------------------------------------------------

    def on_path(
        self, z: Tensor, chosen: Tensor, gradient: Gradient = "own", turn: int = 0, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits (m, C) for z (m, …) on the paths chosen (m, N, K), and by how much each path leads there (m,).

        `rows` (m,): where z are in the block, which deviations depend on.

        A path's lead is the least over its sites, each in median gaps of the site's natural route; above 0 the model
        takes the path by itself, and the logits are its own.
        """
        if not self._inside and not self._apart:
            return self._along(z, chosen, gradient, turn, rows)
        if self._apart:
            groups = list(torch.split(torch.arange(len(z), device=z.device), 1))
        else:  # an expert is not asked about all rows, so that its own site can be forced on rows of one path alone
            different, which = torch.unique(chosen.flatten(1), dim=0, return_inverse=True)
            groups = [(which == number).nonzero()[:, 0] for number in range(len(different))]
        found = [self._along(z[group], chosen[group], gradient, turn) for group in groups]
        back = torch.cat(groups).argsort()
        return torch.cat([logits for logits, _ in found])[back], torch.cat([lead for _, lead in found])[back]

    def _along(
        self, z: Tensor, chosen: Tensor, gradient: Gradient, turn: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`on_path`, where every site is asked about all rows, or all rows are on one path."""
        found = [self._one_pass(z, chosen, gradient, turn, rows) for _ in range(self._passes)]
        if len(found) == 1:
            return found[0]
        logits, lead = (torch.stack(several) for several in zip(*found, strict=True))
        return logits.mean(0), lead.mean(0)

    def _one_pass(
        self, z: Tensor, chosen: Tensor, gradient: Gradient, turn: int, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        leads: list[Tensor] = [torch.full((len(z),), torch.inf, device=z.device)]
        by_slopes = [site for site in self.sites if gradient == "slopes" and site.name in self._direct]
        lines = {site.name: (z.flatten(1) @ self._slopes_of(site, turn).to(z).T)[:, None] for site in by_slopes}

        def change(number: int, scores: Tensor) -> Tensor:
            site = self.sites[number]
            if len(scores) != len(z):  # some rows of a path that does not lead here
                return routing.forced(scores, chosen[:1, number].expand(len(scores), -1))
            known = self._readable(site.name, scores)
            if (line := lines.get(site.name)) is not None:
                known = line + (known - line).detach()
            if self.deviations is None:
                mine, k = routing.wanted(chosen[:, number], site.num_experts)[:, None].expand_as(scores), 1
            else:
                assert rows is not None
                mine, k = self.deviations.forced(number, chosen[:, number], rows), site.k
            leads.append(routing.ahead(known, mine, k) / self._scales[site.name])
            return routing.lifted(scores, mine, k, self._closed.get(site.name))

        smooth = gradient in ("gates", "experts")
        around: Callable[[], AbstractContextManager[object]] = StraightThrough if smooth else nullcontext
        with ExitStack() as stack:
            if gradient != "own":  # what a model works on in place may have a gradient through a gate's stand-in
                stack.enter_context(StraightThrough() if gradient == "through" else in_place_allowed())
            for number, site in enumerate(self.sites):
                stack.enter_context(routing.intercepted(site, partial(change, number), around))
            logits = self._pass(z)
        logits = self._of_experts(z, chosen) if gradient.startswith("experts") else logits
        return logits, torch.stack(leads).amin(0)

    @property
    def among_classifiers(self) -> list[Site]:
        """The sites whose experts are classifiers of the images: a model's own, or those of a dual's branches."""
        return [site for number, site in enumerate(self.sites) if site.whole and number not in self._inside]

    def _of_experts(self, z: Tensor, chosen: Tensor) -> Tensor:
        """The mean logits (m, C) of the classifiers of each path chosen (m, N, K)."""
        found = []
        for site in self.among_classifiers:
            experts = [behind(self.search.block.model, expert) for expert in site.owner.experts]
            mine = routing.wanted(chosen[:, self.sites.index(site)], site.num_experts).to(z)
            logits = torch.stack([standardised(expert(z)) for expert in experts], 1)
            found.append((logits * mine[..., None]).sum(1) / mine.sum(1, keepdim=True).clamp_min(1))
        return torch.stack(found).sum(0)

    def _slopes_of(self, site: Site, turn: int) -> Tensor:
        distance = DISTANCES[turn % len(DISTANCES)] * self.search.block.threat_model.eps
        if (key := (site.name, distance)) not in self._slopes:
            self._slopes[key] = slopes(partial(self._asked, site), self.search.block.x, distance)
        return self._slopes[key]

    def lead(self, z: Tensor, chosen: Tensor) -> Tensor:
        """By how much each path chosen (m, N, K) leads at z, (m,), as `on_path` has it."""
        if not self.direct:
            return self.on_path(z, chosen)[1]
        found = [
            routing.gap(self._asked(site, z)[:, None], chosen[:, number]) / self._scales[site.name]
            for number, site in enumerate(self.sites)
        ]
        return torch.stack(found).amin(0)

    def _asked(self, site: Site, x: Tensor) -> Tensor:
        """The scores (m, E) of a gate that sees the images as they are."""
        gate = behind(self.search.block.model, site.gate, scores=True)
        found = routing.scores_of(gate(x), len(x), site.num_experts)
        assert found is not None  # it was read before
        return self._readable(site.name, found)[:, 0]

    def takers(self, chosen: Tensor) -> Tensor:
        """Which clean images of the block (B, B) take each of the paths chosen (B, N, K); of deviations none."""
        count = len(self.search.block.x)
        takes = torch.full((count, count), self.deviations is None, device=chosen.device)
        for number, site in enumerate(self.sites if self.deviations is None else ()):
            scores = self._scores[site.name]
            lead = [routing.gap(scores, one.expand(len(scores), -1)) for one in chosen[:, number]]
            takes &= torch.stack(lead) > 0
        return takes


def closed_score(scores: Tensor) -> float | None:
    """The score that a gate gives to all experts that it closes, -∞ or a large negative one; None where none is seen.

    A mask gives the same number wherever it closes: the lowest, more than once among the scores (B, T, E).
    """
    lowest = scores.min()
    return float(lowest) if lowest <= CLOSED and (scores == lowest).sum() > 1 else None


def _sent(expert: int, scores: Tensor) -> Tensor:
    """Scores that send every image to an expert."""
    return routing.forced(scores, torch.full((len(scores), 1), expert, device=scores.device))

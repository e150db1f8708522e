"""Attacks on paths: make the experts of a path wrong, and the model take that path.

Restarts of Auto-PGD on the paths of a block in turn, and Square on each. Axes as in `bench.attacks.paths`: B = examples
of the block, m = rows that are attacked, P = paths, N = sites, K = selected experts, C = classes, D = pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, product
from typing import Literal

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor
from torch.nn.functional import one_hot

from bench.attacks.block import Block
from bench.attacks.deviations import SCOPE
from bench.attacks.paths import Gradient, Paths
from bench.attacks.search import Objective, losses, margin, standardised
from bench.pgd import ascend_once, finite, project

#: Where a restart begins.
Beginning = Literal["drawn", "elsewhere", "away"]
#: How far ahead the path is pushed, in median gaps of the natural route, and how hard: exponents of ten, from … to.
AHEAD, PUSH = (-2.0, 0.0), (-1.0, 2.0)
#: A push that outweighs every loss, in every sixth restart: the route comes first, and the loss where it is won.
ROUTE_FIRST, EVERY = 1e3, 6
#: Where restarts begin, after the first on a path, which is aimed at it: cumulated probabilities of an aimed point, a
#: uniform one, the nearest to being broken so far; the rest begin at other images that take the path.
AIMED, UNIFORM, NEAREST = 0.15, 0.3, 0.9
#: The first steps of a restart, in ε: Auto-PGD's own, and finer ones from the nearest point so far.
COARSE, FINE = 2.0, (1 / 4, 1 / 32)
#: Where tokens or many gates are routed, there are more ways than restarts: so many times more of these for an image
#: whose standardised margin has come so near to 0. What longer attacks broke of a V-MoE had all come above −0.45.
AGAIN, NEAR = 4, -0.5
#: How many Gaussian neighbours are averaged, and how far they lie, in ε.
NEIGHBOURS, SPREAD = 4, 0.125
#: Pairs of corners of the ball that an image's own slopes are taken from, where the gates can be asked alone, and else.
CORNERS, FEW_CORNERS = 512, 16
#: The share of the pixels in which every second of the many corners leans to where the path has been found to lie.
LEANING = 0.5
#: How far away, in ε, the likeliest class must be to count as a decoy, where another is within ε; restarts past it.
DECOY, PAST = 10.0, 3
#: A path's other classes that a restart may aim at, the likeliest first.
TARGETS = 5
#: Restarts that follow one gradient from a drawn start, which may be the right one throughout.
RIGHT: tuple[tuple[Gradient, Beginning], ...] = (("own", "drawn"), ("gates", "drawn"), ("through", "drawn"))
#: The share of Square's queries that paths get where gradients can be believed.
SOME_QUERIES = 1 / 4


def forced_paths(paths: Paths, restarts: int, steps: int) -> None:
    """Auto-PGD on the paths that each image can be led to, in turn, the weakest first.

    Every reachable path is met by every kind of restart at least once, however few the restarts. Of deviations, which
    are a few of very many paths, images that came near to being broken are met AGAIN times more. At the end, what a
    decoy may have kept from all of them.
    """
    search, ranking = paths.search, Ranking.of(paths)
    turns = kinds(paths)
    most = int(ranking.reachable[search.rows].max()) if search.rows.numel() else 0
    restarts = max(restarts, len(turns) * most)
    again = 0 if paths.deviations is None else AGAIN
    for number, (kind, beginning, turn) in enumerate(islice(in_turn(paths, turns, most), restarts * (1 + again))):
        rows = search.rows if number < restarts else search.rows[search.best[search.rows] > NEAR]
        if not len(rows):
            break
        restart = Restart.drawn(paths, ranking, kind, turn, route_first=number % EVERY == EVERY - 1)
        start, first = restart.start(beginning)
        search.climb(restart.objective(), start, steps, rows, first)
    for rows, restart in past_decoys(paths, ranking, turns):
        start, first = restart.start("drawn")
        search.climb(restart.objective(), start, steps, rows, first)


def kinds(paths: Paths) -> list[tuple[Gradient, Beginning]]:
    """What restarts do in turn: the gradient that they follow, and where they begin.

    The model's own alone where gradients are right. A gate that is not affine by its structure may have a gradient that
    is zero or leads astray: what opens a path may lie the other way.
    """
    turns: list[tuple[Gradient, Beginning]] = [("own", "drawn")]
    if paths.deviations is not None:
        turns += [("gates", "drawn"), ("own", "elsewhere")]
    elif not paths.affine:
        turns += [("gates", "drawn"), ("slopes", "drawn"), ("local", "drawn"), ("own", "elsewhere"), ("gates", "away")]
    if paths.blind or (not paths.affine and paths.cut):
        turns += [("through", "drawn")]
    if paths.blind:
        turns += [("neighbours", "drawn")]
        if paths.among_classifiers:
            turns += [("experts", "drawn")]
            turns += [("experts-local", "drawn")] * (not paths.affine)  # what hides the experts' may hide the gates'
    return turns


def in_turn(
    paths: Paths, turns: Sequence[tuple[Gradient, Beginning]], most: int
) -> Iterator[tuple[Gradient, Beginning, int]]:
    """The kinds of restarts, each with the number of its turn, in which all are made once on one of an image's paths.

    Once all paths, `most` at least, have had their turn, half of the restarts follow a gradient that leads to the paths
    of a gate of whole networks that is not affine, where one does.
    """
    later = turns
    if not paths.affine and paths.among_classifiers:
        right = [each for each in turns if each in RIGHT and paths.led_by(each[0])][:1]
        later = [each for other in turns if other not in right for each in (*right, other)]
    for turn in count():
        yield from ((*each, turn) for each in (turns if turn < most else later))


#: Kinds that raise a path's lead by each image's own slopes.
BY_LOCAL_SLOPES = ("local", "experts-local")


@dataclass(frozen=True)
class Ranking:
    """The paths of each row in the order in which they are attacked.

    order (B, P): the weakest on the clean image first, those out of reach last. reachable (B,): how many can be
    reached, at least one. targets (B, P, TARGETS): the likeliest other classes on each path.
    """

    order: Tensor
    reachable: Tensor
    targets: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, paths: Paths) -> "Ranking":
        block, rows, can = paths.search.block, paths.search.rows, paths.reachable
        count = min(TARGETS, block.num_classes - 1)
        targets = torch.zeros(*can.shape, count, dtype=torch.long, device=can.device)
        weakness = torch.full(can.shape, -torch.inf, device=can.device)
        for path in range(len(paths.choices)):
            mine = rows[can[rows, path]]
            if len(mine):
                chosen = paths.choices[path].expand(len(mine), -1, -1)
                logits, _ = paths.on_path(block.x[mine], chosen, rows=mine)
                weakness[mine, path] = margin(standardised(logits), block.y[mine]).nan_to_num(-1e9).clamp_min(-1e9)
                own = one_hot(block.y[mine], logits.shape[1]).bool()
                others = logits.nan_to_num(-torch.inf).masked_fill(own, -torch.inf)
                targets[mine, path] = others.topk(count).indices
        return cls(weakness.argsort(1, descending=True), can.sum(1).clamp_min(1), targets)


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
    def drawn(cls, paths: Paths, ranking: Ranking, kind: Gradient, turn: int, route_first: bool) -> "Restart":
        """With the loss, its target, the push and how far ahead it goes drawn for each row."""
        block, many = paths.search.block, ranking.reachable
        count, device = len(block.y), block.x.device
        path = ranking.order.gather(1, (turn % many)[:, None])[:, 0]
        chosen, others = paths.choices[path], ranking.targets[torch.arange(count, device=device), path]
        which = torch.randint(4, (count,)).to(device)
        target = others.gather(1, torch.randint(others.shape[1], (count, 1)).to(device))[:, 0]
        ahead, push = (10 ** torch.empty(count).uniform_(*bounds).to(device) for bounds in (AHEAD, PUSH))
        if route_first:
            push = torch.full_like(push, ROUTE_FIRST)
        local = local_slopes(paths, chosen) if kind in BY_LOCAL_SLOPES else None
        return cls(paths, kind, turn, chosen, which, target, push, ahead, turn < many, local)

    def on_path(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`Paths.on_path` for rows (m,), by this restart's gradient."""
        logits, lead = self.paths.on_path(z, self.chosen[rows], self.kind, self.turn, rows)
        if self.local is not None:
            line = (z.flatten(1) * self.local[rows]).sum(1)
            lead = line + (lead - line).detach()
        return logits, lead

    def start(self, beginning: Beginning) -> tuple[Tensor, Tensor]:
        """Where it begins (B, C, H, W), and its first step (B,).

        Aimed at the path where that is new; else at an aimed, a uniform, the nearest point so far, or another image.
        `elsewhere`: at another image; `away`: a step of ε away from the path.
        """
        search, device = self.paths.search, self.new.device
        draw = torch.rand(self.new.shape).to(device)
        draw = torch.ones_like(draw) if beginning == "elsewhere" else draw.masked_fill(self.new, 0)
        fine = torch.tensor(FINE)[torch.randint(len(FINE), draw.shape)].to(device)
        start = other_images(self.paths, self.chosen)
        for least, most, points in ((UNIFORM, NEAREST, search.nearest), (AIMED, UNIFORM, search.uniform())):
            here = (draw >= least) & (draw < most)
            start = torch.where(here.view(-1, 1, 1, 1), points, start)
        here = draw < AIMED
        if bool(here[search.rows].any()):
            start = torch.where(here.view(-1, 1, 1, 1), self.aimed(), start)
        if beginning == "away":
            return self.aimed(-1), torch.full_like(fine, COARSE)
        return start, torch.where((draw >= UNIFORM) & (draw < NEAREST), fine, torch.full_like(fine, COARSE))

    def aimed(self, side: int = 1) -> Tensor:
        """From each image a step of ε towards its path, or, on side −1, away from it: (B, C, H, W)."""
        block, rows = self.paths.search.block, self.paths.search.rows
        z = block.x[rows].detach().requires_grad_()
        with torch.enable_grad():
            _, lead = self.on_path(z, rows)
        start = block.x.clone()
        if lead.requires_grad:
            (found,) = torch.autograd.grad(lead.sum(), z, allow_unused=True)  # a quantized layer's may be of its bias
            ascent = torch.zeros_like(z) if found is None else side * finite(found)
            start[rows] = ascend_once(block.x[rows], ascent, block.x[rows], block.threat_model, block.threat_model.eps)
        return start

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


def other_images(paths: Paths, chosen: Tensor) -> Tensor:
    """For each row the clean image of another, brought into the row's ball: (B, C, H, W).

    By chance one of those that take its path, chosen (B, N, K), where there are any, else one of another class.
    """
    block, takers = paths.search.block, paths.takers(chosen)
    takers = torch.where(takers.any(1, keepdim=True), takers, block.y[:, None] != block.y)
    draw = torch.rand(takers.shape).to(takers.device).masked_fill(~takers, -1)
    return project(block.x[draw.argmax(1)], block.x, block.threat_model)


def past_decoys(
    paths: Paths, ranking: Ranking, turns: Sequence[tuple[Gradient, Beginning]]
) -> Iterator[tuple[Tensor, Restart]]:
    """Restarts, each with its rows (m,), on paths whose likeliest other class is a decoy, towards the nearest class.

    A decoy stays just behind the true class and leads nowhere: the margin, DLR and cross-entropy see nothing else. By
    the distance to the linearised boundary (Melamed et al. 2024) it is far away, and another class is not.
    """
    search, block = paths.search, paths.search.block
    for path, choice in enumerate(paths.choices if ranking.targets.shape[2] > 1 else ()):
        rows = search.rows[paths.reachable[search.rows, path]]
        if not len(rows):
            continue
        decoyed, nearest = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows)
        for distances in _distances(paths, rows, choice, ranking.targets[rows, path]):
            near = (distances[:, 1:] > 0).all(1) & (distances[:, 1:].amin(1) < block.threat_model.eps)
            here = near & (distances[:, 0] > DECOY * block.threat_model.eps)
            decoyed, nearest = decoyed | here, torch.where(here, distances.argmin(1), nearest)
        target = torch.zeros_like(block.y)
        target[rows] = ranking.targets[rows, path].gather(1, nearest[:, None])[:, 0]
        for kind, turn in product((kind for kind, _ in turns), range(PAST)):
            if not len(unbroken := rows[decoyed & search.unbroken[rows]]):
                break
            drawn = Restart.drawn(paths, ranking, "own", turn, route_first=turn == PAST - 1)
            chosen, which = choice.expand_as(drawn.chosen), torch.full_like(drawn.which, 3)
            local = local_slopes(paths, chosen) if kind in BY_LOCAL_SLOPES else None
            yield unbroken, replace(drawn, kind=kind, chosen=chosen, which=which, target=target, local=local)


def _distances(paths: Paths, rows: Tensor, choice: Tensor, targets: Tensor) -> list[Tensor]:
    """How far rows (m,) on a path are from each of the targets (m, T), where that is linearised: (m, T), in two ways.

    Gaps are relative to the true logit's lead on the least and on the middle one: a gate's weight scales all logits,
    and brings no class nearer. Nothing where the logits have no gradient.
    """
    block = paths.search.block
    z, order = block.x[rows].detach().requires_grad_(), 1 if block.threat_model.norm == "Linf" else 2
    with torch.enable_grad():
        logits, _ = paths.on_path(z, choice.expand(len(rows), -1, -1), rows=rows)
        own = logits.gather(1, block.y[rows, None])
        if not logits.requires_grad:
            return []
        found = []
        for other in (logits.amin(1, keepdim=True), logits.median(1, keepdim=True).values):
            gaps = (own - logits.gather(1, targets)) / (own - other).clamp_min(1e-12)
            slopes = [torch.autograd.grad(gap.sum(), z, retain_graph=True)[0] for gap in gaps.T]
            sizes = torch.stack([slope.flatten(1).norm(p=order, dim=1) for slope in slopes], 1)
            found.append((gaps.detach() / sizes.clamp_min(1e-12)).nan_to_num(torch.inf))
    return found


@torch.no_grad()
def local_slopes(paths: Paths, chosen: Tensor) -> Tensor:
    """Of each image's lead on its path of those chosen (B, N, K) the slopes (B, D), from corners of its ball.

    Without a gradient, and of each image alone: a router may be led elsewhere by each, or answer in steps.
    """
    block, rows = paths.search.block, paths.search.rows
    x, threat, generator = block.x[rows], block.threat_model, torch.Generator().manual_seed(block.seed)
    total = torch.zeros_like(x)
    for number in range(CORNERS if paths.direct else FEW_CORNERS):
        signs = (torch.randint(0, 2, block.x.shape, generator=generator) * 2 - 1).to(block.x)[rows]
        mean = torch.zeros_like(signs)
        if paths.direct and number % 2:  # a route that few corners open is open for more of these
            leans = (torch.rand(block.x.shape, generator=generator) < LEANING).to(signs.device)[rows]
            signs, mean = torch.where(leans & (total != 0), total.sign(), signs), LEANING * total.sign()
        ends = [ascend_once(x, side * signs, x, threat, threat.eps) for side in (1, -1)]
        high, low = (paths.lead(end, chosen[rows]) for end in ends)
        total += (high - low).nan_to_num(0.0, 0.0, 0.0).view(-1, 1, 1, 1) * (signs - mean)
    slopes = torch.zeros(len(block.x), x[0].numel(), device=x.device)
    slopes[rows] = total.flatten(1)
    return slopes


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
    search, block, can = paths.search, paths.search.block, paths.reachable
    if not paths.blind:
        queries = max(1, int(SOME_QUERIES * queries / max(1, int(can[search.rows].sum(1).max()))))
    for number, path in enumerate(paths.choices):
        rows = search.rows[can[search.rows, number]]
        if not len(rows) or bool((path >= SCOPE).any()):  # Square does not say which images it asks about
            continue
        attack = square_attack(block, queries, 104729 * (number + 1))

        def asked(x: Tensor, y: Tensor, path: Tensor = path) -> tuple[Tensor, Tensor]:
            logits, lead = paths.on_path(x, path.expand(len(x), -1, -1), rows=torch.zeros_like(y))
            value = -torch.minimum(margin(standardised(logits), y), lead)
            return value, value

        attack.margin_and_loss = asked
        search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

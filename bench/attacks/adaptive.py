"""The attacks made for models that route, whose robustness standard suites overstate, in the order they run.

AutoAttack follows gradients, and a hard route has none: it changes the expert by accident. These attacks aim at it
(the paper's section 4 asks for none of them). Success is judged on the deployed model, and each attack runs on the
examples that those before it have not broken.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.deployed import OPENED, averaged, deployed, nearest, reweighed, stand_ins, targeted
from bench.attacks.gates import blurred, left_routes, softened
from bench.attacks.grid import on_grid
from bench.attacks.influence import PARTS, UNITS, least_used
from bench.attacks.paths import Paths
from bench.attacks.restarts import forced_paths, square_attack, square_on_paths
from bench.attacks.search import Search
from bench.errors import UnusableInput, did_you_mean
from bench.models.choices import plain
from bench.models.deployed import eval_frozen, full_float32
from bench.models.foreign import DRAWS, Guarded
from bench.models.gates import LOOKED_AT, declared, find_gates, look_at_shown
from bench.models.parts import is_dual, parts
from bench.models.sites import sites
from bench.spec import Norm, ThreatModel

BudgetName = Literal["small", "standard", "large"]
Attack = Callable[[], None]


@dataclass(frozen=True)
class Budget:
    """How much of each attack is run.

    A restart of Auto-PGD costs 1.2 forward passes and one backward pass a step: one for the objective, and one at every
    fifth step for the deployed model; `averaged` costs `neighbours` + 0.2. paths: how many paths are attacked at most.
    path_restarts, path_steps: on all of them together; many short restarts, most of which go on from the nearest point
    so far, found more than few long ones at the same cost. queries: of Square, by seed, and by path where gradients
    cannot be believed.
    """

    paths: int
    path_restarts: int
    path_steps: int
    restarts: int
    steps: int
    weights: tuple[float, ...]
    targets: int
    neighbours: int
    square_seeds: int
    queries: int


BUDGETS = {
    "small": Budget(16, 8, 50, 1, 50, (0.0, 0.5, 1.0), 1, 2, 1, 250),
    "standard": Budget(64, 160, 25, 2, 100, (0.0, 0.25, 0.5, 0.75, 1.0), 4, 4, 1, 1000),
    "large": Budget(256, 800, 25, 10, 200, (0.0, 0.25, 0.5, 0.75, 1.0), 9, 8, 3, 5000),
}


def passes(budget: BudgetName, num_classes: int, *, dual: bool, routed: bool, foreign: bool) -> tuple[int, int]:
    """About how many forward and backward passes an example costs that withstands everything.

    Without those of Square on the paths whose gradients cannot be believed, which most models do not have, and without
    the further restarts where gates inside a network have too many paths and an image came near to being broken, which
    are four times as many. foreign: of a user's own model, which may hold more than it shows.
    """
    much = BUDGETS[budget]

    def climbs(count: int, steps: int, neighbours: float = 1) -> tuple[float, float]:
        return count * ((steps + 2) * (neighbours + 0.2) + 2), count * (steps + 2) * neighbours

    every = [
        climbs(much.path_restarts * routed, much.path_steps),
        climbs((4 * much.restarts + 2 * (PARTS + UNITS)) * foreign, much.steps // OPENED),
        climbs(2 * much.restarts * foreign, much.steps),
        climbs(much.restarts + len(much.weights) * dual + min(much.targets, num_classes - 1), much.steps),
        climbs(int(routed), much.steps, much.neighbours),
        ((much.square_seeds + foreign) * much.queries, 0),
    ]
    forwards, backwards = (sum(each) for each in zip(*every, strict=True))
    return round(forwards), round(backwards)


def attacks(search: Search, budget: BudgetName) -> Iterator[tuple[str, Attack]]:
    """The attacks by name in the order they run, the strongest on routes first."""
    model, much = search.block.model, BUDGETS[budget]
    paths, mixed = Paths(search, much.paths), Paths(search, much.paths, mixed=True)
    search.block.flags.extend(f"adaptive: {note}" for note in (*paths.notes, *mixed.notes))
    led = {name: found for name, found in (("paths", paths), ("mixtures", mixed)) if found.sites}
    for name, found in led.items():
        yield name, partial(forced_paths, found, much.path_restarts, much.path_steps)
    yield "deployed", partial(deployed, search, much.restarts, much.steps)
    if isinstance(model, Guarded):  # a user's own: nobody knows what it holds beside its routes
        yield "stand-ins", partial(stand_ins, search, much.restarts, much.steps)
        yield "least-used", partial(least_used, search, much.steps)
        yield "on-grid", partial(on_grid, search, much.restarts, much.steps, much.queries)
    if any(not site.whole for site in paths.sites):
        yield "left-routes", partial(left_routes, paths, much.restarts, much.steps)
        yield "blurred", partial(blurred, paths, much.neighbours, much.steps)
    if soft := [site for site in sites(model) if site.soft]:
        yield "softened", partial(softened, search, soft, much.steps)
    if is_dual(model):
        for weight in much.weights:
            yield f"reweighed-{weight:g}", partial(reweighed, search, weight, much.steps)
    yield "targeted", lambda: targeted(search, nearest(search, much.targets), much.steps)
    if led:
        yield "averaged", partial(averaged, search, much.neighbours, much.steps)
    for name, found in led.items():
        yield f"square-{name}", partial(square_on_paths, found, much.queries)
    for number in range(much.square_seeds):
        yield f"square-{number + 1}", partial(_square, search, much.queries, number)


def run(search: Search, budget: BudgetName, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Make the attacks (those called `only`, if given), and after each give its name and the rows (m,) that it met.

    Passes through a part of the model count as those through the whole. Each attack's random numbers depend on the
    block's seed and its own name alone, so those of one do not shift with what others have left; but for Square's,
    which pyautoattack draws for the rows that it meets.
    """
    with search.block.passes.also(*parts(search.block.model).values()):
        known = dict(attacks(search, budget))
        for name in only or ():
            if name not in known:
                raise UnusableInput(f"no adaptive attack '{name}' for this model: {did_you_mean(name, known)}")
        for name, attack in known.items():
            if only is None or name in only:
                rows = search.rows
                if len(rows):
                    search.attack, search.given = name, len(rows)
                    search.block.on_attack(name, len(rows), len(rows))
                    torch.manual_seed(crc32(f"{search.block.seed} {name}".encode()))
                    attack()
                    search.confirm(rows)
                yield name, rows


class AdaptiveAttack:
    """All of them on any model, those on routes where it shows some, called as an attack of torchattacks is:

        x_adv = AdaptiveAttack(model, norm="Linf", eps=8 / 255)(x, y)

    The model takes pixels in [0, 1] and gives logits; ε is in pixels. `attacks_to_run`, as AutoAttack's: the names of
    those to make (`attacks`), all if not given. `gates`: as `bench run --gates` takes them. UnusableInput for L1, or an
    unknown name of an attack or budget.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        budget: BudgetName = "standard",
        seed: int = 0,
        attacks_to_run: Collection[str] | None = None,
        gates: Sequence[str] = (),
    ) -> None:
        model, self.gates = plain(model), gates or declared(model)
        if norm == "L1":
            raise UnusableInput("no adaptive attack in an L1 ball: attack in Linf or L2")
        if budget not in BUDGETS:
            raise UnusableInput(f"no budget '{budget}': {did_you_mean(budget, BUDGETS)}")
        self.model, self.threat_model = model, ThreatModel(norm=norm, eps=eps)
        self.budget, self.seed, self.attacks_to_run = budget, seed, attacks_to_run

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """What breaks the model on x (B, C, H, W) with labels y (B,), in the ball; any point of it where nothing did.

        The model is called behind a guard, and of one that answers by chance the mean of DRAWS passes is attacked.
        Modes, parameters' flags and torch's random state are as before, after it.
        """
        model = Guarded(self.model)
        model.shown = look_at_shown(self.model, x[:LOOKED_AT])
        with eval_frozen(model), full_float32(), torch.random.fork_rng(), PassCounter(model) as passes:
            if self.gates:
                model.gates = find_gates(self.model, self.gates, x[:LOOKED_AT]).sites
            with torch.no_grad():
                logits = model(x)
                if not torch.equal(model(x), logits):  # it answers by chance
                    model.draws = DRAWS
                    logits = model(x)
            correct = logits.argmax(1) == y
            block = Block(model, x, y, correct, logits.shape[1], "", self.threat_model, self.seed, passes)
            search = Search(block)
            for _ in run(search, self.budget, self.attacks_to_run):
                pass
            return search.x_adv


def _square(search: Search, queries: int, number: int) -> None:
    """Square on the deployed model, with a seed of its own."""
    block, rows = search.block, search.rows
    attack = square_attack(block, queries, 7919 * (number + 1))
    search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

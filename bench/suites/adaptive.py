"""`adaptive`: attacks made for models that route, whose answers standard suites overstate.

AutoAttack follows gradients, and a hard route has none: it hardly ever changes the expert. These attacks do (the
paper's section 4 asks for none of them; see `bench.attacks`, one file a kind). Success is judged on the deployed model
at every iterate, and each attack runs on what those before it have left standing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from pyautoattack.square import SquareAttack

from bench.attacks.duals import reweighed, transfer
from bench.attacks.routes import Routes, route_aware
from bench.attacks.search import Search
from bench.attacks.surrogates import averaged, bpda, joint, soft
from bench.attacks.targets import nearest, targeted
from bench.parts import is_dual, parts, routed_branch
from bench.spec import Norm
from bench.suites.base import SUITES, Attempt, Block, Suite


@dataclass(frozen=True)
class Budget:
    """How much of each attack is run; steps are gradient steps from each start."""

    route_steps: int
    route_starts: int
    steps: int
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    targets: int
    neighbours: int
    square_seeds: int
    square_queries: int


BUDGETS = {
    "small": Budget(50, 1, 25, (1.0,), (0.5,), 3, 2, 1, 500),
    "standard": Budget(100, 2, 50, (0.1, 1.0, 10.0), (0.0, 0.25, 0.5, 0.75, 1.0), 5, 4, 2, 2500),
    "large": Budget(200, 5, 100, (0.1, 0.3, 1.0, 3.0, 10.0), (0.0, 0.25, 0.5, 0.75, 1.0), 9, 8, 3, 5000),
}
#: Steps and starts of the trial in which the route-aware attack's strength was first measured; larger budgets begin
#: with it, so that none is weaker.
TRIAL = (100, 2)

Attack = Callable[[], None]


@SUITES.register("adaptive")
class Adaptive(Suite):
    """`budget`: how much; `recipe=trial`: two starts of 100 steps for each reachable expert, and nothing else."""

    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    budget: Literal["small", "standard", "large"] = "standard"
    recipe: Literal["full", "trial"] = "full"

    def attack(self, block: Block) -> Iterator[Attempt]:
        if not parts(block.model):
            block.flags.append("routing not visible")
            return
        search = Search(block)
        for name, attack in self.attacks(search):
            block.attacks.append(name)
            rows = search.rows
            if len(rows):
                attack()
                yield block.attempt(name, rows, search.x_adv[rows], claimed=~search.standing[rows])

    def attacks(self, search: Search) -> Iterator[tuple[str, Attack]]:
        """The attacks in the order they run, the strongest on routes first."""
        model, budget = search.block.model, BUDGETS[self.budget]
        routed = routed_branch(model) is not None
        if routed:
            routes = Routes(search)
            short = self.budget == "small" and self.recipe == "full"
            steps, starts = (budget.route_steps, budget.route_starts) if short else TRIAL
            yield "route-aware", partial(route_aware, routes, steps, starts, push=5.0, ahead=0.05)
        if self.recipe == "trial":
            return
        if is_dual(model):
            for branch in ("standard", "robust"):
                yield f"transfer-{branch}", partial(transfer, search, branch, budget.steps)
            for weight in budget.weights:
                yield f"reweighed-{weight:g}", partial(reweighed, search, weight, budget.steps)
        if routed:
            # The push and its margin in the router's own scale: a trained router's scores may be large.
            scale = float(routes.scale)
            again = partial(route_aware, routes, budget.route_steps, budget.route_starts, push=1 / scale, ahead=scale)
            yield "route-aware-scaled", again
            for temperature in budget.temperatures:
                yield f"bpda-{temperature:g}", partial(bpda, routes, temperature, budget.steps)
                yield f"soft-{temperature:g}", partial(soft, routes, temperature, budget.steps)
            yield "joint", partial(joint, routes, budget.steps)
            yield "averaged", partial(averaged, routes, budget.neighbours, budget.steps)
        yield "targeted", lambda: targeted(search, nearest(search, budget.targets), budget.steps)
        for number in range(budget.square_seeds):
            yield f"square-{number + 1}", partial(_square, search, budget.square_queries, number)


def _square(search: Search, queries: int, number: int) -> None:
    """Square (Andriushchenko et al. 2020), by pyautoattack, with a seed of its own."""
    block, rows = search.block, search.rows
    seed = (block.seed + 7919 * (number + 1)) % 2**32
    attack = SquareAttack(
        block.model, norm=block.threat_model.norm, eps=block.threat_model.eps, n_queries=queries, seed=seed,
        device=block.x.device,
    )  # fmt: skip
    search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

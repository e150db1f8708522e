"""The attacks made for models that route, whose answers standard suites overstate, in the order they run.

AutoAttack follows gradients, and a hard route has none: it hardly ever changes the expert. These attacks do (the
paper's section 4 asks for none of them); each kind is a file beside this one. Success is judged on the deployed model
at every iterate, and each attack runs on what those before it have left standing.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args
from zlib import crc32

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.duals import reweighed, transfer
from bench.attacks.routes import Routes, route_aware
from bench.attacks.search import Search
from bench.attacks.surrogates import averaged, bpda, joint, soft
from bench.attacks.targets import nearest, targeted
from bench.errors import UnusableInput, did_you_mean
from bench.models.deployed import eval_frozen, full_float32
from bench.models.parts import is_dual, parts, routed_branches
from bench.spec import Norm, ThreatModel

BudgetName = Literal["small", "standard", "large"]
Recipe = Literal["full", "trial"]
Attack = Callable[[], None]


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


def attacks(search: Search, budget: BudgetName, recipe: Recipe) -> Iterator[tuple[str, Attack]]:
    """The attacks by name in the order they run, the strongest on routes first; `trial` is that one alone.

    On a dual those on routes are made for each branch that routes, `:R` and `:S` behind their names.
    """
    model, much = search.block.model, BUDGETS[budget]
    every = {f":{name}" if name else "": Routes(search, name) for name in routed_branches(model)}
    short = budget == "small" and recipe == "full"
    steps, starts = (much.route_steps, much.route_starts) if short else TRIAL
    for end, routes in every.items():
        yield f"route-aware{end}", partial(route_aware, routes, steps, starts, push=5.0, ahead=0.05)
    if recipe == "trial":
        return
    if is_dual(model):
        for branch in ("standard", "robust"):
            yield f"transfer-{branch}", partial(transfer, search, branch, much.steps)
        for weight in much.weights:
            yield f"reweighed-{weight:g}", partial(reweighed, search, weight, much.steps)
    for end, routes in every.items():
        # The push and its margin in the router's own scale, since a trained router's scores may be large; then a push
        # that outweighs every loss, so that the route comes first, and the loss where it is won.
        for name, push, ahead in (("scaled", 1.0, 1.0), ("first", 1000.0, 0.05)):
            yield f"route-aware-{name}{end}", partial(_scaled, routes, much, push, ahead)
        for temperature in much.temperatures:
            yield f"bpda-{temperature:g}{end}", partial(bpda, routes, temperature, much.steps)
            yield f"soft-{temperature:g}{end}", partial(soft, routes, temperature, much.steps)
        if routes.affine is None:  # its gradient may lead nowhere, or astray
            by_slopes = replace(routes, by_slopes=True)
            yield f"route-aware-slopes{end}", partial(_scaled, by_slopes, much, 1.0, 1.0)
        yield f"joint{end}", partial(joint, routes, much.steps)
        yield f"averaged{end}", partial(averaged, routes, much.neighbours, much.steps)
    yield "targeted", lambda: targeted(search, nearest(search, much.targets), much.steps)
    for number in range(much.square_seeds):
        yield f"square-{number + 1}", partial(_square, search, much.square_queries, number)


def run(
    search: Search, budget: BudgetName, recipe: Recipe, only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Make the attacks (those called `only`, if given), and after each give its name and the rows (m,) that it met.

    Passes through a part of the model count as those through the whole. Each attack's random numbers depend on the
    block's seed and its name alone, so those of one do not shift with what others have left; but for Square's, which
    pyautoattack draws for the rows that it meets.
    """
    known = dict(attacks(search, budget, recipe))
    for name in only or ():
        if name not in known:
            raise UnusableInput(f"no adaptive attack '{name}' for this model: {did_you_mean(name, known)}")
    with search.block.passes.also(*parts(search.block.model).values()):
        for name, attack in known.items():
            if only is None or name in only:
                rows = search.rows
                if len(rows):
                    torch.manual_seed(crc32(f"{search.block.seed} {name}".encode()))
                    attack()
                    search.confirm(rows)
                yield name, rows


class AdaptiveAttack:
    """All of them on any model that shows its routing, called as an attack of torchattacks is:

        x_adv = AdaptiveAttack(model, norm="Linf", eps=8 / 255)(x, y)

    The model takes pixels in [0, 1] and gives logits; ε is in pixels. `attacks_to_run`, as AutoAttack's: the names of
    those to make (`attacks`), all if not given. UnusableInput for a model without visible parts, for L1, or an unknown
    name of an attack, budget or recipe.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        budget: BudgetName = "standard",
        recipe: Recipe = "full",
        seed: int = 0,
        attacks_to_run: Collection[str] | None = None,
    ) -> None:
        if not parts(model):
            raise UnusableInput(
                f"{type(model).__name__} shows no routing: an MoE has `router` and `experts`, a dual `standard`,"
                " `robust` and `alpha`"
            )
        if norm == "L1":
            raise UnusableInput("no adaptive attack in an L1 ball: attack in Linf or L2")
        for what, value, known in (("budget", budget, BUDGETS), ("recipe", recipe, get_args(Recipe))):
            if value not in known:
                raise UnusableInput(f"no {what} '{value}': {did_you_mean(value, known)}")
        self.model, self.threat_model = model, ThreatModel(norm=norm, eps=eps)
        self.budget, self.recipe, self.seed, self.attacks_to_run = budget, recipe, seed, attacks_to_run

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """What breaks the model on x (B, C, H, W) with labels y (B,), in the ball; any point of it where nothing did.

        Modes, parameters' flags and torch's random state are as before, after it.
        """
        with eval_frozen(self.model), full_float32(), torch.random.fork_rng(), PassCounter(self.model) as passes:
            with torch.no_grad():
                logits = self.model(x)
            correct = logits.argmax(1) == y
            block = Block(self.model, x, y, correct, logits.shape[1], "", self.threat_model, self.seed, passes)
            search = Search(block)
            for _ in run(search, self.budget, self.recipe, self.attacks_to_run):
                pass
            return search.x_adv


def _scaled(routes: Routes, much: Budget, push: float, ahead: float) -> None:
    """Route-aware PGD with a push and a margin that are relative to the router's median gap."""
    scale = float(routes.scale)
    route_aware(routes, much.route_steps, much.route_starts, push / scale, ahead * scale)


def _square(search: Search, queries: int, number: int) -> None:
    """Square (Andriushchenko et al. 2020), by pyautoattack, with a seed of its own."""
    block, rows = search.block, search.rows
    seed = (block.seed + 7919 * (number + 1)) % 2**32
    attack = SquareAttack(
        block.model, norm=block.threat_model.norm, eps=block.threat_model.eps, n_queries=queries, seed=seed,
        device=block.x.device,
    )  # fmt: skip
    search.test(attack.perturb(block.x[rows], block.y[rows]), rows)

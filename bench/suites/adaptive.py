"""`adaptive`: attacks made for models that route, whose answers standard suites overstate (`bench.attacks`)."""

from collections.abc import Iterator
from typing import ClassVar

from bench.attacks.adaptive import BudgetName, Recipe, run
from bench.attacks.block import Attempt, Block
from bench.attacks.search import Search
from bench.models.parts import parts
from bench.spec import Norm
from bench.suites.base import SUITES, Suite


@SUITES.register("adaptive")
class Adaptive(Suite):
    """`budget`: how much; `recipe=trial`: two starts of 100 steps for each reachable expert, and nothing else.

    A model without visible parts has nothing to attack here.
    """

    version: ClassVar[int] = 2
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")

    budget: BudgetName = "standard"
    recipe: Recipe = "full"

    def attack(self, block: Block) -> Iterator[Attempt]:
        if not parts(block.model):
            return
        search = Search(block)
        for name, rows in run(search, self.budget, self.recipe):
            block.attacks.append(name)
            if len(rows):
                yield block.attempt(name, rows, search.x_adv[rows], claimed=~search.standing[rows])

"""`adaptive`: attacks made for models that route, whose robustness standard suites overstate (`bench.attacks`)."""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from torch import nn

from bench.attacks.adaptive import BudgetName, passes, run
from bench.attacks.block import Attempt, Block
from bench.attacks.prepared import on_copy
from bench.attacks.search import Search
from bench.models.foreign import Guarded
from bench.models.parts import is_dual, parts
from bench.models.sites import sites
from bench.registry import SUITES
from bench.spec import Norm
from bench.suites.base import Cost, Suite


@SUITES.register("adaptive")
class Adaptive(Suite):
    """`budget`: how much of each attack; `small` has every kind of attack at a tenth of the cost, and is not ranked.

    A model without routes is attacked as a whole, by what others have met: a dense one can be compared with them.
    """

    version: ClassVar[int] = 3
    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    needs: ClassVar[tuple[str, ...]] = ("routes",)

    budget: BudgetName = Field(default="standard", description="how much of each attack; small earns no rank")

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost | None:
        routed = model is None or bool(parts(model) or sites(model))
        dual, foreign = model is not None and is_dual(model), isinstance(model, Guarded)
        return Cost(*passes(self.budget, num_classes, dual=dual, routed=routed, foreign=foreign))

    def attack(self, block: Block) -> Iterator[Attempt]:
        search = Search(on_copy(block), deployed=block.model)
        for name, rows in run(search, self.budget):
            block.attacks.append(name)
            if len(rows):
                yield block.attempt(name, rows, search.x_adv[rows], claimed=~search.unbroken[rows])

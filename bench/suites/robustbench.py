"""AutoAttack as RobustBench's own `benchmark` runs it (Croce et al. 2021)."""

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from bench.attacks.block import Attempt, Block
from bench.registry import SUITES
from bench.spec import ROBUSTBENCH_DATASETS, ROBUSTBENCH_NORMS, Norm
from bench.suites.autoattack import standard_cost, watched
from bench.suites.base import Cost, Suite


@SUITES.register("robustbench")
class RobustBenchSuite(Suite):
    """One attempt an example: what `benchmark` was left with after all of AutoAttack's attacks.

    An example that withstood them has its clean image as the answer. The accuracies that `benchmark` returns are
    stated, so that evaluation flags them where they are not those of the re-check.
    """

    norms: ClassVar[tuple[Norm, ...]] = ROBUSTBENCH_NORMS
    needs: ClassVar[tuple[str, ...]] = ("gradients",)
    datasets: ClassVar[tuple[str, ...]] = ROBUSTBENCH_DATASETS

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost:
        return standard_cost(num_classes)

    def attack(self, block: Block) -> Iterator[Attempt]:
        from bench.compat import benchmark  # robustbench takes seconds to import

        block.on_attack("robustbench", len(block.rows), len(block.rows))
        with watched(block):
            found = benchmark(block.model, block.x, block.y, block.dataset, block.threat_model, block.seed)
        rows = block.rows
        stated = (found.clean, found.robust)
        yield block.attempt("robustbench", rows, found.x_adv[rows], claimed=found.fooled[rows], stated=stated)

"""AutoAttack as RobustBench's own `benchmark` runs it (Croce et al. 2021)."""

from collections.abc import Iterator
from typing import ClassVar

from bench.attacks.block import Attempt, Block
from bench.spec import ROBUSTBENCH_DATASETS, ROBUSTBENCH_NORMS, Norm
from bench.suites.autoattack import watched
from bench.suites.base import SUITES, Suite


@SUITES.register("robustbench")
class RobustBenchSuite(Suite):
    """One attempt an example: what `benchmark` was left with after all of AutoAttack's attacks.

    An example that withstood them has its clean image as the answer. The accuracies that `benchmark` returns are
    stated, so that evaluation flags them where they are not those of the re-check.
    """

    norms: ClassVar[tuple[Norm, ...]] = ROBUSTBENCH_NORMS
    datasets: ClassVar[tuple[str, ...]] = ROBUSTBENCH_DATASETS

    def attack(self, block: Block) -> Iterator[Attempt]:
        from bench.compat import benchmark  # robustbench takes seconds to import

        with watched(block):
            found = benchmark(block.model, block.x, block.y, block.dataset, block.threat_model, block.seed)
        rows = block.rows
        stated = (found.clean, found.robust)
        yield block.attempt("robustbench", rows, found.x_adv[rows], claimed=found.fooled[rows], stated=stated)

"""No attack: the clean accuracy alone, which every other suite measures as well."""

from collections.abc import Iterator

from bench.suites.base import SUITES, Attempt, Block, Suite


@SUITES.register("clean")
class Clean(Suite):
    """Attacks nothing."""

    def attack(self, block: Block) -> Iterator[Attempt]:
        return iter(())

"""No attack: the clean accuracy alone, which every other suite measures as well."""

from collections.abc import Iterator
from typing import ClassVar

from bench.attacks.block import Attempt, Block
from bench.suites.base import SUITES, Suite


@SUITES.register("clean")
class Clean(Suite):
    """Attacks nothing."""

    has_attack: ClassVar[bool] = False

    def attack(self, block: Block) -> Iterator[Attempt]:
        return iter(())

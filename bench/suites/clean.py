"""No attack: the clean accuracy alone, which every other suite measures as well."""

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from bench.attacks.block import Attempt, Block
from bench.registry import SUITES
from bench.suites.base import Cost, Suite


@SUITES.register("clean")
class Clean(Suite):
    """Attacks nothing."""

    has_attack: ClassVar[bool] = False

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost:
        return Cost(1, 0)

    def attack(self, block: Block) -> Iterator[Attempt]:
        return iter(())

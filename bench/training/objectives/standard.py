"""Clean training: CE(F(x), y)."""

from collections.abc import Iterator
from typing import Any

from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, Objective, Step


@OBJECTIVES.register("standard")
class Standard(Objective):
    """CE(F(x), y)."""

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        yield Step("model", lambda m: self.cross_entropy(m, batch.x, batch.y))

"""Adversarial training (Madry et al. 2018): CE(F(x'), y), x' maximises CE."""

from collections.abc import Iterator
from typing import Any

from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, CrossEntropyAttack, Step


@OBJECTIVES.register("at")
class AT(CrossEntropyAttack):
    """CE(F(x'), y)."""

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        x_adv = self.attack_model(model, batch)
        yield Step("model", lambda m: self.cross_entropy(m, x_adv, batch.y))

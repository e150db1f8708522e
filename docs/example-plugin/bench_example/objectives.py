"""Objective `smooth`: cross-entropy with smoothed labels."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from pydantic import Field

from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, Objective, Step, Terms


@OBJECTIVES.register("smooth")
class Smooth(Objective):
    """`smoothing`: how much of each label is shared among all classes."""

    smoothing: float = Field(default=0.1, ge=0, lt=1)

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        def loss(m: Any) -> Terms:
            logits, terms = self.clean_terms(m, batch.x, batch.y)
            return terms | {"ce": F.cross_entropy(logits, batch.y, label_smoothing=self.smoothing)}

        yield Step("model", loss)

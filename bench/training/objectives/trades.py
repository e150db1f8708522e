"""TRADES (Zhang et al. 2019): CE(F(x), y) + β · KL(F(x) ‖ F(x')), x' maximises the KL; the clean side is the target."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench.models.deployed import eval_frozen
from bench.pgd import near_start
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Adversarial, Batch, Step, Terms, kl


@OBJECTIVES.register("trades")
class TRADES(Adversarial):
    """`beta` weighs the KL's mean over the batch."""

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"beta": (1.0, 3.0, 6.0)}

    beta: float = Field(default=6.0, ge=0)

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        with eval_frozen(model):
            with torch.no_grad():
                clean = model(batch.x)

            def start(suffix: str) -> Tensor:
                return near_start(batch.x, batch.threat_model, batch.noise(f"model{suffix}"))

            x_adv = self.ascend(lambda x: kl(clean, model(x)), batch.x, batch, start)

        def loss(m: Any) -> Terms:
            logits, terms = self.clean_terms(m, batch.x, batch.y)
            return {**terms, "kl": self.beta * kl(logits, m(x_adv)).mean()}

        yield Step("model", loss)

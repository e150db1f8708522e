"""AdvMoE (Zhang et al., ICCV 2023): experts and router are trained in turn, each on its own robust loss.

x' maximises KL(F(x) ‖ F(x')) + KL(r(x) ‖ r(x')), softmaxes of logits and of router scores, the clean side the target.
Expert step: CE(F(x), y) + β KL_F / B; with a new x', router step: β CE(r(x), y mod E) + β KL_r / B.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bench.errors import TrainingFailed
from bench.models.deployed import eval_frozen
from bench.pgd import near_start
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Adversarial, Batch, Step, Terms, kl


@OBJECTIVES.register("advmoe")
class AdvMoE(Adversarial):
    """`beta` weighs the robust terms, and the router's pseudo-labels y mod E.

    These labels balance the load themselves, so the load-balance loss is off unless it is asked for. The published
    attack is 2 steps of 5/255 in a ball of 8/255: 1.25 ε / inner_steps each.
    """

    reach: ClassVar[float] = 1.25
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"beta": (1.0, 3.0, 6.0), "inner_steps": (2, 5)}

    inner_steps: int = Field(default=2, gt=0)
    beta: float = Field(default=6.0, ge=0)
    balance: float = Field(default=0.0, ge=0)

    def parts(self, model: Any) -> Mapping[str, nn.Module]:
        return {"experts": model.experts, "router": model.router}

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        x_adv = self.worst(model, batch, "experts")

        def experts(m: Any) -> Terms:
            logits = m(batch.x)
            return {"ce": F.cross_entropy(logits, batch.y), "kl": self.beta * kl(logits, m(x_adv)).mean()}

        yield Step("experts", experts)
        x_adv = self.worst(model, batch, "router")

        def router(m: Any) -> Terms:
            scores = m.router(batch.x)
            pseudo = F.cross_entropy(scores, batch.y % scores.shape[1])
            divergence = kl(scores, m.router(x_adv)).mean()
            terms = {"router_ce": self.beta * pseudo, "router_kl": self.beta * divergence}
            return terms | self.balance_term(m, scores)

        yield Step("router", router)

    def worst(self, moe: Any, batch: Batch, salt: str) -> Tensor:
        """x' for the model as it is now; TrainingFailed once the router's scores are not finite."""
        with eval_frozen(moe):
            with torch.no_grad():
                logits, scores = moe(batch.x), moe.router(batch.x)
            if not scores.isfinite().all():
                raise TrainingFailed("the router's scores are not finite")

            def start(suffix: str) -> Tensor:
                return near_start(batch.x, batch.threat_model, batch.noise(f"{salt}{suffix}"))

            return self.ascend(lambda x: kl(logits, moe(x)) + kl(scores, moe.router(x)), batch.x, batch, start)

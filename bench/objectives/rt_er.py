"""RT-ER, robust training with experts' robustification (the paper's section 4).

CE(F(x'), y) + (β/B) Σ_x Σ_s KL(softmax f_s(x) ‖ softmax f_s(x'_s)), x'_s = PGD on expert f_s alone.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from bench.inner import attacking
from bench.objectives.base import OBJECTIVES, Adversarial, Batch, Step, Terms, kl
from models.moe import MoE
from models.routing import dispatch


@OBJECTIVES.register("rt_er")
class RTER(Adversarial):
    """`expert_term`: s is the expert that the router ranks second for the clean x, or runs over all experts."""

    routed: ClassVar[bool] = True

    beta: float = Field(default=6.0, ge=0)
    expert_term: Literal["second", "all"] = "second"

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        yield Step("model", self.robust_loss(model, batch))

    def robust_loss(self, moe: MoE, batch: Batch) -> Callable[[MoE], Terms]:
        """Attack the MoE and its experts now; the loss on what was found, as a function of the MoE."""
        x_adv = self.attack_model(moe, batch)
        experts = list(moe.experts)
        with attacking(moe), torch.no_grad():
            if self.expert_term == "second":
                selected = moe.router(batch.x).topk(2, dim=1).indices[:, 1:]
            else:
                selected = torch.arange(len(experts), device=batch.x.device).expand(len(batch.x), -1)
            # Row r·S + s is image r for its s-th selected expert: one dispatch serves them all.
            count = selected.shape[1]
            rows = selected.reshape(-1, 1)
            x, y = batch.x.repeat_interleave(count, 0), batch.y.repeat_interleave(count, 0)
            noise = torch.stack([batch.noise(f"expert{s}") for s in range(count)], 1).flatten(0, 1)
            x_expert = self.attack(lambda z: dispatch(experts, z, rows)[:, 0], x, y, batch, noise)

        def loss(m: MoE) -> Terms:
            f = list(m.experts)
            divergence = kl(dispatch(f, x, rows)[:, 0], dispatch(f, x_expert, rows)[:, 0])
            return {**self.cross_entropy(m, x_adv, batch.y), "kl": self.beta * divergence / len(batch.y)}

        return loss

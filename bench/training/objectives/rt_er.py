"""RT-ER, robust training with experts' robustification (the paper's section 4).

CE(F(x'), y) + (β/B) Σ_x Σ_s KL(softmax f_s(x) ‖ softmax f_s(x'_s)), x'_s = PGD on expert f_s alone; with
`expert_reduction=mean`, the mean over s instead of the sum.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.models.deployed import eval_frozen
from bench.models.moe import MoE
from bench.models.routing import dispatch
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, CrossEntropyAttack, Step, Terms, kl


@OBJECTIVES.register("rt_er")
class RTER(CrossEntropyAttack):
    """`expert_term`: s is the expert that the router ranks second for the clean x, or runs over all experts.

    `expert_reduction`: over several experts the released code sums the terms, so that its β = 6 with E = 4 weighs as
    much as 24 does with the mean.

    `one_dispatch`: the attacks on F and on the experts go through the experts together, in each of their steps. They
    find the same up to rounding; which is faster depends on the device (see benchmarks/README.md).
    """

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta": (0.3, 1.0, 3.0, 6.0),
        "expert_term": ("second", "all"),
        "expert_reduction": ("sum", "mean"),
    }

    beta: float = Field(default=6.0, ge=0)
    expert_term: Literal["second", "all"] = "second"
    expert_reduction: Literal["sum", "mean"] = "sum"
    one_dispatch: bool | None = Field(default=None, description="None: on a GPU, and not on a CPU")

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        yield Step("model", self.robust_loss(model, batch))

    def robust_loss(self, moe: MoE, batch: Batch) -> Callable[[MoE], Terms]:
        """Attack the MoE and its experts now; the loss on what was found, as a function of the MoE."""
        with eval_frozen(moe), torch.no_grad():
            if self.expert_term == "second":
                selected = moe.router(batch.x).topk(2, dim=1).indices[:, 1:]
            else:
                selected = torch.arange(len(moe.experts), device=batch.x.device).expand(len(batch.x), -1)
            # Row r·S + s is image r for its s-th selected expert: one dispatch serves them all.
            count = selected.shape[1]
            rows = selected.reshape(-1, 1)
            x, y = batch.x.repeat_interleave(count, 0), batch.y.repeat_interleave(count, 0)
            x_adv, x_expert = self._attack_both(moe, batch, x, y, rows)

        def loss(m: MoE) -> Terms:
            f = list(m.experts)
            divergence = kl(dispatch(f, x, rows)[:, 0], dispatch(f, x_expert, rows)[:, 0]).sum()
            terms = len(batch.y) if self.expert_reduction == "sum" else len(rows)
            return {**self.cross_entropy(m, x_adv, batch.y), "kl": self.beta * divergence / terms}

        return loss

    def _attack_both(self, moe: MoE, batch: Batch, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x' (B, c, H, W), and x'_s (B·S, c, H, W) of the images x with labels y, each on the expert of its row."""
        experts, images, count = list(moe.experts), len(batch.x), len(x) // len(batch.x)

        def model_noise(suffix: str) -> Tensor:
            return batch.noise(f"model{suffix}")

        def expert_noise(suffix: str) -> Tensor:
            return torch.stack([batch.noise(f"expert{s}{suffix}") for s in range(count)], 1).flatten(0, 1)

        def both(z: Tensor) -> Tensor:
            """F of the first rows, and of the others each one's own expert."""
            trace = moe.route(z[:images])
            k = trace.selected_experts.shape[1]
            z = torch.cat([z[:images].repeat_interleave(k, 0), z[images:]])
            outputs = dispatch(experts, z, torch.cat([trace.selected_experts.reshape(-1, 1), rows]))[:, 0]
            logits = moe.mix(trace, outputs[: images * k].view(images, k, -1))
            return torch.cat([logits, outputs[images * k :]])

        if x.is_cuda if self.one_dispatch is None else self.one_dispatch:
            all_x, all_y = torch.cat([batch.x, x]), torch.cat([batch.y, y])
            found = self.attack(
                both, all_x, all_y, batch, lambda suffix: torch.cat([model_noise(suffix), expert_noise(suffix)])
            )
            return found[:images], found[images:]
        return (
            self.attack(moe, batch.x, batch.y, batch, model_noise),
            self.attack(lambda z: dispatch(experts, z, rows)[:, 0], x, y, batch, expert_noise),
        )

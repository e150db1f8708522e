"""Adversarial training of every path, since a routed model is as robust as the worst expert that an attack can reach.

CE(F(x'), y) + β · mean_x agg_i CE(f_i(x'_i), y), x'_i = PGD on the cross-entropy of expert f_i alone, agg the mean over
all experts or the worst; x' = x'_i of the expert that the router chooses for the clean x.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from bench.models.deployed import eval_frozen
from bench.models.moe import MoE
from bench.models.routing import dispatch
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, CrossEntropyAttack, Step, Terms


@OBJECTIVES.register("at-paths")
class ATPaths(CrossEntropyAttack):
    """`paths`: the loss is the mean over all experts, or each image's worst one.

    Every expert counts as reachable: with the usual affine routers and radii nearly every one is, and for top-1 routing
    the worst expert's loss then bounds that of every attack that forces a path. Each of E experts is attacked for every
    image, so a step costs about E times one of `at`; `inner_steps=1` makes up for it.
    """

    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"beta": (0.3, 1.0, 3.0), "paths": ("all", "worst")}

    beta: float = Field(default=1.0, ge=0)
    paths: Literal["all", "worst"] = "all"

    def steps(self, model: MoE, batch: Batch) -> Iterator[Step]:
        images, count = len(batch.y), len(model.experts)
        # Row i·E + e is image i for expert e: one dispatch serves them all.
        rows = torch.arange(count, device=batch.x.device).repeat(images).view(-1, 1)
        x, y = batch.x.repeat_interleave(count, 0), batch.y.repeat_interleave(count, 0)
        with eval_frozen(model), torch.no_grad():
            experts, chosen = list(model.experts), model.router(batch.x).argmax(1)
            x_paths = self.attack(
                lambda z: dispatch(experts, z, rows)[:, 0], x, y, batch,
                lambda suffix: torch.stack([batch.noise(f"expert{e}{suffix}") for e in range(count)], 1).flatten(0, 1),
            )  # fmt: skip
        x_adv = x_paths[torch.arange(images, device=chosen.device) * count + chosen]

        def loss(m: MoE) -> Terms:
            each = F.cross_entropy(dispatch(list(m.experts), x_paths, rows)[:, 0], y, reduction="none")
            each = each.view(images, count)
            paths = (each.mean(1) if self.paths == "all" else each.amax(1)).mean()
            return {**self.cross_entropy(m, x_adv, batch.y), "paths": self.beta * paths}

        yield Step("model", loss)

"""JTDMoE, joint training of the dual model (the paper's section 5.3): two steps a batch, in turn.

(1) the robust branch, by RT-ER's loss with the term of every expert; (2) the standard branch, by CE(F_D(x), y).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.deployed import eval_frozen
from bench.models.dual import DualModel
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch, Step, Terms
from bench.training.objectives.rt_er import RTER


@OBJECTIVES.register("jtdmoe")
class JTDMoE(RTER):
    """Each step changes the parameters, and the BatchNorm statistics, of its own branch alone."""

    expert_term: Literal["second", "all"] = "all"

    def parts(self, model: Any) -> Mapping[str, nn.Module]:
        return {"robust": model.robust, "standard": model.standard}

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        robust_loss = self.robust_loss(model.robust, batch)
        yield Step("robust", lambda dual: robust_loss(dual.robust))
        yield Step("standard", lambda dual: self.standard_loss(dual, batch.x, batch.y))

    def standard_loss(self, dual: DualModel, x: Tensor, y: Tensor) -> Terms:
        """CE(F_D(x), y) with R as it is deployed, and held fixed."""
        with eval_frozen(dual.robust), torch.no_grad():
            robust = dual.robust(x)
        standard, trace = dual.standard.trace(x)
        terms = {
            "ce": F.cross_entropy(dual.mix(standard, robust), y),
            **self.balance_term(dual.standard, trace.gate_logits),
        }
        return {f"standard_{name}": term for name, term in terms.items()}

"""The interface between a training objective and the loop.

Axes: B = batch, E = experts, C = classes. An objective's fields are its hyper-parameters. The loop takes the optimiser
steps of a batch from it one at a time, so that each step sees the weights after the one before.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bench.models.deployed import eval_frozen
from bench.models.layers import Balance, trained_gates, watched
from bench.models.moe import MoE
from bench.pgd import default_step_size, pgd, random_start
from bench.spec import Spec, ThreatModel

#: From the suffix of a salt to a tensor of the images' shape.
Start = Callable[[str], Tensor]

#: Named terms of a loss, already weighted: the loss is their sum.
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """x (B, c, H, W) in [0, 1], y (B,); `noise(salt)` is uniform in [−1, 1], of x's shape.

    The noise of an example depends on (seed, epoch, example, salt) alone, not on the batch that it is in. `weight`
    multiplies the loss where several processes share one batch, so that the mean over processes is that over images.
    """

    x: Tensor
    y: Tensor
    threat_model: ThreatModel
    noise: Callable[[str], Tensor]
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimiser step: on the parameters of `part`, down the gradient of `loss(model)`."""

    part: str
    loss: Callable[[Any], Terms]


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q) of each row, (B,), from two (B, C); the first is the target."""
    # CPU autocast would take these logarithms in bfloat16, which is coarser than the divergence
    dtype = torch.promote_types(p_logits.dtype, torch.float32)
    log_p, log_q = p_logits.log_softmax(1, dtype=dtype), q_logits.log_softmax(1, dtype=dtype)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def load_balance(gate_logits: Tensor) -> Tensor:
    """E · Σ_i f_i P_i (Fedus et al. 2021, Switch, equation 4), gate_logits (B, E).

    f_i is the share of rows whose best expert is i, P_i the mean gate probability of i. It is 1 for a balanced router
    and E for one that sends everything to one expert; its gradient flows through P alone.
    """
    num_experts = gate_logits.shape[1]
    counts = F.one_hot(gate_logits.argmax(1), num_experts).sum(0)
    if (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):  # f_i is the whole batch's, also where several processes share it
        torch.distributed.all_reduce(counts)
    share = counts / counts.sum()
    return num_experts * (share * gate_logits.softmax(1).mean(0)).sum()


def load_entropy(gate_logits: Tensor) -> Tensor:
    """ln E − H(P), gate_logits (B, E), P the mean gate probabilities: 0 for a balanced gate, ln E for a collapsed one.

    P is of the rows of this process alone: unlike a count, it cannot be summed over processes with its gradient.
    """
    return math.log(gate_logits.shape[1]) - torch.special.entr(gate_logits.softmax(1).mean(0)).sum()


#: From a gate's scores (B, E) to the loss that keeps its experts in use.
BALANCE_LOSSES: dict[Balance, Callable[[Tensor], Tensor]] = {"switch": load_balance, "entropy": load_entropy}


class Objective(Spec):
    """Base of all objectives; subclasses register with `OBJECTIVES`.

    `adversarial`: the checkpoint is chosen by robust, not by clean accuracy.
    """

    adversarial: ClassVar[bool] = False
    #: Parameters of the method's own, and the values of each that `bench tune` tries.
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    balance: float = Field(default=0.5, ge=0, description="weight of the load-balance loss of a softmax gate")

    def parts(self, model: Any) -> Mapping[str, nn.Module]:
        """The parts of the model that have an optimiser each."""
        return {"model": model}

    def steps(self, model: Any, batch: Batch) -> Iterator[Step]:
        """The optimiser steps of one batch; the loop takes each before it asks for the next."""
        raise NotImplementedError

    def clean_terms(self, model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Terms]:
        """F(x) (B, C), and its cross-entropy with the load-balance term of the model's gates that train."""
        gates = trained_gates(model)
        with watched(gates) as scores:
            logits = model(x)
        losses = [BALANCE_LOSSES[gates[gate]](own) for gate, own in scores.items()]
        terms = {"ce": F.cross_entropy(logits, y)}
        if losses and self.balance:
            terms["balance"] = self.balance * torch.stack(losses).mean()
        return logits, terms

    def cross_entropy(self, model: Any, x: Tensor, y: Tensor) -> Terms:
        """The terms of CE(F(x), y)."""
        return self.clean_terms(model, x, y)[1]

    def balance_term(self, moe: MoE, gate_logits: Tensor) -> Terms:
        """The weighted load-balance loss; nothing for `gate=argmax`, whose router is never trained."""
        if moe.gate != "softmax" or not self.balance:
            return {}
        return {"balance": self.balance * load_balance(gate_logits)}


class Adversarial(Objective):
    """Shared by the objectives with an inner maximisation."""

    adversarial: ClassVar[bool] = True

    reach: ClassVar[float] = 2.5

    inner_steps: int = Field(default=10, gt=0)
    step_size: float | None = Field(
        default=None, gt=0, description="in pixels of [0, 1]; None: reach · ε / inner_steps"
    )
    restarts: int = Field(default=1, gt=0, description="random starts; of each image the end of highest loss is taken")

    def inner_step_size(self, eps: float) -> float:
        """Of each inner step, in pixels of [0, 1]."""
        return self.step_size or default_step_size(eps, self.inner_steps, self.reach)

    def ascend(
        self,
        loss: Callable[[Tensor], Tensor],
        x: Tensor,
        batch: Batch,
        start: Start,
        ball: ThreatModel | None = None,
    ) -> Tensor:
        """PGD on `loss` (images → a value each) inside the ball around x, which may repeat the batch's images.

        start(suffix) is a starting point, drawn from the batch's noise under a salt that ends in `suffix`. `ball` is
        what the iterates are projected onto, the batch's threat model if it is not given.
        """
        ball, step_size = ball or batch.threat_model, self.inner_step_size(batch.threat_model.eps)
        suffixes = ["", *(f", start {number}" for number in range(2, self.restarts + 1))]
        ends = torch.stack([pgd(loss, x, ball, self.inner_steps, step_size, start(suffix)) for suffix in suffixes])
        if self.restarts == 1:
            return ends[0]
        with torch.no_grad():
            strongest = torch.stack([loss(end) for end in ends]).argmax(0)
        return ends[strongest, torch.arange(len(x), device=x.device)]


class CrossEntropyAttack(Adversarial):
    """Shared by the objectives whose inner maximisation is of the cross-entropy, from a random start.

    With `inner_steps=1` it is FGSM with a random start (Wong et al. 2020), and with `start_radius=2` as well it is
    N-FGSM (de Jorge et al. 2022): the start is uniform in a ball of 2ε, and the sum of start and step is not projected
    onto the ball of ε, only onto [0, 1].
    """

    start_radius: float = Field(
        default=1.0, gt=0, description="of the random start, in units of ε; above 1: one step, not projected to ε"
    )

    @model_validator(mode="after")
    def _unprojected_attack_has_one_step(self) -> Self:
        if self.start_radius > 1 and self.inner_steps > 1:
            raise ValueError(f"start_radius {self.start_radius:g} is above 1: it needs inner_steps=1")
        return self

    def attack(self, f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch: Batch, noise: Start) -> Tensor:
        """PGD on the cross-entropy of f (images → logits) from random starts; noise(suffix) is uniform in [−1, 1]."""
        threat = batch.threat_model
        first = ThreatModel(norm=threat.norm, eps=self.start_radius * threat.eps)
        ball = threat
        if self.start_radius > 1:  # as large as the start and the step can reach
            ball = ThreatModel(norm=threat.norm, eps=first.eps + self.inner_step_size(threat.eps))

        def start(suffix: str) -> Tensor:
            return random_start(x, first, noise(suffix))

        return self.ascend(lambda x_adv: F.cross_entropy(f(x_adv), y, reduction="none"), x, batch, start, ball)

    def attack_model(self, model: Any, batch: Batch) -> Tensor:
        """x', PGD on the whole model in eval mode."""
        with eval_frozen(model):
            return self.attack(model, batch.x, batch.y, batch, lambda suffix: batch.noise(f"model{suffix}"))

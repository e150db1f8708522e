"""AdvMoE's two steps on linear experts, by hand.

The pixels are (a, b, t). Expert i has the logits (i + 1)·(a, b); the router's scores are (0, t).
"""

from collections.abc import Callable
from math import cosh, exp, log

import pytest
import torch

from bench.errors import TrainingFailed
from bench.models.moe import MoE
from bench.spec import ThreatModel
from bench.training.objectives.advmoe import AdvMoE
from bench.training.objectives.base import Batch, Step

EXPERTS = [[[s, 0, 0], [0, s, 0]] for s in (1.0, 2.0)]
ROUTER = [[0, 0, 0], [0, 0, 1.0]]
NOISE = torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 1, 3)


def batch(y: int = 0) -> Batch:
    x = torch.full((1, 1, 1, 3), 0.5)
    return Batch(x, torch.tensor([y]), ThreatModel(norm="Linf", eps=0.1), lambda salt: NOISE)


def values(step: Step, moe: MoE) -> dict[str, float]:
    return {name: term.item() for name, term in step.loss(moe).items()}


@pytest.fixture
def moe(linear_moe: Callable[..., MoE]) -> MoE:
    return linear_moe(EXPERTS, ROUTER, 1, "argmax")


@pytest.mark.parametrize("beta", [6.0, 2.0])
def test_the_losses_by_hand(moe: MoE, beta: float):
    experts, router = AdvMoE(beta=beta).steps(moe, batch())
    assert [experts.part, router.part] == ["experts", "router"]
    # expert 1 is chosen, whose logits are equal at x and 0.4 apart at x' = (0.6, 0.4, 0.6)
    assert values(experts, moe) == {
        "ce": pytest.approx(log(2)),
        "kl": pytest.approx(beta * log(cosh(0.2)), rel=1e-4),
    }
    # scores (0, 0.5) at x, (0, 0.6) at x'; p and q are the second expert's probabilities
    p, q = 1 / (1 + exp(-0.5)), 1 / (1 + exp(-0.6))
    divergence = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
    assert values(router, moe) == {
        "router_ce": pytest.approx(beta * log(1 + exp(0.5))),  # label 0 mod 2
        "router_kl": pytest.approx(beta * divergence, rel=1e-3),
    }


@pytest.mark.parametrize(("y", "loss"), [(2, log(1 + exp(0.5))), (3, log(1 + exp(-0.5)))])
def test_the_routers_label_is_the_class_modulo_the_number_of_experts(moe: MoE, y: int, loss: float):
    objective, wide = AdvMoE(), [[s, 0, 0] for s in (1.0, 2.0, 3.0, 4.0)]
    for expert in moe.experts:
        expert[1].weight.data = torch.tensor(wide)  # four classes
    *_, router = objective.steps(moe, batch(y))
    assert values(router, moe)["router_ce"] == pytest.approx(6 * loss)


def test_the_second_attack_sees_the_weights_that_the_first_step_has_left(moe: MoE):
    steps = AdvMoE().steps(moe, batch())
    next(steps)
    with torch.no_grad():
        moe.router[1].weight.mul_(-1)  # the router now falls with t: x' of the router's step still moves t up
    # scores (0, −0.5) at x, (0, −0.6) at x'
    p, q = 1 / (1 + exp(0.5)), 1 / (1 + exp(0.6))
    divergence = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
    assert values(next(steps), moe)["router_kl"] == pytest.approx(6 * divergence, rel=1e-3)


def test_the_parts_are_the_experts_and_the_router(moe: MoE):
    parts = AdvMoE().parts(moe)
    named = {name: {id(p) for p in part.parameters()} for name, part in parts.items()}
    assert named["experts"] | named["router"] == {id(p) for p in moe.parameters()}
    assert not named["experts"] & named["router"]


def test_scores_that_are_not_finite_stop_the_training(moe: MoE):
    moe.router[1].weight.data[1, 2] = float("nan")
    with pytest.raises(TrainingFailed, match=r"^the router's scores are not finite$"):
        next(AdvMoE().steps(moe, batch()))


def test_the_load_balance_loss_reaches_the_router_where_it_is_asked_for(linear_moe: Callable[..., MoE]):
    moe = linear_moe(EXPERTS, ROUTER, 1, "softmax")
    experts, router = AdvMoE(balance=0.5).steps(moe, batch())
    assert "balance" not in values(experts, moe)
    # E · f · P with everything on expert 1: 2 · σ(0.5)
    assert values(router, moe)["balance"] == pytest.approx(0.5 * 2 / (1 + exp(-0.5)))


def test_the_published_attack_is_the_default(moe: MoE):
    # 2 steps of 5/255 in a ball of 8/255: 0.5 → 5/255 away → cut at 8/255
    objective, seen = AdvMoE(), []
    assert (objective.inner_steps, objective.step_size, objective.restarts) == (2, None, 1)
    moe.register_forward_pre_hook(lambda _, inputs: seen.append(255 * (inputs[0].detach() - 0.5).flatten()))
    x, zero = torch.full((1, 1, 1, 3), 0.5), torch.zeros(1, 1, 1, 3)
    steps = objective.steps(
        moe, Batch(x, torch.tensor([0]), ThreatModel(norm="Linf", eps=8 / 255), lambda _: NOISE / 9)
    )
    next(steps).loss(moe)
    clean, start, after, again, x_adv = seen  # two of the attack's steps between the clean image, twice, and x'
    assert clean.tolist() == again.tolist() == zero.flatten().tolist()
    moved = (after - start).tolist()
    assert moved == pytest.approx([5, -5, 5], abs=1e-3)
    assert x_adv.tolist() == pytest.approx([8, -8, 8], abs=1e-3)

"""RT-ER's loss on linear experts, by hand.

The pixels are (a, b, t, 1). Expert i has the logits (i + 1)·(a, b), so that for a = b = 0.5, y = 0 and ε = 0.1 every
attack ends at a = 0.4, b = 0.6, and KL(½, ½ ‖ softmax of logits d apart) = ln cosh(d/2) with d = 0.2 (i + 1).
The router looks at t alone: for t = 0 it ranks the experts 0, 2, 1, and for t = 1 it ranks them 1, 0, 2.
"""

from collections import Counter
from collections.abc import Callable
from math import cosh, exp, log
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from bench.models.architecture import Routed
from bench.models.moe import MoE
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.objectives.rt_er import RTER

EXPERTS = [[[s, 0, 0, 0], [0, s, 0, 0]] for s in (1.0, 2.0, 3.0)]
ROUTER = [[0, 0, -1.0, 3.0], [0, 0, 2.0, 1.0], [0, 0, -1.0, 2.0]]
IMAGES = torch.tensor([[0.5, 0.5, 0.0, 1.0], [0.5, 0.5, 1.0, 1.0]]).view(2, 1, 1, 4)


def ln_cosh(u: float) -> float:
    return log(cosh(u))


def batch(x: Tensor = IMAGES) -> Batch:
    y = torch.zeros(len(x)).long()
    return Batch(x, y, ThreatModel(norm="Linf", eps=0.1), lambda salt: torch.zeros_like(x))


def terms(objective: RTER, moe: MoE, x: Tensor = IMAGES) -> dict[str, float]:
    (step,) = objective.steps(moe, batch(x))
    assert step.part == "model"
    return {name: term.item() for name, term in step.loss(moe).items()}


@pytest.mark.parametrize("beta", [6.0, 1.0, 0.0])
def test_the_term_of_the_second_ranked_expert(linear_moe: Callable[..., MoE], beta: float):
    # image 0: F = f_0, d = 0.2, second expert 2; image 1: F = f_1, d = 0.4, second expert 0
    found = terms(RTER(beta=beta), linear_moe(EXPERTS, ROUTER, 1, "argmax"))
    assert found == {
        "ce": pytest.approx((log(1 + exp(0.2)) + log(1 + exp(0.4))) / 2),
        "kl": pytest.approx(beta / 2 * (ln_cosh(0.3) + ln_cosh(0.1)), rel=1e-4),
    }


def test_the_term_of_all_experts(linear_moe: Callable[..., MoE]):
    found = terms(RTER(expert_term="all"), linear_moe(EXPERTS, ROUTER, 1, "argmax"))
    assert found["kl"] == pytest.approx(6 / 2 * 2 * (ln_cosh(0.1) + ln_cosh(0.2) + ln_cosh(0.3)), rel=1e-4)


def test_the_mean_of_the_terms_of_all_experts(linear_moe: Callable[..., MoE]):
    found = terms(RTER(expert_term="all", expert_reduction="mean"), linear_moe(EXPERTS, ROUTER, 1, "argmax"))
    assert found["kl"] == pytest.approx(6 / 3 * (ln_cosh(0.1) + ln_cosh(0.2) + ln_cosh(0.3)), rel=1e-4)


def test_the_papers_beta_and_expert_are_the_defaults():
    assert (RTER().beta, RTER().expert_term, RTER().expert_reduction) == (6.0, "second", "sum")


def test_the_second_expert_is_that_of_the_clean_image(linear_moe: Callable[..., MoE]):
    # scores (10, a, 0.45): at a = 0.5 expert 1 is second, at the attacked a = 0.4 expert 2 would be
    moe = linear_moe(EXPERTS, [[0, 0, 0, 10.0], [1.0, 0, 0, 0], [0, 0, 0, 0.45]], 1, "argmax")
    assert terms(RTER(beta=1), moe, IMAGES[:1])["kl"] == pytest.approx(ln_cosh(0.2), rel=1e-4)


def test_the_expert_is_attacked_alone(linear_moe: Callable[..., MoE]):
    # F = f_0 does not depend on t, and expert 1 on nothing else: logits (5t − 2.5, 0), attacked from t = 0.5 to 0.4
    experts = [EXPERTS[0], [[0, 0, 5.0, -2.5], [0, 0, 0, 0]]]
    moe = linear_moe(experts, [[0, 0, 0, 2.0], [0, 0, 0, 1.0]], 1, "argmax")
    x = torch.tensor([0.5, 0.5, 0.5, 1.0]).view(1, 1, 1, 4)
    assert terms(RTER(beta=1), moe, x)["kl"] == pytest.approx(ln_cosh(0.25), rel=1e-4)


def test_the_clean_image_is_the_target_of_the_divergence(linear_moe: Callable[..., MoE]):
    # expert 1 at x: (ln 3, 0) of the constant pixel; attacked, t from 1 to 0.9: 10 · 0.1 less. p = ¾, q = 3/(3 + e)
    experts = [EXPERTS[0], [[0, 0, 10.0, log(3) - 10], [0, 0, 0, 0]]]
    moe = linear_moe(experts, [[0, 0, 0, 2.0], [0, 0, 0, 1.0]], 1, "argmax")
    x = torch.tensor([0.5, 0.5, 1.0, 1.0]).view(1, 1, 1, 4)
    p, q = 3 / 4, 3 / (3 + exp(1))
    expected = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
    assert terms(RTER(beta=1), moe, x)["kl"] == pytest.approx(expected, rel=1e-4)


def test_a_softmax_gate_adds_the_balance_term_and_an_argmax_gate_does_not(linear_moe: Callable[..., MoE]):
    assert list(terms(RTER(), linear_moe(EXPERTS, ROUTER))) == ["ce", "balance", "kl"]
    assert list(terms(RTER(), linear_moe(EXPERTS, ROUTER, 1, "argmax"))) == ["ce", "kl"]


def test_the_divergence_trains_the_experts_and_not_the_router(linear_moe: Callable[..., MoE]):
    moe = linear_moe(EXPERTS, ROUTER)
    (step,) = RTER().steps(moe, batch(IMAGES[:1]))
    step.loss(moe)["kl"].backward()
    assert moe.router[1].weight.grad is None
    assert [e[1].weight.grad is not None for e in moe.experts] == [False, False, True]


def test_each_expert_term_has_its_own_noise(linear_moe: Callable[..., MoE]):
    asked: list[str] = []

    def noise(salt: str) -> Tensor:
        asked.append(salt)
        return torch.zeros_like(IMAGES)

    b = batch()
    next(RTER(expert_term="all").steps(linear_moe(EXPERTS, ROUTER), Batch(b.x, b.y, b.threat_model, noise)))
    assert asked == ["model", "expert0", "expert1", "expert2"]


def test_the_attacks_do_not_touch_batch_statistics_and_the_loss_does():
    experts = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)) for _ in "ab"]
    moe = MoE(experts, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)), 2)
    means = [expert[1].running_mean for expert in experts]
    (step,) = RTER().steps(moe.train(), batch(IMAGES.repeat(2, 1, 1, 1)))
    assert not any(mean.any() for mean in means)
    step.loss(moe)
    assert all(mean.any() for mean in means)


# --- one dispatch for both attacks ------------------------------------------------------------------------------------


def run_of(
    one_dispatch: bool | None, k: int = 1, gate: Any = "softmax", steps: int = 3, **options: Any
) -> tuple[list[Tensor], Counter[int], Tensor]:
    """What the experts see in the loss (clean images, x'_s, x'), how often the attacks call each, and the clean x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moe = Routed(
            expert="small_cnn", expert_params={"width": 3}, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,),
            std=(0.5,), num_experts=3, num_selected_experts=k, gate=gate,
        ).build().double()  # fmt: skip
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    seen: list[Tensor] = []
    calls: Counter[int] = Counter()

    def noise(salt: str) -> Tensor:
        numbers = torch.rand(x.shape, generator=torch.Generator().manual_seed(crc32(salt.encode())))
        return (2 * numbers - 1).double()

    for i, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(
            lambda module, inputs, i=i: seen.append(inputs[0]) if module.training else calls.update([i])
        )
    objective = RTER(one_dispatch=one_dispatch, inner_steps=steps, **options)
    (step,) = objective.steps(moe.train(), Batch(x, torch.arange(12) % 3, ThreatModel(norm="Linf", eps=0.1), noise))
    step.loss(moe)
    return seen, calls, x


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("expert_term", ["second", "all"])
@pytest.mark.parametrize("gate", ["softmax", "argmax"])
@pytest.mark.parametrize("k", [1, 2])
def test_one_dispatch_finds_the_same_images(k: int, gate: str, expert_term: Any, restarts: int):
    options = {"k": k, "gate": gate, "expert_term": expert_term, "restarts": restarts}
    (apart, _, x), (together, _, _) = (run_of(one, **options) for one in (False, True))
    assert len(apart) == len(together) > 2
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    clean = {tuple(image) for image in x.flatten(1).tolist()}
    assert any(tuple(image) not in clean for part in together for image in part.flatten(1).tolist())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("expert_term", ["second", "all"])
def test_one_dispatch_runs_each_expert_at_most_once_a_step(k: int, expert_term: Any):
    _, calls, _ = run_of(True, k=k, expert_term=expert_term, steps=5)
    assert set(calls.values()) == {5}
    _, apart, _ = run_of(False, k=k, expert_term=expert_term, steps=5)
    assert max(apart.values()) == 10  # once for F and once for itself


def test_on_a_cpu_the_attacks_run_apart_unless_they_are_asked_to_run_together():
    assert RTER().one_dispatch is None
    apart, together, default = (run_of(one, expert_term="all")[1] for one in (False, True, None))
    assert default == apart != together

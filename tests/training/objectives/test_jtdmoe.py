"""JTDMoE: two steps a batch, each on its own branch, the second with what the first has left."""

from collections.abc import Callable, Iterator
from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from bench.models.architecture import Dual, Routed
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.objectives.jtdmoe import JTDMoE
from bench.training.objectives.rt_er import RTER

LINF = ThreatModel(norm="Linf", eps=0.1)
X, Y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
BATCH = Batch(X, Y, LINF, lambda salt: torch.zeros_like(X))


@pytest.fixture
def dual() -> DualModel:
    torch.manual_seed(0)
    moe = Routed(
        expert="small_cnn", expert_params={"width": 2}, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,),
        num_experts=2,
    )  # fmt: skip
    model = Dual(standard=moe, robust=moe).build().train()
    assert isinstance(model, DualModel)
    return model


def states(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items() if "normalize" not in key}


def optimised(model: DualModel) -> Iterator[tuple[str, set[str], set[str]]]:
    """Take the steps; for each its part, and the names of what changed and of what did not."""
    objective = JTDMoE(inner_steps=2)
    for step in objective.steps(model, BATCH):
        before = states(model)
        model.zero_grad()
        torch.stack(list(step.loss(model).values())).sum().backward()
        torch.optim.SGD(objective.parts(model)[step.part].parameters(), lr=0.1).step()
        after = states(model)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        yield step.part, changed, set(before) - changed


def test_the_robust_branch_moves_first_and_then_the_standard_one(dual: DualModel):
    for (part, changed, unchanged), expected in zip(optimised(dual), ["robust", "standard"], strict=True):
        assert part == expected
        # parameters and BatchNorm statistics of the one branch, all of them; of the other none
        assert {key.partition(".")[0] for key in changed} == {expected}
        assert not any(key.startswith(f"{expected}.") for key in unchanged)


def test_no_gradient_reaches_the_other_branch(dual: DualModel):
    for step in JTDMoE(inner_steps=1).steps(dual, BATCH):
        dual.zero_grad()
        torch.stack(list(step.loss(dual).values())).sum().backward()
        with_gradient = {key.partition(".")[0] for key, p in dual.named_parameters() if p.grad is not None}
        assert with_gradient == {step.part}


def test_modes_in_each_step(dual: DualModel):
    seen: list[tuple[str, bool]] = []
    for name in ("robust", "standard"):
        branch = getattr(dual, name)
        branch.router.register_forward_hook(lambda _, *__, b=branch, n=name: seen.append((n, b.training)))
    steps = JTDMoE(inner_steps=1).steps(dual, BATCH)
    robust_step = next(steps)
    assert seen
    assert set(seen) == {("robust", False)}  # the attacks
    seen.clear()
    robust_step.loss(dual)
    assert seen == [("robust", True)]
    seen.clear()
    next(steps).loss(dual)
    assert seen == [("robust", False), ("standard", True)]  # the S step mixes in R as it is deployed
    assert all(module.training for module in dual.modules())
    assert all(parameter.requires_grad for parameter in dual.parameters())


def test_the_standard_step_sees_what_the_robust_step_has_left(dual: DualModel):
    steps = JTDMoE(inner_steps=1).steps(dual, BATCH)
    next(steps)
    with torch.no_grad():
        for expert in dual.robust.experts:
            expert.backbone[-1].bias.copy_(torch.tensor([50.0, -50.0, 0.0]))
    found = next(steps).loss(dual)["standard_ce"]
    # α R is now sure of class 0 for every image: of the classes in turn, two thirds must come from (1 − α) S
    assert found.item() > 0.8


def pixel_dual(linear_moe: Callable[..., MoE], combine: str) -> DualModel:
    """Two pixels; every expert of S has twice their values as its logits, and every expert of R four times."""
    branches = [linear_moe([[[s, 0.0], [0.0, s]]] * 2, [[1.0, 0.0], [0.0, 1.0]], 1, "argmax") for s in (2.0, 4.0)]
    return DualModel(*branches, 0.7, combine)


def losses(dual: DualModel, objective: JTDMoE) -> dict[str, float]:
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    batch = Batch(x, torch.tensor([0]), LINF, lambda salt: torch.zeros_like(x))
    return {name: term.item() for step in objective.steps(dual, batch) for name, term in step.loss(dual).items()}


def test_the_losses_by_hand(linear_moe: Callable[..., MoE]):
    # x = (1, 0), y = 0; attacked (0.9, 0.1): R = 4x', 3.2 apart: CE = ln(1 + e^−3.2)
    # every expert of R: KL between sigmoids of 4 and 3.2, twice, β = 6
    # S step, clean: logits 0.3 · 2 + 0.7 · 4 = 3.4 apart
    p, q = 1 / (1 + exp(-4)), 1 / (1 + exp(-3.2))
    divergence = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
    assert losses(pixel_dual(linear_moe, "logits"), JTDMoE()) == {
        "ce": pytest.approx(log(1 + exp(-3.2)), rel=1e-4),
        "kl": pytest.approx(6 * 2 * divergence, rel=1e-3),
        "standard_ce": pytest.approx(log(1 + exp(-3.4)), rel=1e-4),
    }


def test_the_standard_loss_of_mixed_probabilities_by_hand(linear_moe: Callable[..., MoE]):
    # softmaxes of 2 and 4 apart, mixed 0.3 to 0.7
    found = losses(pixel_dual(linear_moe, "probs"), JTDMoE())
    assert found["standard_ce"] == pytest.approx(-log(0.3 / (1 + exp(-2)) + 0.7 / (1 + exp(-4))), rel=1e-4)


def test_all_experts_are_the_default_and_the_second_alone_is_possible(linear_moe: Callable[..., MoE]):
    assert (JTDMoE().expert_term, RTER().expert_term) == ("all", "second")
    dual = pixel_dual(linear_moe, "logits")
    every, second = (losses(dual, JTDMoE(expert_term=term))["kl"] for term in ("all", "second"))
    assert every == pytest.approx(2 * second)  # two experts of equal weights
    assert second > 0

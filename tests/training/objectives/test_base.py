"""What the objectives share: divergence, load balance, the attack; and the contract that each keeps."""

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from bench.models.architecture import Dual, Inside, Routed
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.registry import OBJECTIVES
from bench.spec import ThreatModel
from bench.training.objectives.base import (
    Adversarial,
    Batch,
    CrossEntropyAttack,
    Objective,
    kl,
    load_balance,
    load_entropy,
)

LINF = ThreatModel(norm="Linf", eps=0.1)
logits = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6)


# --- Kullback–Leibler -------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    # p = (1, 1)/2, q = (3, 1)/4: ½ ln(2/3) + ½ ln 2 = ½ ln(4/3)
    p, q = torch.zeros(1, 2), torch.tensor([[log(3), 0.0]])
    assert kl(p, q).sum().item() == pytest.approx(0.5 * log(4 / 3))
    # the other way round: ¾ ln(3/2) + ¼ ln(1/2)
    assert kl(q, p).sum().item() == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))
    assert kl(p.repeat(3, 1), q.repeat(3, 1)).tolist() == pytest.approx([0.5 * log(4 / 3)] * 3)


@settings(deadline=None)
@given(logits, logits)
def test_kl_is_the_sum_of_scipys_relative_entropy(p: list[float], q: list[float]):
    expected = rel_entr(softmax(np.reshape(p, (2, 3)), 1), softmax(np.reshape(q, (2, 3)), 1)).sum(1)
    found = kl(torch.tensor(p).view(2, 3).double(), torch.tensor(q).view(2, 3).double())
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_kl_under_autocast_is_taken_in_float32():
    p = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    p, q = p.bfloat16(), (p + 0.05).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl(p, q), kl(p.float(), q.float()))


# --- load balance -----------------------------------------------------------------------------------------------------


def test_load_balance_by_hand():
    # probabilities (3, 1)/4 twice and (1, 3)/4: f = (2, 1)/3, P = (7, 5)/12; 2 · (2/3 · 7/12 + 1/3 · 5/12) = 19/18
    scores = torch.tensor([[log(3), 0.0], [log(3), 0.0], [0.0, log(3)]])
    assert load_balance(scores).item() == pytest.approx(19 / 18)


def test_load_balance_is_one_when_balanced_and_e_when_all_go_to_one():
    assert load_balance(9 * torch.eye(4)).item() == pytest.approx(1)
    assert load_balance(99 * torch.eye(4)[[2, 2, 2]]).item() == pytest.approx(4)


def test_gradient_of_load_balance_flows_through_the_probabilities():
    # one row, P = (3, 1)/4, f = (1, 0): L = 2 P_0, ∂P_0/∂r = ±P_0 P_1 = ±3/16
    scores = torch.tensor([[log(3), 0.0]], requires_grad=True)
    load_balance(scores).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[6 / 16, -6 / 16]]))


# --- terms of a loss --------------------------------------------------------------------------------------------------

ONE, ZERO = torch.ones(1, 1, 1, 1), torch.tensor([0])


def test_a_dense_model_has_cross_entropy_alone(linear_net: Callable[..., nn.Module]):
    terms = Objective().cross_entropy(linear_net([[log(3)], [0.0]]), ONE, ZERO)
    assert {name: term.item() for name, term in terms.items()} == {"ce": pytest.approx(log(4 / 3))}


def test_a_softmax_gate_has_the_weighted_balance_and_an_argmax_gate_has_none(linear_moe: Callable[..., MoE]):
    experts, router = [[[log(3)], [0.0]]] * 2, [[log(3)], [0.0]]
    terms = Objective(balance=0.1).cross_entropy(linear_moe(experts, router), ONE, ZERO)
    # F = ¾ (ln 3, 0): CE = ln(1 + 3^−¾); the balance of one row is 2 · ¾
    assert terms["ce"].item() == pytest.approx(log(1 + 3**-0.75))
    assert terms["balance"].item() == pytest.approx(0.1 * 1.5)
    for moe, balance in [(linear_moe(experts, router, 1, "argmax"), 0.5), (linear_moe(experts, router), 0.0)]:
        assert list(Objective(balance=balance).cross_entropy(moe, ONE, ZERO)) == ["ce"]


# --- the attack -------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Two logits of one pixel, (x, 0); remembers in which mode and with which pixel it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[bool, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, x.item()))
        return torch.cat([self.weight * x.flatten(1), 0 * x.flatten(1)], 1)


def batch(noise: Callable[[str], Tensor]) -> Batch:
    return Batch(torch.full((1, 1, 1, 1), 0.5), torch.tensor([1]), LINF, noise)


def test_the_attack_sees_the_model_in_eval_mode_and_gives_it_back_in_train_mode():
    model = Watched().train()
    x_adv = CrossEntropyAttack(inner_steps=2).attack_model(model, batch(lambda salt: torch.zeros(1, 1, 1, 1)))
    assert [training for training, _ in model.seen] == [False, False]
    assert model.training
    assert model.weight.requires_grad
    assert x_adv.item() == pytest.approx(0.6)  # y = 1: CE grows with x


def test_the_attack_starts_at_the_models_own_noise():
    asked = []

    def noise(salt: str) -> Tensor:
        asked.append(salt)
        return torch.full((1, 1, 1, 1), -0.5)

    model = Watched()
    CrossEntropyAttack(inner_steps=1).attack_model(model, batch(noise))
    assert asked == ["model"]
    assert model.seen == [(False, pytest.approx(0.45))]


@pytest.mark.parametrize(("step_size", "expected"), [(0.01, 0.52), (None, 0.6)])
def test_the_step_size_is_the_recipes_or_the_default(step_size: float | None, expected: float):
    # two steps from x: of 0.01 each, or of 2.5 ε/2 > ε, cut to ε
    objective = CrossEntropyAttack(inner_steps=2, step_size=step_size)
    x_adv = objective.attack_model(Watched(), batch(lambda salt: torch.zeros(1, 1, 1, 1)))
    assert x_adv.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("radius", "noise", "start", "end"),
    [
        # ε = 0.1 and the slope is positive. FGSM from a start in the ball of ε: the step of ε is projected to 0.6
        (1.0, -0.5, 0.45, 0.55),
        (1.0, 0.5, 0.55, 0.6),
        (0.5, -1.0, 0.45, 0.55),
        # from one in the ball of 2ε it is not: 3ε away at most
        (2.0, -0.5, 0.4, 0.5),
        (2.0, 0.5, 0.6, 0.7),
        (2.0, 1.0, 0.7, 0.8),
    ],
)
def test_one_step_from_a_random_start_by_hand(radius: float, noise: float, start: float, end: float):
    model = Watched()
    objective = CrossEntropyAttack(inner_steps=1, start_radius=radius)
    x_adv = objective.attack_model(model, batch(lambda salt: torch.full((1, 1, 1, 1), noise)))
    assert model.seen == [(False, pytest.approx(start))]
    assert x_adv.item() == pytest.approx(end)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_one_step_that_is_not_projected_stays_in_the_box(norm: Any):
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1
    images = Batch(x, torch.zeros(8).long(), ThreatModel(norm=norm, eps=0.3), lambda salt: noise)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x_adv = CrossEntropyAttack(inner_steps=1, start_radius=2).attack_model(net, images)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    delta = (x_adv - x).flatten(1)
    reached = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert reached.max() <= 0.9 + 1e-5
    assert reached.max() > 0.3


# --- restarts ---------------------------------------------------------------------------------------------------------


class Basins(nn.Module):
    """Logits (0, v) of one pixel: v is 0 at 0.5, and grows to the left by 1 a pixel and to the right by 2.

    So every attack, on the cross-entropy of class 0 or on a divergence from 0.5, ends from the left at 0.4 with v = 0.1
    and from the right at 0.6 with v = 0.2. It remembers what it saw in train mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) - 0.5
        if self.training:
            self.seen |= {round(pixel, 4) for pixel in x.flatten().tolist()}
        return torch.cat([0 * z, torch.maximum(-z, 2 * z)], 1)


def test_of_each_image_the_start_that_ends_highest_is_kept():
    # images 0 and 1 end higher on the right, image 2 on the left; the starts lie left, right, left, and then opposite
    side, slope = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1, 1), torch.tensor([1.0, 1.0, -1.0])
    images = Batch(torch.full((3, 1, 1, 1), 0.5), torch.zeros(3).long(), LINF, lambda salt: torch.zeros(3, 1, 1, 1))

    def loss(x: Tensor) -> Tensor:
        z = slope * (x.flatten() - 0.5)
        return torch.maximum(-z, 2 * z)

    def end(restarts: int) -> list[float]:
        x_adv = Adversarial(inner_steps=3, restarts=restarts).ascend(
            loss, images.x, images, lambda suffix: images.x + (-0.05 if suffix == ", start 2" else 0.05) * side
        )
        assert not x_adv.requires_grad
        return x_adv.flatten().tolist()

    assert end(1) == pytest.approx([0.4, 0.6, 0.4])
    assert end(2) == pytest.approx([0.6, 0.6, 0.4])
    assert end(3) == end(2)  # the third starts where the first did


#: the salts of each objective's attacks on an MoE of two experts
SALTS = {
    "at": ["model"],
    "trades": ["model"],
    "advmoe": ["experts", "router"],
    "rt_er": ["model", "expert0"],
    "jtdmoe": ["model", "expert0", "expert1"],
    "at-paths": ["expert0", "expert1"],
}


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.adversarial])
def test_every_attack_has_its_restarts_and_the_first_starts_as_the_only_one_does(name: str):
    found: dict[int, tuple[list[str], set[float]]] = {}
    for restarts in (1, 2):
        asked: list[str] = []

        def noise(salt: str, asked: list[str] = asked) -> Tensor:
            asked.append(salt)
            return torch.full((1, 1, 1, 1), 0.5 if salt.endswith(", start 2") else -0.5)

        experts, router = [Basins(), Basins()], Basins()
        moe = MoE(experts, router, 2, "softmax").train()  # at 0.5 the router weighs both alike
        model = DualModel(MoE([Basins(), Basins()], Basins()), moe).train() if name == "jtdmoe" else moe
        x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
        for step in OBJECTIVES[name](restarts=restarts, inner_steps=4).steps(model, Batch(x, y, LINF, noise)):
            step.loss(model)
        found[restarts] = asked, set.union(*(net.seen for net in [*experts, router]))
    assert found[1] == (SALTS[name], {0.4, 0.5} if name not in ("at", "at-paths") else {0.4})
    assert sorted(found[2][0]) == sorted([*SALTS[name], *(f"{salt}, start 2" for salt in SALTS[name])])
    assert found[2][1] == ({0.5, 0.6} if name not in ("at", "at-paths") else {0.6})


# --- every objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("gate", ["softmax", pytest.param("argmax", marks=pytest.mark.slow)])
def test_every_objective_gives_finite_steps_on_parts_that_it_names(name: str, gate: Any):
    torch.manual_seed(0)
    moe = Routed(
        expert="small_cnn", expert_params={"width": 2}, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,),
        num_experts=3, gate=gate,
    )  # fmt: skip
    objective = OBJECTIVES[name]()
    model = (Dual(standard=moe, robust=moe) if name == "jtdmoe" else moe).build()
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    parts, stepped = objective.parts(model), []
    for step in objective.steps(model, Batch(x, y, LINF, lambda salt: torch.zeros_like(x))):
        stepped.append(step.part)
        terms = step.loss(model)
        assert all(term.ndim == 0 and term.isfinite() for term in terms.values())
        if objective.balance and name != "advmoe":
            assert any("balance" in term for term in terms) == (gate == "softmax")
        torch.stack(list(terms.values())).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in parts[step.part].parameters())
        if name != "advmoe":  # there the gate's weight carries the experts' loss to the router; it is not stepped
            assert all(p.grad is None for key in parts if key != step.part for p in parts[key].parameters())
        model.zero_grad()
    assert sorted(stepped) == sorted(parts)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_knows_its_parameters(name: str):
    with pytest.raises(ValidationError, match="Extra inputs"):
        OBJECTIVES[name](betta=3)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        OBJECTIVES[name](balance=-1)


def test_the_checkpoint_of_an_objective_with_an_attack_is_chosen_by_robust_accuracy():
    chosen = {name: objective.adversarial for name, objective in OBJECTIVES.items()}
    assert {"at", "rt_er", "jtdmoe"} <= {name for name, adversarial in chosen.items() if adversarial}
    assert not chosen["standard"]


# --- MoE blocks inside a network --------------------------------------------------------------------------------------


def test_load_entropy_by_hand():
    """Mean probabilities ¾ and ¼: ln 2 − (¾ ln 4/3 + ¼ ln 4)."""
    assert load_entropy(torch.zeros(5, 4)).item() == pytest.approx(0, abs=1e-6)
    assert load_entropy(torch.tensor([[100.0, 0.0]])).item() == pytest.approx(log(2))
    gate_logits = torch.tensor([[log(3.0), 0.0], [log(3.0), 0.0]])
    assert load_entropy(gate_logits).item() == pytest.approx(log(2) - 0.75 * log(4 / 3) - 0.25 * log(4))


@pytest.mark.parametrize(
    "name", ["standard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("at", "trades"))]
)
@pytest.mark.parametrize("balance_loss", ["switch", "entropy"])
def test_blocks_inside_are_balanced_by_the_mean_of_their_gates_losses(name: str, balance_loss: str):
    torch.manual_seed(0)
    inside = Inside(
        expert="vmoe", expert_params={"width": 12, "image_size": 8, "patch_size": 4, "balance_loss": balance_loss},
        num_selected_experts=2, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,),
    ).build()  # fmt: skip
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    batch = Batch(x, y, LINF, lambda salt: torch.zeros_like(x))
    (step,) = OBJECTIVES[name](balance=0.5).steps(inside, batch)
    seen = []
    gates = [block.mlp.gate for block in inside.backbone.blocks[1::2]]
    for gate in gates:
        gate.register_forward_hook(lambda _gate, _inputs, scores: seen.append(scores.flatten(0, 1)))
    terms = step.loss(inside)
    loss = {"switch": load_balance, "entropy": load_entropy}[balance_loss]
    assert terms["balance"].item() == pytest.approx(0.5 * (loss(seen[0]) + loss(seen[1])).item() / 2)
    terms["balance"].backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates)

"""The adaptive suite: it breaks what only looks robust because it routes, and spares what is robust."""

from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from bench.attacks import adaptive
from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, Budget
from bench.registry import UnusableInput
from bench.suites.base import open_suites
from models.checkpoints import ZOO, load_model
from models.dual import DualModel
from models.moe import MoE

#: Budgets as large as these tests need.
TINY = Budget(20, 1, 6, (1.0,), (0.0, 1.0), 2, 2, 1, 50)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUDGETS:
        monkeypatch.setitem(BUDGETS, name, TINY)


@pytest.fixture(scope="module")
def masked() -> Any:
    """A routed model whose robustness is only its routing, for the planted images.

    Expert 0 reads the loud code through a rounding: it is right in the whole ball, and has no gradient. Expert 1 reads
    the quiet code, which any gradient breaks. The clean route leads to expert 0; expert 1 is reached by 0.0625 along a
    direction of its own, of at most ε = 0.2. A uniform point of the ball comes 0.009 far.
    """
    rows = torch.from_numpy(hadamard(64)).float().repeat(1, 3)

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 10 * ((x - 0.5).flatten(1) @ rows[1:11].T / 60).round()

    class Quiet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5).flatten(1) @ rows[32:42].T

    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lead = (x - 0.5).flatten(1) @ rows[50] / 192 - 0.0625
            return torch.stack([torch.zeros_like(lead), lead], 1)

    return MoE([Rounded(), Quiet()], Router(), 1, "argmax").eval()


@pytest.mark.parametrize("suite", ["pgd", "autoattack"])
def test_gradients_leave_a_model_standing_that_hides_behind_its_route(
    masked: MoE, suite: str, score: Any, cut_autoattack: Any
):
    cut_autoattack(20, 9, 0)
    result, _ = score(masked, suite)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value == result.clean_accuracy.value == 23 / 24


@pytest.mark.parametrize("settings", [{"recipe": "trial"}, {"budget": "small"}])
def test_adaptive_breaks_the_model_that_hides_behind_its_route(masked: MoE, settings: Any, score: Any):
    result, _ = score(masked, "adaptive", settings=settings)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value < 0.05


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_adaptive_spares_an_honest_model(norm: Any, tiny: None, planted: Any, score: Any):
    result, _ = score(planted.robust(), "adaptive", norm=norm)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value == 23 / 24
    names = ["route-aware", "route-aware-scaled", "bpda-1", "soft-1", "joint", "averaged", "targeted", "square-1"]
    assert list(result.accuracy_after) == ["clean", *names]


def test_a_dual_is_attacked_by_its_branches_too(tiny: None, planted: Any, score: Any):
    robust, _ = score(planted.dual(0.7), "adaptive", alpha=0.7)
    broken, _ = score(planted.dual(0.3), "adaptive", alpha=0.3)
    assert (robust.robust_accuracy.value, robust.errors) == (23 / 24, 0)
    assert broken.robust_accuracy.value <= 0.1
    assert list(robust.accuracy_after)[1:6] == [
        "route-aware", "transfer-standard", "transfer-robust", "reweighed-0", "reweighed-1",
    ]  # fmt: skip


def test_a_users_dual_that_does_not_say_how_it_mixes(tiny: None, planted: Any, score: Any):
    class Mean(nn.Module):
        def __init__(self, dual: DualModel) -> None:
            super().__init__()
            self.standard, self.robust, self.alpha = dual.standard, dual.robust, dual.alpha

        def forward(self, x: Tensor) -> Tensor:
            p = (1 - self.alpha) * self.standard(x).softmax(1) + self.alpha * self.robust(x).softmax(1)
            return p.log()

    result, _ = score(Mean(planted.dual(0.3)), "adaptive", alpha=0.3)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value <= 0.1


def test_a_model_without_parts_is_said_to_have_none(linear_net: Any, planted: Any, score: Any):
    result, rows = score(linear_net([[1.0] * 192] * 10), "adaptive")
    assert result.flags == ()
    assert set(rows["attack"]) == {"clean"}


def test_the_larger_budgets_break_all_that_the_trial_breaks(monkeypatch: pytest.MonkeyPatch, score: Any):
    from bench.datasets.base import open_dataset

    for name in ("standard", "large"):
        monkeypatch.setitem(BUDGETS, name, TINY)
    monkeypatch.setattr(adaptive, "TRIAL", (10, 2))
    data = open_dataset("digits").evaluation_set(ZOO, 24)
    model = load_model("moe-rt_er-argmax", model_dir=ZOO)

    def broken(**settings: Any) -> set[int]:
        _, rows = score(model, "adaptive", data, eps=0.1, settings=settings)
        return set(rows.loc[(rows["attack"] != "clean") & ~rows["robust"], "idx"])

    trial = broken(recipe="trial")
    assert trial
    assert trial <= broken()
    assert trial <= broken(budget="large")


def test_budgets_grow():
    small, standard, large = (BUDGETS[name] for name in ("small", "standard", "large"))
    for less, more in ((small, standard), (standard, large)):
        assert less.route_steps * less.route_starts < more.route_steps * more.route_starts
        assert (less.steps, less.square_queries, less.targets) < (more.steps, more.square_queries, more.targets)
        assert set(less.temperatures) <= set(more.temperatures)
    assert open_suites(["adaptive"], {})["adaptive"].params == {}


def test_called_by_itself_it_finds_what_the_suite_finds(tiny: None, masked: MoE, planted: Any, score: Any):
    data = planted.data()
    _, rows = score(masked, "adaptive", settings={"recipe": "trial"}, seed=3)
    masked.train()
    state = torch.random.get_rng_state()
    x_adv = AdaptiveAttack(masked, "Linf", planted.balls["Linf"], recipe="trial", seed=3)(data.x, data.y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert masked.training
    assert all(parameter.requires_grad for parameter in masked.parameters())
    masked.eval()
    assert (x_adv - data.x).abs().max() <= planted.balls["Linf"] + 1e-6
    robust = rows.groupby("idx")["robust"].all().to_numpy()
    assert ((masked(x_adv).argmax(1) == data.y).numpy() == robust).all()
    assert robust.mean() < 0.05


def test_called_by_itself_it_gives_the_same_for_a_seed(monkeypatch: pytest.MonkeyPatch, planted: Any):
    monkeypatch.setattr(adaptive, "TRIAL", (2, 2))  # the second start is random
    data = planted.data()
    attack = AdaptiveAttack(planted.robust(), "Linf", planted.balls["Linf"], recipe="trial", seed=3)
    first = attack(data.x, data.y)  # nothing is broken: the last try of each image
    torch.rand(1)
    assert torch.equal(attack(data.x, data.y), first)
    attack.seed = 4
    assert not torch.equal(attack(data.x, data.y), first)


def test_called_by_itself_it_refuses_a_model_without_parts(linear_net: Any):
    with pytest.raises(UnusableInput, match=r"^Sequential shows no routing: an MoE has `router` and `experts`"):
        AdaptiveAttack(linear_net([[1.0], [0.0]]))

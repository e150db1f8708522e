"""The adaptive suite: it breaks what only looks robust because it routes, and spares what is robust."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from bench.attacks import adaptive
from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, Budget, run
from bench.attacks.search import Search
from bench.datasets.base import EvalSet, fingerprint
from bench.models.dual import DualModel
from bench.models.foreign import Guarded
from bench.models.layers import SparseMoE
from bench.models.moe import MoE
from bench.suites.adaptive import Adaptive

#: The attacks on a routed model, in the order they run.
ROUTED = ["paths", "deployed", "targeted", "averaged", "square-paths", "square-1"]
#: Budgets as large as these tests need.
TINY = Budget(16, 4, 20, 1, 10, (0.0, 1.0), 2, 2, 1, 50)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUDGETS:
        monkeypatch.setitem(BUDGETS, name, TINY)


CODES = torch.from_numpy(hadamard(64)).float().repeat(1, 3)


class Rounded(nn.Module):
    """Reads the loud code through a rounding: right in the whole ball, and without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * ((x - 0.5).flatten(1) @ CODES[1:11].T / 60).round()


class Quiet(nn.Module):
    """Reads the quiet code, which any gradient breaks."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ CODES[32:42].T


class Away(nn.Module):
    """Sends an image to its second expert 0.0625 along a direction of its own; a uniform point comes 0.009 far."""

    def forward(self, x: Tensor) -> Tensor:
        lead = (x - 0.5).flatten(1) @ CODES[50] / 192 - 0.0625
        return torch.stack([torch.zeros_like(lead), lead], 1)


class InSteps(Away):
    """The same of an image rounded to 4 bits: its gradient by the pixels is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((16 * x).round() / 16)


class Detached(Away):
    """The same without a gradient at all, as one may well write a router that only argmax reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Saturated(Away):
    """A softmax that decides so clearly that next to nothing is left of its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (600 * super().forward(x)).softmax(1)


class Misleading(InSteps):
    """Rounded, with a tiny slope that leads the wrong way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1e-9 * (x - 0.5).flatten(1) @ torch.stack([-CODES[50], CODES[50]]).T


class WithAMethod(nn.Module):
    """A user's own mixture, whose router is a method and no module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self._away = nn.ModuleList([Rounded(), Quiet()]), Away()

    @torch.no_grad()
    def router(self, x: Tensor) -> Tensor:
        return self._away(x)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return outputs[torch.arange(len(x)), self.router(x).argmax(1)]


class Flat(nn.Module):
    """Gives every class the same logit."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * Quiet()(x)


@pytest.fixture(scope="module")
def masked() -> Any:
    """A routed model whose robustness is only its routing, for the planted images, which its router keeps at home."""
    return MoE([Rounded(), Quiet()], Away(), 1, "argmax").eval()


HIDING = {
    "an affine router": lambda: MoE([Rounded(), Quiet()], Away(), 1, "argmax"),
    "a rounded router": lambda: MoE([Rounded(), Quiet()], InSteps(), 1, "argmax"),
    "a rounded router with a weight": lambda: MoE([Rounded(), Quiet()], InSteps(), 1, "softmax"),
    "a detached router": lambda: MoE([Rounded(), Quiet()], Detached(), 1, "argmax"),
    "a saturated router": lambda: MoE([Rounded(), Quiet()], Saturated(), 1, "argmax"),
    "a misleading router": lambda: MoE([Rounded(), Quiet()], Misleading(), 1, "argmax"),
    "a method": WithAMethod,
    # R prefers no class, so the dual does what S does
    "S": lambda: DualModel(MoE([Rounded(), Quiet()], Away(), 1, "argmax"), Flat(), 0.5, "logits"),
    "S beside a routed R": lambda: DualModel(
        MoE([Rounded(), Quiet()], Away(), 1, "argmax"), MoE([Flat(), Flat()], Away(), 1, "argmax"), 0.5, "logits"
    ),
}


#: Those that differ most, for every edit.
FIRST = ("an affine router", "a rounded router", "a method", "S")


@pytest.mark.parametrize("suite", ["pgd", "autoattack"])
def test_gradients_leave_a_model_standing_that_hides_behind_its_route(
    masked: MoE, suite: str, score: Any, cut_autoattack: Any
):
    cut_autoattack(10, 3, 0)
    result, _ = score(masked, suite, settings={"steps": 10} if suite == "pgd" else {})
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value == result.clean_accuracy.value == 23 / 24


@pytest.mark.parametrize(
    "where", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in HIDING]
)
def test_adaptive_breaks_the_model_that_hides_behind_its_route(where: str, tiny: None, score: Any):
    model = HIDING[where]().eval()
    result, _ = score(model, "adaptive", alpha=getattr(model, "alpha", None))
    assert result.clean_accuracy.value == 23 / 24
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value < 0.05


@pytest.mark.parametrize("norm", ["Linf", pytest.param("L2", marks=pytest.mark.slow)])
def test_adaptive_spares_an_honest_model(norm: Any, tiny: None, planted: Any, score: Any):
    result, _ = score(planted.robust(), "adaptive", norm=norm)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value == 23 / 24
    assert list(result.accuracy_after) == ["clean", *ROUTED]


@pytest.mark.slow
def test_a_dual_is_attacked_by_its_branches_too(tiny: None, planted: Any, score: Any):
    robust, _ = score(planted.dual(0.7), "adaptive", alpha=0.7)
    broken, _ = score(planted.dual(0.3), "adaptive", alpha=0.3)
    assert (robust.robust_accuracy.value, robust.errors) == (23 / 24, 0)
    assert broken.robust_accuracy.value <= 0.1
    assert list(robust.accuracy_after)[1:6] == ["paths", "deployed", "reweighed-0", "reweighed-1", "targeted"]


@pytest.mark.parametrize("attack", [name for name in ROUTED if name != "square-paths"])
def test_each_attack_breaks_what_is_broken_by_itself(attack: str, planted: Any):
    data, model = planted.data(), planted.broken()
    x_adv = AdaptiveAttack(model, "Linf", 0.2, "small", attacks_to_run=[attack])(data.x, data.y)
    assert (model(x_adv).argmax(1) == data.y).sum() <= 2


@pytest.mark.parametrize("attack", ["paths", "reweighed-0", "reweighed-0.5", "reweighed-1"])
def test_each_attack_on_a_dual_breaks_what_is_broken_by_itself(attack: str, planted: Any):
    data, model = planted.data(), DualModel(planted.broken(), planted.broken(), 0.6).eval()
    x_adv = AdaptiveAttack(model, "Linf", 0.2, "small", attacks_to_run=[attack])(data.x, data.y)
    assert (model(x_adv).argmax(1) == data.y).sum() <= 2


def test_the_route_comes_first_where_the_expert_pulls_back(linear_moe: Any):
    # Expert 1 is wrong everywhere, the less the nearer an image is to it, so its loss pulls back a hundredfold; and the
    # third router row, which nothing reaches, makes a step away from the mean of all lead away from expert 1 too.
    away = [[0.0] * 9, [1.0] * 8 + [-4.7], [20.0] * 8 + [-500.0]]
    experts = [[[0.0] * 9, [0.0] * 8 + [1.0]], [[0.0] * 8 + [1e4], [100.0] * 8 + [0.0]], [[0.0] * 9, [0.0] * 8 + [1.0]]]
    moe = linear_moe(experts, away, 1, "argmax")
    x = torch.tensor([[0.5] * 8 + [1.0]] * 3).view(3, 1, 1, 9)
    y = torch.ones(3, dtype=torch.long)
    assert moe(x).argmax(1).tolist() == [1, 1, 1]
    x_adv = AdaptiveAttack(moe, "Linf", 0.1, "small", attacks_to_run=["paths"])(x, y)
    assert (moe(x_adv).argmax(1) != y).all()


def test_a_mixture_of_one_expert_has_no_routes_and_is_attacked_all_the_same(planted: Any, tiny: None, score: Any):
    for model, accuracy in ((planted.robust(), 23 / 24), (planted.broken(), 0)):
        one = MoE([model.experts[0]], nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), 1, "softmax").eval()
        result, _ = score(one, "adaptive")
        assert result.errors == 0, result.error_messages
        assert result.robust_accuracy.value <= accuracy + 0.1
        assert list(result.accuracy_after) == ["clean", "deployed", "targeted", "square-1"]


def test_its_cost_counts_what_goes_through_the_parts(linear_moe: Any, score: Any, monkeypatch: pytest.MonkeyPatch):
    # One image that nothing breaks, two experts that the router can lead it to, ten steps.
    monkeypatch.setitem(BUDGETS, "small", Budget(2, 1, 10, 1, 10, (), 1, 3, 0, 0))
    moe = linear_moe([[[0.0, 0], [0, 1]]] * 2, [[0, 0], [1, -0.5]], 1, "argmax")
    x, y = torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2), torch.ones(1, dtype=torch.long)
    result, _ = score(
        moe, "adaptive", EvalSet(x, y, torch.arange(1), fingerprint(x, y), ""), settings={"budget": "small"},
        num_classes=2, eps=0.1,
    )  # fmt: skip
    passes = {name: (counts["forwards"], counts["backwards"]) for name, counts in result.passes.items()}
    # Auto-PGD from one start: the deployed model at the start and at every fifth step, the objective before each step
    # and after the last; and once the deployed model about what the attack ends with
    climb, confirm = 1 + 11 + 2, 1
    # both paths on the clean image for their order, and an aimed start each, whose gradient is the router's alone; the
    # model once for its sites; it and both experts three times to see whether gradients can be believed; and the model
    # and its prepared copy once to see whether they are alike
    assert passes["paths"] == (2 * (climb + 1) + confirm + 2 + 1 + 9 + 2, 2 * 11 + 3 + 2)
    assert passes["deployed"] == (climb + confirm, 11)
    assert passes["targeted"] == (climb + confirm + 1, 11 + 1)
    assert passes["averaged"] == (1 + 3 * 11 + 2 + confirm, 3 * 11)


def test_what_the_model_does_not_confirm_is_left_to_the_next_attack(
    block_of: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
):
    # a model may round otherwise in a smaller batch, and a step too small to be judged alike was taken for a success
    search, met = Search(block_of(planted.robust(), planted.data())), []

    def hasty() -> None:
        search.unbroken[:5] = False

    stages = {"hasty": hasty, "next": lambda: met.append(search.rows.tolist())}
    monkeypatch.setattr(adaptive, "attacks", lambda *_: stages.items())
    deque(run(search, "small"), maxlen=0)
    assert met == [list(range(23))]


def test_what_breaks_a_copy_alone_is_left_to_the_next_attack(
    block_of: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
):
    block, met = block_of(planted.robust(), planted.data()), []
    wrong = nn.Sequential(planted.robust(), nn.Softmin(1))
    search = Search(replace(block, model=wrong), deployed=block.model)
    stages = {
        "copy": lambda: search.test(block.x[search.rows], search.rows),
        "next": lambda: met.append(search.rows.tolist()),
    }
    monkeypatch.setattr(adaptive, "attacks", lambda *_: stages.items())
    deque(run(search, "small"), maxlen=0)
    assert met == [list(range(23))]


def test_a_model_of_ours_is_searched_on_a_prepared_copy_and_a_users_own_on_itself(
    block_of: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
):
    searched = []

    def none(search: Search, _: str) -> Iterator[Any]:
        searched.append((search.block.model, search.deployed))
        return iter(())

    monkeypatch.setattr("bench.suites.adaptive.run", none)
    for model in (planted.robust(), Guarded(planted.robust())):
        list(Adaptive().attack(block_of(model, planted.data())))
        copy, deployed = searched.pop()
        assert (copy is model, deployed is model) == (isinstance(model, Guarded), True)


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


def test_a_model_without_parts_is_attacked_as_a_whole(linear_net: Any, planted: Any, score: Any):
    result, rows = score(linear_net([[1.0] * 192] * 10), "adaptive")
    assert result.flags == ()
    assert set(rows["attack"]) == {"clean", "deployed", "targeted", "square-1"}


def test_a_users_own_model_may_hold_more_than_it_shows(tiny: None, linear_net: Any, planted: Any, score: Any):
    _, rows = score(linear_net([[1.0] * 192] * 10), "adaptive", foreign=True)
    assert {"deployed", "stand-ins"} <= set(rows["attack"])


def test_called_by_itself_it_finds_what_the_suite_finds(tiny: None, masked: MoE, planted: Any, score: Any):
    data = planted.data()
    _, rows = score(masked, "adaptive", settings={"budget": "small"}, seed=3)
    masked.train()
    state = torch.random.get_rng_state()
    x_adv = AdaptiveAttack(masked, "Linf", planted.balls["Linf"], "small", seed=3)(data.x, data.y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert masked.training
    assert all(parameter.requires_grad for parameter in masked.parameters())
    masked.eval()
    assert (x_adv - data.x).abs().max() <= planted.balls["Linf"] + 1e-6
    robust = rows.groupby("idx")["robust"].all().to_numpy()
    assert ((masked(x_adv).argmax(1) == data.y).numpy() == robust).all()
    assert robust.mean() < 0.05


@pytest.mark.parametrize("attack", ["paths", "averaged", "square-1"])
def test_what_others_have_left_shifts_no_draw(
    attack: str, block_of: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(BUDGETS, "small", TINY)
    last = {}
    for unbroken in (24, 1):
        search = Search(block_of(planted.robust(), planted.data()))
        search.unbroken[unbroken:] = False
        deque(run(search, "small", ["targeted", attack]), maxlen=0)
        last[unbroken] = search.x_adv[0]
    assert torch.equal(last[24], last[1])


class Planted(nn.Module):
    """A network with one MoE block inside, whose second expert reads the quiet code."""

    def __init__(self, gate: nn.Module, second: Tensor) -> None:
        super().__init__()
        experts = [nn.Linear(192, 10, bias=False), nn.Linear(192, 10, bias=False)]
        for expert, weight in zip(experts, (CODES[1:11], second), strict=True):
            expert.weight.data = weight.clone()
        self.block = SparseMoE(gate, experts, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block((x - 0.5).flatten(1))


class Inner(nn.Module):
    """Sends the rows to the second expert 0.0625 along a direction of their own, in steps, as `InSteps` the images."""

    def forward(self, h: Tensor) -> Tensor:
        lead = (16 * h).round() / 16 @ CODES[50] / 192 - 0.0625
        return torch.stack([torch.zeros_like(lead), 40 * lead], 1)


@pytest.mark.parametrize("budget", ["tiny", pytest.param("standard", marks=pytest.mark.slow)])
def test_a_block_inside_a_network_is_attacked_by_its_routes(budget: str, score: Any, request: pytest.FixtureRequest):
    if budget == "tiny":
        request.getfixturevalue("tiny")
    broken, _ = score(Planted(Inner(), CODES[32:42]).eval(), "adaptive")
    assert (broken.errors, broken.robust_accuracy.value) == (0, 0)
    if budget == "tiny":
        return
    honest, _ = score(Planted(Inner(), CODES[1:11] / 2).eval(), "adaptive", settings={"budget": "small"})
    assert (honest.errors, honest.robust_accuracy.value) == (0, 23 / 24)


def test_gradients_leave_a_block_that_hides_behind_its_gate(score: Any, cut_autoattack: Any):
    cut_autoattack(10, 3, 0)
    result, _ = score(Planted(Inner(), CODES[32:42]).eval(), "autoattack")
    assert result.robust_accuracy.value >= 0.9 * result.clean_accuracy.value

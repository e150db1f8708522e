"""Suite `adaptive` on models that are broken by construction, one way of routing each, and on their honest twins."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted_routes import EPS, VICTIMS, Coarse, Gate, Mixture, Normalised, Victim, images, majority
from torch import nn

from bench import benchmark
from bench.attacks import adaptive, gradients, restarts
from bench.attacks.adaptive import AdaptiveAttack
from bench.datasets.base import EvalSet, fingerprint
from bench.results.flags import ROUTES_INSIDE
from bench.spec import NOT_FORCED

GATES: list[Gate] = ["softmax", "argmax"]
EVERY = [pytest.param(kind, gate, id=f"{kind}-{gate}") for kind in VICTIMS for gate in GATES]
#: Each kind under one of the gates, in turn.
ONCE = [EVERY[2 * number + number % 2] for number in range(len(VICTIMS))]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of chance; every pass of an attack takes as many."""
    for module in ("bench.attacks.adaptive", "bench.evaluation.examine"):
        monkeypatch.setattr(f"{module}.DRAWS", 10)


@pytest.fixture
def verdict(score: Any) -> Any:
    """verdict(model, budget, n): the suite's Result for n planted images; `foreign`: behind the guard."""

    def run(model: Any, budget: str, n: int = 10, foreign: bool = True) -> Any:
        x, y = images(n)
        data = EvalSet(x, y, torch.arange(len(y)), fingerprint(x, y), "")
        alpha = getattr(model, "alpha", None)
        result, _ = score(
            model, "adaptive", data, eps=EPS, settings={"budget": budget}, num_classes=5, alpha=alpha, foreign=foreign
        )
        assert result.errors == 0, result.error_messages
        assert result.clean_accuracy.value >= 0.8  # by chance, of a model of chance
        return result

    return run


@pytest.mark.parametrize(("kind", "gate"), EVERY)
def test_the_witness_breaks_every_image_and_spares_the_twin(kind: str, gate: Gate):
    victim: Victim = VICTIMS[kind]
    x, y = images()
    witness = victim.witness(x, y)
    assert (witness - x).abs().max() <= EPS + 1e-6
    assert witness.amin() >= 0
    assert witness.amax() <= 1
    torch.manual_seed(0)
    draws = 101 if kind == "gate noise" else 1
    for honest in (False, True):
        model = victim.model(gate, honest)
        assert (majority(model, x, draws) == y).all()
        assert (majority(model, witness, draws) == y).all() == honest
    assert (majority(victim.model(gate), witness, draws) != y).all()


#: Those that take several seconds under the small budget, too: under one gate each.
DEAR = (
    "gate noise", "a decoy class", "probabilities given as logits", "rounded logits", "a region towards other images",
    "one-hot scores", "a decided mixture of all experts", "labels alone",
)  # fmt: skip
#: Those of the others that take a second or more.
SLOW = (
    "a step that opens inside the ball", "a score that rises the wrong way", "features under no_grad",
    "a pair of a dual's routes", "rounded scores", "images one by one", "saturated scores",
)  # fmt: skip
#: Of the dear ones, those whose routes need no slopes of an image's own, which take another third.
WITHOUT_SLOPES = ("a decoy class", "probabilities given as logits", "rounded logits", "labels alone")
#: And those that need no other images, by half of them.
FEW = tuple(kind for kind in DEAR if kind not in ("a region towards other images", "one-hot scores"))
#: Where there are most paths: what the small budget breaks of the others, the standard one, which has more, does too.
MANY = ("a pair of a dual's routes", "a pair of sixteen experts", "an expert that is routed")


@pytest.mark.parametrize(
    ("kind", "gate", "budget"),
    [
        pytest.param(
            *case.values, "small", marks=[pytest.mark.slow] * (case.values[0] in DEAR + SLOW or case not in ONCE)
        )
        for case in EVERY
        if case in ONCE or case.values[0] not in DEAR or case.values[0] == "one-hot scores"
    ]
    + [pytest.param(kind, "softmax", "standard", marks=pytest.mark.slow) for kind in MANY],
)
def test_adaptive_breaks_the_victim(kind: str, gate: Gate, budget: str, verdict: Any, monkeypatch: pytest.MonkeyPatch):
    """The dear ones without the guard, which takes a third of the time, but for the one that answers by chance."""
    if kind in WITHOUT_SLOPES:
        monkeypatch.setattr(restarts, "CORNERS", restarts.FEW_CORNERS)
    if kind in DEAR:
        monkeypatch.setitem(adaptive.BUDGETS, "small", replace(adaptive.BUDGETS["small"], path_steps=30))
    guarded = kind not in DEAR or kind == "gate noise"
    count = 3 if kind == "gate noise" else 5 if kind in FEW else 10
    assert verdict(VICTIMS[kind].model(gate), budget, count, guarded).robust_accuracy.value == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gate"), [case for case in ONCE if case.values[0] != "experts that are routed, by class"]
)
def test_adaptive_spares_the_honest_twin(kind: str, gate: Gate, verdict: Any, monkeypatch: pytest.MonkeyPatch):
    """By few steps of each attack: what none has broken all attack, and more steps prove no more."""
    few = replace(adaptive.BUDGETS["small"], paths=6, path_restarts=1, path_steps=4, steps=5, targets=1, queries=15)
    monkeypatch.setitem(adaptive.BUDGETS, "small", few)
    monkeypatch.setattr(restarts, "CORNERS", restarts.FEW_CORNERS)
    result = verdict(VICTIMS[kind].model(gate, honest=True), "small", 3 if kind == "gate noise" else 5)
    assert result.robust_accuracy.value == result.clean_accuracy.value  # of a model of chance some answers are wrong


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("masked scores", 5),
        ("one-hot scores", 5),
        ("a step that opens inside the ball", 5),
        ("features under no_grad", 5),
        pytest.param("labels alone", 2, marks=pytest.mark.slow),
    ],
)
def test_adaptive_breaks_it_where_so_many_pixels_tell_little_by_chance(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(restarts, "CORNERS", restarts.FEW_CORNERS)  # many more would not do either
    monkeypatch.setattr(gradients, "AT_MOST", 100)
    monkeypatch.setitem(adaptive.BUDGETS, "small", replace(adaptive.BUDGETS["small"], path_steps=15))
    x, y = images(count)
    model = Coarse.parts_of(VICTIMS[kind].model("softmax"))
    x_adv = AdaptiveAttack(model, eps=EPS, budget="small", attacks_to_run=["paths"])(Coarse.images(x), y)
    with torch.no_grad():
        assert (model(x_adv).argmax(1) != y).all()


@pytest.mark.slow
def test_adaptive_breaks_it_behind_a_normalisation(verdict: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restarts, "CORNERS", restarts.FEW_CORNERS)
    monkeypatch.setitem(adaptive.BUDGETS, "small", replace(adaptive.BUDGETS["small"], path_steps=30))
    assert verdict(Normalised.behind(VICTIMS["labels alone"].model("softmax")), "small", 2).robust_accuracy.value == 0


class Named(nn.Module):
    """A planted mixture under names that show nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Mixture(honest=False, sharpness=1000)
        self.gating, self.nets = self.known.router, self.known.experts
        del self.known.router, self.known.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.known.sharpness * self.gating(x)).softmax(1)
        return (weights[:, :, None] * torch.stack([net(x) for net in self.nets], 1)).sum(1)


@pytest.mark.slow
def test_a_decided_mixture_that_the_user_names_is_led_to_each_expert():
    x, y = images(10)
    scored = benchmark(
        Named().eval(), "digits", x=x, y=y, eps=EPS, suites=["adaptive"], settings={"budget": "small"},
        gates=["gating"], progress=False, device="cpu",
    )  # fmt: skip
    assert scored.robust_accuracy is not None
    assert scored.robust_accuracy.value == 0


@pytest.mark.slow
def test_a_mixture_whose_router_is_called_twice_is_not_forced(verdict: Any):
    class Twice(Mixture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.router(x)
            return super().forward(x)

    result = verdict(Twice(honest=True, sharpness=30), "small", 5)
    assert f"adaptive: router: {NOT_FORCED}" in result.flags


@pytest.mark.slow
def test_a_mixture_that_declares_all_experts_selected_has_no_rank_without_adaptive():
    x, y = images(10)
    model = VICTIMS["a decided mixture of all experts"].model("softmax")
    scored = benchmark(model, "digits", x=x, y=y, eps=EPS, suites=["pgd"], progress=False, device="cpu")
    assert f"{ROUTES_INSIDE}router" in scored.flags

"""Gates inside networks: standard attacks leave what is planted, `adaptive` breaks it and spares the honest twin."""

from dataclasses import replace
from typing import Any

import planted_gates
import pytest
import third_party
import torch
from planted_routes import EPS, images

from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, Budget, run
from bench.attacks.block import Block, PassCounter
from bench.attacks.search import Search
from bench.datasets.base import EvalSet, fingerprint
from bench.models.foreign import Guarded
from bench.models.gates import find_gates
from bench.spec import NOT_FORCED, ThreatModel

X, Y = images(10)
KINDS = list(planted_gates.KINDS)


def left(kind: str, honest: bool, **more: Any) -> int:
    """How many of the images `adaptive` leaves at its small budget."""
    model, gates = planted_gates.build(kind, honest), [planted_gates.KINDS[kind][2]]
    x_adv = AdaptiveAttack(model, "Linf", EPS, "small", gates=gates, **more)(X, Y)
    assert float((x_adv - X).abs().max()) <= EPS + 1e-6
    return int((model(x_adv).argmax(1) == Y).sum())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "one token")) for kind in KINDS]
)
def test_adaptive_breaks_what_a_named_gate_leads_to(kind: str):
    assert left(kind, False) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mixture" in kind])
def test_paths_to_each_expert_break_a_mixture_by_themselves(kind: str):
    assert left(kind, False, attacks_to_run=["mixtures"]) == 0


@pytest.mark.slow
def test_a_layer_that_shows_its_router_routes_tokens_apart():
    model = planted_gates.ByLayer(1.0).eval()
    x_adv = AdaptiveAttack(model, "Linf", EPS, "small")(X[:5], Y[:5])
    assert (model(x_adv).argmax(1) != Y[:5]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_spares_the_honest_twin(kind: str, monkeypatch: pytest.MonkeyPatch):
    """By few steps of each attack: what none has broken all attack, and more steps prove no more."""
    few = replace(BUDGETS["small"], path_restarts=1, path_steps=4, steps=5, queries=15)
    monkeypatch.setitem(BUDGETS, "small", few)
    assert left(kind, True) == len(X)


@pytest.mark.parametrize("suite", ["pgd", pytest.param("autoattack", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_standard_attacks_leave_it(kind: str, suite: str, score: Any, cut_autoattack: Any):
    cut_autoattack(10, 3, 50)
    data = EvalSet(X, Y, torch.arange(len(X)), fingerprint(X, Y), "")
    settings = {"steps": 20} if suite == "pgd" else {}
    result, _ = score(planted_gates.build(kind), suite, data, eps=EPS, num_classes=5, settings=settings)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", list(third_party.ALL))
def test_every_shape_of_public_code_is_attacked_once_its_gates_are_named(name: str, monkeypatch: pytest.MonkeyPatch):
    word = third_party.GATES.get(name)
    if word is None:
        pytest.skip("it has no gate: a threshold decides")
    monkeypatch.setitem(BUDGETS, "small", Budget(6, 2, 3, 1, 3, (), 1, 2, 1, 5))
    model = third_party.build(name)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guard = Guarded(model)
    guard.gates = find_gates(model, [word], x).sites
    with torch.no_grad():
        y = guard(x).argmax(1)
    everywhere, threat = torch.ones(4, dtype=torch.bool), ThreatModel(norm="Linf", eps=0.1)
    block = Block(guard, x, y, everywhere, 10, "planted", threat, 0, PassCounter(guard))
    names = [attack for attack, _ in run(Search(block), "small")]
    unforced = [flag for flag in block.flags if NOT_FORCED in flag]
    if name == "soft mixture of nine":
        assert "softened" in names
    else:
        assert {"paths", "left-routes", "blurred"} <= set(names)
        assert not unforced

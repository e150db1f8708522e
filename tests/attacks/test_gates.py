"""Gates inside networks: standard attacks leave what is planted, `adaptive` breaks it and spares the honest twin."""

from typing import Any

import planted_gates
import pytest
import torch
from planted_routes import EPS, images

from bench.attacks.adaptive import AdaptiveAttack
from bench.datasets.base import EvalSet, fingerprint

X, Y = images()
KINDS = list(planted_gates.KINDS)


def left(kind: str, honest: bool, **more: Any) -> int:
    """How many of the 20 images `adaptive` leaves at its small budget."""
    model, gates = planted_gates.build(kind, honest), [planted_gates.KINDS[kind][2]]
    x_adv = AdaptiveAttack(model, "Linf", EPS, "small", gates=gates, **more)(X, Y)
    assert float((x_adv - X).abs().max()) <= EPS + 1e-6
    return int((model(x_adv).argmax(1) == Y).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_breaks_what_a_named_gate_leads_to(kind: str):
    assert left(kind, False) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_spares_the_honest_twin(kind: str):
    assert left(kind, True) == len(X)


@pytest.mark.parametrize("suite", ["pgd", "autoattack"])
@pytest.mark.parametrize("kind", KINDS)
def test_standard_attacks_leave_it(kind: str, suite: str, score: Any, cut_autoattack: Any):
    cut_autoattack(20, 4, 200)
    data = EvalSet(X, Y, torch.arange(len(X)), fingerprint(X, Y), "")
    result, _ = score(planted_gates.build(kind), suite, data, eps=EPS, num_classes=5)
    assert result.errors == 0, result.error_messages
    assert result.robust_accuracy.value >= 0.9

"""Suite `adaptive` on models that are broken by construction, one way of routing each, and on their honest twins."""

from typing import Any

import pytest
import torch
from planted_routes import EPS, VICTIMS, Gate, Victim, images, majority

from bench.datasets.base import EvalSet, fingerprint

GATES: list[Gate] = ["softmax", "argmax"]
BUDGETS = ["small", pytest.param("standard", marks=pytest.mark.slow)]
EVERY = [pytest.param(kind, gate, id=f"{kind}-{gate}") for kind in VICTIMS for gate in GATES]

#: What version 2 of the suite leaves where 0 is true: robust accuracy in percent, (small, standard) under each gate.
#: Under argmax the last model has no gradient by the pixels at all, and version 2 ends in an error.
LEFT: dict[str, dict[Gate, tuple[int | str, int | str]]] = {
    "a pair of experts": {"softmax": (45, 15), "argmax": (30, 10)},
    "a ReLU that opens inside the ball": {"softmax": (100, 100), "argmax": (100, 100)},
    "saturated scores": {"softmax": (55, 50), "argmax": (50, 50)},
    "rounded scores": {"softmax": (85, 35), "argmax": (90, 75)},
    "rounded logits": {"softmax": (65, 35), "argmax": (95, 90)},
    "probabilities given as logits": {"softmax": (75, 15), "argmax": (90, 80)},
    "a pair of a dual's routes": {"argmax": (65, 0)},
    "an expert that is routed": {"softmax": (25, 0), "argmax": (80, 55)},
    "a region towards other images": {"softmax": (45, 15), "argmax": ("an error", "an error")},
}


@pytest.fixture
def verdict(score: Any) -> Any:
    """verdict(model, budget): the suite's Result for the planted images."""

    def run(model: Any, budget: str) -> Any:
        x, y = images()
        data = EvalSet(x, y, torch.arange(len(y)), fingerprint(x, y), "")
        settings = {"budget": budget}
        alpha = getattr(model, "alpha", None)
        result, _ = score(model, "adaptive", data, eps=EPS, settings=settings, num_classes=5, alpha=alpha)
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
    for honest in (False, True):
        model = victim.model(gate, honest)
        assert (majority(model, x) == y).all()
        assert (majority(model, witness) == y).all() == honest
    assert (majority(victim.model(gate), witness) != y).all()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("kind", "gate"), EVERY)
def test_adaptive_breaks_the_victim(kind: str, gate: Gate, budget: str, verdict: Any, request: Any):
    left = LEFT.get(kind, {}).get(gate, (0, 0))[budget == "standard"]
    if left:
        reason = f"version 2 leaves {left} where 0 % is true"
        request.applymarker(pytest.mark.xfail(strict=False, reason=reason))
    assert verdict(VICTIMS[kind].model(gate), budget).robust_accuracy.value == 0


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("kind", "gate"), EVERY)
def test_adaptive_spares_the_honest_twin(kind: str, gate: Gate, budget: str, verdict: Any, request: Any):
    reasons = {"gate noise": "version 2 takes one wrong answer by chance for a broken image"}
    if gate == "argmax":
        reasons["a region towards other images"] = "version 2 fails on a model without a gradient"
    if kind in reasons:
        request.applymarker(pytest.mark.xfail(strict=False, reason=reasons[kind]))
    assert verdict(VICTIMS[kind].model(gate, honest=True), budget).robust_accuracy.value == 1

"""F_D(x) = (1 − α) F_S(x) + α F_R(x), by hand."""

from collections.abc import Callable
from math import log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.errors import UnusableInput
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import Combine

ONE = torch.ones(1, 1, 1, 1)
#: for a pixel of value 1: S has softmax (1, 1)/2 and R (3, 1)/4
S, R = [[5.0], [5.0]], [[log(3.0)], [0.0]]


@pytest.mark.parametrize(
    ("combine", "alpha", "expected"),
    [
        ("logits", 0.0, (5.0, 5.0)),
        ("logits", 0.7, (0.3 * 5 + 0.7 * log(3), 0.3 * 5)),
        ("logits", 1.0, (log(3), 0)),
        ("probs", 0.0, (log(1 / 2), log(1 / 2))),
        ("probs", 0.7, (log(0.3 / 2 + 0.7 * 3 / 4), log(0.3 / 2 + 0.7 / 4))),
        ("probs", 1.0, (log(3 / 4), log(1 / 4))),
    ],
)
def test_combination_by_hand(
    linear_net: Callable[..., nn.Module], combine: Combine, alpha: float, expected: tuple[float, float]
):
    dual = DualModel(linear_net(S), linear_net(R), alpha, combine)
    torch.testing.assert_close(dual(ONE), torch.tensor([expected]))


def test_the_papers_mixture_is_the_default(linear_net: Callable[..., nn.Module]):
    dual = DualModel(linear_net(S), linear_net(R))
    assert (dual.alpha, dual.combine) == (0.7, "probs")


@settings(deadline=None)
@given(st.floats(0, 1), st.lists(st.floats(-80, 80, width=32), min_size=6, max_size=6))
def test_probs_are_log_probabilities(alpha: float, logits: list[float]):
    dual = DualModel(nn.Identity(), nn.Identity(), alpha, "probs")
    standard, robust = torch.tensor(logits).view(2, 1, 3)
    mixed = dual.mix(standard, robust)
    assert mixed.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected = (1 - alpha) * standard.double().softmax(1) + alpha * robust.double().softmax(1)
    torch.testing.assert_close(mixed.exp().double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("combine", ["logits", "probs"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_gradients_are_finite_and_reach_the_branches_that_count(
    linear_net: Callable[..., nn.Module], combine: Combine, alpha: float
):
    dual = DualModel(linear_net([[200.0], [0.0]]), linear_net([[0.0], [90.0]]), alpha, combine)
    x = ONE.clone().requires_grad_()
    F.cross_entropy(dual(x), torch.tensor([0])).backward()
    gradients = [x.grad, *(p.grad for p in dual.parameters())]
    assert all(g is None or g.isfinite().all() for g in gradients)
    moved = [g is not None and bool(g.any()) for g in gradients[1:]]
    if alpha == 1:
        assert moved == [False, True]
    if alpha == 0:
        assert not moved[1]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float):
    with pytest.raises(UnusableInput, match=rf"^α {alpha} must be in \[0, 1\]$"):
        DualModel(nn.Identity(), nn.Identity(), alpha)


def test_trace_is_of_the_robust_branch(linear_moe: Callable[..., MoE]):
    # the standard branch sends the pixel to its expert 0, the robust one to its expert 1
    standard = linear_moe([S, S], [[9.0], [0.0]], 1, "argmax")
    robust = linear_moe([R, R], [[0.0], [9.0]], 1, "argmax")
    dual = DualModel(standard, robust, 0.7, "logits")
    logits, trace = dual.trace(ONE)
    assert trace.selected_experts.tolist() == [[1]]
    assert trace.gate_logits.tolist() == [[0, 9]]
    assert torch.equal(logits, dual(ONE))
    torch.testing.assert_close(logits, torch.tensor([[1.5 + 0.7 * log(3), 1.5]]))


def test_an_unknown_way_to_combine_is_refused(linear_net: Callable[..., nn.Module]):
    with pytest.raises(UnusableInput, match="unknown combine 'prob': did you mean 'probs'"):
        DualModel(linear_net(S), linear_net(R), combine="prob")  # type: ignore[arg-type]


def test_a_branch_that_works_in_place_changes_no_other_branchs_images(linear_moe: Callable[..., MoE]):
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sub_(0.3).flatten(1).repeat(1, 2) * torch.tensor([5.0, 1.0])

    robust = linear_moe([R, S], [[1.0], [0.0]])
    dual, x = DualModel(InPlace(), robust), ONE.clone()
    expected = dual.mix(torch.tensor([[3.5, 0.7]]), robust(ONE))
    torch.testing.assert_close(dual(x), expected)
    torch.testing.assert_close(dual.trace(x)[0], expected)
    assert float(x) == 1

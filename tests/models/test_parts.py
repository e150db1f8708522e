"""A routed model's parts, of ours and of a user's own classes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.dual import DualModel
from bench.models.foreign import Guarded
from bench.models.parts import (
    is_dual,
    is_moe,
    is_traced,
    parts,
    refuse_idle_alpha,
    routed_branch,
    routed_branches,
    set_alpha,
)


class Own(nn.Module):
    """A user's MoE, of which only router and experts have the names that are looked for."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def router(self, x: Tensor) -> Tensor:
        return x


def nets(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def test_what_a_model_is_goes_by_what_it_shows(linear_moe: Any):
    moe = linear_moe([[[1.0]], [[2.0]]], [[1.0], [0.0]])
    dual = DualModel(moe, moe)
    assert [is_moe(moe), is_dual(moe), is_traced(moe)] == [True, False, True]
    assert [is_moe(dual), is_dual(dual), is_traced(dual)] == [False, True, True]
    assert [is_moe(Own(nets(2))), is_traced(Own(nets(2)))] == [True, False]
    assert not is_moe(Own(list(nets(2))))  # experts that nn.Module does not know of
    assert not is_moe(nn.Linear(2, 2))
    assert not is_dual(SimpleNamespace(standard=moe, robust=moe))  # no α
    assert is_dual(SimpleNamespace(standard=moe, robust=moe, alpha=torch.tensor([0.5])))
    for of_the_image in (nn.Linear(2, 1), torch.ones(3)):
        assert not is_dual(SimpleNamespace(standard=moe, robust=moe, alpha=of_the_image))


def test_only_a_branch_that_can_choose_is_routed(linear_moe: Any):
    two, one = linear_moe([[[1.0]], [[2.0]]], [[1.0], [0.0]]), Own(nets(1))
    dense = nn.Linear(2, 2)
    assert routed_branches(two) == {"": two}
    assert routed_branches(one) == routed_branches(dense) == {}
    assert routed_branches(DualModel(two, one)) == {"S": two}
    assert list(routed_branches(DualModel(two, two)).items()) == [("R", two), ("S", two)]
    # a dual's routes are those of R, and never those of S in its place
    assert routed_branch(DualModel(one, two)) is two
    assert routed_branch(DualModel(two, dense)) is None
    assert [routed_branch(two), routed_branch(dense)] == [two, None]


def test_parts_by_name(linear_moe: Any):
    moe, dense = linear_moe([[[1.0]], [[2.0]]], [[1.0], [0.0]]), nn.Linear(2, 2)
    assert parts(moe) == {"expert:0": moe.experts[0], "expert:1": moe.experts[1]}
    assert parts(dense) == {}
    expected = {"S": dense, "R": moe, "R.expert:0": moe.experts[0], "R.expert:1": moe.experts[1]}
    assert parts(DualModel(dense, moe)) == expected


def test_alpha_may_be_a_number_a_tensor_or_a_parameter():
    number = DualModel(nn.Linear(2, 2), nn.Linear(2, 2), 0.7)
    set_alpha(number, 0.5)
    assert number.alpha == 0.5
    for make in (torch.tensor, lambda value: nn.Parameter(torch.tensor(value))):
        model = nn.Module()
        model.alpha = make(0.7)
        before = model.alpha
        set_alpha(model, 0.5)
        assert model.alpha is before  # in place: an optimiser or a hook may hold it
        assert model.alpha.item() == 0.5


def test_an_alpha_that_cannot_be_set_is_one_line():
    class Fixed(nn.Module):
        @property
        def alpha(self) -> float:
            return 0.7

    with pytest.raises(UnusableInput, match=r"^the dual's α cannot be set \(.*\): let `alpha` be an attribute"):
        set_alpha(Fixed(), 0.5)


def test_an_alpha_that_changes_nothing_is_refused():
    class Shows(nn.Module):
        """A dual that mixes by another number than the α that it shows."""

        def __init__(self, robust: nn.Module, mixes: bool) -> None:
            super().__init__()
            self.standard, self.robust, self.alpha, self.weight = nn.Linear(2, 2), robust, torch.tensor(0.3), 0.5
            self.mixes = mixes

        def forward(self, x: Tensor) -> Tensor:
            weight = self.alpha if self.mixes else self.weight
            return (1 - weight) * self.standard(x) + weight * self.robust(x)

    x, robust = torch.rand(4, 2), nn.Linear(2, 2)
    idle, mixing = Shows(robust, False), Shows(robust, True)
    for model in (idle, Guarded(idle)):
        assert is_dual(model)
        with pytest.raises(UnusableInput, match="--alpha changes nothing of the model's answers"):
            refuse_idle_alpha(model, x, 0.9)
    for fine in (mixing, Shows(idle.standard, False)):
        fine.standard = idle.standard
        refuse_idle_alpha(fine, x, 0.9)
        assert float(fine.alpha) == pytest.approx(0.3)


def test_attributes_of_these_names_that_are_something_else_are_no_parts():
    dense = nn.Linear(2, 2)
    dense.alpha, dense.standard, dense.robust, dense.trace = 0.5, 1.0, True, False
    assert not is_dual(dense)
    assert not is_traced(dense)

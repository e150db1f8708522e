"""Slopes of what a pass has recorded, against gradients worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.attacks.gradients import LEAK
from bench.attacks.recorded import with_slopes


def slope(function: Callable[[Tensor], Tensor], at: list[float]) -> list[float]:
    """The gradient of the sum of what a function gives, behind `with_slopes`."""
    z = torch.tensor(at, requires_grad=True)
    return torch.autograd.grad(with_slopes(function(z)).sum(), z)[0].tolist()


def test_a_unit_that_is_off_has_a_little_of_the_slope():
    assert slope(torch.relu, [-1.0, 2.0]) == pytest.approx([LEAK, 1.0])


def test_a_product_of_what_is_off_has_a_slope_by_each_factor():
    # each factor has LEAK of what comes in, and the unit behind it LEAK of that; beside one that is on, 3 and 2
    assert slope(lambda z: z.relu() * (z - 1).relu(), [-1.0, 3.0]) == pytest.approx([2 * LEAK**2, 2.0 + 3.0])
    assert slope(lambda z: z * torch.tensor([0.0, 2.0]), [-1.0, 3.0]) == pytest.approx([LEAK, 2.0])


def test_what_a_softmax_gives_no_weight_has_a_slope_as_if_it_had_a_little():
    # of the second of two, which has none: LEAK · (1 − 0) / 2; the first, of which nothing is asked, stays without
    assert slope(lambda z: z.softmax(0)[1:], [0.0, -200.0]) == pytest.approx([0.0, LEAK / 2])


def test_what_takes_other_inputs_is_none_of_each_element_alone():
    factor, other = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = with_slopes(torch.addcmul(torch.zeros(2), factor, other))
    assert torch.autograd.grad(found.sum(), [factor, other])[1].tolist() == [0.0, 0.0]

"""Gradients for what has none: a smooth function's in the backward pass, and mean slopes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attacks.gradients import LEAK, StraightThrough, differentiable, has_gradient, logarithms, readable, slopes

WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-0.5, 0.5, 1.0, 3.0]])


def affine(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT.T + 1


def rounded(x: Tensor) -> Tensor:
    return affine((16 * x).round() / 16)


def half_rounded(x: Tensor) -> Tensor:
    return torch.stack([rounded(x)[:, 0], affine(x)[:, 1]], 1)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def ascent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


# --- straight through -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (16 * x).round() / 16,
        lambda x: torch.floor(4 * x),
        lambda x: torch.sign(x - 2),
        lambda x: torch.relu(x - 2),
        lambda x: nn.ReLU(inplace=True)(x - 2),
        lambda x: torch.tanh(1000 * x),
        lambda x: torch.sigmoid(1000 * x - 2),
        lambda x: (1000 * x.flatten(1)).softmax(1)[:, :1],
        lambda x: x.clamp(2, 3),
        lambda x: x.masked_fill(x > 0, -1e9),
        lambda x: torch.where(x > 0, -1e9, x),
        lambda x: torch.where(x > 0, torch.tensor(-1e9), x),
        lambda x: x.where(x < 0, -1e9),
        lambda x: x.detach() * 2,
        lambda x: x.data * 2,
        torch.no_grad()(lambda x: 3 * x),
        torch.inference_mode()(lambda x: 3 * x),
        lambda x: torch.min(x, torch.tensor(-1.0)),
        lambda x: x.clamp_max(-1),
        lambda x: F.softmin(1000 * x.flatten(1), dim=1)[:, :1],
    ],
)
def test_values_stay_and_there_is_a_gradient(function: Callable[[Tensor], Tensor]):
    x = images(3)
    z = x.clone().requires_grad_()
    with StraightThrough():
        value = function(z)
    torch.testing.assert_close(value.detach(), function(x).detach(), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(value.sum(), z)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("function", "sign"),
    [
        (lambda x: (x > 2).float(), 1),
        (lambda x: (x >= 2).to(x.dtype), 1),
        (lambda x: (x < 2).double(), -1),
        (lambda x: torch.lt(x, 2)[:, 0].unsqueeze(1).type_as(x), -1),
        (lambda x: torch.ge(x, 2) * x.detach(), 1),
        (lambda x: 3.0 * (x > 2), 1),
        (lambda x: (x > 2).int().float(), 1),
        (lambda x: torch.where(x > 2, 1.0, 3.0), -1),
        (lambda x: torch.where(x > 2, torch.tensor(3.0), 1.0), 1),
    ],
)
def test_numbers_made_of_a_mask_have_the_gradient_of_what_was_compared(function: Callable[[Tensor], Tensor], sign: int):
    x = 4 * images(3)
    z = x.clone().requires_grad_()
    with StraightThrough():
        value = function(z)
    assert torch.equal(value.detach(), function(x))
    slope = torch.autograd.grad(value.sum(), z)[0]
    assert (slope * sign >= 0).all()
    assert (slope * sign > 0).sum() >= 3 if value.dim() < 4 else (slope * sign > 0).all()


def test_a_mask_that_selects_is_a_mask_as_before():
    x = torch.tensor([[-1.0, 3.0]], requires_grad=True)
    with StraightThrough():
        mask = x > 2
        assert mask.dtype == torch.bool
        assert x[mask].tolist() == [3.0]
        kept = x.masked_fill(mask, 0.0)
        assert torch.where(mask, x, 0.0).tolist() == [[0.0, 3.0]]
    assert kept.tolist() == [[-1.0, 0.0]]


def test_a_mask_may_be_worked_on_in_place():
    """As where what exceeds an expert's capacity is dropped: a mask has no gradient but by its stand-in."""
    x = torch.tensor([[-1.0, 3.0]], requires_grad=True)
    with StraightThrough():
        mask = (x > 0).float()
        place = mask.cumsum(1) * mask
        mask *= place < 2
    (gradient,) = torch.autograd.grad((place + mask).sum(), x)
    assert (gradient > 0).all()


def test_a_probability_of_zero_keeps_the_slope_it_has():
    weights = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    found = logarithms(weights)
    assert found[0, 0] == 0
    assert (found[0, 1:] < -80).all()
    assert torch.autograd.grad(found.sum(), weights)[0].tolist() == [[1, 1, 1]]


def test_a_dead_relu_has_a_tenth_of_the_slope():
    x = torch.tensor([-1.0, 2.0])
    with StraightThrough():
        assert ascent(torch.relu, x).tolist() == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize(
    "function",
    [F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.elu, F.celu, F.selu, lambda x: F.threshold(x, 0.0, 0.0),
     lambda x: x.clamp_min(0), lambda x: torch.maximum(x, torch.zeros(())), lambda x: torch.max(torch.zeros(1), x),
     lambda x: x.relu().square(), lambda x: x.relu() ** 2, nn.PReLU(init=0.0), lambda x: F.rrelu(x, 0.0, 0.0),
     F.hardsigmoid, torch.erf, lambda x: (x + x.abs()) / 2,
     lambda x: (h := x.relu()) * h, lambda x: x.relu() * F.relu6(x),
     lambda x: (40 * x).sigmoid() * (40 * x - 9).sigmoid(), lambda x: torch.stack([x.relu()] * 3).prod(0),
     lambda x: torch.einsum("i,i->i", x.relu(), x.relu()), lambda x: torch.einsum("i,i->i", [x.relu()] * 2),
     lambda x: (x.relu()[:, None, None] @ x.relu()[:, None, None])[:, 0, 0]],
)  # fmt: skip
def test_an_activation_that_is_off_leads_to_where_it_opens(function: Callable[[Tensor], Tensor]):
    x = torch.tensor([-40.0, -2.0, 2.0])
    with StraightThrough():
        value = function(x.clone().requires_grad_())
        assert (ascent(function, x) > 0).all()
    assert torch.equal(value, function(x))


def test_what_has_no_gradient_anywhere_is_counted():
    z = images(1).requires_grad_()
    with StraightThrough() as smooth:
        torch.relu(z).softmax(-1)
    assert smooth.hard == 0
    with StraightThrough() as smooth:
        z.round().detach()
    assert smooth.hard == 2


def test_outside_of_it_gradients_are_their_own():
    with StraightThrough():
        pass
    assert ascent(lambda x: (16 * x).round(), images(1)).abs().sum() == 0


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "has"),
    [
        (affine, True),
        (rounded, False),
        (half_rounded, True),
        (lambda x: affine(x).detach(), False),
        (torch.no_grad()(affine), False),
        (lambda x: nn.Parameter(torch.ones(len(x), 2)), False),
    ],
)
def test_whether_any_score_has_a_gradient(router: nn.Module, has: bool):
    assert has_gradient(router, images(3)) is has


def test_probabilities_are_taken_by_their_logarithms():
    scores = affine(images(3))
    saturated = (20 * scores).softmax(1)
    assert torch.equal(logarithms(saturated).argsort(1), scores.argsort(1))
    gaps = ascent(lambda x: logarithms((20 * affine(x)).softmax(1)).diff(dim=1), images(3))
    assert (gaps != 0).flatten(1).any(1).all()
    assert logarithms(scores) is scores
    assert logarithms(scores[:0]).shape == (0, 2)


def test_a_closed_experts_score_is_finite_and_keeps_its_gradient():
    scores = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    known = logarithms(scores)
    assert known.tolist() == [[1.0, -1.0, 0.5]]
    known.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[1.0, 1.0, 1.0]]
    assert readable(torch.tensor([[0.0, -1e9, -2.0]]), -1e9).tolist() == [[0.0, -5.0, -2.0]]


def test_the_slopes_of_an_affine_router_are_its_weights():
    # signs drawn 16 times for 4 pixels leave noise; of one pixel there is none
    one = slopes(lambda x: 3 * x.flatten(1) @ torch.tensor([[1.0, -2.0]]), images(5)[:, :, :1, :1], 0.1)
    torch.testing.assert_close(one, torch.tensor([[3.0], [-6.0]]))


def test_the_slopes_of_a_rounded_router_have_its_signs():
    weight = torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def router(z: Tensor) -> Tensor:
        return (16 * z).round().flatten(1) @ weight.T / 16

    found = slopes(router, x, 0.1)
    large = weight.abs() > 0.5
    assert (found.sign() == weight.sign())[large].float().mean() > 0.8
    state = torch.random.get_rng_state()
    assert torch.equal(slopes(router, x, 0.1), found)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("router", [rounded, lambda x: affine(x).detach(), lambda x: affine((x > 0.5).float())])
def test_a_missing_gradient_is_replaced_and_no_other(router: Callable[[Tensor], Tensor]):
    x = images(64)
    scores = differentiable(router, x, 0.2)
    torch.testing.assert_close(scores(x), router(x), atol=1e-5, rtol=0)
    assert ascent(lambda z: scores(z)[:, 1], x).abs().sum() > 0
    assert torch.equal(ascent(differentiable(affine, x, 0.2), x), ascent(affine, x))


@pytest.mark.parametrize(("far", "slope"), [(False, 1e-4), (True, 1e-2)])
def test_a_comparison_that_is_far_from_turning_counts_as_is_asked(far: bool, slope: float):
    x = torch.tensor([99.0], requires_grad=True)
    with StraightThrough(far=far):
        number = (x > 0).float()
    assert number.item() == 1
    assert torch.autograd.grad(number.sum(), x)[0].item() == pytest.approx(slope, rel=1e-3)


def test_a_tensor_made_of_a_tensor_has_its_gradient():
    x = torch.tensor([3.0], requires_grad=True)
    with StraightThrough():
        copied = torch.tensor(x, dtype=torch.float64)
    assert (copied.dtype, copied.item()) == (torch.float64, 3.0)
    assert torch.autograd.grad(copied.sum(), x)[0].item() == 1


@pytest.mark.parametrize(("at", "exponent", "slope"), [(9.0, -6, -LEAK), (1e-9, 4, LEAK), (2.0, 3, 12.0)])
def test_a_power_has_a_slope_where_it_falls_and_near_zero(at: float, exponent: float, slope: float):
    x = torch.tensor([at], requires_grad=True)
    with StraightThrough():
        power = x**exponent
    assert power.item() == pytest.approx(at**exponent)
    assert torch.autograd.grad(power.sum(), x)[0].item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    ("raise_", "sign"),
    [
        (lambda x: 0.5**x, -1),
        (lambda x: torch.pow(0.5, x), -1),
        (lambda x: 2**x, 1),
        (torch.exp2, 1),
        (torch.special.exp2, 1),
        (torch.expm1, 1),
        (torch.erfc, -1),
        (lambda x: 1 / (2 - 1e18 * x), -1),
    ],
)
def test_what_falls_or_rises_to_nothing_has_a_slope(raise_: Callable[[Tensor], Tensor], sign: int):
    """−sign · 200 is where none has a slope of its own any more in float32."""
    x = torch.tensor([-200.0 * sign], requires_grad=True)
    with StraightThrough():
        value = raise_(x)
    assert value.item() == raise_(x.detach()).item()
    assert torch.autograd.grad(value.sum(), x)[0].item() * sign > 1e-3


def test_what_where_takes_from_two_networks_has_the_gradients_of_both_and_of_the_choice():
    x = torch.tensor([3.0], requires_grad=True)
    with StraightThrough():
        value = torch.where(x > 0, 5 * x, 2 * x)
    assert value.item() == 15
    # 5 of the side that is taken, and of the step, whose slope is 1 / (1 + 3)², the difference of the sides, 9
    assert torch.autograd.grad(value.sum(), x)[0].item() == pytest.approx(5 + 9 / 16)


@pytest.mark.parametrize(
    ("largest", "value", "gradient"),
    [
        (lambda x: x.amax(1), 9.0, [0.1, 1.1]),
        (lambda x: torch.amin(x, dim=-1, keepdim=True), -40.0, [1.1, 0.1]),
        (lambda x: x.logsumexp(1), 9.0, [0.1, 1.1]),
        (lambda x: x.amax(), 9.0, [0.1, 1.1]),
    ],
)
def test_the_largest_of_several_has_a_little_of_the_gradients_of_all(
    largest: Callable[[Tensor], Tensor], value: float, gradient: list[float]
):
    x = torch.tensor([[-40.0, 9.0]], requires_grad=True)
    with StraightThrough():
        found = largest(x)
    assert found.item() == value
    assert torch.autograd.grad(found.sum(), x)[0].flatten().tolist() == pytest.approx(gradient)

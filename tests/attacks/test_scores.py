"""A router's scores, and the slopes that stand in where it has no gradient."""

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.scores import differentiable, has_gradient, logarithms, slopes

WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-0.5, 0.5, 1.0, 3.0]])


def affine(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT.T + 1


def rounded(x: Tensor) -> Tensor:
    return affine((16 * x).round() / 16)


def half_rounded(x: Tensor) -> Tensor:
    return torch.stack([rounded(x)[:, 0], affine(x)[:, 1]], 1)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))


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
    saturated = lambda x: (20 * affine(x)).softmax(1)  # noqa: E731
    x = images(3)
    scores = logarithms(saturated, x)
    assert torch.equal(scores(x).argsort(1), affine(x).argsort(1))
    z = x.clone().requires_grad_()
    gaps = scores(z).diff(dim=1)
    assert (torch.autograd.grad(gaps.sum(), z)[0] != 0).any(1).all()
    assert logarithms(affine, x) is affine


def test_the_slopes_of_an_affine_router_are_its_weights():
    # signs drawn 16 times for 4 pixels leave noise; of one pixel there is none
    one = slopes(lambda x: 3 * x.flatten(1) @ torch.tensor([[1.0, -2.0]]), images(5)[:, :, :1, :1])
    torch.testing.assert_close(one, torch.tensor([[3.0], [-6.0]]))


def test_the_slopes_of_a_rounded_router_have_its_signs():
    weight = torch.randn(2, 192, generator=torch.Generator().manual_seed(0))
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = slopes(lambda x: (16 * x).round().flatten(1) @ weight.T / 16, x)
    large = weight.abs() > 0.5
    assert (found.sign() == weight.sign())[large].float().mean() > 0.8
    state = torch.random.get_rng_state()
    assert torch.equal(slopes(lambda x: (16 * x).round().flatten(1) @ weight.T / 16, x), found)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scores_are_the_routers_and_only_a_missing_gradient_is_replaced():
    assert differentiable(affine, images(3)) is affine
    scores, x = differentiable(rounded, images(64)), images(5).requires_grad_()
    torch.testing.assert_close(scores(x), rounded(x), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(scores(x)[:, 1].sum(), x)
    assert torch.equal(gradient[0], gradient[4])
    assert gradient.abs().sum() > 0

"""What attacks know of a router: whether it is affine, and which experts it can be led to."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.routes import Routes, affine_map, mixture, reachable_affine
from bench.attacks.search import Search
from bench.attacks.targets import nearest
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.routing import AffineRouter, ConvRouter
from bench.spec import ThreatModel


def search(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, norm: Any = "Linf", classes: int = 2) -> Search:
    everywhere = torch.ones(len(x), dtype=torch.bool)
    threat = ThreatModel(norm=norm, eps=eps)
    return Search(Block(model, x, y, everywhere, classes, "planted", threat, 0, PassCounter(model)))


def test_an_affine_router_is_found_in_pixel_units():
    router = AffineRouter((3, 4, 4), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x = torch.rand(5, 3, 4, 4)
    weight, bias, off = affine_map(router, x)  # type: ignore[misc]
    assert off < 1e-5
    torch.testing.assert_close(x.flatten(1) @ weight.T + bias, router(x).detach(), atol=1e-5, rtol=1e-5)
    assert affine_map(ConvRouter((3, 4, 4), 3, (0.5,) * 3, (0.2,) * 3), x) is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 0.5]), st.integers(1, 2))
def test_no_expert_that_a_corner_of_the_ball_leads_to_is_missed(seed: int, eps: float, k: int):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(3, 2, generator=g), 0.3 * torch.randn(3, generator=g)
    x = torch.rand(1, 1, 1, 2, generator=g)
    found = reachable_affine(weight, bias, 0.0, x, ThreatModel(norm="Linf", eps=eps), k)[0]
    low, high = (x.flatten() - eps).clamp_min(0).tolist(), (x.flatten() + eps).clamp_max(1).tolist()
    grid = torch.tensor(list(product(*(np.linspace(a, b, 15) for a, b in zip(low, high, strict=True)))))
    chosen = (grid.float() @ weight.T + bias).topk(k, dim=1).indices.unique()
    assert found[chosen].all()
    if eps == 0.02 and k == 1 and len(chosen) == 1:  # what is far away is left out, else everything would pass
        gaps = x.flatten() @ weight.T + bias
        far = gaps.max() - gaps > 0.2 * weight.abs().sum()
        assert not found[far].any()


def test_experts_by_hand(linear_moe: Any):
    # the scores are (0, a − 0.55, a − 0.7) and a = ½ ± 0.1, or at most 1: b's second score is reached, the third is not
    moe = linear_moe([[[1.0, 0], [0, 0]]] * 3, [[0, 0], [1, -0.55], [1, -0.7]], 1, "argmax")
    x = torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2)
    routes = Routes(search(moe, x, torch.zeros(2, dtype=torch.long)))
    # the constant pixel falls to 0.9 as well: a − 0.7 · 0.9 < 0; at a = 0.95 the second always beats the third
    assert routes.reachable.tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_a_router_that_is_saturated_is_not_affine(scale: float):
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for router in (
        lambda x: (scale * x.flatten(1) @ weight.T).softmax(1),
        lambda x: (scale * (x.flatten(1) @ weight.T - 3)).tanh(),
        lambda x: 0 * x.flatten(1) @ weight.T,
    ):
        assert affine_map(router, x) is None
    assert affine_map(lambda x: scale * x.flatten(1) @ weight.T + 1e3 * scale, x) is not None


def test_a_router_that_is_affine_but_for_a_rounding_misses_no_expert():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) / 8
    x = torch.rand(4000, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def router(z: Tensor) -> Tensor:
        scores = z.flatten(1) @ weight.T
        return scores + ((2000 * scores).round() / 2000 - scores).detach()

    *affine, off = affine_map(router, x[:32])  # type: ignore[misc]
    assert 0.0002 < off <= 0.0006  # half a 2000th, and that of the constant
    there = router(x).argmax(1, keepdim=True)
    threat = ThreatModel(norm="Linf", eps=1e-6)
    assert reachable_affine(*affine, off, x, threat).gather(1, there).all()
    assert not reachable_affine(*affine, 0.0, x, threat).gather(1, there).all()


def test_every_expert_of_a_router_that_is_not_affine_may_be_reached(linear_moe: Any):
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x.flatten(1)[:, 0]
            return torch.stack([torch.full_like(a, 0.36), a.square(), a.square() - 0.5], 1)

    moe = MoE(linear_moe([[[1.0, 0], [0, 0]]] * 3, [[0, 0]] * 3).experts, Squared(), 1, "argmax")
    routes = Routes(search(moe, torch.full((2, 1, 1, 2), 0.5), torch.zeros(2, dtype=torch.long)))
    assert routes.reachable.all()


def test_a_start_is_a_point_of_the_box_also_where_a_router_has_no_finite_gradient(linear_moe: Any):
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) - 0.5).clamp_min(0).sqrt()  # at ½ the gradient is ∞ · 0

    moe = MoE(linear_moe([[[1.0, 0], [0, 0]]] * 2, [[0, 0]] * 2).experts, Root(), 1, "argmax")
    routes = Routes(search(moe, torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.long)))
    assert routes.aimed(torch.tensor([1])).isfinite().all()


def test_the_gap_is_to_the_last_that_would_be_selected(linear_moe: Any):
    moe = linear_moe([[[1.0], [0]]] * 3, [[0.0]] * 3, 2, "softmax")
    routes = Routes(search(moe, torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)))
    scores = torch.tensor([[3.0, 1.0, 0.5]])
    # of two selected, expert 2 has to beat the second best other, 1; expert 0 is ahead of it by 2.5
    assert [routes.gap(scores, torch.tensor([i])).item() for i in (2, 0)] == [-0.5, 2.5]


def test_a_mixture_is_the_duals_own_or_of_probabilities():
    s, r = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    class Foreign:
        alpha, combine = 0.25, "logits"

    torch.testing.assert_close(mixture(Foreign(), s, r), torch.tensor([[1.5, 0.25]]))
    dual = DualModel(nn.Identity(), nn.Identity(), 0.25, "probs")
    Foreign.combine = "probs"
    torch.testing.assert_close(mixture(Foreign(), s, r), dual.mix(s, r))


def test_targets_come_by_their_linearised_distance(linear_net: Any):
    # z = (a, 0.8 a, 0): the second class is nearer in logits, a (1 − 0.8)/(0.2) = a; the third at a/1: both a; tilt b
    net = linear_net([[1.0, 0.0], [0.8, 0.1], [0.0, 0.9]])
    x = torch.tensor([[0.5, 0.2]]).view(1, 1, 1, 2)
    # gaps 0.1 − 0.02 = 0.08 over |0.2| + |0.1| = 0.27 away; 0.5 − 0.18 = 0.32 over 1 + 0.9 = 0.17 away
    order = nearest(search(net, x, torch.tensor([0]), classes=3), 2)
    assert order.tolist() == [[2, 1]]


@pytest.mark.parametrize("count", [1, 5])
def test_there_are_no_more_targets_than_wrong_classes(count: int, linear_net: Any):
    net = linear_net([[1.0], [0.5], [0.2]])
    order = nearest(search(net, torch.ones(2, 1, 1, 1), torch.tensor([0, 1]), classes=3), count)
    assert order.shape == (2, min(count, 2))
    assert not (order == torch.tensor([[0], [1]])).any()

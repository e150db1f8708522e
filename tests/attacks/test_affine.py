"""Affinity is read from the structure, and no expert that an affine router can be led to is missed."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.attacks.affine import affine_map, is_affine, reachable_pairs
from bench.models.routing import AffineRouter, ConvRouter
from bench.spec import ThreatModel

LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


class Inactive(nn.Module):
    """Affine wherever its ReLU sleeps, which is almost everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) + torch.relu(x.flatten(1)[:, :1] - 0.99)


def test_an_affine_router_is_found_in_pixel_units():
    router = AffineRouter((3, 4, 4), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x = torch.rand(5, 3, 4, 4)
    weight, bias = affine_map(router, x)  # type: ignore[misc]
    torch.testing.assert_close(x.flatten(1) @ weight.T + bias, router(x).detach(), atol=1e-5, rtol=1e-5)


def test_a_chain_of_affine_layers_is_affine_also_where_one_is_used_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    router = nn.Sequential(conv, conv, nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(5, 3, 4, 4)
    weight, bias = affine_map(router, x)  # type: ignore[misc]
    torch.testing.assert_close(x.flatten(1) @ weight.T + bias, router(x).detach(), atol=1e-5, rtol=1e-5)


def hooked() -> nn.Module:
    router = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    router.register_forward_hook(lambda module, inputs, output: output.relu())
    return router


def patched() -> nn.Module:
    router = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    router.forward = lambda x: x.flatten(1)[:, :3].square()  # type: ignore[method-assign]
    return router


@pytest.mark.parametrize(
    "router",
    [
        ConvRouter((3, 4, 4), 3, (0.5,) * 3, (0.2,) * 3),
        Inactive(),  # its answers at any probe may be affine
        nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Softmax(1)),
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *LINEAR).eval(),
        hooked(),
        patched(),
        lambda x: LINEAR(x),
    ],
)
def test_what_is_not_affine_by_its_structure_is_none(router: nn.Module):
    assert not is_affine(router)
    assert affine_map(router, torch.rand(5, 3, 4, 4)) is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 0.5]))
def test_no_expert_that_a_point_of_the_ball_leads_to_is_missed(seed: int, eps: float):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(3, 2, generator=g), 0.3 * torch.randn(3, generator=g)
    x = torch.rand(1, 1, 1, 2, generator=g)
    found = reachable_pairs(weight, bias, x, ThreatModel(norm="Linf", eps=eps))[0]
    low, high = (x.flatten() - eps).clamp_min(0).tolist(), (x.flatten() + eps).clamp_max(1).tolist()
    grid = torch.tensor(list(product(*(np.linspace(a, b, 15) for a, b in zip(low, high, strict=True)))))
    scores = grid.float() @ weight.T + bias
    ahead = (scores[:, :, None] >= scores[:, None]).any(0)
    assert found[ahead].all()
    far = (scores[:, :, None] - scores[:, None]).amax(0) < -0.1  # the grid holds the corners, so this is exact
    assert not found[far].any()


def test_pairs_by_hand():
    # the scores are (0, a − 0.55 b, a − 0.7 b) and a = ½ ± 0.1, b = 0.9 … 1
    weight, bias = torch.tensor([[0.0, 0], [1, -0.55], [1, -0.7]]), torch.zeros(3)
    x = torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2)
    ahead = reachable_pairs(weight, bias, x, ThreatModel(norm="Linf", eps=0.1))
    # at most a − 0.55 b = 0.6 − 0.495 and a − 0.7 b = 0.6 − 0.63; the third is always behind the second
    assert ahead[0].tolist() == [[True, True, True], [True, True, True], [False, False, True]]
    assert ahead[1].tolist() == [[True, False, False], [True, True, True], [True, False, True]]
    l2 = reachable_pairs(weight, bias, x[:1], ThreatModel(norm="L2", eps=0.04))
    # 0.5 − 0.55 + 0.04 · ‖(1, −0.55)‖ = −0.004
    assert not l2[0, 1, 0]

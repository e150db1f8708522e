"""The grid of pixel values, and an attack that never leaves it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keyed import search
from torch import Tensor, nn

from bench.attacks.deployed import deployed
from bench.attacks.grid import grid, on_grid, steps_within
from bench.spec import Norm, ThreatModel

#: Two grey images, each with one brighter pixel in its upper half, which is their class.
X = (8 + torch.eye(64)[[3, 9]].view(2, 1, 8, 8)) / 16
Y = torch.tensor([0, 0])


class OnTheGrid(nn.Module):
    """Class 0 for sure, but on multiples of 1/16 the brighter half; smooth, alike at the images."""

    def forward(self, x: Tensor) -> Tensor:
        off = torch.sin(16 * math.pi * x).square().flatten(1).mean(1, keepdim=True)
        halves = x.flatten(1).view(len(x), 2, -1).sum(2)
        return (-200 * off).exp() * halves + (1 - (-200 * off).exp()) * torch.tensor([5.0, 0.0])


@given(st.integers(3, 1000), st.integers(0, 10**6))
def test_the_grid_of_images_is_found(count: int, seed: int):
    """Where two neighbours of it occur: that a finer one holds them as well does not matter."""
    drawn = torch.randint(0, count + 1, (2, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    drawn[0, 0, 0, :3] = torch.tensor([0, 1, 2])
    assert grid(drawn.float() / count) == count


def test_images_that_lie_on_no_grid_have_none():
    x = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    assert grid(x) == 255
    assert grid(torch.where(x == x.amax(), x - 0.3 / 255, x)) is None
    assert grid(torch.rand(1, 3, 8, 8)) is None
    assert grid(torch.zeros(1, 1, 2, 2)) is None
    two = torch.tensor([0.0, 1, 1, 0]).view(1, 1, 2, 2)
    assert (grid(two), grid(two, 0.3)) == (1, 255)  # black and white pixels of 8 bits
    assert grid(two / 3 + 1 / 3, 0.2) == 255


def test_steps_lie_within_the_ball():
    delta = torch.tensor([2.0, -2.7, 0.4, 0.0]).view(1, 1, 2, 2)
    assert steps_within(delta, 2.7, "Linf").flatten().tolist() == [2, -2, 0, 0]
    # rounded (3, 2, 1): 9 + 4 are at most 3.7² = 13.69, and 9 + 4 + 1 are at most 14
    assert steps_within(delta, 3.7, "L2").flatten().tolist() == [2, -3, 0, 0]
    assert steps_within(delta, 14**0.5, "L2").flatten().tolist() == [2, -3, 1, 0]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_shows_on_the_grid_alone_is_broken_there(norm: Norm):
    eps = 0.15 if norm == "Linf" else 0.4  # whose corners lie off the grid, or a projection would meet it
    anywhere, there = (search(OnTheGrid(), X, Y, eps, norm=norm) for _ in range(2))
    deployed(anywhere, 5, 50)
    assert anywhere.unbroken.all()  # iterates between the points see the sure class alone
    on_grid(there, 1, 50, 50)
    assert not there.unbroken.any()
    assert torch.equal((16 * there.x_adv).round() / 16, there.x_adv)
    distance = (there.x_adv - X).flatten(1).norm(p=math.inf if norm == "Linf" else 2, dim=1)
    assert (distance <= ThreatModel(norm=norm, eps=eps).reach).all()


class Bent(OnTheGrid):
    """The same, of pixels whose derivative is 0 at the points of the grid."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - torch.sin(32 * math.pi * x) / (32 * math.pi))


def test_gradients_that_are_bent_at_the_points_are_not_needed():
    for queries, left in ((1, 2), (400, 0)):
        found = search(Bent(), X, Y, 0.15)
        torch.manual_seed(0)
        on_grid(found, 1, 10, queries)
        assert int(found.unbroken.sum()) == left
        assert torch.allclose((16 * found.x_adv).round() / 16, found.x_adv, atol=1e-6)
        assert ((found.x_adv - X).abs().amax((1, 2, 3)) <= 2 / 16 + 1e-6).all()  # 0.15 holds two whole steps


def test_where_there_is_no_other_point_nothing_is_done():
    narrow, off = search(OnTheGrid(), X, Y, 0.06), search(OnTheGrid(), X + 0.001 * torch.rand(X.shape), Y, 0.2)
    for each in (narrow, off):
        on_grid(each, 2, 10, 50)
        assert torch.equal(each.x_adv, each.block.x)


def test_a_model_that_cannot_take_no_images_is_never_given_none():
    class Views(OnTheGrid):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(x.size(0), -1)[:, :64].view(-1, 1, 8, 8))

    found = search(Views(), X, Y, 0.15)
    found.unbroken[:] = False
    on_grid(found, 2, 10, 50)
    on_grid(search(Views(), X, Y, 0.15), 2, 50, 50)


def test_a_model_without_gradients_is_left_alone():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

    found = search(Constant(), X, Y, 0.2)
    on_grid(found, 2, 10, 50)
    assert found.unbroken.all()

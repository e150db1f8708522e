"""Restarts on paths: in which order, where they begin, what they climb; and Square on paths."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_pixels import ROUTER, SAME, Stepped, X, paths

from bench.attacks.paths import Paths
from bench.attacks.restarts import (
    AGAIN,
    NEAR,
    Ranking,
    Restart,
    forced_paths,
    local_slopes,
    other_images,
    square_on_paths,
)
from bench.models.architecture import Inside
from bench.models.moe import MoE


def restart(found: Paths, experts: list[int], kind: Any = "own", **more: Any) -> Restart:
    """One on the path to one expert for each row, by the margin."""
    chosen, zero = torch.tensor(experts).view(-1, 1, 1), torch.zeros(len(experts))
    fields = {
        "which": zero.long(),
        "target": zero.long(),
        "push": zero,
        "ahead": zero,
        "new": zero.bool(),
        "local": None,
    }
    return Restart(found, kind, 0, chosen, **({"local": None} | fields | more))


def test_the_weakest_path_comes_first(linear_moe: Any):
    experts = [[[1.0, 0], [0, 0]], [[1.0, 0], [0.0, 0.9]], [[1.0, 0], [0.0, 0.6]]]
    found = paths(linear_moe(experts, [[0.0, 0]] * 3, 1, "argmax"), X)  # all scores are alike: every one is reached
    ranking = Ranking.of(found)
    # at a = ½, b = 1 the margins are −0.5, 0.4 and 0.1
    assert found.choices[ranking.order[0]].flatten().tolist() == [1, 2, 0]
    assert ranking.reachable.tolist() == [3, 3]


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5).clamp_min(0).sqrt()  # at ½ the gradient is ∞ · 0


def test_a_start_is_a_point_of_the_box_also_where_a_router_has_no_finite_gradient(linear_moe: Any):
    found = paths(MoE(linear_moe(SAME[:2], ROUTER[:2]).experts, Root(), 1, "argmax"), torch.full((1, 1, 1, 2), 0.5))
    start = restart(found, [1]).aimed()
    assert start.isfinite().all()
    assert ((start >= 0) & (start <= 1)).all()


class OfItsBias(nn.Module):
    """As a quantized layer: the scores have a gradient by the bias, and none by the images."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1) + self.bias


def test_a_start_cannot_be_aimed_where_the_router_has_a_gradient_by_its_bias_alone(linear_moe: Any):
    found = paths(MoE(linear_moe(SAME[:2], ROUTER[:2]).experts, OfItsBias(), 1, "argmax"), X[:1])
    assert torch.equal(restart(found, [1]).aimed(), X[:1])


def test_an_aimed_start_is_as_far_towards_the_path_as_the_ball_goes(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    # the lead of expert 1 over 0 rises with a and falls with b
    assert restart(found, [1, 1]).aimed()[0].flatten().tolist() == pytest.approx([0.6, 0.9])


def test_other_images_on_the_path_are_brought_into_the_ball(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2))
    start = other_images(found, torch.tensor([[[1]], [[1]]]))  # the second image alone takes expert 1
    assert start.flatten(1).tolist() == [pytest.approx([0.6, 1.0]), pytest.approx([0.95, 1.0])]


@pytest.mark.slow
@pytest.mark.parametrize("attack", [lambda p: forced_paths(p, 8, 20), lambda p: square_on_paths(p, 100)])
def test_they_are_broken_all_the_same(linear_moe: Any, attack: Any):
    blind = MoE([linear_moe(SAME, ROUTER).experts[0], Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    x = torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2)  # 0.6 leads to the second expert, whose step is at ¼
    found = paths(blind, x, eps=0.3)
    attack(found)
    assert bool(found.search.unbroken[0])  # at a ≤ 0.25 the first expert is right, and is taken
    down = MoE([Stepped(), Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    found = paths(down, x, eps=0.3)
    attack(found)
    assert not bool(found.search.unbroken[0])


class Mirrored(nn.Module):
    """Sends an image to its second expert where its first pixel is far on its own side; in steps."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        far = torch.where(b > 0.9, a - 0.5, 0.5 - a) > 0.02
        return torch.stack([torch.zeros_like(a), far.float() - 0.5], 1)


def test_slopes_of_each_image_lead_where_those_of_all_cancel(linear_moe: Any):
    model = MoE(linear_moe(SAME[:2], ROUTER[:2]).experts, Mirrored(), 1, "argmax")
    x = torch.tensor([[0.5, 1.0], [0.5, 0.5]]).view(2, 1, 1, 2)
    found = paths(model, x, eps=0.05)
    chosen = torch.tensor([[[1]], [[1]]])
    local = local_slopes(found, chosen)
    assert local[:, 0].sign().tolist() == [1, -1]
    assert (local[:, 0].abs() > 5 * local[:, 1].abs()).all()
    start = restart(found, [1, 1], "local", local=local).aimed()
    assert model.router(start).argmax(1).tolist() == [1, 1]


def test_a_class_that_only_a_targeted_loss_reaches_is_aimed_at(linear_moe: Any):
    # class 1 stays just below the true class 0, class 2 far below it rises with the first pixel and passes it
    weak = [[0.0, 300], [0.0, 299], [1000.0, -250]]
    model = linear_moe([weak, weak], [[0.0, 0], [0, 0]], 1, "argmax")
    found = paths(model, torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2), classes=3)
    assert Ranking.of(found).targets[0, 0].tolist() == [1, 2]
    fields = {"which": torch.tensor([3]), "target": torch.tensor([2])}
    value, _ = restart(found, [0], **fields).objective()(found.search.block.x, torch.tensor([0]))
    shape = torch.tensor([300.0, 299, 250]) / torch.tensor([300.0, 299, 250]).std(correction=0)
    assert value.item() == pytest.approx((shape[2] - shape[0]).item(), rel=1e-4)
    forced_paths(found, 8, 20)
    assert not bool(found.search.unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize(("inside", "times"), [(True, 1 + AGAIN), (False, 1)])
def test_images_that_came_near_to_being_broken_are_met_again_where_paths_are_left_out(
    inside: bool, times: int, linear_moe: Any, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    parameters = {"width": 12, "image_size": 4, "patch_size": 2}
    shape: dict[str, Any] = {"input_shape": (1, 4, 4), "num_classes": 3, "mean": (0.5,), "std": (0.5,)}
    if inside:
        vit = Inside(**shape, expert="vmoe", expert_params=parameters, num_experts=2).build().eval()
        found = paths(vit, torch.rand(2, 1, 4, 4), classes=3, limit=8)
    else:
        found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    assert (found.deviations is not None) == inside
    met = torch.zeros(2, dtype=torch.long)

    def climb(_objective: Any, _start: Tensor, _steps: int, rows: Tensor, *_: Any) -> None:
        met[rows] += 1

    monkeypatch.setattr(found.search, "climb", climb)
    found.search.unbroken[:] = True
    found.search.best = torch.tensor([NEAR + 0.1, NEAR - 0.1])
    monkeypatch.setattr("bench.attacks.restarts.past_decoys", lambda *_: [])
    forced_paths(found, 1000, 1)
    assert met.tolist() == [1000 * times, 1000]

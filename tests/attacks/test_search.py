"""The Auto-PGD that all adaptive attacks share: by hand on one pixel, and step by step as pyautoattack's."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.search import Search, dlr, losses, margin, standardised
from bench.spec import ThreatModel


class Threshold(nn.Module):
    """Class 1 where the pixel is above ½."""

    def forward(self, x: Tensor) -> Tensor:
        m = x.flatten(1)[:, 0] - 0.5
        return torch.stack([-m, m], 1)


def search(values: list[float], y: int = 1, eps: float = 0.2, norm: Any = "Linf", model: Any = None) -> Search:
    model, x = model or Threshold(), torch.tensor(values).view(-1, 1, 1, 1)
    labels = torch.full((len(values),), y)
    correct = model(x).argmax(1) == labels
    counter = PassCounter(model).__enter__()
    return Search(Block(model, x, labels, correct, 2, "planted", ThreatModel(norm=norm, eps=eps), 0, counter))


def down(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    value = -z.flatten(1)[:, 0]
    return value, value > -0.5


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits, y = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]]), torch.tensor([1, 2])
    assert margin(logits, y).tolist() == [-1.0, 4.0]
    assert dlr(logits, y).tolist() == pytest.approx([-1 / 2, 4 / 5])
    found = losses(logits, y)
    assert found[0].tolist() == pytest.approx(
        [-1 / (2 / 3) ** 0.5, torch.tensor([-2.0, 0, -1]).logsumexp(0).item(), -0.5]
    )
    assert torch.allclose(losses(100 * logits, y)[:, [0, 2]], found[:, [0, 2]])  # of any scale, alike
    two, labels = logits[:, :2], torch.tensor([1, 0])
    assert torch.equal(dlr(two, labels), margin(two, labels))
    assert torch.equal(standardised(two), two)


# --- who leaves -------------------------------------------------------------------------------------------------------


def test_a_row_leaves_when_the_deployed_model_is_wrong_on_it():
    s = search([0.55, 0.9, 0.3])
    s.climb(down, s.block.x, 10, s.rows)
    # 0.55 falls; 0.9 can fall to 0.7 alone; 0.3 was wrong from the start, and is not attacked
    assert s.unbroken.tolist() == [False, True, False]
    assert s.x_adv.flatten().tolist() == pytest.approx([0.35, 0.7, 0.3])


def test_the_iterate_that_broke_the_model_is_kept_though_the_next_does_not():
    s, seen = search([0.6]), []

    def back(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(z.item())
        sign = 1 if len(seen) > 1 else -1  # down once, then up for good
        return sign * z.flatten(1)[:, 0], z.flatten(1)[:, 0] < 0.5

    s.climb(back, s.block.x, 5, s.rows)
    assert seen[1] == pytest.approx(0.4)
    assert seen[-1] > 0.5
    assert s.unbroken.tolist() == [False]
    assert s.x_adv.item() == pytest.approx(0.4)


def test_success_is_the_deployed_models_and_not_the_objectives():
    s = search([0.9])
    s.climb(lambda z, rows: (z.flatten(1)[:, 0] + 100, torch.ones(1, dtype=torch.bool)), s.block.x, 10, s.rows)
    assert s.unbroken.tolist() == [True]


def test_the_start_itself_counts():
    s = search([0.6])
    s.climb(down, torch.full((1, 1, 1, 1), 0.45), 0, s.rows)
    assert s.unbroken.tolist() == [False]


@pytest.mark.parametrize("value", [lambda z: z * torch.nan, torch.zeros_like, lambda z: z.detach()])
def test_a_gradient_that_is_missing_or_not_finite_does_not_spoil_the_iterate(value: Any):
    s = search([0.9])
    s.climb(lambda z, rows: (value(z).sum((1, 2, 3)), torch.zeros(1, dtype=torch.bool)), s.block.x, 3, s.rows)
    assert s.x_adv.item() == pytest.approx(0.9)


def test_the_nearest_point_is_remembered():
    s = search([0.9])
    s.climb(down, s.block.x, 5, s.rows)
    s.climb(lambda z, rows: (z.flatten(1)[:, 0], torch.zeros(1, dtype=torch.bool)), s.block.x, 5, s.rows)
    assert s.nearest.item() == pytest.approx(0.7)
    assert s.x_adv.item() > 0.7


# --- steps ------------------------------------------------------------------------------------------------------------


def test_what_is_broken_already_changes_no_draw():
    torch.manual_seed(0)
    first = search([0.9, 0.9, 0.9]).uniform()
    torch.manual_seed(0)
    assert torch.equal(search([0.9, 0.4, 0.9]).uniform()[2], first[2])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_starts_lie_in_the_ball_and_the_box(norm: Any):
    s = search([0.05, 0.5, 0.95], norm=norm)
    start = s.uniform()
    assert ((start - s.block.x).abs() <= 0.2 + 1e-6).all()
    assert ((start >= 0) & (start <= 1)).all()


def test_steps_begin_as_large_as_asked_and_end_far_below_a_thousandth_of_the_radius():
    sizes: list[float] = []

    def flat(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(z.item())
        return -(z.flatten(1)[:, 0] - 0.8).abs(), torch.zeros(1, dtype=torch.bool)

    s = search([0.9])
    s.climb(flat, s.block.x, 100, s.rows, 1 / 32)
    moves = [abs(b - a) for a, b in pairwise(sizes)]
    assert moves[0] == pytest.approx(0.2 / 32, rel=1e-4)
    assert max(moves[-5:]) < 0.2 / 2000


class Recorded(nn.Module):
    """A network that keeps what it was asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.asked = network, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach().clone())
        return self.network(x)


class Right(nn.Module):
    """Always right on the labels of a block, so that no row leaves."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.y, 4).float()


@pytest.mark.parametrize(("norm", "same"), [("Linf", 101), ("L2", 60)])
def test_iterates_are_those_of_pyautoattack(norm: Any, same: int):
    # In L2 the last ones lie on a plateau, where its history of losses, kept in float32, decides by rounding.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).requires_grad_(False).double()
    x, y, eps = torch.rand(6, 3, 4, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1]), 0.1
    theirs, ours = Recorded(network), Recorded(network)
    attack = APGDAttack(theirs, n_iter=100, norm=norm, eps=eps, loss="ce", device="cpu")
    attack.init_hyperparam(x)
    start = (x + 0.01).clamp(0, 1)
    attack.attack_single_run(x, y, x_init=start)

    def objective(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return losses(ours(z), y[rows])[:, 1], torch.zeros_like(rows, dtype=torch.bool)

    right, threat = Right(y), ThreatModel(norm=norm, eps=eps)
    s = Search(Block(right, x, y, torch.ones(6, dtype=torch.bool), 4, "planted", threat, 0, PassCounter(right)))
    s.climb(objective, start, 100, s.rows)
    assert len(ours.asked) == len(theirs.asked) == 101
    for number, (mine, other) in enumerate(zip(ours.asked[:same], theirs.asked[:same], strict=True)):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=f"iterate {number}")
    logits = network(x)
    torch.testing.assert_close(dlr(logits, y), attack.dlr_loss(logits, y))


def test_at_a_tie_the_class_that_is_given_counts():
    s = search([0.5], y=1)  # two equal logits: class 0 comes first
    s.unbroken[:] = True
    s.test(s.block.x, torch.tensor([0]))
    assert s.unbroken.tolist() == [False]


class Root(nn.Module):
    """Class 1 where the sum of the pixels' roots is above ½: at black pixels its gradient is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        m = 0.5 - x.flatten(1).sqrt().sum(1)
        return torch.stack([-m, m], 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_infinite_gradient_is_followed(norm: Any):
    s = search([0.0], model=Root(), norm=norm, eps=0.3)

    def up(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = Root()(z)
        return margin(logits, s.block.y[rows]), logits.argmax(1) != 1

    s.climb(up, s.block.x, 5, s.rows)
    assert not s.unbroken.any()

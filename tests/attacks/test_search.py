"""The climb that all adaptive attacks share: on one pixel, class 1 where it is above ½."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.search import Search, halved, margin
from bench.spec import ThreatModel


class Threshold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        m = x.flatten(1)[:, 0] - 0.5
        return torch.stack([-m, m], 1)


def search(values: list[float], y: int = 1, eps: float = 0.2, norm: Any = "Linf") -> Search:
    model, x = Threshold(), torch.tensor(values).view(-1, 1, 1, 1)
    labels = torch.full((len(values),), y)
    correct = model(x).argmax(1) == labels
    counter = PassCounter(model).__enter__()
    return Search(Block(model, x, labels, correct, 2, "planted", ThreatModel(norm=norm, eps=eps), 0, counter))


def test_margin_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [-1.0, 4.0]


def test_steps_are_a_quarter_of_the_radius_and_then_a_sixteenth():
    assert halved(0.16, 5) == pytest.approx([0.04, 0.04, 0.04, 0.01, 0.01])


def test_a_row_leaves_when_the_deployed_model_is_wrong_on_it():
    s, seen = search([0.55, 0.65, 0.9, 0.3]), []

    def down(z: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return -z.flatten(1)[:, 0]

    s.climb(down, s.block.x, [0.1, 0.1], s.rows)
    # 0.55 falls with the first step, 0.65 with the second; 0.9 stands; 0.3 was wrong from the start
    assert seen == [[0, 1, 2], [1, 2]]
    assert s.standing.tolist() == [False, False, True, False]
    assert s.x_adv.flatten().tolist() == pytest.approx([0.45, 0.45, 0.7, 0.3])


def test_success_is_the_deployed_models_and_not_the_losss():
    s = search([0.9])
    s.climb(lambda z, rows: z.flatten(1)[:, 0] + 100, s.block.x, [0.1] * 3, s.rows)
    assert s.standing.tolist() == [True]


def test_the_start_itself_counts():
    s = search([0.6])
    s.climb(lambda z, rows: z.sum((1, 2, 3)), torch.full((1, 1, 1, 1), 0.45), [], s.rows)
    assert s.standing.tolist() == [False]


def test_a_gradient_that_is_not_finite_does_not_spoil_the_iterate():
    s = search([0.9])
    s.climb(lambda z, rows: (z * torch.nan).sum((1, 2, 3)), s.block.x, [0.1], s.rows)
    assert s.x_adv.item() == pytest.approx(0.9)


def test_who_still_stands_changes_no_draw():
    torch.manual_seed(0)
    all_stand = search([0.9, 0.9, 0.9])
    first = all_stand.uniform()
    torch.manual_seed(0)
    one_fell = search([0.9, 0.4, 0.9])
    assert torch.equal(one_fell.uniform()[2], first[2])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_starts_lie_in_the_ball_and_the_box(norm: Any):
    s = search([0.05, 0.5, 0.95], norm=norm)
    start = s.uniform()
    assert ((start - s.block.x).abs() <= 0.2 + 1e-6).all()
    assert ((start >= 0) & (start <= 1)).all()

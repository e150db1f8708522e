"""Auto-PGD on the deployed model: targets in MALT's order, and a dual's branches reweighed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.deployed import nearest, reweighed
from bench.attacks.search import Search
from bench.models.dual import DualModel
from bench.spec import ThreatModel


def search(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, classes: int = 2) -> Search:
    everywhere, threat = torch.ones(len(x), dtype=torch.bool), ThreatModel(norm="Linf", eps=eps)
    return Search(Block(model, x, y, everywhere, classes, "planted", threat, 0, PassCounter(model)))


def test_targets_come_by_their_linearised_distance(linear_net: Any):
    net = linear_net([[1.0, 0.0], [0.8, 0.1], [0.0, 0.9]])
    x = torch.tensor([[0.5, 0.2]]).view(1, 1, 1, 2)
    # gaps 0.1 − 0.02 = 0.08 over |0.2| + |0.1| = 0.27 away; 0.5 − 0.18 = 0.32 over 1 + 0.9 = 0.17 away
    assert nearest(search(net, x, torch.tensor([0]), classes=3), 2).tolist() == [[2, 1]]


@pytest.mark.parametrize("count", [1, 5])
def test_there_are_no_more_targets_than_wrong_classes(count: int, linear_net: Any):
    net = linear_net([[1.0], [0.5], [0.2]])
    order = nearest(search(net, torch.ones(2, 1, 1, 1), torch.tensor([0, 1]), classes=3), count)
    assert order.shape == (2, min(count, 2))
    assert not (order == torch.tensor([[0], [1]])).any()


def test_a_model_without_gradients_has_targets_all_the_same(linear_net: Any):
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear_net([[1.0], [0.5], [0.2]])(x).detach()

    assert nearest(search(Detached(), torch.ones(1, 1, 1, 1), torch.tensor([0]), classes=3), 2).shape == (1, 2)


@pytest.mark.parametrize(("weight", "broken"), [(0.0, True), (1.0, False)])
def test_a_branch_is_attacked_by_its_weight(linear_net: Any, weight: float, broken: bool):
    # S, which decides, is wrong where the second pixel exceeds the first; R is the surer the higher the second is
    dual = DualModel(linear_net([[0.0, 4], [4.0, 0]]), linear_net([[0.0, -0.1], [0.0, 0]]), 0.5, "logits")
    x = torch.tensor([[0.55, 0.5]]).view(1, 1, 1, 2)
    s = search(dual, x, torch.tensor([1]))
    torch.manual_seed(0)  # whose start is not broken
    reweighed(s, weight, 10)
    assert bool(s.unbroken[0]) is not broken

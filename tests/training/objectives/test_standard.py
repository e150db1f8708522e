"""Clean training: CE(F(x), y)."""

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor, nn

from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.objectives.standard import Standard


def test_loss_by_hand_and_without_an_attack(linear_net: Callable[..., nn.Module]):
    # logits (ln 3, 0) and (0, 0): −ln ¾ and −ln ½
    def noise(salt: str) -> Tensor:
        raise AssertionError(f"clean training asks for no noise, but did for {salt}")

    x = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    net = linear_net([[log(3)], [0.0]])
    (step,) = Standard().steps(net, Batch(x, torch.tensor([0, 1]), ThreatModel(norm="Linf", eps=0.3), noise))
    terms = step.loss(net)
    assert step.part == "model"
    assert {name: term.item() for name, term in terms.items()} == {"ce": pytest.approx((log(4 / 3) + log(2)) / 2)}

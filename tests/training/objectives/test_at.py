"""Adversarial training: CE(F(x'), y)."""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import nn

from bench.spec import ThreatModel
from bench.training.objectives.at import AT
from bench.training.objectives.base import Batch


@pytest.mark.parametrize(
    ("norm", "eps", "difference"),
    [
        ("Linf", 0.1, 0.2),  # x' = (0.4, 0.6)
        ("L2", 0.5**0.5 / 5, 0.2),  # (−1, 1)/√2 · √½/5 = (−0.1, 0.1)
        ("Linf", 0.7, 1.0),  # the box: x' = (0, 1)
    ],
)
def test_loss_on_the_attacked_images_by_hand(
    linear_net: Callable[..., nn.Module], norm: Any, eps: float, difference: float
):
    # logits = pixels (0.5, 0.5), y = 0: CE(x') = ln(1 + e^(x'_1 − x'_0))
    net, x = linear_net([[1.0, 0.0], [0.0, 1.0]]), torch.full((1, 1, 1, 2), 0.5)
    batch = Batch(x, torch.tensor([0]), ThreatModel(norm=norm, eps=eps), lambda salt: torch.zeros_like(x))
    (step,) = AT(inner_steps=10).steps(net, batch)
    terms = step.loss(net)
    assert step.part == "model"
    assert {name: term.item() for name, term in terms.items()} == {"ce": pytest.approx(log(1 + exp(difference)), 1e-4)}
    assert torch.equal(x, torch.full((1, 1, 1, 2), 0.5))


def test_the_loss_runs_the_model_in_train_mode_after_the_attack():
    modes: list[bool] = []
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2)).train()
    net.register_forward_hook(lambda module, *_: modes.append(module.training))
    x, y = torch.rand(4, 1, 1, 2), torch.zeros(4).long()
    batch = Batch(x, y, ThreatModel(norm="Linf", eps=0.1), lambda salt: torch.zeros_like(x))
    (step,) = AT(inner_steps=2).steps(net, batch)
    step.loss(net)
    assert modes == [False, False, True]

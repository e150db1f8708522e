"""Adversarial training of every path, on linear experts, by hand.

The pixels are (a, b, t, 1). Expert i has the logits s_i (a, b), so that for a = b = 0.5, y = 0 and ε = 0.1 every
attack ends at a = 0.4, b = 0.6, and its loss is ln(1 + e^(0.2 s_i)). The router prefers expert 0 for t = 0 and expert 1
for t = 1.
"""

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models.moe import MoE
from bench.spec import ThreatModel
from bench.training.objectives.at_paths import ATPaths
from bench.training.objectives.base import Batch

SCALES = (1.0, 3.0)
EXPERTS = [[[s, 0, 0, 0], [0, s, 0, 0]] for s in SCALES]
ROUTER = [[0, 0, 0, 0.5], [0, 0, 1.0, 0]]
IMAGES = torch.tensor([[0.5, 0.5, 0.0, 1.0], [0.5, 0.5, 1.0, 1.0]]).view(2, 1, 1, 4)
LOSSES = [log(1 + exp(0.2 * s)) for s in SCALES]


def batch(noise: Callable[[str], Tensor] = lambda _: torch.zeros_like(IMAGES)) -> Batch:
    return Batch(IMAGES, torch.zeros(2).long(), ThreatModel(norm="Linf", eps=0.1), noise)


@pytest.mark.parametrize(("paths", "expected"), [("all", sum(LOSSES) / 2), ("worst", LOSSES[1])])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_loss_by_hand(linear_moe: Callable[..., MoE], paths: Any, expected: float, beta: float):
    moe = linear_moe(EXPERTS, ROUTER, 1, "argmax")
    (step,) = ATPaths(paths=paths, beta=beta).steps(moe, batch())
    found = {name: term.item() for name, term in step.loss(moe).items()}
    assert step.part == "model"
    assert found == {
        "ce": pytest.approx(sum(LOSSES) / 2),  # image 0 goes to expert 0, image 1 to expert 1
        "paths": pytest.approx(beta * expected),
    }


def test_the_worst_path_trains_the_worst_expert_alone_and_all_paths_train_all(linear_moe: Callable[..., MoE]):
    for paths, trained in (("worst", [False, True]), ("all", [True, True])):
        moe = linear_moe(EXPERTS, ROUTER)
        (step,) = ATPaths(paths=paths).steps(moe, batch())
        step.loss(moe)["paths"].backward()
        assert [bool(expert[1].weight.grad.any()) for expert in moe.experts] == trained
        assert moe.router[1].weight.grad is None


def test_every_expert_is_attacked_for_every_image_with_noise_of_its_own_and_in_eval_mode():
    seen: list[list[tuple[bool, int]]] = [[], []]
    experts = [nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in "ab"]
    for calls, expert in zip(seen, experts, strict=True):
        expert.register_forward_hook(lambda m, x, _, calls=calls: calls.append((m.training, len(x[0]))))
    asked: list[str] = []

    def noise(salt: str) -> Tensor:
        asked.append(salt)
        return torch.zeros_like(IMAGES)

    moe = MoE(experts, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 2).train()
    (step,) = ATPaths(inner_steps=3).steps(moe, batch(noise))
    assert asked == ["expert0", "expert1"]
    assert seen == [[(False, 2)] * 3] * 2
    step.loss(moe)
    assert [calls[3] for calls in seen] == [(True, 2)] * 2

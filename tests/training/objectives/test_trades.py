"""TRADES' loss on a linear network, by hand."""

from collections.abc import Callable
from math import cosh, log

import pytest
import torch
from torch import Tensor, nn

from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.objectives.trades import TRADES

NOISE = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)


def terms(net: nn.Module, noise: Tensor = NOISE, **fields: float) -> dict[str, float]:
    x = torch.full((1, 1, 1, 2), 0.5)
    batch = Batch(x, torch.tensor([0]), ThreatModel(norm="Linf", eps=0.1), lambda salt: noise)
    (step,) = TRADES(**fields).steps(net, batch)
    assert step.part == "model"
    return {name: term.item() for name, term in step.loss(net).items()}


@pytest.mark.parametrize("beta", [6.0, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_loss_by_hand(linear_net: Callable[..., nn.Module], beta: float, sign: int):
    # logits 3·(a, b): equal at x, 0.6 apart at the attacked (0.6, 0.4) or (0.4, 0.6); CE = ln 2 on the clean image,
    # KL(½, ½ ‖ softmax of logits d apart) = ln cosh(d/2)
    found = terms(linear_net([[3.0, 0.0], [0.0, 3.0]]), sign * NOISE, beta=beta)
    assert found == {"ce": pytest.approx(log(2)), "kl": pytest.approx(beta * log(cosh(0.3)), rel=1e-4)}


def test_without_the_near_start_there_is_no_gradient(linear_net: Callable[..., nn.Module]):
    assert terms(linear_net([[3.0, 0.0], [0.0, 3.0]]), torch.zeros_like(NOISE))["kl"] == pytest.approx(0, abs=1e-6)


def test_both_sides_of_the_divergence_are_trained(linear_net: Callable[..., nn.Module]):
    net = linear_net([[3.0, 0.0], [0.0, 1.0]])
    x = torch.full((1, 1, 1, 2), 0.5)
    batch = Batch(x, torch.tensor([0]), ThreatModel(norm="Linf", eps=0.1), lambda salt: NOISE)
    (step,) = TRADES().steps(net, batch)
    loss = step.loss(net)["kl"]
    loss.backward()
    # with u = w·x and v = w·x' (difference of the logits), dKL/dw = dKL/du x + dKL/dv x'; p = σ(u), q = σ(v):
    # dKL/dv = q − p and dKL/du = p (1 − p) (u − v), for the first logit
    u, v = 1.5 - 0.5, 3 * 0.6 - 0.4
    p, q = (1 / (1 + torch.tensor(-z).exp().item()) for z in (u, v))
    expected = 6 * (p * (1 - p) * (u - v) * 0.5 + (q - p) * 0.6)
    assert net[1].weight.grad[0, 0].item() == pytest.approx(expected, rel=1e-3)

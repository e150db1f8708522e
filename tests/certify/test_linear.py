"""Bounds of networks: the same function, sound everywhere, and as tight as worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.certify import layers as lowering
from bench.certify.layers import layers
from bench.certify.linear import Bounds, Region
from bench.models.base import Classifier
from bench.models.experts import EXPERTS
from bench.models.routing import AffineRouter, ConvRouter
from bench.spec import ThreatModel

SHAPE = (3, 8, 8)
COLOURS: Any = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "affine":
        return AffineRouter(SHAPE, 4, *COLOURS)
    if name == "conv":
        return ConvRouter(SHAPE, 4, *COLOURS)
    net = Classifier(EXPERTS[name](SHAPE, 5, width=2), *COLOURS)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after a training: statistics and an affine map of its own
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.3, 2)  # type: ignore[union-attr]
            module.weight.data.uniform_(-1, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


NETWORKS = ["affine", "conv", "small_cnn", "resnet10"]
THREATS = [ThreatModel(norm="Linf", eps=0.02), ThreatModel(norm="L2", eps=0.3), ThreatModel(norm="L1", eps=1.0)]


def points(x: Tensor, threat: ThreatModel, count: int) -> Tensor:
    """Points of the ball ∩ [0, 1] around x (B, …), among them far ones: (count, B, …)."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(count, *x.shape, generator=g, dtype=torch.double)
    if threat.norm == "Linf":
        step = threat.eps * noise.sign() * torch.rand(noise.shape, generator=g).round()
    elif threat.norm == "L2":
        step = threat.eps * noise / noise.flatten(2).norm(dim=2)[:, :, None, None, None]
    else:  # all in a few pixels
        flat = (noise.flatten(2) * 4).softmax(2) * noise.flatten(2).sign()
        step = threat.eps * flat.view_as(noise)
    return (x + step).clamp(0, 1)


@pytest.mark.parametrize("matrix", [0, 2**20])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_point_is_bounded_by_what_the_network_says(name: str, matrix: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering, "MAX_MATRIX", matrix)
    net = network(name)
    x = torch.rand(3, *SHAPE)
    outputs = Bounds(layers(net, x.shape[1:]), x, ThreatModel(norm="Linf", eps=1e-12)).outputs
    expected = net.double()(x.double()).detach()
    # the ball's tolerance is 1e-6, so the interval is not quite a point
    torch.testing.assert_close((outputs.low + outputs.high) / 2, expected, atol=1e-4, rtol=1e-4)
    assert (outputs.low <= expected).all()
    assert (expected <= outputs.high).all()


@pytest.mark.slow
@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_in_the_ball_is_out_of_bounds(name: str, threat: ThreatModel):
    net = network(name)
    x = torch.rand(4, *SHAPE)
    x[:2] = x[:2].round()  # black and white: the box cuts the ball
    bounds = Bounds(layers(net, x.shape[1:]), x, threat)
    classes = bounds.outputs.low.shape[1]
    a = torch.randn(1, 6, classes, dtype=torch.double)
    least, steep = bounds.least(a.expand(4, -1, -1)), bounds.lipschitz(a)
    net = net.double()
    z = points(x.double(), threat, 200).flatten(0, 1).requires_grad_()
    values = net(z) @ a[0].T
    for s in range(6):
        (gradient,) = torch.autograd.grad(values[:, s].sum(), z, retain_graph=True)
        norms = Region(z, threat).dual_norm(gradient.flatten(1)[:, None])[:, 0]
        assert (norms.view(200, 4) <= steep[:, s] * (1 + 1e-9)).all()
    assert (values.view(200, 4, 6) >= least - 1e-9).all()
    outputs = net(z).view(200, 4, classes)
    assert (outputs >= bounds.outputs.low - 1e-9).all()
    assert (outputs <= bounds.outputs.high + 1e-9).all()


def test_an_affine_network_is_bounded_exactly():
    net, x = network("affine"), torch.rand(4, *SHAPE)
    threat = THREATS[0]
    weight, bias = lowering.affine_map(net, x.shape[1:])
    low, high = Region(x.double(), threat).low.flatten(1), Region(x.double(), threat).high.flatten(1)
    exact = low @ weight.clamp_min(0).T + high @ weight.clamp_max(0).T + bias
    bounds = Bounds(layers(net, x.shape[1:]), x, threat)
    torch.testing.assert_close(bounds.least(torch.eye(4).double().expand(4, -1, -1)), exact)
    torch.testing.assert_close(bounds.lipschitz(torch.eye(4).double()[None])[0], weight.abs().sum(1))


def test_the_linear_bounds_by_hand(linear_net: Any):
    # h = (a + b, a − b) at a, b = 0.5 ± 0.25; relu(h_1) = h_1 in [0.5, 1.5], h_2 in ±0.5; z = relu(h_1) − relu(h_2)
    first, last = linear_net([[1, 1], [1, -1]]), linear_net([[1, -1]])
    net = nn.Sequential(*first, nn.ReLU(), last[1])
    x = torch.tensor([[[[0.5, 0.5]]]])
    bounds = Bounds(layers(net, x.shape[1:]), x, ThreatModel(norm="Linf", eps=0.25))
    # intervals: 0.5 − 0.5 = 0. The chord: relu(h_2) ≤ (h_2 + 0.5) / 2, so z ≥ a + b − (a − b)/2 − 0.25
    # = a/2 + 3b/2 − 0.25 ≥ 0.5 − 0.25; the least of z is 0.5 at a = b = 0.25.
    one = torch.ones(1, 1, 1, dtype=torch.double)
    assert float(bounds.outputs.low) == pytest.approx(0.0, abs=1e-5)
    assert float(bounds.least(one)) == pytest.approx(0.25, abs=1e-5)
    # from above relu(h_2) ≥ 0, so z ≤ a + b ≤ 1.5, as intervals have it
    assert float(bounds.least(-one)) == pytest.approx(-1.5, abs=1e-5)
    # the derivatives: (1, 1) − (on or off) (1, −1): |1 − {0, 1}| + |1 + {0, 1}| at most 1 + 2
    for sign in (1, -1):
        assert float(bounds.lipschitz(sign * one)) == pytest.approx(3.0, abs=1e-9)
    # L2: 0.5 √(1/4 + 9/4) less than the values at the centre: 0.75 − 0.25·√2.5, above the box's bound
    l2 = Bounds(layers(net, x.shape[1:]), x, ThreatModel(norm="L2", eps=0.25))
    # h_2 is in ±0.25 √2 now, so the chord's constant is 0.25 √2 / 2
    expected = 0.5 * 0.5 + 1.5 * 0.5 - 0.25 * 2**0.5 / 2 - 0.25 * (0.25 + 2.25) ** 0.5
    assert float(l2.least(one)) == pytest.approx(expected, abs=1e-5)


def test_of_intervals_and_linear_bounds_the_tighter_counts(linear_net: Any):
    # z = relu(h), h = a − 0.75 b at a, b = 0.5 ± 0.25, in [−0.3125, 0.5625]: x is the smaller triangle, but 0 holds
    net = nn.Sequential(*linear_net([[1, -0.75]]), nn.ReLU(), linear_net([[1]])[1])
    x = torch.tensor([[[[0.5, 0.5]]]])
    bounds = Bounds(layers(net, x.shape[1:]), x, ThreatModel(norm="Linf", eps=0.25))
    one = torch.ones(1, 1, 1, dtype=torch.double)
    assert float(bounds._carried(bounds._steps, one)) == pytest.approx(-0.3125, abs=1e-5)
    assert float(bounds.least(one)) == pytest.approx(0.0, abs=1e-5)
    # a − 1.25 b is in [−0.5625, 0.3125], where 0 is the smaller triangle
    net = nn.Sequential(*linear_net([[1, -1.25]]), nn.ReLU(), linear_net([[1]])[1])
    bounds = Bounds(layers(net, x.shape[1:]), x, ThreatModel(norm="Linf", eps=0.25))
    assert float(bounds._carried(bounds._steps, one)) == pytest.approx(0.0, abs=1e-5)

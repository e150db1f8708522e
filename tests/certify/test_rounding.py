"""Rounding margins: by hand, and against what float32, bfloat16 and float16 really lose."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bench.certify.layers import read
from bench.certify.rounding import Arithmetic, margins

FLOAT32 = Arithmetic.of()
U, TINY = 2.0**-24, 2.0**-126


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def test_the_formats_are_the_coarsest_of_those_that_are_used():
    assert Arithmetic(U, TINY, float(torch.finfo(torch.float32).max)) == FLOAT32
    assert Arithmetic.of(torch.float64) == FLOAT32  # logits are compared in float32
    assert Arithmetic.of(torch.float16) == Arithmetic(2.0**-11, 2.0**-14, 65504.0)
    assert Arithmetic.of(torch.bfloat16, torch.float64).unit == 2.0**-8
    assert Arithmetic.used(nn.Linear(2, 2).half(), torch.ones(1)).unit == 2.0**-11
    assert FLOAT32.gamma(1000) == gamma(1000)
    assert Arithmetic.of(torch.bfloat16).gamma(129) == torch.inf  # n u above ½: nothing is known


def only(net: nn.Module, size: Tensor, **options: Any) -> float:
    (found,) = margins(read(net.eval()), size, FLOAT32, **options).flatten().tolist()
    return found


def test_what_cancels_counts_in_full_and_so_does_every_addition(linear_net: Any):
    # |−1| 0.5 + |2| 1 + |−1| = 3.5 and 1.5 + 4 + 0.5 = 6, as they leave a ReLU; together 9.5, whatever the outputs are;
    # two products, a bias and a cast make four roundings in a row, each time; four more are everybody's
    first, last = nn.Linear(2, 2), linear_net([[1, -1]])
    first.weight.data, first.bias.data = torch.tensor([[-1.0, 2.0], [3.0, 4.0]]), torch.tensor([-1.0, 0.5])
    size = torch.tensor([[[[0.5, 1.0]]]])
    for net in (nn.Sequential(nn.Flatten(), first, nn.ReLU(), last), nn.Sequential(nn.Flatten(), first, last)):
        assert only(net, size) == pytest.approx(9.5 * gamma(4 + 4 + 4), rel=1e-9)
    # BatchNorm: (x − 5) · 2 + 10 is 2x: 2 (1 + 5) + 10
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.running_mean, norm.running_var = torch.tensor([5.0]), torch.tensor([1.0])
    norm.weight.data, norm.bias.data = torch.tensor([2.0]), torch.tensor([10.0])
    assert only(norm, torch.ones(1, 1, 1, 1)) == pytest.approx(22 * gamma(16 + 4), rel=1e-9)
    # a residual block: its input, and of its body, which sees nothing, the last bias; the longer way and the sum
    block = BasicBlock(1, 1).eval()
    for conv in (block.conv1, block.conv2):
        conv.weight.data.zero_()
    block.bn2.bias.data.fill_(-3)
    assert only(block, torch.ones(1, 1, 1, 1)) == pytest.approx(4 * gamma(2 * (9 + 2 + 16) + 1 + 4), rel=1e-9)
    # a mean over 4 × 5 pixels
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert only(pool, torch.ones(1, 1, 4, 5)) == pytest.approx(gamma(20 + 2 + 4), rel=1e-9)


def test_what_is_flushed_to_zero_counts_by_what_later_layers_make_of_it():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight in zip(net[1:], (2e-30, 1e25), strict=True):
        layer.weight.data.fill_(weight)
    size = torch.ones(1, 1, 1, 1)
    # after the first layer: the input, and three roundings' products, sums and weights; after the second 1e25 times
    # that and one more input; twice, for rounding acts on it as well
    lost = 2e-30 * TINY + 3 * TINY * (1 + 2)
    lost = 1e25 * (lost + TINY) + 3 * TINY * (2e-30 + lost + 2)
    assert only(net, size) == pytest.approx(gamma(3 + 3 + 4) * 2e-5 + 2 * (lost + 4 * TINY), rel=1e-6)
    assert only(net, size, experts=9) - only(net, size) <= 2 * 32 * TINY * (1 + 1e-6)
    net[1].weight.data.fill_(2e-45)
    net[2].weight.data.fill_(1e38)
    assert only(net, size) > 1  # the output is 2e-7


def test_what_can_leave_the_finite_range_has_no_margin():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    net[1].weight.data, net[2].weight.data = torch.tensor([[1e38, -1e38]]), torch.tensor([[1e-38]])
    assert only(net, torch.ones(1, 1, 1, 2)) == torch.inf
    net[1].weight.data *= 0.01
    assert only(net, torch.ones(1, 1, 1, 2)) < 1
    net[2].weight.data.zero_()  # nor where a later layer makes zero of it
    net[1].weight.data *= 1000
    assert only(net, torch.ones(1, 1, 1, 2)) == torch.inf
    block = BasicBlock(1, 1).eval()
    block.bn2.bias.data.fill_(2e38)
    assert only(block, torch.full((1, 1, 1, 1), 2e38)) == torch.inf


@pytest.mark.parametrize("width", [100, 3072, pytest.param(150_528, marks=pytest.mark.slow)])
def test_sums_in_the_worst_order_are_within_the_margin(width: int):
    # one after the other, terms that grow and then cancel: 1e-5 of the terms is too little from some thousands on
    weight = torch.linspace(1, 2, width)
    weight[width // 2 :] *= -1
    net = nn.Linear(width, 1, bias=False)
    net.weight.data = weight[None]
    x = torch.rand(20, width, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(20)
    for column in (x * weight).T:
        total += column
    error = (total.double() - x.double() @ weight.double()).abs()
    allowed = margins(read(net), x, FLOAT32)[:, 0]
    assert (error <= allowed).all()
    assert allowed.max() <= gamma(width + 6) * float((x.double() @ weight.double().abs()).max()) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_margin(dtype: torch.dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    x = torch.rand(500, 1, 4, 4).to(dtype)
    with torch.no_grad():
        error = (net(x).double() - net.double()(x.double())).abs()
    allowed = margins(read(net), x, Arithmetic.of(dtype))
    assert (error <= allowed).all()
    assert (error > margins(read(net), x, FLOAT32)).any()
    assert (margins(read(nn.Linear(20_000, 1)), torch.rand(1, 20_000), Arithmetic.of(dtype)) == torch.inf).all()


def test_a_probabilitys_margin_grows_with_the_classes():
    assert FLOAT32.of_probabilities(10, 4) == 2 * gamma(128)
    logits = 5 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    error = (logits.log_softmax(1).exp().double() - logits.double().softmax(1)).abs()
    assert error.max() < FLOAT32.of_probabilities(1000)

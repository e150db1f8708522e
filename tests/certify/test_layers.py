"""Which layers are known, and how they are read: as `forward` runs them, or not at all."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bench.certify.layers import NotSupported, affine_map, evaluate, layers, read
from bench.models.base import Normalize
from bench.models.experts import EXPERTS

SHAPE = (3, 8, 8)
COLOURS: Any = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def shared_relu() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 5), relu, nn.Linear(5, 5)
    )


def three_times() -> nn.Module:
    linear = nn.Linear(192, 192)
    return nn.Sequential(nn.Flatten(), linear, linear, linear)


def padded(mode: Any) -> nn.Module:
    conv = nn.Conv2d(3, 4, (3, 5), padding=(1, 2), stride=(1, 2), dilation=(2, 1), padding_mode=mode)
    return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 3, padding="same", padding_mode=mode), nn.Flatten())


def changed_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    norm.running_mean, norm.affine = torch.tensor([0.5, 0.4, 0.3]), False  # forward does not look at `affine`
    return nn.Sequential(norm, nn.Flatten())


def downsampled() -> nn.Module:
    block = BasicBlock(3, 3)
    block.downsample = nn.Sequential(block.bn1, block.relu)
    return nn.Sequential(block, block, nn.Flatten())


@pytest.mark.parametrize("made", [
    shared_relu, three_times, changed_norm, downsampled,
    *(lambda mode=mode: padded(mode) for mode in ("zeros", "reflect", "replicate", "circular")),
])  # fmt: skip
def test_a_network_is_read_as_forward_runs_it(made: Any):
    torch.manual_seed(0)
    net, x = made().eval().double(), 4 * torch.rand(5, *SHAPE).double() - 1
    with torch.no_grad():
        expected = net(x.clone())
    torch.testing.assert_close(evaluate(read(net), x), expected)
    torch.testing.assert_close(evaluate(layers(net, x.shape[1:]), x), expected)


def test_a_layer_that_is_applied_three_times_is_a_map_to_the_third_power():
    net = three_times()
    weight, bias = affine_map(net, torch.Size(SHAPE))
    once, shift = net[1].weight.detach().double(), net[1].bias.detach().double()
    torch.testing.assert_close(weight, once @ once @ once)
    torch.testing.assert_close(bias, once @ (once @ shift + shift) + shift)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(net: nn.Module) -> nn.Module:
    net.register_forward_pre_hook(lambda *_: None)
    return net


def overridden(net: nn.Module) -> nn.Module:
    net.forward = lambda x: x  # type: ignore[method-assign]
    return net


def compiled(net: nn.Module) -> nn.Module:
    net._compiled_call_impl = lambda x: x
    return net


def begun_in_place() -> nn.Module:
    block = BasicBlock(3, 3).eval()
    block.conv1 = nn.Sequential(nn.ReLU(inplace=True), block.conv1)  # the shortcut would see its output
    return block


def negative_variance() -> nn.Module:
    norm = nn.BatchNorm2d(2).eval()
    norm.running_var = torch.tensor([1.0, -1e-6])
    return norm


def odd_weight() -> nn.Module:
    class Odd(nn.Parameter):
        pass

    net = nn.Linear(2, 2)
    net.weight = Odd(net.weight.data)
    return net


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        (nn.GELU(), "GELU"),
        (nn.GroupNorm(1, 2), "GroupNorm"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (Scaled(2, 2), "Scaled"),
        (hooked(nn.Linear(2, 2)), "Linear with hooks"),
        (hooked(nn.Sequential(nn.Linear(2, 2))), "Sequential with hooks"),
        (overridden(nn.Linear(2, 2)), "Linear with its own forward"),
        (overridden(nn.Sequential(nn.Linear(2, 2))), "Sequential with its own forward"),
        (compiled(nn.Linear(2, 2)), "Linear, compiled"),
        (begun_in_place(), "BasicBlock that begins with ReLU"),
        (nn.BatchNorm2d(2).train(), "BatchNorm2d in training mode"),
        (negative_variance(), "BatchNorm2d with a variance that is not positive"),
        (Normalize((0.5,), (0.0,)), "Normalize with a standard deviation of 0"),
        (odd_weight(), "weights of Odd, torch.float32"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "ParametrizedLinear"),
        (nn.BatchNorm2d(2, track_running_stats=False), "BatchNorm2d without running statistics"),
        (nn.AdaptiveAvgPool2d(2), "AdaptiveAvgPool2d to 2"),
        (nn.Flatten(2), "Flatten from 2 to -1"),
        (EXPERTS["vit_mini"]((3, 16, 16), 5, image_size=16, width=6), "ResizedViT"),
        (EXPERTS["small_cnn"](SHAPE, 5, norm="group"), "GroupNorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_by_its_exact_class_is_named(part: nn.Module, wanted: str):
    with pytest.raises(NotSupported, match=f"^{wanted}$"):
        layers(nn.Sequential(Normalize(*COLOURS), part), torch.Size(SHAPE))


def test_hooks_on_all_modules_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(NotSupported, match="Linear with hooks"):
            read(nn.Linear(2, 2))
    finally:
        handle.remove()

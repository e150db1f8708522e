"""The contract of every expert network; each is tested by being registered."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.experts import EXPERTS, Shape, build_expert, expert_label
from bench.training.recipes import train_spec

#: the input shape and the parameters that make a quick one; for an expert that is not here its own defaults at 32 px
TINY: dict[str, tuple[Shape, dict[str, Any]]] = {
    "small_cnn": ((1, 8, 8), {"width": 4}),
    "resnet10": ((3, 16, 16), {"width": 4}),
    "resnet18": ((3, 64, 64), {"width": 4}),
    "vit_small": ((3, 24, 24), {"image_size": 32, "patch_size": 16, "width": 24}),
    "vit_mini": ((3, 16, 16), {"image_size": 16, "patch_size": 8, "width": 12}),
}


def tiny(name: str) -> tuple[nn.Module, Shape]:
    shape, params = TINY.get(name, ((3, 32, 32), {}))
    torch.manual_seed(0)
    return build_expert(name, shape, 7, params), shape


@pytest.mark.parametrize("name", list(EXPERTS))
def test_gives_finite_logits_that_vary_with_the_image(name: str):
    net, shape = tiny(name)
    logits = net.eval()(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 1e-4


@pytest.mark.parametrize("name", list(EXPERTS))
def test_a_row_does_not_depend_on_the_others_in_eval_mode(name: str):
    net, shape = tiny(name)
    x = torch.randn(5, *shape)
    net.train()(x)  # so that the running statistics are not their initial ones
    whole = net.eval()(x)
    torch.testing.assert_close(torch.cat([net(row[None]) for row in x]), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x.flip(0)).flip(0), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(EXPERTS))
def test_every_parameter_and_every_pixel_gets_a_gradient(name: str):
    net, shape = tiny(name)
    x = torch.randn(4, *shape, requires_grad=True)
    net(x).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (x.grad != 0).all()


@pytest.mark.parametrize("name", list(EXPERTS))
def test_a_parameter_that_it_has_not_is_refused_with_the_nearest(name: str):
    with pytest.raises(UnusableInput, match=rf"^expert '{name}' has no parameter 'widht': did you mean 'width'\?$"):
        build_expert(name, (3, 32, 32), 10, {"widht": 8})


def test_an_unknown_expert_is_refused_with_the_nearest():
    with pytest.raises(UnusableInput, match=r"^unknown expert 'resnet81': did you mean 'resnet18'\?$"):
        build_expert("resnet81", (3, 32, 32), 10, {})


def test_width_scales_the_network():
    narrow, wide = (build_expert("small_cnn", (1, 8, 8), 10, {"width": width}) for width in (3, 6))
    assert (narrow[0].out_channels, wide[0].out_channels) == (3, 6)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("resnet18", (3, 32, 32), 10, 11_173_962),  # the usual ResNet18 with the CIFAR stem
        ("vit_small", (3, 64, 64), 1000, 22_050_664),  # DeiT-small/16 at 224 px
    ],
)
def test_the_papers_experts_have_the_published_size(name: str, shape: Shape, classes: int, count: int):
    net = build_expert(name, shape, classes, {})
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(("side", "stride"), [(16, 1), (32, 1), (64, 2)])
def test_a_resnet_halves_images_above_32_pixels(side: int, stride: int):
    net = build_expert("resnet10", (3, side, side), 10, {"width": 4})
    assert net[0].stride == (stride, stride)
    assert not any(isinstance(module, nn.MaxPool2d) for module in net)


@pytest.mark.parametrize("name", list(EXPERTS))
@pytest.mark.parametrize("side", [8, 32, 64])
def test_an_expert_trains_on_a_single_image(name: str, side: int):
    # a router may leave an expert no more of a batch, and batch norm needs two values a channel
    _, params = TINY[name]
    net = build_expert(name, (3, side, side), 7, params).train()
    net(torch.randn(1, 3, side, side)).sum().backward()


def test_a_vit_resizes_native_pixels_bilinearly_inside():
    net = build_expert("vit_mini", (3, 8, 8), 10, {"image_size": 16, "patch_size": 8, "width": 12}).eval()
    x = torch.rand(2, 3, 8, 8)
    large = nn.functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x), net(large))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"image_size": 64, "patch_size": 7}, "image_size 64 must be a multiple of patch_size 7"),
        ({"width": 100}, "width 100 must be a multiple of 3, the ViT's number of heads"),
    ],
)
def test_a_vit_that_does_not_divide_is_refused(params: dict[str, int], expected: str):
    with pytest.raises(UnusableInput, match=f"^{expected}$"):
        build_expert("vit_mini", (3, 64, 64), 10, params)


def test_labels_as_boards_show_them():
    assert expert_label("small_cnn", {}) == "small_cnn"
    assert expert_label("resnet10", {"width": 16}) == "resnet10-w16"
    assert expert_label("vit_mini", {"patch_size": 8, "image_size": 64}) == "vit_mini-i64-p8"
    assert expert_label("small_cnn", {"norm": "group"}) == "small_cnn-group"
    assert expert_label("resnet10", {"width": 16, "norm": "group"}) == "resnet10-group-w16"


# --- normalisation ----------------------------------------------------------------------------------------------------

NORMALISED = [name for name in EXPERTS if "norm" in inspect.signature(EXPERTS[name]).parameters]


def normalised(name: str, norm: str) -> tuple[nn.Module, Tensor]:
    shape, params = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_expert(name, shape, 7, {**params, "norm": norm}).train(), torch.randn(4, *shape)


@pytest.mark.parametrize("name", NORMALISED)
def test_with_group_norm_a_row_does_not_depend_on_the_others_even_in_train_mode(name: str):
    for norm, alone in [("group", True), ("batch", False)]:
        net, x = normalised(name, norm)
        kinds = {type(module) for module in net.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
        assert kinds == {nn.GroupNorm if alone else nn.BatchNorm2d}
        assert any("running" in key for key in net.state_dict()) != alone
        whole, part = net(x), net(x[:2])
        assert torch.allclose(whole[:2], part, atol=1e-5) == alone


def test_the_groups_divide_the_channels():
    # up to eight: gcd(8, 12) = 4, gcd(8, 24) = 8
    net = build_expert("small_cnn", (1, 8, 8), 10, {"width": 12, "norm": "group"})
    assert [module.num_groups for module in net if isinstance(module, nn.GroupNorm)] == [4, 8]


def test_a_normalisation_that_is_not_there_is_refused():
    digits = open_dataset("digits")
    with pytest.raises(UnusableInput, match=r"^recipe 'digits': norm: Input should be 'batch' or 'group' .*'layer'"):
        train_spec("moe-at", digits, digits.threat_model, settings={"norm": "layer"})
    with pytest.raises(UnusableInput, match=r"^expert 'vit_mini' has no parameter 'norm': "):
        build_expert("vit_mini", (3, 64, 64), 10, {"norm": "group"})

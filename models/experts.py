"""The networks that serve as experts, or alone as dense models; put together from torchvision's and timm's parts.

Each is registered in `EXPERTS` as a function of (input_shape, num_classes) and its own keyword parameters that returns
an nn.Module from normalised images (B, c, H, W) to logits (B, C). What needs torchvision or timm imports them
itself: they take longer than torch.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from bench.errors import UnusableInput, did_you_mean
from bench.registry import Registry

Shape = tuple[int, int, int]
Norm = Literal["batch", "group"]
EXPERTS: Registry[Callable[..., nn.Module]] = Registry("expert", group="bench.experts")


def build_expert(name: str, input_shape: Shape, num_classes: int, params: Mapping[str, Any]) -> nn.Module:
    """The network called `name`; UnusableInput for an unknown name or a parameter that this network has not."""
    builder = EXPERTS[name]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in params:
        if key not in known:
            raise UnusableInput(f"expert '{name}' has no parameter '{key}': {did_you_mean(key, known)}")
    return builder(input_shape, num_classes, **params)


def expert_label(name: str, params: Mapping[str, Any]) -> str:
    """`resnet10-w16`, `vit_mini-i64-p8`, `small_cnn-group`: the name and what was set, as boards show it."""
    return "-".join([name, *(v if isinstance(v, str) else f"{k[0]}{v}" for k, v in sorted(params.items()))])


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """From a number of channels to their normalisation; group: up to 8 groups, and no statistics of the batch."""
    if norm == "batch":
        return nn.BatchNorm2d
    return lambda channels: nn.GroupNorm(math.gcd(8, channels), channels)


@EXPERTS.register("small_cnn")
def small_cnn(input_shape: Shape, num_classes: int, *, width: int = 12, norm: Norm = "batch") -> nn.Module:
    """Two convolutions and a linear layer, for images of about 8×8."""
    channels, height, side = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        norm_layer(norm)(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        norm_layer(norm)(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * ((height + 1) // 2) * ((side + 1) // 2), num_classes),
    )


def resnet_stage(inplanes: int, planes: int, blocks: int, stride: int, norm: Norm) -> nn.Sequential:
    """Basic blocks from `inplanes` to `planes` channels, the first of which has the stride."""
    from torchvision.models.resnet import BasicBlock, conv1x1

    downsample = None
    if stride != 1 or inplanes != planes:
        downsample = nn.Sequential(conv1x1(inplanes, planes, stride), norm_layer(norm)(planes))
    first = BasicBlock(inplanes, planes, stride, downsample, norm_layer=norm_layer(norm))
    return nn.Sequential(first, *(BasicBlock(planes, planes, norm_layer=norm_layer(norm)) for _ in range(blocks - 1)))


def _resnet(input_shape: Shape, num_classes: int, blocks: int, width: int, norm: Norm) -> nn.Module:
    # The CIFAR stem (3×3, no max-pooling); above 32 px it halves the image, as the ImageNet stem would.
    channels, *sides = input_shape
    first = 1 if sides[0] <= 32 else 2
    stem = nn.Conv2d(channels, width, 3, stride=first, padding=1, bias=False)
    # A map of one pixel is not made: a router may leave an expert one image, and its batch norm one value a channel.
    strides = [2 if min(sides) > first * size else 1 for size in (2, 4, 8)]
    net = nn.Sequential(
        stem,
        norm_layer(norm)(width),
        nn.ReLU(),
        resnet_stage(width, width, blocks, 1, norm),
        resnet_stage(width, 2 * width, blocks, strides[0], norm),
        resnet_stage(2 * width, 4 * width, blocks, strides[1], norm),
        resnet_stage(4 * width, 8 * width, blocks, strides[2], norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@EXPERTS.register("resnet10")
def resnet10(input_shape: Shape, num_classes: int, *, width: int = 16, norm: Norm = "batch") -> nn.Module:
    """ResNet with one basic block a stage; at width 16 it is what a CPU can train."""
    return _resnet(input_shape, num_classes, 1, width, norm)


@EXPERTS.register("resnet18")
def resnet18(input_shape: Shape, num_classes: int, *, width: int = 64, norm: Norm = "batch") -> nn.Module:
    """ResNet18 (He et al. 2016) for 32 and 64 px; the paper's CIFAR-10 expert at width 64."""
    return _resnet(input_shape, num_classes, 2, width, norm)


def vit(
    input_shape: Shape, num_classes: int, depth: int, heads: int, image_size: int, patch_size: int, width: int
) -> nn.Module:
    """A ViT of `depth` blocks; UnusableInput for sizes that do not divide."""
    from bench.models.vit import ResizedViT

    if image_size % patch_size:
        raise UnusableInput(f"image_size {image_size} must be a multiple of patch_size {patch_size}")
    if width % heads:
        raise UnusableInput(f"width {width} must be a multiple of {heads}, the ViT's number of heads")
    return ResizedViT(
        img_size=image_size, patch_size=patch_size, in_chans=input_shape[0], num_classes=num_classes,
        embed_dim=width, depth=depth, num_heads=heads,
    )  # fmt: skip


@EXPERTS.register("vit_small")
def vit_small(
    input_shape: Shape, num_classes: int, *, image_size: int = 224, patch_size: int = 16, width: int = 384
) -> nn.Module:
    """ViT-small/16 at 224 px (Touvron et al. 2021): the paper's Tiny-ImageNet expert."""
    return vit(input_shape, num_classes, 12, 6, image_size, patch_size, width)


@EXPERTS.register("vit_mini")
def vit_mini(
    input_shape: Shape, num_classes: int, *, image_size: int = 64, patch_size: int = 8, width: int = 96
) -> nn.Module:
    """A ViT of four blocks for 64 px, which a CPU can train."""
    return vit(input_shape, num_classes, 4, 3, image_size, patch_size, width)

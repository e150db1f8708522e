"""The networks that serve as experts, or alone as dense models; put together from torchvision's and timm's parts.

Each is registered in `EXPERTS` as a function of (input_shape, num_classes) and its own keyword parameters that returns
an nn.Module from normalised images (B, c, H, W) to logits (B, C).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from bench.registry import Registry, UnusableInput, did_you_mean

Shape = tuple[int, int, int]
EXPERTS: Registry[Callable[..., nn.Module]] = Registry("expert")


def build_expert(name: str, input_shape: Shape, num_classes: int, params: Mapping[str, Any]) -> nn.Module:
    """The network called `name`; UnusableInput for an unknown name or a parameter that this network has not."""
    builder = EXPERTS[name]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in params:
        if key not in known:
            raise UnusableInput(f"expert '{name}' has no parameter '{key}': {did_you_mean(key, known)}")
    return builder(input_shape, num_classes, **params)


def expert_label(name: str, params: Mapping[str, Any]) -> str:
    """`resnet10-w16`, `vit_mini-i64-p8`: the name and what was set, as boards show it."""
    return "-".join([name, *(f"{key[0]}{value}" for key, value in sorted(params.items()))])


@EXPERTS.register("small_cnn")
def small_cnn(input_shape: Shape, num_classes: int, *, width: int = 12) -> nn.Module:
    """Two convolutions and a linear layer, for images of about 8×8."""
    channels, height, side = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * ((height + 1) // 2) * ((side + 1) // 2), num_classes),
    )


def _stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or inplanes != planes:
        downsample = nn.Sequential(conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
    first = BasicBlock(inplanes, planes, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def _resnet(input_shape: Shape, num_classes: int, blocks: int, width: int) -> nn.Module:
    # The CIFAR stem (3×3, no max-pooling); above 32 px it halves the image, as the ImageNet stem would.
    stem = nn.Conv2d(input_shape[0], width, 3, stride=1 if input_shape[1] <= 32 else 2, padding=1, bias=False)
    net = nn.Sequential(
        stem,
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _stage(width, width, blocks, 1),
        _stage(width, 2 * width, blocks, 2),
        _stage(2 * width, 4 * width, blocks, 2),
        _stage(4 * width, 8 * width, blocks, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@EXPERTS.register("resnet10")
def resnet10(input_shape: Shape, num_classes: int, *, width: int = 16) -> nn.Module:
    """ResNet with one basic block a stage; at width 16 it is what a CPU can train."""
    return _resnet(input_shape, num_classes, 1, width)


@EXPERTS.register("resnet18")
def resnet18(input_shape: Shape, num_classes: int, *, width: int = 64) -> nn.Module:
    """ResNet18 (He et al. 2016) for 32 and 64 px; the paper's CIFAR-10 expert at width 64."""
    return _resnet(input_shape, num_classes, 2, width)


class ResizedViT(VisionTransformer):  # type: ignore[misc]  # timm has no types
    """timm's ViT behind a bilinear resize to its own image size, so that attacks act on the native pixels."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.patch_embed.img_size
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return super().forward(x)


def _vit(
    input_shape: Shape, num_classes: int, depth: int, heads: int, image_size: int, patch_size: int, width: int
) -> nn.Module:
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
    return _vit(input_shape, num_classes, 12, 6, image_size, patch_size, width)


@EXPERTS.register("vit_mini")
def vit_mini(
    input_shape: Shape, num_classes: int, *, image_size: int = 64, patch_size: int = 8, width: int = 96
) -> nn.Module:
    """A ViT of four blocks for 64 px, which a CPU can train."""
    return _vit(input_shape, num_classes, 4, 3, image_size, patch_size, width)

"""MoE blocks inside a network, and networks that have them: by image or position in a ResNet, by token in a ViT.

Axes: B = batch, T = tokens or positions, N = rows that are routed (B, or B·T), E = experts, K = selected experts,
D = width of a token, c = channels, H, W = height and width of a map.

Every gate is a module of its own, called `gate`, whose output is the scores of the experts: what a forward hook puts in
their place is what the block selects by.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import UnusableInput, did_you_mean
from bench.models.experts import Norm, Shape, norm_layer, resnet_stage, vit
from bench.models.moe import MoE
from bench.models.routing import dispatch, route
from bench.registry import Registry

#: `switch`: E Σ f_i P_i (Fedus et al. 2021, equation 4); `entropy`: ln E − H(P), which Pavlitska et al. (2025) saw keep
#: experts alive where `switch` let the routing collapse. f_i: the share of rows whose best expert is i; P: their mean
#: probabilities.
Balance = Literal["switch", "entropy"]
RouteBy = Literal["image", "position"]


class ImageGate(nn.Module):
    """Mean pooling and a linear layer: (B, c, H, W) → scores (B, E)."""

    def __init__(self, channels: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(dim=(2, 3)))


class PositionGate(nn.Module):
    """A linear layer at each position: (B, c, H, W) → scores (B, H·W, E). `stride`: of the block that it is for."""

    def __init__(self, channels: int, num_experts: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, num_experts, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class SoftGate(nn.Module):
    """(B, T, D) → scores (B, T, E): a learned scale times cosines of token and slot, one slot an expert.

    Puigcerver et al. (2024), section 2.3: without the normalisation the softmaxes collapse as D grows.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(width, num_experts) / math.sqrt(width))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=2) @ (self.scale * F.normalize(self.slots, dim=0))


class SparseMoE(nn.Module):
    """E blocks of which each row uses K: the weighted sum of their outputs, weights as `route` has them for a softmax.

    A row is an image (gate scores (B, E), x (B, …)) or a token (gate scores (B, T, E), x (B, T, D)). There is no limit
    on how many rows an expert takes: under one, an image's logits would depend on the others of its batch.

    Args:
        gate: a module from x to the scores.
        experts: E modules from rows to rows.
        num_selected_experts: K.
        balance: the loss that keeps the experts in use, taken from the gate's scores by whoever trains.

    Raises:
        UnusableInput: K out of 1 … E.
    """

    def __init__(
        self, gate: nn.Module, experts: Iterable[nn.Module], num_selected_experts: int, balance: Balance = "switch"
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        if not 1 <= num_selected_experts <= len(self.experts):
            raise UnusableInput(f"num_selected_experts {num_selected_experts} must be in 1 … {len(self.experts)}")
        self.num_selected_experts = num_selected_experts
        self.balance: Balance = balance

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        axes = scores.dim() - 1  # of x, that number the rows
        trace = route(scores.flatten(0, axes - 1), self.num_selected_experts, "softmax")
        outputs = dispatch(list(self.experts), x.flatten(0, axes - 1), trace.selected_experts)
        weights = trace.combine_weights.gather(1, trace.selected_experts)
        return torch.einsum("nk,nk...->n...", weights, outputs).reshape(*x.shape[:axes], *outputs.shape[2:])


class SparseMoEByPosition(SparseMoE):
    """Each position of a map (B, c, H, W) uses K experts' outputs there; gate scores (B, H'·W', E) of the output's map.

    A convolution needs its neighbours, so every expert computes the whole map: sparse in what is used, not in cost.
    """

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        weights = route(scores.flatten(0, 1), self.num_selected_experts, "softmax").combine_weights.view_as(scores)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # (B, E, c', H', W')
        return torch.einsum("bte,bect->bct", weights, outputs.flatten(3)).view_as(outputs[:, 0])


class SoftMoE(nn.Module):
    """Soft MoE (Puigcerver et al. 2024, Algorithm 1) with one slot an expert: (B, T, D) → (B, T, D).

    A slot is a mixture of all tokens of its image (softmax of the scores over T), an output token one of all slots
    (softmax over E): nothing is chosen, and every expert sees every image.
    """

    def __init__(self, gate: nn.Module, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.num_selected_experts = len(self.experts)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        slots = scores.softmax(dim=1).transpose(1, 2) @ x  # (B, E, D)
        outputs = torch.stack([expert(slots[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return scores.softmax(dim=2) @ outputs


class MoEStage(nn.Module):
    """The last stage of a ResNet: relu(shortcut(x) + MoE(x)), so that a gate's small weight scales no shortcut."""

    def __init__(self, shortcut: nn.Module, moe: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.moe(x))


def trained_gates(model: nn.Module) -> dict[nn.Module, Balance]:
    """The gates in a model whose load is to be balanced, each with its loss: of whole networks' MoEs and of blocks.

    An MoE's with `gate=argmax` is not trained, and a Soft MoE uses all experts alike.
    """
    gates: dict[nn.Module, Balance] = {}
    for module in model.modules():
        if isinstance(module, SparseMoE):
            gates[module.gate] = module.balance
        elif isinstance(module, MoE) and module.gate == "softmax":
            gates[module.router] = "switch"
    return gates


@contextmanager
def watched(gates: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The scores (N, E) that each of the gates gives, from its last call inside; with their gradient."""
    scores: dict[nn.Module, Tensor] = {}

    def keep(gate: nn.Module, _inputs: Any, output: Tensor) -> None:
        scores[gate] = output.flatten(0, -2)

    handles = [gate.register_forward_hook(keep) for gate in gates]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


#: Networks with MoE blocks inside: from (input_shape, num_classes, num_experts, num_selected_experts) and keyword
#: parameters to a module from normalised images (B, c, H, W) to logits (B, C). They are no experts of an MoE, nor a
#: dense model's network: there they would be routes that nobody attacks.
NETWORKS: Registry[Callable[..., nn.Module]] = Registry("network with MoE blocks")


def build_network(
    name: str,
    input_shape: Shape,
    num_classes: int,
    num_experts: int,
    num_selected_experts: int,
    params: Mapping[str, Any],
) -> nn.Module:
    """The network called `name`; UnusableInput for an unknown name or a parameter that this network has not."""
    builder = NETWORKS[name]
    known = parameters_of(name)
    for key in params:
        if key not in known:
            raise UnusableInput(f"'{name}' has no parameter '{key}': {did_you_mean(key, known)}")
    return builder(input_shape, num_classes, num_experts, num_selected_experts, **params)


def parameters_of(name: str) -> list[str]:
    """The keyword parameters of a network with MoE blocks."""
    return [p.name for p in inspect.signature(NETWORKS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]


@NETWORKS.register("blockmoe")
def blockmoe(
    input_shape: Shape,
    num_classes: int,
    num_experts: int = 4,
    num_selected_experts: int = 1,
    *,
    width: int = 16,
    norm: Norm = "batch",
    route_by: RouteBy = "image",
    balance_loss: Balance = "switch",
) -> nn.Module:
    """A ResNet of one basic block a stage whose last stage is a sparse MoE block (Pavlitska et al. 2025).

    Stages halve the map and double the width until the map has 4 pixels a side: two for 8 px, four for 32 and 64.
    """
    from torchvision.models.resnet import conv1x1

    channels, side = input_shape[0], min(input_shape[1:])
    first = 1 if side <= 32 else 2  # the CIFAR stem; above 32 px it halves the image, as the ImageNet stem would
    stem = nn.Conv2d(channels, width, 3, stride=first, padding=1, bias=False)
    stages: list[nn.Module] = [stem, norm_layer(norm)(width), nn.ReLU(), resnet_stage(width, width, 1, 1, norm)]
    side //= first
    while side > 8:
        stages.append(resnet_stage(width, 2 * width, 1, 2, norm))
        side, width = side // 2, 2 * width
    stride = 2 if side > 4 else 1
    experts = [_branch(width, 2 * width, stride, norm) for _ in range(num_experts)]
    if route_by == "image":
        moe = SparseMoE(ImageGate(width, num_experts), experts, num_selected_experts, balance_loss)
    else:
        gate = PositionGate(width, num_experts, stride)
        moe = SparseMoEByPosition(gate, experts, num_selected_experts, balance_loss)
    shortcut = nn.Sequential(conv1x1(width, 2 * width, stride), norm_layer(norm)(2 * width))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes)]
    net = nn.Sequential(*stages, MoEStage(shortcut, moe), *head)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # a gate's has one
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@NETWORKS.register("vmoe")
def vmoe(
    input_shape: Shape,
    num_classes: int,
    num_experts: int = 4,
    num_selected_experts: int = 2,
    *,
    width: int = 96,
    image_size: int = 64,
    patch_size: int = 8,
    balance_loss: Balance = "switch",
) -> nn.Module:
    """A ViT of four blocks whose every second MLP is E MLPs, K of them for each token (Riquelme et al. 2021, V-MoE).

    The chosen probabilities are renormalised over the K, where V-MoE leaves them as they are.
    """

    def moe() -> nn.Module:
        gate = nn.Linear(width, num_experts, bias=False)
        return SparseMoE(gate, _mlps(width, num_experts), num_selected_experts, balance_loss)

    return _every_second_mlp(vit(input_shape, num_classes, 4, 3, image_size, patch_size, width), moe)


@NETWORKS.register("softmoe")
def softmoe(
    input_shape: Shape,
    num_classes: int,
    num_experts: int = 4,
    num_selected_experts: int = 4,
    *,
    width: int = 96,
    image_size: int = 64,
    patch_size: int = 8,
) -> nn.Module:
    """The same ViT with a Soft MoE in every second block (Puigcerver et al. 2024); all experts are always used."""
    if num_selected_experts != num_experts:
        raise UnusableInput(f"a softmoe uses all of its {num_experts} experts: drop num_selected_experts")
    network = vit(input_shape, num_classes, 4, 3, image_size, patch_size, width)
    return _every_second_mlp(network, lambda: SoftMoE(SoftGate(width, num_experts), _mlps(width, num_experts)))


def _branch(inplanes: int, planes: int, stride: int, norm: Norm) -> nn.Sequential:
    """A basic block without its shortcut."""
    from torchvision.models.resnet import conv3x3

    first, second = conv3x3(inplanes, planes, stride), conv3x3(planes, planes)
    return nn.Sequential(first, norm_layer(norm)(planes), nn.ReLU(), second, norm_layer(norm)(planes))


def _mlps(width: int, count: int) -> list[nn.Module]:
    from timm.layers import Mlp

    return [Mlp(width, 4 * width) for _ in range(count)]


def _every_second_mlp(network: Any, build: Callable[[], nn.Module]) -> nn.Module:
    for block in network.blocks[1::2]:
        block.mlp = build()
    return network

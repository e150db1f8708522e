"""A network as the affine maps, ReLUs and residual sums that bounds can be carried through, in double precision.

Only modules of exactly known classes are read, and as their `forward` runs them: `certify.composition` then holds what
was read to the network's own outputs.

Axes: B = batch, S = linear functions that are bounded, E = experts; the shape of one example is (…).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from bench.models.base import Classifier, Normalize
from bench.models.routing import AffineRouter, ConvRouter

#: Elements of a matrix above which an affine layer is not written out.
MAX_MATRIX = 2**20


class NotSupported(Exception):
    """A layer that bounds cannot be carried through; the message is the name of its class."""


@dataclass(frozen=True)
class Affine:
    """x (B, …) → M x + b. `magnitude` is |M|, which carries the radius of an interval.

    roundings: the most that a term of one output goes through, products and additions in the worst order; 0 where
    numbers are only moved. pooled: one more for each pixel, as it is a mean over all. flushed: how many times the
    largest input what flushes to zero may be multiplied with.
    """

    forward: Callable[[Tensor], Tensor]
    magnitude: Callable[[Tensor], Tensor]
    roundings: int
    pooled: bool = False
    flushed: float = 1.0

    def transpose(self, a: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """For functions a (B, S, …) of the output: a M (B, S, *shape), and a b (B, S)."""
        return _pulled_back(self.forward, a, shape)

    def transpose_magnitude(self, a: Tensor, shape: torch.Size) -> Tensor:
        """a |M| (B, S, *shape)."""
        return _pulled_back(self.magnitude, a, shape)[0]


@dataclass(frozen=True)
class Dense:
    """The same with M (outputs, inputs) written out, which is faster where it is small; outputs have `shape`."""

    matrix: Tensor
    bias: Tensor
    shape: torch.Size

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T + self.bias).view(-1, *self.shape)

    def magnitude(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.abs().T).view(-1, *self.shape)

    def transpose(self, a: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        flat = a.flatten(2)
        return (flat @ self.matrix).view(*a.shape[:2], *shape), flat @ self.bias

    def transpose_magnitude(self, a: Tensor, shape: torch.Size) -> Tensor:
        return (a.flatten(2) @ self.matrix.abs()).view(*a.shape[:2], *shape)


@dataclass(frozen=True)
class ReLU:
    """max(x, 0), elementwise."""


@dataclass(frozen=True)
class Residual:
    """body(x) + shortcut(x)."""

    body: "list[Layer]"
    shortcut: "list[Layer]"


Layer = Affine | Dense | ReLU | Residual


def layers(module: nn.Module, shape: torch.Size) -> list[Layer]:
    """The layers of a network in eval mode on images of `shape`, in order, affine ones in a row as one where small.

    NotSupported for a layer that is not known by its exact class: a subclass may compute something else than its base.
    """
    return joined(read(module), shape)


def read(module: nn.Module) -> list[Layer]:
    """The layers of a network in eval mode, in order, one for each step of its forward pass; NotSupported as above."""
    kind: Any = type(module)
    reader = _KNOWN.get(kind) or (_block if kind is _basic_block() else None)
    if reader is None:
        raise NotSupported(kind.__name__)
    check_untouched(module)
    return reader(module)


def joined(parts: list[Layer], shape: torch.Size) -> list[Layer]:
    """The same function of images of `shape`, with affine layers in a row as one where that is small."""
    return _joined(parts, shape)[0]


def evaluate(parts: Sequence[Layer], x: Tensor) -> Tensor:
    """What the layers make of x (B, …), float64."""
    for layer in parts:
        if isinstance(layer, Residual):
            x = evaluate(layer.body, x) + evaluate(layer.shortcut, x)
        else:
            x = x.clamp_min(0) if isinstance(layer, ReLU) else layer.forward(x)
    return x


def check_untouched(module: nn.Module) -> None:
    """NotSupported for a module that may compute something else than its class: by hooks, or methods of its own."""
    name = type(module).__name__
    everywhere = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
    if module._forward_hooks or module._forward_pre_hooks or any(everywhere) or hasattr(module, "parametrizations"):
        raise NotSupported(f"{name} with hooks")
    if vars(module).get("_compiled_call_impl") is not None:
        raise NotSupported(f"{name}, compiled")
    if own := [key for key in vars(module) if callable(getattr(type(module), key, None))]:
        raise NotSupported(f"{name} with its own {', '.join(own)}")


def affine_map(module: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(W (E, D), b (E,)), float64, of a network of affine layers alone on images of `shape`; else NotSupported."""
    found = read(module)
    if not all(isinstance(layer, Affine) for layer in found):
        raise NotSupported(f"{type(module).__name__}, which is not affine")
    dense = _dense(found, shape)
    return dense.matrix, dense.bias


def _pulled_back(function: Callable[[Tensor], Tensor], a: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    flat = a.flatten(0, 1)
    output, pull, *_ = torch.func.vjp(function, torch.zeros(len(flat), *shape, dtype=a.dtype))
    return pull(flat)[0].view(*a.shape[:2], *shape), (output * flat).flatten(1).sum(1).view(a.shape[:2])


def _joined(parts: list[Layer], shape: torch.Size) -> tuple[list[Layer], torch.Size]:
    """The same function of images of `shape`, and the shape of its outputs."""
    found: list[Layer] = []
    for affine, group in groupby(parts, key=_is_affine):
        run = list(group)
        if affine:
            outputs = _through(run, torch.zeros(1, *shape, dtype=torch.double)).shape[1:]
            found += [_dense(run, shape)] if shape.numel() * outputs.numel() <= MAX_MATRIX else run
            shape = outputs
            continue
        for layer in run:
            if isinstance(layer, Residual):
                (body, outputs), (shortcut, _) = _joined(layer.body, shape), _joined(layer.shortcut, shape)
                layer, shape = Residual(body, shortcut), outputs
            found.append(layer)
    return found, shape


def _is_affine(layer: Layer) -> bool:
    return isinstance(layer, Affine)


def _through(run: Sequence[Any], x: Tensor) -> Tensor:
    for layer in run:
        x = layer.forward(x)
    return x


def _dense(run: Sequence[Layer], shape: torch.Size) -> Dense:
    """A run of affine layers as one matrix."""
    output = _through(run, torch.zeros(1, *shape, dtype=torch.double))
    one = torch.eye(output.numel(), dtype=torch.double).view(1, -1, *output.shape[1:])
    weight, _ = _pulled_back(lambda x: _through(run, x), one, shape)
    return Dense(weight[0].flatten(1), output[0].flatten(), output.shape[1:])


def _double(value: Tensor | None) -> Tensor | None:
    """A weight, exactly; NotSupported for a tensor whose class or layout may make something else of it."""
    if value is None:
        return None
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or not value.is_floating_point():
        raise NotSupported(f"weights of {type(value).__name__}, {value.dtype}")
    return value.detach().cpu().double()


def _tensor(value: Tensor) -> Tensor:
    found = _double(value)
    assert found is not None
    return found


def _linear(module: Any) -> list[Layer]:
    weight, bias = _tensor(module.weight), _double(module.bias)
    return [Affine(lambda x: F.linear(x, weight, bias), lambda x: F.linear(x, weight.abs()), weight.shape[1] + 2)]


def _conv(module: Any) -> list[Layer]:
    weight, bias = _tensor(module.weight), _double(module.bias)

    def run(x: Tensor, kernel: Tensor, shift: Tensor | None) -> Tensor:  # the class's own way, with its padding
        return nn.Conv2d._conv_forward(module, x, kernel, shift)

    return [Affine(lambda x: run(x, weight, bias), lambda x: run(x, weight.abs(), None), weight[0].numel() + 2)]


def _scale(scale: Tensor, shift: Tensor, roundings: int, flushed: float = 1.0) -> list[Layer]:
    """Channel by channel: scale and shift are (1, c, 1, 1)."""
    return [Affine(lambda x: x * scale + shift, lambda x: x * scale.abs(), roundings, flushed=flushed)]


def _batch_norm(module: Any) -> list[Layer]:
    mean, var = _double(module.running_mean), _double(module.running_var)
    if mean is None or var is None:
        raise NotSupported("BatchNorm2d without running statistics")
    if module.training:
        raise NotSupported("BatchNorm2d in training mode")
    limits = torch.finfo(module.running_var.dtype)
    if module.eps < 0 or not bool(((var >= 0) & (var + module.eps >= 2 * limits.tiny)).all()):
        raise NotSupported("BatchNorm2d with a variance that is not positive")
    weight, bias = _double(module.weight), _double(module.bias)
    scale = (var + module.eps).rsqrt()
    weight = torch.ones_like(scale) if weight is None else weight
    bias = torch.zeros_like(scale) if bias is None else bias
    if not bool(((scale * weight).abs() <= limits.max / 2).all()):  # kernels multiply these first
        raise NotSupported("BatchNorm2d, whose scale can leave the finite range of its number format")
    mean, scale, weight, bias = (part.view(1, -1, 1, 1) for part in (mean, scale, weight, bias))
    # eps and the variance, root, reciprocal, and the products and sums of either order: at most 8 each. Two steps, so
    # that a mean and a bias that cancel both count among the terms; where scale · weight is flushed to zero, the inputs
    # before the scale are multiplied with what is lost
    flushed = max(1.0, float(1 / scale.min()))
    return [*_scale(scale, -mean * scale, 8), *_scale(weight, bias, 8, flushed)]


def _normalize(module: Normalize) -> list[Layer]:
    mean, std = (_tensor(module.get_buffer(name)) for name in ("mean", "std"))
    if not bool((std.abs() >= 2 * torch.finfo(module.get_buffer("std").dtype).tiny).all()):
        raise NotSupported("Normalize with a standard deviation of 0")
    return _scale(1 / std, -mean / std, 4)


def _pool(module: Any) -> list[Layer]:
    if module.output_size not in (1, (1, 1)):
        raise NotSupported(f"AdaptiveAvgPool2d to {module.output_size}")

    def mean(x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    return [Affine(mean, mean, 2, pooled=True)]


def _flatten(module: Any) -> list[Layer]:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise NotSupported(f"Flatten from {module.start_dim} to {module.end_dim}")
    return [Affine(lambda x: x.flatten(1), lambda x: x.flatten(1), 0)]


def _basic_block() -> type[nn.Module] | None:
    """torchvision's BasicBlock; None where nobody has imported torchvision, which is slow, so that no module is one."""
    resnet = sys.modules.get("torchvision.models.resnet")
    return None if resnet is None else resnet.BasicBlock


def _block(module: Any) -> list[Layer]:
    shortcut = [] if module.downsample is None else read(module.downsample)
    body = [layer for part in (module.conv1, module.bn1, module.relu, module.conv2, module.bn2) for layer in read(part)]
    # the shortcut sees the block's input after the body has: a body that begins in place would have changed it
    first = next((part for part in module.conv1.modules() if not list(part.children())), None)
    if type(first) is not nn.Conv2d:
        raise NotSupported(f"BasicBlock that begins with {type(first).__name__}")
    return [Residual(body, shortcut), *read(module.relu)]


def _chain(*names: str) -> Callable[[nn.Module], list[Layer]]:
    """The named parts, one after the other."""
    return lambda module: [layer for name in names for layer in read(module.get_submodule(name))]


_KNOWN: dict[type[nn.Module], Callable[[Any], list[Layer]]] = {
    # as `forward` iterates: `children()` leaves out a module that comes again
    nn.Sequential: lambda module: [layer for part in module for layer in read(part)],
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda _: [ReLU()],
    nn.AdaptiveAvgPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Identity: lambda _: [],
    Normalize: _normalize,
    Classifier: _chain("normalize", "backbone"),
    ConvRouter: _chain("normalize", "features", "linear"),
    AffineRouter: lambda module: [*read(module.normalize), *_flatten(nn.Flatten()), *read(module.linear)],
}

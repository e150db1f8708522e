"""A network as the affine maps, ReLUs and residual sums that bounds can be carried through, in double precision.

Axes: B = batch, S = linear functions that are bounded, E = experts; the shape of one example is (…).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bench.models.base import Classifier, Normalize
from bench.models.routing import AffineRouter, ConvRouter

#: Elements of a matrix above which an affine layer is not written out.
MAX_MATRIX = 2**20


class NotSupported(Exception):
    """A layer that bounds cannot be carried through; the message is the name of its class."""


@dataclass(frozen=True)
class Affine:
    """x (B, …) → M x + b. `magnitude` is |M|, which carries the radius of an interval."""

    forward: Callable[[Tensor], Tensor]
    magnitude: Callable[[Tensor], Tensor]

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
    return _joined(_parts(module), shape)[0]


def check_untouched(module: nn.Module) -> None:
    """NotSupported for a module that may compute something else than its class: by hooks, or methods of its own."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
        raise NotSupported(f"{name} with hooks")
    if own := [key for key in vars(module) if callable(getattr(type(module), key, None))]:
        raise NotSupported(f"{name} with its own {', '.join(own)}")


def terms(module: nn.Module, size: Tensor) -> Tensor:
    """Of what magnitude (B, C) the terms are that each output is summed from, for inputs of magnitude `size` (B, …).

    |M| size + |b| layer after layer, as a network in single precision computes them: what cancels in its outputs, or
    where affine layers are joined, counts in full, so that rounding is at most a small multiple of it.
    """
    return _terms(_parts(module), size.detach().cpu().double())


def affine_map(module: nn.Module, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(W (E, D), b (E,)), float64, of a network of affine layers alone on images of `shape`; else NotSupported."""
    found = _parts(module)
    if not all(isinstance(layer, Affine) for layer in found):
        raise NotSupported(f"{type(module).__name__}, which is not affine")
    dense = _dense(found, shape)
    return dense.matrix, dense.bias


def _pulled_back(function: Callable[[Tensor], Tensor], a: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    flat = a.flatten(0, 1)
    output, pull, *_ = torch.func.vjp(function, torch.zeros(len(flat), *shape, dtype=a.dtype))
    return pull(flat)[0].view(*a.shape[:2], *shape), (output * flat).flatten(1).sum(1).view(a.shape[:2])


def _parts(module: nn.Module) -> list[Layer]:
    kind: Any = type(module)
    if kind not in _KNOWN:
        raise NotSupported(kind.__name__)
    check_untouched(module)
    return _KNOWN[kind](module)


def _terms(parts: Sequence[Layer], size: Tensor) -> Tensor:
    for layer in parts:
        if isinstance(layer, Residual):
            size = _terms(layer.body, size) + _terms(layer.shortcut, size)
        elif isinstance(layer, Affine):
            size = layer.magnitude(size) + layer.forward(torch.zeros_like(size[:1])).abs()
    return size


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
    return None if value is None else value.detach().cpu().double()


def _linear(module: Any) -> list[Layer]:
    weight, bias = module.weight.detach().cpu().double(), _double(module.bias)
    return [Affine(lambda x: F.linear(x, weight, bias), lambda x: F.linear(x, weight.abs()))]


def _conv(module: Any) -> list[Layer]:
    if module.padding_mode != "zeros":
        raise NotSupported(f"Conv2d with padding_mode={module.padding_mode}")
    weight, bias = module.weight.detach().cpu().double(), _double(module.bias)
    how = (module.stride, module.padding, module.dilation, module.groups)
    return [Affine(lambda x: F.conv2d(x, weight, bias, *how), lambda x: F.conv2d(x, weight.abs(), None, *how))]


def _scale(scale: Tensor, shift: Tensor) -> list[Layer]:
    """Channel by channel: scale and shift are (1, c, 1, 1)."""
    return [Affine(lambda x: x * scale + shift, lambda x: x * scale.abs())]


def _batch_norm(module: Any) -> list[Layer]:
    mean, var = _double(module.running_mean), _double(module.running_var)
    if mean is None or var is None:
        raise NotSupported("BatchNorm2d without running statistics")
    scale = (var + module.eps).rsqrt()
    found = _scale(scale.view(1, -1, 1, 1), (-mean * scale).view(1, -1, 1, 1))
    if module.affine:  # a step of its own, so that a mean and a bias that cancel both count in `terms`
        weight, bias = (part.detach().cpu().double().view(1, -1, 1, 1) for part in (module.weight, module.bias))
        found += _scale(weight, bias)
    return found


def _normalize(module: Normalize) -> list[Layer]:
    mean, std = (module.get_buffer(name).detach().cpu().double() for name in ("mean", "std"))
    return _scale(1 / std, -mean / std)


def _pool(module: Any) -> list[Layer]:
    if module.output_size not in (1, (1, 1)):
        raise NotSupported(f"AdaptiveAvgPool2d to {module.output_size}")
    return [Affine(lambda x: x.mean((2, 3), keepdim=True), lambda x: x.mean((2, 3), keepdim=True))]


def _flatten(module: Any) -> list[Layer]:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise NotSupported(f"Flatten from {module.start_dim} to {module.end_dim}")
    return [Affine(lambda x: x.flatten(1), lambda x: x.flatten(1))]


def _block(module: Any) -> list[Layer]:
    shortcut = [] if module.downsample is None else _parts(module.downsample)
    body = [
        layer for part in (module.conv1, module.bn1, module.relu, module.conv2, module.bn2) for layer in _parts(part)
    ]
    return [Residual(body, shortcut), ReLU()]


def _chain(*names: str) -> Callable[[nn.Module], list[Layer]]:
    """The named parts, one after the other."""
    return lambda module: [layer for name in names for layer in _parts(module.get_submodule(name))]


_KNOWN: dict[type[nn.Module], Callable[[Any], list[Layer]]] = {
    nn.Sequential: lambda module: [layer for part in module.children() for layer in _parts(part)],
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda _: [ReLU()],
    nn.AdaptiveAvgPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Identity: lambda _: [],
    BasicBlock: _block,
    Normalize: _normalize,
    Classifier: _chain("normalize", "backbone"),
    ConvRouter: _chain("normalize", "features", "linear"),
    AffineRouter: lambda module: [*_parts(module.normalize), *_flatten(nn.Flatten()), *_parts(module.linear)],
}

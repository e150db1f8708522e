"""A copy of a model prepared for attacks: the same function, computed faster.

Axes: B = images, C = classes.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

#: How far the prepared model's logits may be from the original's, relative to the largest.
TOLERANCE = 1e-5


class _ChannelsLast(torch.autograd.Function):
    """Channels-last images inside, a contiguous gradient outside, since pyautoattack takes views of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Prepared(nn.Module):
    """A copy of a model in eval mode: frozen, BatchNorm folded into convolutions, channels-last inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inside = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norm(inside)
        self.model: nn.Module = inside.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(_ChannelsLast.apply(x))


def prepare(model: nn.Module, x: Tensor) -> nn.Module | None:
    """A prepared copy of `model`, or None where there can be none with the same logits on the images x (B, c, H, W).

    A user's own model may be of any kind: one that cannot be copied, one whose outputs are random, or one that looks at
    the whole batch, from which an attack must not take rows away.
    """
    try:
        ready = Prepared(model)
        with torch.no_grad():
            expected, logits = model(x), torch.cat([ready(half) for half in torch.chunk(x, 2)])
        agree = (logits - expected).abs() <= TOLERANCE * expected.abs().max()
        return ready if bool(agree.all()) else None
    except Exception:  # whatever a foreign model raises when it is copied
        return None


def fold_batch_norm(model: nn.Module) -> None:
    """Puts every BatchNorm that follows a convolution into it: in eval mode it is an affine map of each channel.

    What follows what is read from the traced graph of each part that can be traced (of an MoE, whose dispatch cannot,
    each expert); the modules themselves go on as they are written.
    """
    try:
        nodes = list(fx.Tracer().trace(model).nodes)
    except Exception:  # forward depends on the data
        for part in model.children():
            fold_batch_norm(part)
        return
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for norm in nodes:
        if norm.op != "call_module" or type(modules[norm.target]) is not nn.BatchNorm2d:
            continue
        source = norm.all_input_nodes[0]
        if source.op != "call_module" or type(modules[source.target]) is not nn.Conv2d or len(source.users) > 1:
            continue
        if calls[source.target] == calls[norm.target] == 1 and modules[norm.target].track_running_stats:
            fused = fuse_conv_bn_eval(modules[source.target], modules[norm.target])
            model.set_submodule(source.target, fused)
            model.set_submodule(norm.target, nn.Identity())

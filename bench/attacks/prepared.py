"""A copy of a model prepared for attacks: the same function, computed faster.

Axes: B = images, C = classes.
"""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.attacks.block import Block
from bench.models.dependence import same_logits, same_slopes, sloped
from bench.models.foreign import Guarded

#: How far the prepared model's logits may be from the original's, relative to how far these lie apart.
TOLERANCE = 1e-5
#: The same on images that an attack made, among which an MoE's may lie so near a tie that rounding decides the route.
UNDER_ATTACK = 1e-3


class _ChannelsLast(torch.autograd.Function):
    """Channels-last images inside, a contiguous gradient outside, since pyautoattack takes views of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Prepared(nn.Module):
    """A copy of a model in eval mode, `model`: frozen, BatchNorm folded into convolutions, channels-last inside."""

    def __init__(self, model: nn.Module, channels_last: bool = True) -> None:
        super().__init__()
        inside = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norm(inside)
        self.channels_last = channels_last
        self.model: nn.Module = inside.to(memory_format=torch.channels_last) if channels_last else inside

    def forward(self, x: Tensor) -> Tensor:
        return self.model(_ChannelsLast.apply(x) if self.channels_last else x)


def prepare(model: nn.Module, x: Tensor) -> Prepared | None:
    """A prepared copy of `model`, or None where there can be none that answers as it does on the images x (B, c, H, W).

    A user's own model may be of any kind: one that cannot be copied, one whose outputs are random, or one that looks at
    the whole batch, from which an attack must not take rows away. One that takes a `view` of what a convolution gives
    cannot be channels-last.
    """
    for channels_last in (True, False):
        try:
            ready = Prepared(model, channels_last)
        except Exception:  # whatever a foreign model raises when it is copied
            return None
        if faithful(ready, model, x, TOLERANCE):
            return ready
    return None


def on_copy(block: Block) -> Block:
    """The block with a prepared copy of its model, where there is one: to be searched, not to judge by.

    A user's own model is searched as it is, since its gates may be anywhere.
    """
    ready = None if isinstance(block.model, Guarded) else prepare(block.model, block.x)
    return block if ready is None else replace(block, model=ready.model)


def faithful(ready: nn.Module, model: nn.Module, x: Tensor, tolerance: float = UNDER_ATTACK) -> bool:
    """Whether a copy gives the model's logits on the images x (B, c, H, W), and the gradients of them.

    A class may say itself how it is copied, and a model may know that it is a copy: what it then hides from attacks
    must not be hidden from the verdict. The tolerance is that of `same_logits`.
    """
    try:
        expected, slope = sloped(model, x)
        halves = [sloped(ready, half) for half in torch.chunk(x, 2)]
    except Exception:  # of a kind that only the model knows
        return False
    logits, other = (torch.cat(parts) for parts in zip(*halves, strict=True))
    return same_logits(logits, expected, tolerance) and same_slopes(other, slope, 0.01)


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

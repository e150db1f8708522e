"""Batches that do not fit into a device's memory are passed through a network one part after another.

Axes: B = images of a block; images (m, c, H, W).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.errors import UnusableInput

#: Attacks ask for batches of several blocks, one for each expert or path: so many blocks are tried to fit.
_BLOCKS = 8


def in_parts(function: Callable[[Tensor], Any], x: Tensor, largest: int | None) -> Any:
    """`function` of the images, of at most `largest` at a time.

    What it keeps for a gradient is kept of one part at a time, so that a gradient costs another pass of each part.
    """
    if largest is None or len(x) <= largest:
        return function(x)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in torch.split(x, largest)])
    return torch.cat([function(part) for part in torch.split(x, largest)])


def fit(model: nn.Module, x: Tensor, whole: bool = False) -> int | None:
    """Let the model's networks take no more images at a time than fit into memory, as a block x (B, c, H, W) tells.

    How many that is; None where all fit. Half of what was found to fit is left for what an attack keeps.

    Raises:
        UnusableInput: not one image fits; or not a block, and the model has to have whole batches (`whole`), since
            routes in what would be split are forced for all of their images.
    """
    size, fits = len(x), 0
    while True:
        try:
            images = x.repeat(-(-size // len(x)), 1, 1, 1)[:size].requires_grad_()
            with torch.enable_grad():
                model(images).sum().backward(inputs=[images])
        except torch.OutOfMemoryError:
            if fits:
                break
            if size == 1:
                raise UnusableInput("--batch-size auto: the device's memory does not hold one image's pass") from None
            size //= 2
        else:
            fits = size
            if size < len(x) or size >= _BLOCKS * len(x):
                break
            size *= 2
        finally:
            images = None  # type: ignore[assignment]  # so that the next size finds the memory free
    if fits >= _BLOCKS * len(x):
        return None
    largest = max(1, fits // 2)
    if whole:
        if fits >= len(x):
            return None
        raise UnusableInput(
            f"--batch-size auto: {len(x)} images do not fit into the device's memory, and a model whose routes are"
            f" forced inside takes whole batches: pass --batch-size {largest}"
        )
    for module in model.modules():
        if hasattr(module, "largest"):
            module.largest = largest  # type: ignore[assignment]
    return largest

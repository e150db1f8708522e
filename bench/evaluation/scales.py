"""Whether a foreign model seems to want its images on another scale: the normalisation belongs inside.

Axes: B = images, c = channels, C = classes.
"""

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from bench.results.flags import DOUBTFUL

#: By how much (fraction) a model has to be better on images of another scale to be taken as made for that.
BETTER = 0.15
#: What is subtracted and divided by, per channel, of ImageNet.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images x (B, c, H, W) that are answered as labelled, y (B,)."""
    with torch.no_grad():
        logits: Tensor = model(x)
    return float((logits.float().nan_to_num(-torch.inf).argmax(1) == y).float().mean())


def better_scale(model: nn.Module, x: Tensor, y: Tensor, found: float) -> str:
    """What a model whose accuracy (fraction) on images x in [0, 1] is `found` gets right on another scale; "" where no
    other is far better: normalised by the images' own mean and standard deviation, by ImageNet's, in [-1, 1], [0, 255].
    """
    if found > 1 - BETTER:
        return ""
    half = (0.5,) * x.shape[1]
    scales: dict[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]] = {
        "normalised by their own mean and standard deviation": (
            x.mean((0, 2, 3)),
            x.std((0, 2, 3), correction=0).clamp_min(1e-3),
        ),
        "in [-1, 1]": (half, half),
        "in [0, 255]": ((0.0,) * x.shape[1], (1 / 255,) * x.shape[1]),
        **({"normalised as ImageNet": _IMAGENET} if x.shape[1] == len(_IMAGENET[0]) else {}),
    }
    right = {"": 0.0}
    for name, (mean, std) in scales.items():
        middle, width = (torch.as_tensor(value).to(x).view(-1, 1, 1) for value in (mean, std))
        with suppress(Exception):  # a user's model may refuse pixels outside [0, 1]
            right[name] = accuracy(model, (x - middle) / width, y)
    best = max(right, key=lambda name: right[name])
    spread = sum(share * (1 - share) for share in (found, right[best])) / len(x)
    if right[best] <= found + max(BETTER, 2 * math.sqrt(spread)):  # two standard errors: of few images many differ
        return ""
    return f"{right[best]:.1%} are right where images are {best}: the model seems to have no normalisation inside"


def by_chance(found: float, images: int, num_classes: int) -> bool:
    """Whether an accuracy (fraction) of so many images is no more than guessing gives, with two standard errors."""
    guess = 1 / num_classes
    return found <= guess + 2 * math.sqrt(guess * (1 - guess) / images)


def accuracy_flags(model: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> list[str]:
    """Flags of a model whose clean accuracy on the first block, images x (B, c, H, W) with labels y, is doubtful."""
    found = accuracy(model, x, y)
    if better := better_scale(model, x, y, found):
        return [f"{DOUBTFUL}{found:.1%} of the first {len(x)} images are right, but {better}"]
    if by_chance(found, len(x), num_classes):
        return [f"{DOUBTFUL}no better than chance on the first {len(x)} images"]
    return []

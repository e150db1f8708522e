"""The contract that every classifier keeps: pixels in [0, 1] in, logits out, normalisation inside.

Axes: B = batch, C = classes, c = image channels, H, W = height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bench.models.fit import in_parts


class Normalize(nn.Module):
    """(x − mean) / std per channel; x (B, c, H, W) in [0, 1]. Buffers: they are in the checkpoint."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("mean")) / self.get_buffer("std")


class Classifier(nn.Module):
    """A backbone behind its normalisation: (B, c, H, W) in [0, 1] → logits (B, C).

    A dense model is one of these; an MoE's experts are E of these, so that each can be attacked and scored alone.
    largest: so many images are passed through the backbone at a time (`bench.models.fit`); None: all.
    """

    largest: int | None = None

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return in_parts(self._logits, x, self.largest)

    def _logits(self, x: Tensor) -> Tensor:
        return self.backbone(self.normalize(x))

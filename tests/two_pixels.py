"""Routed models on images of two pixels, the second a constant, whose paths can be worked out by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.paths import Paths
from bench.attacks.search import Search
from bench.spec import ThreatModel

#: The router's scores are (0, a − 0.55 b, a − 0.7 b); all experts are right where a > 0.
ROUTER = [[0, 0], [1, -0.55], [1, -0.7]]
SAME = [[[1.0, 0], [0, 0]]] * 3
X = torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2)


class Stepped(nn.Module):
    """Right where the first pixel, rounded to halves, is at least ½; without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        a = (2 * x.flatten(1)[:, 0]).round() / 2
        return torch.stack([a - 0.25, 0.25 - a], 1)


def search(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, norm: Any = "Linf", classes: int = 2) -> Search:
    everywhere = torch.ones(len(x), dtype=torch.bool)
    threat = ThreatModel(norm=norm, eps=eps)
    return Search(Block(model, x, y, everywhere, classes, "planted", threat, 0, PassCounter(model)))


def paths(model: nn.Module, x: Tensor, y: Tensor | None = None, limit: int = 100, **more: Any) -> Paths:
    return Paths(search(model, x, torch.zeros(len(x), dtype=torch.long) if y is None else y, **more), limit)

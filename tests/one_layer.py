"""A network of one MoE layer whose gate chooses as it is told, and the gates that are found in a model.

Axes: B = batch, T = tokens, E = experts, D = width of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bench.models.gates import Gates, find_gates

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def named(model: nn.Module, *words: str, x: Tensor = X) -> Gates:
    return find_gates(model.eval(), words, x)


class Block(nn.Module):
    """An MoE block of linear experts whose weights for each token come from `weigh`."""

    def __init__(self, gate: nn.Module, weigh: Any, width: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.score, self.weigh = gate, weigh
        self.mlps = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # (B, D, 2, 2)
        weights = self.weigh(self.score, x)  # (B, T, E)
        x = x.flatten(2).transpose(1, 2)
        return self.head((weights[..., None] * torch.stack([mlp(x) for mlp in self.mlps], 2)).sum((1, 2)))


def hot(scores: Tensor, k: int) -> Tensor:
    p = scores.softmax(-1)
    return p * torch.zeros_like(p).scatter(-1, p.topk(k, -1).indices, 1.0)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)

"""Targeted PGD on the deployed model, nearest classes first.

Axes: m = rows that are attacked, C = classes, T = targets.
"""

import torch
from torch import Tensor

from bench.attacks.search import Search, halved

#: Classes whose distance is worked out, by logit: each costs a backward pass.
CANDIDATES = 20


def nearest(search: Search, count: int) -> Tensor:
    """The first `count` wrong classes of each image of the block, (B, T), in MALT's order (Melamed et al. 2024).

    That is by the distance (z_y − z_c) / ‖∇(z_y − z_c)‖ to the linearised boundary, in the norm dual to the ball's.
    """
    block = search.block
    x, y = block.x.detach().requires_grad_(), block.y
    with torch.enable_grad():
        logits = block.model(x)
        own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
        classes = logits.detach().masked_fill(own, -torch.inf).topk(min(CANDIDATES, logits.shape[1] - 1), 1).indices
        distances = []
        for column in classes.T:
            gap = logits[own] - logits.gather(1, column[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            size = gradient.flatten(1).norm(p=1 if block.threat_model.norm == "Linf" else 2, dim=1)
            distances.append(gap.detach() / size.clamp_min(1e-12))
    return classes.gather(1, torch.stack(distances, 1).argsort(dim=1, stable=True))[:, :count]


def targeted(search: Search, targets: Tensor, steps: int) -> None:
    """PGD for each of the targets (B, T) in turn, on the rows that stand."""
    block = search.block
    for column in targets.T:

        def loss(z: Tensor, rows: Tensor, column: Tensor = column) -> Tensor:
            logits = block.model(z)
            return logits.gather(1, column[rows, None])[:, 0] - logits.gather(1, block.y[rows, None])[:, 0]

        search.climb(loss, search.uniform(), halved(block.threat_model.eps, steps), search.rows)

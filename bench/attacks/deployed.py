"""Auto-PGD on the deployed model itself, and on the branches of a dual.

Axes: B = examples of the block, m = rows that are attacked, C = classes, T = targets.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.attacks.gradients import StraightThrough
from bench.attacks.recorded import with_slopes
from bench.attacks.search import Search, losses, margin, standardised
from bench.pgd import random_start

#: Classes whose distance is worked out, by logit: each costs a backward pass.
CANDIDATES = 20
#: How far the neighbours lie that a gradient is averaged over, in ε.
SPREAD = 0.125
#: What opens a part of a model needs so many times fewer steps than what makes the most of it.
OPENED = 4


def deployed(search: Search, restarts: int, steps: int, model: Callable[[Tensor], Tensor] | None = None) -> None:
    """From uniform starts, each row by a loss of its own: the margin, cross-entropy or DLR, of the `model`'s logits."""
    block, model = search.block, model or search.block.model
    for _ in range(restarts):
        which = torch.randint(3, (len(block.y),)).to(block.x.device)

        def objective(z: Tensor, rows: Tensor, which: Tensor = which) -> tuple[Tensor, Tensor]:
            logits, y = model(z), block.y[rows]
            return losses(logits, y).gather(1, which[rows, None])[:, 0], margin(logits, y) > 0

        search.climb(objective, search.uniform(), steps, search.rows)


def smoothly(model: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The model's logits (m, C) with a gradient through all that has none: what Python calls, and what is recorded."""
    as_written = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]  # else several are recorded as one
    with StraightThrough(far=True), as_written:
        logits = model(z)
    return with_slopes(logits)


def stand_ins(search: Search, restarts: int, steps: int) -> None:
    """By the gradients of stand-ins for all that has none (`smoothly`): what is off on every image may open.

    Such as a unit behind a ReLU, an expert without a weight, the side of a `where` that is never taken. What is behind
    it is not known beforehand, and may well raise the true class at first: from each image random directions of the
    logits are followed, and their opposites; then the losses from uniform starts.
    """
    block, smooth = search.block, partial(smoothly, search.block.model)
    for _ in range(2 * restarts):
        direction = torch.randn(len(block.y), block.num_classes).to(block.x.device)
        for side in (direction, -direction):

            def along(z: Tensor, rows: Tensor, side: Tensor = side) -> tuple[Tensor, Tensor]:
                logits = smooth(z)
                return (standardised(logits) * side[rows]).sum(1), margin(logits, block.y[rows]) > 0

            search.climb(along, block.x, steps // OPENED, search.rows)
    deployed(search, restarts, steps, smooth)


def averaged(search: Search, neighbours: int, steps: int) -> None:
    """The margin averaged over points near the iterate: a hard route has no gradient, but it has a slope at large."""
    block = search.block
    threat = block.threat_model.model_copy(update={"eps": SPREAD * block.threat_model.eps})

    def objective(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        many = torch.cat([random_start(z, threat, search.noise()[rows]) for _ in range(neighbours)])
        found = margin(block.model(many), block.y[rows].repeat(neighbours)).view(neighbours, -1)
        return found.mean(0), torch.zeros_like(found[0], dtype=torch.bool)

    search.climb(objective, search.uniform(), steps, search.rows)


def nearest(search: Search, count: int) -> Tensor:
    """The first `count` wrong classes of each image of the block, (B, T), in MALT's order (Melamed et al. 2024).

    That is by the distance (z_y − z_c) / ‖∇(z_y − z_c)‖ to the linearised boundary, in the norm dual to the ball's.
    """
    block = search.block
    x, y = block.x.detach().requires_grad_(), block.y
    with torch.enable_grad():
        logits = block.model(x)
        own = one_hot(y, logits.shape[1]).bool()
        classes = logits.detach().masked_fill(own, -torch.inf).topk(min(CANDIDATES, logits.shape[1] - 1), 1).indices
        distances = []
        for column in classes.T:
            gap = logits[own] - logits.gather(1, column[:, None])[:, 0]
            found = (
                torch.autograd.grad(gap.sum(), x, retain_graph=True)[0] if gap.requires_grad else torch.zeros_like(x)
            )
            size = found.flatten(1).norm(p=1 if block.threat_model.norm == "Linf" else 2, dim=1)
            distances.append(gap.detach() / size.clamp_min(1e-12))
    return classes.gather(1, torch.stack(distances, 1).argsort(dim=1, stable=True))[:, :count]


def targeted(search: Search, targets: Tensor, steps: int) -> None:
    """For each of the targets (B, T) in turn, its logit minus the true one."""
    block = search.block
    for column in targets.T:

        def objective(z: Tensor, rows: Tensor, column: Tensor = column) -> tuple[Tensor, Tensor]:
            logits, y = block.model(z), block.y[rows]
            value = logits.gather(1, column[rows, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
            return value, margin(logits, y) > 0

        search.climb(objective, search.uniform(), steps, search.rows)


def reweighed(search: Search, weight: float, steps: int) -> None:
    """On (1 − w) log p_S + w log p_R of a dual, whatever α is, as MORA (Yu and Gao 2022) reweighs an ensemble.

    Weights 0 and 1 attack one branch alone, which then transfers to the whole.
    """
    block, dual = search.block, _dual(search)

    def objective(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (1 - weight) * dual.standard(z).log_softmax(1) + weight * dual.robust(z).log_softmax(1)
        return margin(mixed, block.y[rows]), torch.zeros_like(rows, dtype=torch.bool)

    search.climb(objective, search.uniform(), steps, search.rows)


def _dual(search: Search) -> Any:
    return search.block.model

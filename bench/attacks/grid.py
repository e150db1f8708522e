"""An attack whose iterates lie on the grid of the data's own pixel values, such as multiples of 1/255.

A model's accuracy is measured on that grid alone. What it does there, and not between its points, no attack finds whose
iterates lie anywhere: a mixture may show one of its experts there only, by weights that are smooth.
Axes: B = examples of the block, m = rows that are attacked.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bench.attacks.restarts import square_attack
from bench.attacks.search import LOOK, Search, losses
from bench.pgd import ascend_once, default_step_size, finite
from bench.spec import Norm

#: The finest grid that is looked for, and how far a value may lie off it, in its steps, for float32 rounds 1/255.
FINEST, OFF = 1024, 1e-3
#: So much more than a whole step of the grid counts as one, as 8/255 is eight of 1/255 but for rounding.
SLACK = 1e-5


def grid(x: Tensor, eps: float = 1.0) -> int | None:
    """The n for which all pixels of images x (B, C, H, W) are multiples of 1/n; None where they lie on no grid.

    Of images with few grey levels, between two of which the ball's ε has no room, that of 8 bits.
    """
    values: Tensor = torch.unique(x)
    if len(values) < 2:
        return None
    steps = round(1 / float(values.diff().min()))
    if steps > FINEST or bool(((values * steps).frac() - 0.5).abs().min() <= 0.5 - OFF):
        return None
    return 255 if eps * steps < 1 and not 255 % steps else steps


def steps_within(delta: Tensor, reach: float, norm: Norm) -> Tensor:
    """Whole numbers (m, C, H, W) near to delta, both in steps of the grid, whose norm is at most `reach`.

    L∞: towards 0. L2: of the largest as many as there is room for, each at least one step, for in the direction of a
    gradient no pixel may go as far as that.
    """
    if norm == "Linf":
        return (delta * (1 + SLACK)).trunc()
    size, order = delta.flatten(1).abs().sort(1, descending=True)
    whole = size.round().clamp_min(1)
    whole *= whole.square().cumsum(1) <= (reach * (1 + SLACK)) ** 2
    return torch.zeros_like(whole).scatter(1, order, whole).view_as(delta) * delta.sign()


def on_grid(search: Search, restarts: int, steps: int, queries: int) -> None:
    """PGD from the images, then from random points, by the gradient at the point of the grid that each iterate is at.

    That is one near to it inside the ball. In L∞ then Square, whose steps are whole ones of the grid: a gradient at a
    point says nothing of the next one, where a model has bent it there. Nothing is done where the images lie on no
    grid, or the ball holds no other point of it.
    """
    block = search.block
    threat, count = block.threat_model, grid(block.x, block.threat_model.eps)
    if count is None or threat.eps * count * (1 + SLACK) < 1:
        return
    for number in range(restarts):
        _climb(search, count, block.x if number == 0 else search.uniform(), steps)
    if threat.norm == "Linf" and len(rows := search.rows):
        widest = int(threat.eps * count * (1 + SLACK)) / count
        inner = replace(block, threat_model=threat.model_copy(update={"eps": widest}))
        search.test(square_attack(inner, queries, 1).perturb(block.x[rows], block.y[rows]), rows)


def _climb(search: Search, count: int, start: Tensor, steps: int) -> None:
    """PGD from start (B, C, H, W) on the grid of 1/count; each row climbs a loss of its own, as in `deployed`."""
    block, threat = search.block, search.block.threat_model
    size = max(default_step_size(threat.eps, steps), 1 / count)
    which = torch.randint(3, (len(block.y), 1)).to(block.x.device)
    rows = search.rows
    z = start[rows]
    for step in range(steps + 1):
        if not len(rows):  # there are models that cannot take none
            return
        x, y = block.x[rows], block.y[rows]
        whole = steps_within((z - x) * count, threat.eps * count, threat.norm)
        point = (((x * count).round() + whole) / count).clamp(0, 1)
        if step % LOOK == 0 or step == steps:
            kept = search.test(point, rows).nonzero()[:, 0]
            rows, z, x, y, point = rows[kept], z[kept], x[kept], y[kept], point[kept]
            if not len(rows) or step == steps:
                return
        point.requires_grad_()
        with torch.enable_grad():
            loss = losses(block.model(point), y).gather(1, which[rows]).sum()
        gradient = torch.autograd.grad(loss, point, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            return
        z = ascend_once(z, finite(gradient), x, threat, size)

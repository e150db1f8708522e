"""An attack whose iterates lie on the grid of the data's own pixel values, such as multiples of 1/255.

A model's accuracy is measured on that grid alone. What it does there, and not between its points, no attack finds whose
iterates lie anywhere: a mixture may show one of its experts there only, by weights that are smooth.
Axes: B = examples of the block, m = rows that are attacked.
"""

import torch
from torch import Tensor

from bench.attacks.search import LOOK, Search, losses
from bench.pgd import ascend_once, default_step_size, finite
from bench.spec import Norm

#: The finest grid that is looked for, and how far a value may lie off it, in its steps, for float32 rounds 1/255.
FINEST, OFF = 1024, 1e-3
#: So much more than a whole step of the grid counts as one, as 8/255 is eight of 1/255 but for rounding.
SLACK = 1e-5


def grid(x: Tensor) -> int | None:
    """The n for which all pixels of images x (B, C, H, W) are multiples of 1/n; None where they lie on no grid."""
    values: Tensor = torch.unique(x)
    if len(values) < 2:
        return None
    steps = round(1 / float(values.diff().min()))
    return steps if steps <= FINEST and bool(((values * steps).frac() - 0.5).abs().min() > 0.5 - OFF) else None


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


def on_grid(search: Search, restarts: int, steps: int) -> None:
    """PGD from the images, then from random points, by the gradient at the point of the grid that each iterate is at.

    That is one near to it inside the ball. Nothing is done where the images lie on no grid, or the ball holds no other
    point of it. Each row climbs a loss of its own, as in `deployed`.
    """
    block = search.block
    threat, count = block.threat_model, grid(block.x)
    if count is None or threat.eps * count * (1 + SLACK) < 1:
        return
    size = max(default_step_size(threat.eps, steps), 1 / count)
    for number in range(restarts):
        which = torch.randint(3, (len(block.y), 1)).to(block.x.device)
        start = block.x if number == 0 else search.uniform()
        rows = search.rows
        if not len(rows):  # there are models that cannot take none
            return
        z = start[rows]
        for step in range(steps + 1):
            x, y = block.x[rows], block.y[rows]
            whole = steps_within((z - x) * count, threat.eps * count, threat.norm)
            point = (((x * count).round() + whole) / count).clamp(0, 1).requires_grad_()
            if step % LOOK == 0 or step == steps:
                kept = search.test(point, rows).nonzero()[:, 0]
                rows, z, x, y, point = rows[kept], z[kept], x[kept], y[kept], point.detach()[kept].requires_grad_()
                if not len(rows):
                    return
            with torch.enable_grad():
                loss = losses(block.model(point), y).gather(1, which[rows]).sum()
            gradient = torch.autograd.grad(loss, point, allow_unused=True)[0] if loss.requires_grad else None
            if gradient is None:
                return
            z = ascend_once(z, finite(gradient), x, threat, size)

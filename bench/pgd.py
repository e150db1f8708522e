"""Projected gradient ascent inside a ball: in training (the inner maximisation), in probes and in suites.

Axes: B = batch; images (B, c, H, W) in [0, 1]. ε and step sizes are in pixels of [0, 1].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench.errors import UnusableInput
from bench.spec import ThreatModel


def default_step_size(eps: float, steps: int, reach: float = 2.5) -> float:
    """reach · ε / steps, at most ε; 2.5 as in Madry et al. (2018), so a quarter of ε at the paper's 10 steps."""
    return min(reach / steps, 1.0) * eps


def _norms(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def project(x_adv: Tensor, x: Tensor, threat_model: ThreatModel) -> Tensor:
    """The nearest point of the ball around x (for L2 before the cut with the box), inside [0, 1]."""
    delta, eps = x_adv - x, threat_model.eps
    if threat_model.norm == "Linf":
        delta = delta.clamp(-eps, eps)
    elif threat_model.norm == "L2":
        delta = delta * (eps / _norms(delta)).clamp_max(1.0)
    else:
        raise UnusableInput(f"no training inside an {threat_model.norm} ball: train for Linf or L2")
    return (x + delta).clamp(0, 1)


def random_start(x: Tensor, threat_model: ThreatModel, noise: Tensor) -> Tensor:
    """A point of the ball ∩ [0, 1] around x from `noise`, which is uniform in [−1, 1] and of x's shape.

    Linf: ε times the noise, so uniform in the ball; L2: the noise's direction, with length ε.
    """
    eps = threat_model.eps
    return project(x + (eps * noise if threat_model.norm == "Linf" else eps * noise / _norms(noise)), x, threat_model)


def near_start(x: Tensor, threat_model: ThreatModel, noise: Tensor) -> Tensor:
    """x + 0.001 · N(0, 1), from uniform `noise`: where TRADES starts, since the KL's gradient is zero at x itself."""
    normal = math.sqrt(2) * torch.erfinv(noise.clamp(-1 + 1e-6, 1 - 1e-6))
    return project(x + 0.001 * normal, x, threat_model)


def ascend_once(x_adv: Tensor, gradient: Tensor, x: Tensor, threat_model: ThreatModel, step_size: float) -> Tensor:
    """A step of `step_size` from x_adv in the steepest direction of the norm, then back into the ball around x."""
    direction = gradient.sign() if threat_model.norm == "Linf" else gradient / _norms(gradient)
    return project(x_adv + step_size * direction, x, threat_model)


def finite(gradient: Tensor) -> Tensor:
    """A gradient (m, …) without infinities: they become twice the largest finite entry of their row; NaN becomes 0.

    A root's gradient at a black pixel is infinite, and its direction is still the steepest.
    """
    rows = gradient.flatten(1)
    most = rows.abs().nan_to_num(0.0, 0.0).amax(1, keepdim=True)
    most = 2 * torch.where(most > 0, most, torch.ones_like(most))
    return rows.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-most, most).view_as(gradient)


def pgd(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    threat_model: ThreatModel,
    steps: int,
    step_size: float,
    start: Tensor,
) -> Tensor:
    """Projected gradient ascent on `loss` (images → one value each, or their sum), inside the ball around x ∩ [0, 1].

    It begins at `start`, a point of that set, and returns the last iterate, as PGD is in Madry et al. (2018).
    """
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
        x_adv = ascend_once(x_adv.detach(), gradient, x, threat_model, step_size)
    return x_adv.detach()

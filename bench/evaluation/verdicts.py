"""The independent re-check of adversarial examples: nothing here is shared with an attack.

Axes: m = examples judged. Distances and ε are in pixels of [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.models.deployed import Prediction, predict
from bench.spec import ABSOLUTE_BOX, ThreatModel


@dataclass(frozen=True)
class Judgement:
    """Per example, (m,) each, on the CPU: what became of an attack's answer.

    error: the answer is illegal, so nothing is known; broken: legal, and misclassified; unconfirmed: the attack claimed
    a success that is none. An example that is neither `error` nor `broken` has withstood the attack.
    """

    prediction: Prediction
    linf: Tensor
    l2: Tensor
    error: Tensor
    broken: Tensor
    unconfirmed: Tensor


def inside(linf: Tensor, l2: Tensor, l1: Tensor, threat_model: ThreatModel) -> Tensor:
    """Whether distances (m,) lie in the ball, with the tolerance of its norm."""
    return {"Linf": linf, "L2": l2, "L1": l1}[threat_model.norm] <= threat_model.reach


def _distances(x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L∞, L2 and L1, (m,) each, on the CPU."""
    delta = (x_adv.detach().double() - x.double()).flatten(1).abs()
    return delta.amax(1).cpu(), delta.square().sum(1).sqrt().cpu(), delta.sum(1).cpu()


def legal(x: Tensor, x_adv: Tensor, threat_model: ThreatModel) -> Tensor:
    """Whether x_adv (m, C, H, W) is finite, in the box, and in the ball around x: (m,), on the CPU."""
    finite = x_adv.isfinite().flatten(1).all(1).cpu()
    box = ((x_adv >= -ABSOLUTE_BOX) & (x_adv <= 1 + ABSOLUTE_BOX)).flatten(1).all(1).cpu()
    return finite & box & inside(*_distances(x, x_adv), threat_model)


def judge(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    threat_model: ThreatModel,
    bounded: bool,
    claimed: Tensor | None,
    routing_visible: bool,
) -> Judgement:
    """Check x_adv, an attack's answer for x (m, C, H, W) with labels y (m,).

    `bounded`: the attack was told ε, so an answer outside the ball or the box is an error; an attack that knows no ε
    has then merely not broken the example. An answer or a logit that is not finite is an error in both cases.

    Raises:
        ValueError: the answer has another shape than x.
    """
    if x_adv.shape != x.shape:
        raise ValueError(f"the attack returned images of shape {tuple(x_adv.shape)} for {tuple(x.shape)}")
    linf, l2, _ = _distances(x, x_adv)
    finite = x_adv.isfinite().flatten(1).all(1).cpu()
    allowed = legal(x, x_adv, threat_model)
    # A row that is not finite must not reach the model: through its batch it could spoil its neighbours.
    usable = torch.where(finite.to(x.device).view(-1, 1, 1, 1), x_adv.detach(), x).float()
    prediction = predict(model, usable, routing_visible)
    error = ~finite | ~prediction.finite | (~allowed if bounded else torch.zeros_like(allowed))
    broken = allowed & ~error & (prediction.classes != y.cpu())
    unconfirmed = torch.zeros_like(broken) if claimed is None else claimed.cpu() & ~broken & ~error
    return Judgement(prediction, linf, l2, error, broken, unconfirmed)

"""Which routers are affine, as their structure shows, and which experts these can be led to inside a ball.

Axes: B = images, E = experts, K = selected experts, D = pixels.
"""

import torch
from torch import Tensor, nn

from bench.models.base import Normalize
from bench.models.routing import AffineRouter
from bench.spec import ThreatModel

#: Modules that compute an affine function of their input in eval mode, by their exact class: a subclass may not.
AFFINE = {
    AffineRouter, Normalize, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d,
}  # fmt: skip


def is_affine(module: object) -> bool:
    """Whether a router is affine by its structure: never guessed from what it answers at some points.

    A chain of known modules, without hooks and without methods of its own.
    """
    if not isinstance(module, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if any(callable(getattr(type(module), key, None)) for key in vars(module)):
        return False  # an instance may override its class's methods
    if type(module) is nn.Sequential:
        return all(is_affine(part) for part in module._modules.values())  # children() drops repeated modules
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None:
        return False  # normalised by the batch, whatever the mode
    return type(module) in AFFINE and all(is_affine(part) for part in module.children())


def affine_map(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(W (E, D), b (E,)) of an affine router r(x) = W·vec(x) + b on images like x (B, …); None where it is none."""
    if not is_affine(router):
        return None
    point = torch.zeros_like(x[:1]).requires_grad_()
    with torch.enable_grad():
        scores = router(point).flatten()
        rows = [torch.autograd.grad(score, point, retain_graph=True)[0].flatten() for score in scores]
    weight, bias = torch.stack(rows), scores.detach()
    with torch.no_grad():
        there = router(x)
        near = torch.allclose(there, x.flatten(1) @ weight.T + bias, rtol=1e-3, atol=1e-3 * float(there.abs().amax()))
    return (weight, bias) if near else None


def reachable_pairs(weight: Tensor, bias: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """ahead (B, E, E): whether expert i can score no less than expert k somewhere in the ball ∩ [0, 1], at most.

    Exact for each pair, up to a margin for rounding; in L2 the ball alone. A superset of what can be reached jointly,
    so that no expert is missed.
    """
    flat, num_experts = x.flatten(1), len(bias)
    scores = flat @ weight.T + bias
    slack = 1e-5 * (flat @ weight.abs().T + bias.abs()).amax(1) + 1e-6
    ahead = torch.zeros(len(x), num_experts, num_experts, dtype=torch.bool, device=x.device)
    for i in range(num_experts):
        for other in range(num_experts):
            d = weight[i] - weight[other]
            if threat.norm == "Linf":
                gain = torch.where(d > 0, (1 - flat).clamp_max(threat.eps), flat.clamp_max(threat.eps)) @ d.abs()
            else:
                gain = threat.eps * d.norm()
            ahead[:, i, other] = scores[:, i] - scores[:, other] + gain >= -slack
    return ahead

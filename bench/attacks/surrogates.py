"""Attacks on smooth stand-ins for a hard route, on the route and the logits at once, and on averaged gradients.

Axes: m = rows that are attacked, E = experts, C = classes. Temperatures are relative to the router's median gap.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.attacks.routes import Routes
from bench.attacks.search import halved, margin
from bench.pgd import random_start


def _soft(routes: Routes, z: Tensor, temperature: float) -> Tensor:
    """F's logits (m, C) with all experts mixed by softmax(r / T)."""
    weights = (routes.scores(z) / (temperature * routes.scale)).softmax(1)
    outputs = torch.stack([expert(z) for expert in routes.moe.experts], 1)
    return routes.logits(z, (weights[:, :, None] * outputs).sum(1))


def soft(routes: Routes, temperature: float, steps: int) -> None:
    """PGD on the soft mixture, from a uniform start; what it finds counts where it breaks the deployed model."""
    _climb(routes, lambda z: _soft(routes, z, temperature), steps)


def bpda(routes: Routes, temperature: float, steps: int) -> None:
    """Hard forward, soft backward (Athalye et al. 2018): the deployed logits with the soft mixture's gradient."""

    def logits(z: Tensor) -> Tensor:
        smooth = _soft(routes, z, temperature)
        with torch.no_grad():
            deployed = routes.search.block.model(z)
        return smooth + (deployed - smooth).detach()

    _climb(routes, logits, steps)


def _climb(routes: Routes, logits: Callable[[Tensor], Tensor], steps: int) -> None:
    search, y = routes.search, routes.search.block.y
    steps_taken = halved(search.block.threat_model.eps, steps)
    search.climb(lambda z, rows: margin(logits(z), y[rows]), search.uniform(), steps_taken, search.rows)


def joint(routes: Routes, steps: int) -> None:
    """The deployed margin, plus a push of the route towards the expert that is weakest on the clean image."""
    search, block = routes.search, routes.search.block
    weakest = routes.margins.masked_fill(~routes.reachable, -torch.inf).argmax(1)

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        push = routes.gap(routes.scores(z), weakest[rows]) / routes.scale
        return margin(block.model(z), block.y[rows]) + push.clamp_max(1)

    search.climb(loss, search.uniform(), halved(block.threat_model.eps, steps), search.rows)


def averaged(routes: Routes, neighbours: int, steps: int) -> None:
    """The deployed margin averaged over points within ε/8 of the iterate, for images with a routing tie in the ball."""
    search, block = routes.search, routes.search.block
    threat = block.threat_model.model_copy(update={"eps": block.threat_model.eps / 8})
    near = (routes.reachable.sum(1) > 1).nonzero()[:, 0]

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        many = torch.cat([random_start(z, threat, search.noise()[rows]) for _ in range(neighbours)])
        return margin(block.model(many), block.y[rows].repeat(neighbours)).view(neighbours, -1).mean(0)

    start = search.uniform()
    search.climb(loss, start, halved(block.threat_model.eps, steps), near)

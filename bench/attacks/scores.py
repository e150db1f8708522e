"""A router's scores as attacks need them: with a gradient by the pixels, also where the router itself has none.

Axes: B = images, E = experts, D = pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: How far from an image a router without a gradient is tried: farther than the steps of any 4-bit image.
PROBE = 0.1
#: Directions tried for each pixel, so that the sign of most of an affine router's weights is found, and at most.
DIRECTIONS, AT_MOST = 4, 20_000


def logarithms(router: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The logarithms of a router's scores where they are probabilities (of x, by their look): the same order.

    A softmax that decides clearly has next to no gradient; its logarithm has.
    """
    with torch.no_grad():
        scores = router(x)
    if bool((scores < 0).any()) or bool(((scores.sum(1) - 1).abs() > 1e-3).any()):
        return router
    tiny = torch.finfo(scores.dtype).tiny
    return lambda z: router(z).clamp_min(tiny).log()


def has_gradient(router: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether any score's gradient by the pixels of any image x (B, C, H, W) is other than zero."""
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        scores = router(z)
        if not scores.requires_grad:
            return False
        found = [torch.autograd.grad(column.sum(), z, retain_graph=True, allow_unused=True)[0] for column in scores.T]
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in found)


@torch.no_grad()
def slopes(router: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """W (E, D) in place of a gradient, for a router that is rounded, detached, or run without one.

    The mean slope of the scores about the images x along random directions of ±PROBE in every pixel: the weights of an
    affine router, up to noise.
    """
    generator = torch.Generator().manual_seed(0)
    size, num_experts = x[0].numel(), router(x[:1]).shape[1]
    total, drawn = torch.zeros(num_experts, size, device=x.device), 0
    directions = min(DIRECTIONS * size, AT_MOST)
    while drawn < directions:
        count = min(len(x), directions - drawn)
        signs = torch.randint(0, 2, x[:count].shape, generator=generator).to(x) * 2 - 1
        rise = router(x[:count] + PROBE * signs) - router(x[:count] - PROBE * signs)
        total += rise.to(total).T @ signs.flatten(1).to(total)
        drawn += count
    return total / (2 * PROBE * directions)


def stand_in(router: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The router's scores with the gradient of its `slopes` about the images x in place of its own."""
    weight = slopes(router, x)

    def scores(z: Tensor) -> Tensor:
        linear = z.flatten(1) @ weight.to(z).T
        return linear + (router(z) - linear).detach()

    return scores


def differentiable(router: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The router itself if it has a gradient at the images x; else its stand-in."""
    return router if has_gradient(router, x) else stand_in(router, x)

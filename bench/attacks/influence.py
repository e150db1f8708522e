"""An attack on the parts of a user's own network that its answers depend on least: mixtures that show no gate.

Axes: B = examples of the block, m = rows that are attacked, C = classes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.deployed import OPENED, smoothly
from bench.attacks.search import Search, losses, margin
from bench.models.unused import Stacks

#: So many parts are led to, those with the least influence on the block's images.
PARTS = 4
#: Below it an influence is none.
NONE = 1e-30


@contextmanager
def _answers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Holds, once left, what experts may have answered: what modules of a list give and `torch.stack` takes."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output)

    listed = [
        one for owner in model.modules() if isinstance(owner, nn.ModuleList | nn.ModuleDict) for one in owner.children()
    ]
    hooks = [module.register_forward_hook(keep) for module in listed]
    try:
        with Stacks() as stacks:
            yield found
        found.extend(one for call in stacks.calls for one in call)
    finally:
        for hook in hooks:
            hook.remove()


def _influences(model: nn.Module, z: Tensor, side: Tensor) -> tuple[list[Tensor], Tensor]:
    """How much logits depend on each answer (m, …), log ‖∂(side · logits)/∂answer‖ (m,); and the logits (m, C)."""
    with _answers(model) as found:
        logits = smoothly(model, z)
    parts = [one for one in found if one.requires_grad and one.dim() > 1 and len(one) == len(z)]
    if not logits.requires_grad or not parts:
        return [], logits
    given = torch.autograd.grad((side * logits).sum(), parts, create_graph=True, allow_unused=True)
    return [logits.new_zeros(len(z)) if one is None else _size(one.flatten(1), side) for one in given], logits


def _size(gradient: Tensor, side: Tensor) -> Tensor:
    """Its log length (m,); where it has none, what has a slope: its part along `side`, if it is of logits."""
    length = gradient.norm(dim=1)
    along = (gradient * (side if gradient.shape == side.shape else 1)).sum(1) / NONE
    none = length < NONE
    return torch.where(none, math.log(NONE) + along, length.masked_fill(none, 1).log())


def least_used(search: Search, steps: int) -> None:
    """Raises the influence of a part that images hardly use, by its gradient, then the loss from where that led to.

    The weight that a mixture gives an expert is the gradient of its answer by the expert's, however it is computed; so
    a route that no gate shows, such as by distances to prototypes, is followed all the same. It is a flag where torch
    cannot differentiate a network twice, which is then not attacked so.
    """
    block, model = search.block, search.block.model
    side = torch.randn(len(block.y), block.num_classes).to(block.x.device)
    try:
        order = _by_influence(model, block.x, side)
    except RuntimeError as error:
        block.flags.append(f"adaptive: no influence of parts was raised: {str(error).splitlines()[0]}")
        return

    def loss(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits, y = model(z), block.y[rows]
        return losses(logits, y)[:, 0], margin(logits, y) > 0

    for number in order[:PARTS]:

        def lead(z: Tensor, rows: Tensor, number: int = number) -> tuple[Tensor, Tensor]:
            found, logits = _influences(model, z, side[rows])
            value = found[number] if number < len(found) else logits.new_zeros(len(z))
            return value, margin(logits, block.y[rows]) > 0

        search.climb(lead, block.x, steps // OPENED, search.rows)
        search.climb(loss, search.x_adv.clone(), steps // OPENED, search.rows, first=0.5)


def _by_influence(model: nn.Module, x: Tensor, side: Tensor) -> list[int]:
    """The numbers of the answers, that of the least influence first; RuntimeError where it cannot be differentiated."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found, _ = _influences(model, x, side)
        if len(found) < 2:  # one part alone is no mixture
            return []
        whole = torch.stack(found)
        if whole.requires_grad:
            torch.autograd.grad(whole.sum(), x, allow_unused=True)
    return whole.detach().mean(1).argsort().tolist()

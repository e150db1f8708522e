"""pyautoattack's APGD and FAB, from which a row leaves at the moment when they would already count it as broken.

Their loops are pyautoattack's own. What changes is the model that they see: it runs the rows that still stand, and
answers for the others. A row's iterates depend on no other row's once its start is drawn, and all random numbers are
drawn before the first pass, so that whoever has left changes nothing for those who stay.

Axes: B = rows that an attack was started on, m = those that still stand, C = classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.fab_base import FABAttack
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bench.spec import Norm

#: From images (B, c, H, W) and where the model is wrong on them (B,) to the rows that leave (B,).
Leaves = Callable[[Tensor, Tensor], Tensor]

#: The lengths (B,) of rows (B, D), by the same formulas as FAB's own, since they are compared with ε.
LENGTHS: dict[Norm, Callable[[Tensor], Tensor]] = {
    "Linf": lambda rows: rows.abs().max(1)[0],
    "L2": lambda rows: (rows**2).sum(-1).sqrt(),
    "L1": lambda rows: rows.abs().sum(-1),
}


class NobodyStands(Exception):
    """The last row has left."""


class Standing:
    """A model that is asked about the rows that still stand.

    One that has left is answered for as if it were classified right: the loop then keeps what it has last noted of the
    row, the image that it left with. That image is in x_adv (B, c, H, W) too.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, leaves: Leaves) -> None:
        self.model, self.y, self.leaves = model, y, leaves
        self.x_adv, self.rows = x.clone(), torch.arange(len(y), device=y.device)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.y):  # FAB without the rows that it found wrong at once
            return self.model(x)
        own = self.model(x[self.rows])
        logits = one_hot(self.y, own.shape[1]).to(own.dtype).index_copy(0, self.rows, own)
        left = self.leaves(x.detach(), logits.detach().max(1)[1] != self.y)
        self.x_adv[left] = x.detach()[left]
        self.rows = self.rows[~left[self.rows]]
        if not len(self.rows):
            raise NobodyStands
        return logits


def hasten(part: Any, ready: nn.Module) -> None:
    """Has a part of AutoAttack run on `ready`, a prepared copy of its model; rows leave it if it is APGD or FAB.

    Where it changed an image and the model is right on that, only the copy was wrong: the part is run again as it was,
    and what it breaks is added to what was found.
    """
    name = "model" if isinstance(part, APGDAttack) else "predict"
    model, perturb = getattr(part, name), part.perturb
    changed: dict[str, Any] = {name: ready}
    for kind, leaving in ((APGDAttack, _apgd), (FABAttack, _fab)):
        if isinstance(part, kind):
            changed["attack_single_run"] = leaving(part)

    def hastened(x: Tensor, y: Tensor) -> Tensor:
        with _replaced(part, **changed):
            x_adv: Tensor = perturb(x, y)
        claimed = (x_adv != x).flatten(1).any(1)  # what an attack did not break, it gives back
        with torch.no_grad():
            right = model(x_adv).max(1)[1] == y
        if bool((claimed & right).any()):
            x_adv = torch.where(right[:, None, None, None], perturb(x, y), x_adv)
        return x_adv

    part.perturb = hastened


def _apgd(part: Any) -> Callable[..., Any]:
    """APGD's run, from which a row leaves at its first misclassified iterate."""
    run = part.attack_single_run

    def leaving(x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if part.eps > part.eps_orig:  # in L1 it begins in larger balls, where nothing is broken yet
            return run(x, y, x_init)
        standing = Standing(part.model, x, y, lambda z, wrong: wrong)
        try:
            with _replaced(part, model=standing):
                return run(x, y, x_init)
        except NobodyStands:
            return standing.x_adv, torch.zeros_like(y, dtype=torch.bool), None, standing.x_adv

    return leaving


def _fab(part: Any) -> Callable[..., Tensor]:
    """FAB's run, from which a row leaves at its first misclassified iterate inside the ball."""
    run = part.attack_single_run

    def leaving(x: Tensor, y: Tensor, **more: Any) -> Tensor:
        def leaves(z: Tensor, wrong: Tensor) -> Tensor:
            # iterates are judged without gradients; where it takes one, it has stepped back
            return wrong & (LENGTHS[part.norm]((z - x).flatten(1)) <= part.eps) & (not torch.is_grad_enabled())

        standing = Standing(part.predict, x, y, leaves)
        try:
            with _replaced(part, predict=standing):
                return run(x, y, **more)
        except NobodyStands:
            return standing.x_adv

    return leaving


@contextmanager
def _replaced(part: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(part, name) for name in values}
    vars(part).update(values)
    try:
        yield
    finally:
        vars(part).update(before)

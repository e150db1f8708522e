"""Early stopping for pyautoattack's APGD and FAB: a row leaves as soon as they would count it as broken.

Their loops are pyautoattack's own. What changes is the model that they see: it runs the rows that are not yet broken,
and answers for the others. A row's iterates depend on no other row's once its start is drawn, and all random numbers
are drawn before the first pass, so a row that has left changes nothing for those that stay.

Axes: B = rows that an attack was started on, m = those not yet broken, C = classes.
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


#: On a GPU, passes between two that wait for it: rows that have left are run along until then.
LOOK = 5


class AllBroken(Exception):
    """The last row has left."""


class UnbrokenRows:
    """A model that runs only the rows that are not yet broken.

    For a row that has left it returns logits of the right class: the loop then keeps the image that it last noted for
    that row, the one that the row left with. That image is in x_adv (B, c, H, W) too. `left` (B,): who has left; `rows`
    (m,): those that are run.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, leaves: Leaves) -> None:
        self.model, self.y, self.leaves = model, y, leaves
        self.x_adv, self.rows = x.clone(), torch.arange(len(y), device=y.device)
        self.left, self.passes = torch.zeros_like(y, dtype=torch.bool), 0
        self.every = 1 if y.device.type == "cpu" else LOOK

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.y):  # FAB without the rows that it found wrong at once
            return self.model(x)
        own = self.model(x[self.rows])
        right = one_hot(self.y, own.shape[1]).to(own.dtype)
        logits = torch.where(self.left[:, None], right, right.index_copy(0, self.rows, own))
        left = self.leaves(x.detach(), logits.detach().max(1)[1] != self.y)
        self.x_adv = torch.where(left[:, None, None, None], x.detach(), self.x_adv)
        self.left, self.passes = self.left | left, self.passes + 1
        if self.passes % self.every == 0:
            self.rows = (~self.left).nonzero()[:, 0]
            if not len(self.rows):
                raise AllBroken
        return logits


def leave_early(part: Any, ready: nn.Module) -> None:
    """Run a part of AutoAttack on `ready`, a prepared copy of its model; rows leave it if it is APGD or FAB.

    Where the part changed an image that the model still classifies right, only the copy was wrong: the part is then run
    again on the model itself, and what that breaks is added.
    """
    name = "model" if isinstance(part, APGDAttack) else "predict"
    model, perturb = getattr(part, name), part.perturb
    changed: dict[str, Any] = {name: ready}
    for kind, leaving in ((APGDAttack, _apgd), (FABAttack, _fab)):
        if isinstance(part, kind):
            changed["attack_single_run"] = leaving(part)

    def stopped_early(x: Tensor, y: Tensor) -> Tensor:
        with _replaced(part, **changed):
            x_adv: Tensor = perturb(x, y)
        claimed = (x_adv != x).flatten(1).any(1)  # what an attack did not break, it gives back
        with torch.no_grad():
            right = model(x_adv).max(1)[1] == y
        if bool((claimed & right).any()):
            x_adv = torch.where(right[:, None, None, None], perturb(x, y), x_adv)
        return x_adv

    part.perturb = stopped_early


def _apgd(part: Any) -> Callable[..., Any]:
    """APGD's run, from which a row leaves at its first misclassified iterate."""
    run = part.attack_single_run

    def leaving(x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        if part.eps > part.eps_orig:  # in L1 it begins in larger balls, where nothing is broken yet
            return run(x, y, x_init)
        unbroken = UnbrokenRows(part.model, x, y, lambda z, wrong: wrong)
        try:
            with _replaced(part, model=unbroken):
                return run(x, y, x_init)
        except AllBroken:
            return unbroken.x_adv, torch.zeros_like(y, dtype=torch.bool), None, unbroken.x_adv

    return leaving


def _fab(part: Any) -> Callable[..., Tensor]:
    """FAB's run, from which a row leaves at its first misclassified iterate inside the ball."""
    run = part.attack_single_run

    def leaving(x: Tensor, y: Tensor, **more: Any) -> Tensor:
        def leaves(z: Tensor, wrong: Tensor) -> Tensor:
            # iterates are judged without gradients; where it takes one, it has stepped back
            return wrong & (LENGTHS[part.norm]((z - x).flatten(1)) <= part.eps) & (not torch.is_grad_enabled())

        unbroken = UnbrokenRows(part.predict, x, y, leaves)
        try:
            with _replaced(part, predict=unbroken):
                return run(x, y, **more)
        except AllBroken:
            return unbroken.x_adv

    return leaving


@contextmanager
def _replaced(part: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(part, name) for name in values}
    vars(part).update(values)
    try:
        yield
    finally:
        vars(part).update(before)

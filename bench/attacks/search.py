"""Gradient ascent on any loss, while success is judged on the deployed model at every iterate.

Axes: B = examples of the block, m = rows that are attacked, E = experts, C = classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.attacks.block import Block
from bench.pgd import ascend_once, random_start

#: From iterates (m, C, H, W) and their rows in the block (m,) to a value each (m,), which is maximised.
Loss = Callable[[Tensor, Tensor], Tensor]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus the true one (m,): above 0 where logits (m, C) are wrong."""
    own = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]


def halved(eps: float, steps: int) -> list[float]:
    """Step sizes of a trial: ε/4 for the first half of the steps, then ε/16."""
    return [eps / 4] * (steps - steps // 2) + [eps / 16] * (steps // 2)


@dataclass
class Search:
    """What has been found in one block.

    standing (B,): where the deployed model has not been broken. x_adv (B, C, H, W): what broke it, or the last iterate.
    """

    block: Block
    standing: Tensor = field(init=False)
    x_adv: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.standing, self.x_adv = self.block.correct.clone(), self.block.x.clone()

    @property
    def rows(self) -> Tensor:
        """Rows of the block that stand, (m,)."""
        return self.standing.nonzero()[:, 0]

    def noise(self) -> Tensor:
        """Uniform in [−1, 1], (B, C, H, W): drawn for all rows, so that who still stands changes no draw."""
        return 2 * torch.rand(self.block.x.shape).to(self.block.x.device) - 1

    def uniform(self) -> Tensor:
        """A random point of the ball around each image of the block, in the box: (B, C, H, W)."""
        return random_start(self.block.x, self.block.threat_model, self.noise())

    def test(self, z: Tensor, rows: Tensor) -> Tensor:
        """Keep the iterates z (m, C, H, W), and note which the deployed model gets wrong; those it gets right, (m,)."""
        with torch.no_grad():
            right = self.block.model(z).argmax(1) == self.block.y[rows]
        self.x_adv[rows] = z.detach()
        self.standing[rows[~right]] = False
        return right

    def confirm(self, rows: Tensor) -> None:
        """Ask the deployed model of all rows (m,) at once, as they are handed on: what it then gets right stands.

        Iterates are judged in batches that shrink, and a model may round otherwise in each. What is not confirmed is
        left to the next attack.
        """
        with torch.no_grad():
            self.standing[rows] = self.block.model(self.x_adv[rows]).argmax(1) == self.block.y[rows]

    def climb(self, loss: Loss, start: Tensor, steps: Sequence[float], rows: Tensor) -> None:
        """Ascend from start (B, C, H, W) by the given step sizes; a row leaves once the deployed model is wrong."""
        rows = rows[self.standing[rows]]
        z = start[rows]
        for step in [*steps, None]:
            right = self.test(z, rows)
            rows, z = rows[right], z[right]
            if step is None or not len(rows):
                return
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(z, rows).sum(), z)
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
            z = ascend_once(z.detach(), gradient, self.block.x[rows], self.block.threat_model, step)

"""Suite `noise`: random corners of the ball, as weak as an attack can be."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from bench.attacks.block import Attempt, Block
from bench.registry import SUITES
from bench.spec import Norm
from bench.suites.base import Suite


@SUITES.register("noise")
class Noise(Suite):
    """`draws` points x ± ε for each example; the first that breaks it is its answer.

    What is returned is checked by the harness: the ball, the box and the model's prediction.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("Linf",)

    draws: int = Field(default=10, gt=0)

    def attack(self, block: Block) -> Iterator[Attempt]:
        x, y, rows = block.x[block.rows], block.y[block.rows], block.rows
        found = x.clone()
        for _ in range(self.draws):
            sign = torch.randint(0, 2, x.shape).to(x.device) * 2 - 1
            z = (x + block.threat_model.eps * sign).clamp(0, 1)
            with torch.no_grad():
                wrong = (block.model(z).argmax(1) != y) & (found == x).flatten(1).all(1)
            found[wrong] = z[wrong]
        yield block.attempt("noise", rows, found)

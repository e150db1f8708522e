"""PGD (Madry et al. 2018) as torchattacks has it: 50 steps of ε/4 from a random start, the last iterate."""

from collections.abc import Iterator
from typing import ClassVar

import torchattacks
from pydantic import Field
from torch import nn

from bench.attacks.block import Attempt, Block
from bench.registry import SUITES
from bench.spec import Norm
from bench.suites.base import Cost, Suite


@SUITES.register("pgd")
class PGD(Suite):
    """`step_size` is in pixels of [0, 1]; unset, it is ε/4."""

    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2")
    needs: ClassVar[tuple[str, ...]] = ("gradients",)

    steps: int = Field(default=50, gt=0, description="gradient steps")
    step_size: float | None = Field(default=None, gt=0, description="in pixels of [0, 1]; None: ε/4")

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost:
        return Cost(self.steps, self.steps)

    def attack(self, block: Block) -> Iterator[Attempt]:
        eps, rows = block.threat_model.eps, block.rows
        block.on_attack("pgd", len(rows), len(rows))
        kind = torchattacks.PGD if block.threat_model.norm == "Linf" else torchattacks.PGDL2
        attack = kind(block.model, eps=eps, alpha=self.step_size or eps / 4, steps=self.steps)
        yield block.attempt("pgd", rows, attack(block.x[rows], block.y[rows]))

"""What the tests of the suites share."""

from collections.abc import Callable
from typing import Any

import pytest
from pyautoattack import AutoAttack

from bench.spec import ThreatModel
from bench.suites.base import Block, PassCounter


@pytest.fixture
def block_of(planted: Any) -> Callable[..., Block]:
    """block_of(model, data): the whole of `data` as one attack block; everything that is classified right stands."""

    def build(
        model: Any, data: Any, *, num_classes: int = 10, norm: Any = "Linf", eps: float | None = None, seed: int = 0
    ) -> Block:
        correct = model(data.x).argmax(1) == data.y
        threat = ThreatModel(norm=norm, eps=eps or planted.balls[norm])
        return Block(model, data.x, data.y, correct, num_classes, threat, seed, PassCounter(model))

    return build


@pytest.fixture
def cut_autoattack(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """cut_autoattack(steps, targets, queries): from here on pyautoattack's standard version has a smaller budget.

    It is pyautoattack's own, so that a direct call has it as well.
    """
    standard = AutoAttack._set_version

    def cut(steps: int, targets: int, queries: int) -> None:
        def set_version(self: Any, version: str = "standard") -> None:
            standard(self, version)
            for part in (self.apgd, self.apgd_targeted):
                part.n_iter = part.n_iter_orig = steps
            self.fab.n_iter = 2 * steps
            self.apgd_targeted.n_target_classes, self.fab.n_target_classes = targets, 2 * targets
            self.square.n_queries = queries

        monkeypatch.setattr(AutoAttack, "_set_version", set_version)

    return cut

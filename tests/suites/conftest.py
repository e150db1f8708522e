"""What the tests of the suites share."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.spec import ThreatModel
from bench.suites.base import Block, PassCounter


@pytest.fixture
def block_of(planted: Any) -> Callable[..., Block]:
    """block_of(model, data): the whole of `data` as one attack block; everything that is classified right stands."""

    def build(
        model: Any,
        data: Any,
        *,
        num_classes: int = 10,
        dataset: str = "planted",
        norm: Any = "Linf",
        eps: float | None = None,
        seed: int = 0,
    ) -> Block:
        correct = model(data.x).argmax(1) == data.y
        threat = ThreatModel(norm=norm, eps=eps or planted.balls[norm])
        return Block(model, data.x, data.y, correct, num_classes, dataset, threat, seed, PassCounter(model))

    return build


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probes, for a model that counts how often it is called."""
    from bench import evaluate

    monkeypatch.setattr(evaluate, "probe", lambda *_, **__: [])

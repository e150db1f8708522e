"""One run to be made, and its blocks."""

from typing import Any

import pytest
import torch

from bench.datasets.base import EvalSet
from bench.job import Job
from bench.spec import RunSpec, ThreatModel


@pytest.mark.parametrize(
    ("examples", "size", "expected"),
    [(7, 3, [(0, 3), (3, 6), (6, 7)]), (6, 3, [(0, 3), (3, 6)]), (2, 3, [(0, 2)]), (1, 1, [(0, 1)])],
)
def test_blocks_are_consecutive_examples_and_the_last_has_what_is_left(
    examples: int, size: int, expected: list[tuple[int, int]]
):
    data = EvalSet(torch.zeros(examples, 1, 1, 1), torch.zeros(examples).long(), torch.arange(examples), "f", "")
    threat = ThreatModel(norm="Linf", eps=0.1)
    fields: dict[str, Any] = {"model": "m", "dataset": "digits", "suite": "pgd", "suite_version": 1}
    spec = RunSpec(**fields, threat_model=threat, n_examples=examples, batch_size=size)
    subject: Any = None
    method: Any = None
    assert [(block.start, block.stop) for block in Job(spec, subject, method, data, 2).blocks] == expected

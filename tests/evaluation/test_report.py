"""What a block tells beside its rows, added up by hand and through JSON."""

import json

import torch

from bench.attacks.block import Attempt
from bench.evaluation.report import BlockReport
from bench.evaluation.verdicts import Judgement
from bench.models.deployed import Prediction


def attempt(attack: str, forwards: int, backwards: int) -> Attempt:
    return Attempt(attack, torch.arange(3), torch.zeros(3, 1, 1, 1), True, None, "F", forwards, backwards)


def judged(errors: int, unconfirmed: int) -> Judgement:
    """Of three answers."""
    first = torch.arange(3)
    nothing = torch.zeros(3)
    prediction = Prediction(first, first >= 0, first)
    return Judgement(prediction, nothing, nothing, first < errors, first < 0, first < unconfirmed)


def test_attempts_add_up_by_attack():
    report = BlockReport()
    report.add(attempt("pgd", 5, 3), judged(errors=0, unconfirmed=2))
    report.add(attempt("pgd", 1, 0), judged(errors=0, unconfirmed=1))
    report.add(attempt("square", 7, 0), judged(errors=2, unconfirmed=0))
    assert report.passes == {"pgd": {"forwards": 6, "backwards": 3}, "square": {"forwards": 7, "backwards": 0}}
    assert report.unconfirmed == {"pgd": 3, "square": 0}
    assert report.errors == ["square: 2 answers are outside the ball or not finite"]
    assert report.run_flags() == ("pgd: 3 successes that the re-check does not confirm",)


def test_blocks_merge_through_json_and_nothing_is_told_twice():
    first = BlockReport(flags=["b"], model_flags=["m"], errors=["e"], attacks=["pgd"], seconds=1.5, thread_counts=[2])
    first.add(attempt("pgd", 5, 3), judged(errors=0, unconfirmed=1))
    second = BlockReport(flags=["a", "b"], errors=["f", "e"], attacks=["warm-start", "pgd"], seconds=2)
    second.thread_counts = [1]
    second.add(attempt("pgd", 1, 1), judged(errors=0, unconfirmed=1))
    second.add(attempt("warm-start", 2, 0), judged(errors=0, unconfirmed=0))
    blocks = [BlockReport.model_validate(json.loads(json.dumps(block.model_dump()))) for block in (first, second)]
    merged = BlockReport.merge(blocks)
    assert merged.passes == {"pgd": {"forwards": 6, "backwards": 4}, "warm-start": {"forwards": 2, "backwards": 0}}
    assert (merged.errors, merged.attacks, merged.model_flags) == (["e", "f"], ["pgd", "warm-start"], ["m"])
    assert merged.seconds == 3.5
    assert merged.run_flags() == (
        "a", "attack blocks ran with 1 and 2 threads", "b", "pgd: 2 successes that the re-check does not confirm",
    )  # fmt: skip
    assert (first.passes, first.errors) == ({"pgd": {"forwards": 5, "backwards": 3}}, ["e"])

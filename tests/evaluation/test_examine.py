"""How a block becomes verdict rows: what a suite does to its images changes none of them."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.attacks.block import Attempt, Block
from bench.suites.base import Suite


class Overwriting(Suite):
    """Blackens the images that it was given, and calls that its adversarial examples."""

    def attack(self, block: Block) -> Iterator[Attempt]:
        block.x.zero_()
        yield block.attempt("overwriting", block.rows, block.x[block.rows])


def test_a_suite_that_works_in_place_changes_no_verdict_and_no_data(planted: Any, score: Any):
    data = planted.data()
    before = data.x.clone()
    result, rows = score(planted.robust(), Overwriting(), data)
    assert torch.equal(data.x, before)
    attacked = rows[rows["attack"] == "overwriting"]
    assert len(attacked) == 23
    assert (attacked["linf"] > 0.2).all()  # from the image as it was, and outside the ball
    assert set(attacked["status"]) == {"error"}
    assert (result.clean_accuracy.value, result.robust_accuracy.value, result.errors) == (23 / 24, 0, 23)


class Forgetful(Suite):
    """Attacks every image but the first two that the model gets right."""

    def attack(self, block: Block) -> Iterator[Attempt]:
        rows = block.rows[2:]
        yield block.attempt("forgetful", rows, block.x[rows])


def test_what_no_attack_was_given_is_an_error_and_not_robust(planted: Any, score: Any):
    result, rows = score(planted.robust(), Forgetful(), planted.data())
    assert (result.clean_accuracy.value, result.robust_accuracy.value, result.errors) == (23 / 24, 21 / 24, 2)
    assert set(rows.loc[rows["status"] == "error", "attack"]) == {result.spec.suite}

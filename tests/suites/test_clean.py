"""The suite that attacks nothing."""

from typing import Any


def test_clean_has_one_row_an_example_and_no_attack(planted: Any, score: Any):
    result, rows = score(planted.broken(), "clean")
    assert result.robust_accuracy == result.clean_accuracy
    assert (list(rows["idx"]), set(rows["attack"])) == (list(range(24)), {"clean"})
    assert (result.accuracy_after, result.passes, result.flags) == ({"clean": 23 / 24}, {}, ())
    assert (rows["adv_pred"] == rows["clean_pred"]).all()
    assert (rows[["linf", "l2"]] == 0).all(axis=None)

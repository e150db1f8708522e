"""Metrics against numbers worked out by hand, and their laws on random rows."""

from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from bench.results.metrics import (
    accuracy_after,
    adjusted,
    clean_by_example,
    first_broken_by,
    holm,
    mcnemar,
    robust_by_example,
    sign_flip,
    tarone,
    unique_kills,
    wilson,
)
from bench.results.table import Table

# a busy machine is slow at times, and scipy's first import always
randomly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)


def rows(*quads: tuple[int, str, str, bool]) -> pd.DataFrame:
    frame = pd.DataFrame(quads, columns=["idx", "attack", "target", "robust"])
    return frame.assign(clean_correct=frame["robust"] | (frame["attack"] != "clean"))


def test_wilson_by_hand():
    # n = 10, k = 5, z = 1.959964, z² = 3.841459: centre (0.5 + 0.192073) / 1.384146 = 0.5,
    # half width 1.959964 / 1.384146 · sqrt(0.25/10 + 3.841459/400) = 1.416010 · sqrt(0.034604) = 0.263408
    assert wilson(5, 10) == pytest.approx((0.236592, 0.763408), abs=1e-5)
    # k = 0: low is 0, high is z² / (n + z²) = 3.841459 / 13.841459
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-5)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(1 / 32)  # all five coins fall one way
    assert mcnemar(0, 5) == pytest.approx(1.0)  # P(Bin ≥ 0): a gain is no loss
    assert mcnemar(4, 1) == pytest.approx((5 + 1) / 32)  # C(5,4) + C(5,5) of 2^5
    assert mcnemar(3, 3) == pytest.approx((20 + 15 + 6 + 1) / 64)
    for lost, gained in ((1, 0), (12, 30), (520, 480), (900, 1100), (5200, 4800), (501_000, 499_000), (0, 9)):
        as_scipy_has_it = binomtest(lost, lost + gained, alternative="greater").pvalue
        assert mcnemar(lost, gained) == pytest.approx(as_scipy_has_it, rel=1e-9)
    assert mcnemar(0, 5, "two-sided") == mcnemar(5, 0, "two-sided") == pytest.approx(2 / 32)


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.2; running maximum, then the order given
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])  # 1 · 0.011 may not fall below 2 · 0.01
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_sign_flip_by_hand():
    # one change an example: McNemar's test
    assert sign_flip(np.array([1, 1, 1, -1, 0])) == pytest.approx(mcnemar(3, 1))
    # |changes| 2, 1, 1 sum to 2 or more for the signs +++ (4), ++- (2), +-+ (2): 3 of 8
    assert sign_flip(np.array([2, 1, -1])) == pytest.approx(3 / 8)
    assert sign_flip(np.array([3, 3, 2])) == pytest.approx(1 / 8)
    assert sign_flip(np.array([0, 0])) == 1.0


@randomly
@given(st.lists(st.integers(-4, 4), max_size=9))
def test_sign_flip_counts_all_patterns_of_signs(changes: list[int]):
    sums = [
        sum(sign * abs(c) for sign, c in zip(signs, changes, strict=True))
        for signs in product((1, -1), repeat=len(changes))
    ]
    assert sign_flip(np.array(changes, dtype="int64")) == pytest.approx(
        np.mean([total >= sum(changes) for total in sums])
    )


def test_tests_that_cannot_become_significant_need_no_part_of_alpha():
    # ½⁵ = 0.031, ½⁶ = 0.016, ½⁹ = 0.002: two can get below 0.05 / 2, and 0.05 / 3 leaves them as well
    assert tarone([5, 6, 9, 0, 1], 0.05) == 2
    assert tarone([5, 0], 0.05) == 1
    assert tarone([], 0.05) == 1
    assert adjusted([0.04, 0.02, 0.002, 1.0], [5, 6, 9, 0], 0.05) == pytest.approx([0.08, 0.02, 0.004, 1.0])


def test_an_example_is_robust_if_no_row_on_f_breaks_it():
    frame = rows(
        *[(i, "clean", "F", i != 2) for i in range(4)],
        *[(0, "pgd", "F", True), (1, "pgd", "F", False)],
        (2, "pgd", "F", True),  # whatever an attack did: a clean-wrong example is not robust
        *[(0, "apgd", "F", True), (3, "apgd", "F", True)],
        (3, "pgd", "expert:1", False),  # an expert alone is not the deployed model
    )
    assert robust_by_example(Table.of(frame)).tolist() == [True, False, False, True]
    assert clean_by_example(Table.of(frame)).tolist() == [True, True, False, True]
    # whatever the order of the rows, the examples are in that of their idx
    assert robust_by_example(Table.of(frame[::-1])).tolist() == [True, False, False, True]


def test_unique_kills_by_hand():
    given_rows = [
        # idx, attack, target, clean_correct, robust, status
        *[(idx, "clean", "F", idx != 5, idx != 5, "ok") for idx in range(6)],
        *[(0, "a", "F", True, False, "ok")] * 2,  # a alone, twice: two seeds
        (0, "b", "F", True, True, "ok"),
        (1, "a", "F", True, False, "ok"),  # both
        (1, "b", "F", True, False, "ok"),
        (2, "a", "F", True, True, "ok"),
        (2, "b", "F", True, False, "ok"),  # b alone
        (3, "a", "F", True, True, "ok"),
        (3, "b", "F", True, False, "error"),  # unknown is not broken
        (4, "a", "F", True, True, "ok"),
        (4, "b", "F", True, True, "ok"),
        (4, "b", "R", True, False, "ok"),  # not F
        (5, "b", "F", False, False, "ok"),  # wrong from the start
    ]
    frame = pd.DataFrame(given_rows, columns=["idx", "attack", "target", "clean_correct", "robust", "status"])
    assert unique_kills(Table.of(frame), ["a", "b"]) == {"a": 1, "b": 1}
    # b has not met example 0, c none: what a broke there nobody knows to be a's alone
    assert unique_kills(Table.of(frame[(frame["idx"] != 0) | (frame["attack"] != "b")]), ["a", "b"]) is None
    assert unique_kills(Table.of(frame), ["a", "b", "c"]) is None


def test_what_was_first_broken_by_which_attack_by_hand():
    def run(**marks: str) -> tuple[Table, list[str]]:
        """One letter an example: 1 robust, 0 broken, `.` not met."""
        given_rows = [
            (idx, name, "F", True, mark == "1", "ok")
            for name, letters in {"clean": "1111", **marks}.items()
            for idx, mark in enumerate(letters)
            if mark != "."
        ]
        columns = ["idx", "attack", "target", "clean_correct", "robust", "status"]
        return Table.of(pd.DataFrame(given_rows, columns=columns)), list(marks)

    assert first_broken_by([run(a="0011", b="..01")]) == {"a": 2, "b": 1}
    assert first_broken_by([run(a="0011", b="0001")]) == {"a": 2, "b": 1}  # b attacks all: a was still first
    # a second seed: example 0 has been broken, 3 has not
    assert first_broken_by([run(a="0011", b="..11"), run(a="1110", b="001.")]) == {"a": 3}


def test_accuracy_after_by_hand():
    # examples 0..3; 3 is clean-wrong, `b` breaks 0, `a` breaks 1; `a` runs after `b` and sees survivors alone
    frame = rows(
        *[(i, "clean", "F", i != 3) for i in range(4)],
        *[(0, "b", "F", False), (1, "b", "F", True), (2, "b", "F", True)],
        *[(1, "a", "F", False), (2, "a", "F", True)],
        (2, "parts", "S", False),
    )
    table = Table.of(frame)
    after = accuracy_after(table)
    assert list(after.items()) == [("clean", 0.75), ("b", 0.5), ("a", 0.25)]
    # the order changes what is left in between: example 0 has no row for `a` and keeps its state
    assert list(accuracy_after(table, ["a", "b"]).items()) == [("clean", 0.75), ("a", 0.5), ("b", 0.25)]
    # `c` found nobody to attack, so it has no row at all
    assert accuracy_after(table, ["b", "a", "c"])["c"] == 0.25


ATTACKS = ("a", "b", "c")


@st.composite
def verdicts(draw: st.DrawFn) -> pd.DataFrame:
    found = []
    for i in range(draw(st.integers(1, 8))):
        found.append((i, "clean", "F", draw(st.booleans())))
        found += [
            (i, name, draw(st.sampled_from("FS")), draw(st.booleans()))
            for name in draw(st.sets(st.sampled_from(ATTACKS)))
        ]
    return rows(*found)


@pytest.mark.slow
@randomly
@given(verdicts())
def test_worst_case_is_below_every_single_attack(frame: pd.DataFrame):
    worst = robust_by_example(Table.of(frame)).mean()
    for attack in ATTACKS:
        assert worst <= robust_by_example(Table.of(frame[frame["attack"].isin(["clean", attack])])).mean()


@randomly
@given(verdicts(), st.permutations(ATTACKS))
def test_accuracy_after_falls_from_clean_to_worst(frame: pd.DataFrame, order: list[str]):
    table = Table.of(frame)
    after = list(accuracy_after(table, order).values())
    assert all(later <= earlier for earlier, later in pairwise(after))
    assert after[0] == clean_by_example(table).mean()
    assert after[-1] == pytest.approx(robust_by_example(table).mean())


@randomly
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_is_never_below_the_raw_value(p: list[float]):
    adjusted = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, adjusted, strict=True))
    ranked = [new for _, new in sorted(zip(p, adjusted, strict=True))]
    assert ranked == sorted(ranked)


@randomly
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_fraction_inside_zero_and_one(case: tuple[int, int]):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1

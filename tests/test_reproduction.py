"""docs/reproduction.md is what the committed results give, and its verdicts follow from them."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/reproduction.py")))


@pytest.mark.slow
def test_the_page_is_what_the_results_give(script: Any):
    assert script.page() == script.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("only_first", "only_second", "verdict"),
    [
        (20, 1, "holds for these models"),
        (1, 20, "does not hold for these models"),
        (3, 1, "cannot be told at this scale"),
        (0, 0, "cannot be told at this scale"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_chance(script: Any, only_first: int, only_second: int, verdict: str):
    both = 30
    first = pd.Series([True] * (both + only_first) + [False] * only_second)
    second = pd.Series([True] * both + [False] * only_first + [True] * only_second)
    test = script.Test("SA", "a", "b", first, second)
    assert test.changed == (only_first, only_second)
    claim = script.Claim("title", "asked", [test])
    ((_, (adjusted,)),) = script.adjusted([(None, [claim])])
    assert adjusted.tests[0].verdict == verdict

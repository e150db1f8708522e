"""What a result is: what the rows amount to, and which rows there can be."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from verdict_rows import ROWS, frame, result, spec

from bench.results.schema import VERDICT_COLUMNS, check_fit, check_verdicts, suite_label
from bench.results.store import Run
from bench.results.table import Table
from bench.spec import ThreatModel


def test_result_is_what_the_rows_amount_to():
    made = result(frame(clean="1110", pgd="1e0."), seed=3)
    assert (made.clean_accuracy.value, made.robust_accuracy.value, made.errors) == (0.75, 0.25, 1)
    # Wilson, k = 1, n = 4: centre (0.25 + 0.480182) / 1.960365 = 0.372472, half width 0.326884
    assert (made.robust_accuracy.low, made.robust_accuracy.high) == pytest.approx((0.045587, 0.699358), abs=1e-5)
    assert made.accuracy_after == {"clean": 0.75, "pgd": 0.25}
    assert made.run == made.spec.run_key("c" * 64, "f" * 16)
    assert (made.work, made.subject) == (result(ROWS).work, result(ROWS).subject)  # neither knows the seed
    with pytest.raises(ValueError, match="rows of 4 examples, not of 5"):
        result(ROWS, n_examples=5)


@pytest.mark.parametrize(
    ("norm", "suite", "distance", "fits"),
    [
        ("Linf", "pgd", {"linf": 0.1}, False),
        ("Linf", "pgd", {"linf": 0.3}, True),  # out of the ball
        ("L2", "pgd", {"l2": 0.1, "linf": 0.3}, False),
        ("L1", "pgd", {"linf": 0.1}, True),  # whose distance no row has
        ("Linf", "torchattacks:FGSM", {"linf": 0.1}, True),  # whose answer may lie out of the box
    ],
)
def test_a_row_is_not_robust_where_its_image_is_in_the_ball_and_of_another_class(
    norm: Any, suite: str, distance: dict[str, float], fits: bool
):
    rows = frame(clean="1111", pgd="1111")
    attacked = rows.index[rows["attack"] == "pgd"][0]
    rows.loc[attacked, ["adv_pred"]] = rows.loc[attacked, "label"] + 1
    rows.loc[attacked, list(distance)] = list(distance.values())
    made = result(rows, suite=suite, threat_model=ThreatModel(norm=norm, eps=0.2))
    with nullcontext() if fits else pytest.raises(ValueError, match="a row is robust although it has an image in the"):
        check_fit(made, Table.of(rows))


def broken_rows(name: str) -> pd.DataFrame:
    match name:
        case "type":
            return ROWS.astype({"label": "int32"})
        case "extra":
            return ROWS.assign(more=1)
        case "order":
            return ROWS[ROWS.columns[::-1]]
        case "empty":
            return ROWS.iloc[:0]
        case "missing":
            return ROWS.assign(attack=ROWS["attack"].where(ROWS.index != 2))
        case "missing number":
            return ROWS.astype({"label": "Int64"}).assign(label=ROWS["label"].astype("Int64").where(ROWS.index != 2))
        case "status":
            return ROWS.assign(status="crash").astype(VERDICT_COLUMNS)
        case "error is robust":
            return ROWS.assign(status="error").astype(VERDICT_COLUMNS)
        case "wrong is robust":
            return ROWS.assign(clean_correct=False)
        case "clean twice":
            return pd.concat([ROWS, ROWS.iloc[:1]])
        case "no clean":
            return ROWS.iloc[1:]
        case _:
            return ROWS.assign(input_hash=ROWS["input_hash"].where(ROWS["attack"] == "clean", "other"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("type", "'label', 'int32'"),
        ("extra", "'more'"),
        ("order", "another order"),
        ("empty", "exactly one clean row"),
        ("missing", "attack is missing in a row"),
        ("missing number", "'label', 'Int64'"),
        ("status", "status is neither"),
        ("error is robust", "its attack failed"),
        ("wrong is robust", "misclassified"),
        ("clean twice", "exactly one clean row"),
        ("no clean", "exactly one clean row"),
        ("two hashes", "one input hash"),
    ],
)
def test_rows_that_no_run_can_have(name: str, expected: str):
    check_verdicts(Table.of(ROWS))
    with pytest.raises(ValueError, match=expected):
        check_verdicts(Table.of(broken_rows(name)))


def test_examples_may_be_in_any_order():
    check_verdicts(Table.of(ROWS.iloc[::-1].reset_index(drop=True)))


def test_names_say_what_is_not_default(tmp_path: Path):
    assert suite_label(spec()) == "pgd"
    assert suite_label(spec(suite_params={"steps": 10, "step_size": 0.1})) == "pgd[step_size=0.1, steps=10]"
    made = result(ROWS, alpha=0.7)
    assert str(Run(made, tmp_path)) == f"pgd on m (α 0.7), digits Linf 8/255 (run {made.run})"

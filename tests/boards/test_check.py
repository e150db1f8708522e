"""The regression check: planted regressions are found, chance is none, and what cannot be compared is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.boards.check import Comparison, check, render
from bench.errors import UnusableInput
from bench.results.schema import VERDICT_COLUMNS, Result
from bench.results.store import RunFolder, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

STATUS = {"1": "ok", "0": "ok", "e": "error"}
REST = (0.0, 0.0, -1, -1)  # distances and experts


def save(root: Path, pgd: str, clean: str | None = None, **fields: Any) -> Result:
    """A finished run whose rows come from one letter an example: 1 right, 0 wrong, e error."""
    clean = clean or "1" * len(pgd)
    checkpoint, finished = fields.pop("checkpoint", "c"), fields.pop("finished", "2030-01-01T00:00:00Z")
    fingerprint, salt = fields.pop("fingerprint", "f" * 16), fields.pop("salt", 0)
    rows = pd.DataFrame(
        [
            (i, f"{i + salt:016x}", 0, attack, "F", 0, 0, right == "1", right + mark == "11", *REST, STATUS[mark])
            for attack, marks in (("clean", clean), ("pgd", pgd))
            for i, (mark, right) in enumerate(zip(marks, clean, strict=True))
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    given = {"model": "moe-at", "dataset": "digits", "suite": "pgd", "suite_version": 1, "n_examples": len(pgd)}
    spec = RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})
    info = ModelInfo(name=spec.model, architecture="cnn", checkpoint_sha256=checkpoint * 64)
    provenance = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": finished}
    result = Result.from_rows(spec, info, fingerprint, rows, **provenance)
    RunFolder(run_folder(root, spec, result.run)).finish(result, rows)
    return result


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tmp_path / "old"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "new"


def row(report: Any, measure: str, model: str = "moe-at") -> Comparison:
    (found,) = (row for row in report.rows if (row.measure, row.model) == (measure, model))
    return found


def refusal(old: Path, new: Path, **options: float) -> str:
    with pytest.raises(UnusableInput) as refused:
        check(old, new, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_planted_regression_is_named(old: Path, new: Path):
    # of 20: 9 lost, 1 gained. p = P(Bin(10, ½) ≥ 9) = (10 + 1) / 1024 = 0.0107
    before = save(old, "1" * 15 + "00000")
    after = save(new, "0" * 9 + "1" * 7 + "0000", checkpoint="d")
    report = check(old, new)
    found = row(report, "robust")
    assert (found.n, found.baseline, found.now, found.lost, found.gained) == (20, 0.75, 0.35, 9, 1)
    assert found.p == found.p_adjusted == pytest.approx(11 / 1024)
    assert found.drop == pytest.approx(0.4)
    assert found.regressed
    assert report.regressed
    assert not row(report, "clean_correct").regressed
    assert report.warnings == []
    text = render(report)
    (line,) = (line for line in text.splitlines() if line.startswith("regression"))
    assert line == (
        "regression: pgd on moe-at: robust fell by 40.00 percentage points (75.00 to 35.00), b = 9, c = 1, "
        f"p = 0.011 (Holm; 0.011 alone), run {before.run} to run {after.run}"
    )
    assert text.count("REGRESSION") == 1


def test_a_loss_of_clean_accuracy_is_a_regression_too(old: Path, new: Path):
    save(old, "1" * 10)
    save(new, "1" * 10, clean="0" * 6 + "1" * 4, checkpoint="d")
    report = check(old, new)
    assert row(report, "clean_correct").regressed
    assert row(report, "clean_correct").lost == 6


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1" * 10 + "0" * 10, "1" * 10 + "0" * 10),  # nothing changed
        ("0" * 10 + "1" * 10, "1" * 20),  # a gain
        ("1" * 20, "0" * 4 + "1" * 16),  # a drop of 20 points that p = 1/16 does not prove
        ("1" * 10 + "0" * 10, "0" * 10 + "1" * 10),  # as many gained as lost
    ],
)
def test_what_is_no_regression(old: Path, new: Path, before: str, after: str):
    save(old, before)
    save(new, after, checkpoint="d")
    report = check(old, new)
    assert not report.regressed
    assert "regression" not in render(report).lower()


def test_a_drop_within_the_tolerance_is_none_however_certain(old: Path, new: Path):
    # 29 of 100 lost, p = 2^-29; 0.29 · 100 is 28.999999999999996 in floating point
    save(old, "1" * 100)
    save(new, "0" * 29 + "1" * 71, checkpoint="d")
    assert not check(old, new, max_drop=0.29).regressed
    assert check(old, new, max_drop=0.28).regressed


def test_what_was_gained_makes_up_for_what_was_lost(old: Path, new: Path):
    # of 400: 40 lost, 20 gained, p = P(Bin(60, ½) ≥ 40) = 0.0067; but 20 / 400 = 0.05 is tolerated
    save(old, "1" * 40 + "0" * 20 + "1" * 340)
    save(new, "0" * 40 + "1" * 20 + "1" * 340, checkpoint="d")
    report = check(old, new, max_drop=0.05)
    assert row(report, "robust").p < 0.01
    assert not report.regressed


def test_holm_changes_a_verdict(old: Path, new: Path):
    # moe-at: 5 lost, p = 1/32 = 0.031 < 0.05 alone
    save(old, "1" * 20)
    save(new, "0" * 5 + "1" * 15, checkpoint="d")
    assert check(old, new).regressed
    # beside a run without a change: 2 · 1/32 = 0.0625
    for root in (old, new):
        save(root, "1" * 20, model="dense-at")
    report = check(old, new)
    assert row(report, "robust").p == pytest.approx(1 / 32)
    assert row(report, "robust").p_adjusted == pytest.approx(2 / 32)
    assert not report.regressed
    assert check(old, new, alpha=0.07).regressed


def test_too_few_examples_are_a_warning(old: Path, new: Path):
    # ½^5 = 0.031 < 0.05 for one run; for two 0.0625
    save(old, "1" * 5)
    run = save(new, "0" * 5, checkpoint="d")
    report = check(old, new)
    assert report.regressed
    assert report.warnings == []
    for root in (old, new):
        save(root, "1" * 9, model="dense-at", fingerprint="9" * 16)
    report = check(old, new)
    assert not report.regressed
    warnings = [
        f"pgd on {run.spec.model}: {measure} of the baseline is 5 of 5, too few"
        for measure in ("robust", "clean_correct")
    ]
    assert [warning[: len(start)] for warning, start in zip(report.warnings, warnings, strict=True)] == warnings
    assert f"warning: {report.warnings[0]}" in render(report)


def test_a_baseline_with_little_to_lose_is_a_warning_however_many_examples_it_has(old: Path, new: Path):
    # of 3 robust examples at most 3 can be lost: ½³ = 0.125 is not below 0.05
    save(old, "111" + "0" * 57)
    save(new, "0" * 60, checkpoint="d")
    report = check(old, new)
    assert not report.regressed
    (warning,) = report.warnings
    assert "robust of the baseline is 3 of 60, too few to show any regression at alpha 0.05" in warning


def test_several_checkpoints_of_one_work_are_refused(old: Path, new: Path):
    # a model that was rolled back has the older run, which is reported and not repeated: the last one is not it
    save(old, "1" * 10, finished="2030-01-02T00:00:00Z", checkpoint="a")
    save(new, "0" * 10, finished="2030-01-01T00:00:00Z", checkpoint="a")
    save(new, "1" * 10, finished="2030-01-03T00:00:00Z", checkpoint="b")
    with pytest.raises(UnusableInput, match=r"the results have 2 such runs, of other checkpoints: keep one of "):
        check(old, new)


def test_seeds_and_alphas_are_paired_with_their_own(old: Path, new: Path):
    for seed in (0, 1):
        for alpha in (0.5, 0.7):
            save(old, "1" * 10, model="dual", seed=seed, alpha=alpha)
            pgd = "0" * 10 if (seed, alpha) == (1, 0.7) else "1" * 10
            bad = save(new, pgd, model="dual", seed=seed, alpha=alpha, checkpoint="d")
    report = check(old, new)
    assert len(report.rows) == 8
    (found,) = (row for row in report.rows if row.regressed)
    assert (found.model, found.run) == ("dual α 0.7", bad.run)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 3}, "seed 0 instead of 3"),
        ({"suite_version": 2}, "suite_version 1 instead of 2"),
        ({"suite_params": {"steps": 10}}, "suite_params {} instead of {'steps': 10}"),
        ({"batch_size": 64}, "batch_size 128 instead of 64"),
        ({"alpha": 0.5}, "alpha None instead of 0.5"),
        ({"fingerprint": "0" * 16}, f"fingerprint {'f' * 16} instead of {'0' * 16}"),
        ({"pgd": "1" * 8, "fingerprint": "0" * 16}, "n_examples 10 instead of 8, fingerprint"),
    ],
)
def test_unlike_runs_are_refused_by_field(old: Path, new: Path, fields: dict[str, Any], said: str):
    save(old, "1" * 10)
    save(old, "1" * 10, seed=9, suite_version=9, batch_size=9, alpha=0.9)  # further off than the first
    save(old, "1" * 10, model="dense-at")
    save(new, "1" * 10, model="dense-at")
    run = save(new, **{"pgd": "1" * 10, **fields})
    message = refusal(old, new)
    assert message.startswith("no baseline for pgd")
    assert run.run in message
    assert f"the nearest has {said}" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "dual"},
        {"suite": "autoattack"},
        {"dataset": "cifar10"},
        {"threat_model": ThreatModel(norm="L2", eps=0.2)},
        {"threat_model": ThreatModel(norm="Linf", eps=0.1)},
    ],
)
def test_a_run_without_counterpart_is_refused_on_both_sides(old: Path, new: Path, fields: dict[str, Any]):
    save(old, "1" * 10)
    save(new, "1" * 10)
    save(new, "1" * 10, **fields)
    message = refusal(old, new)
    assert message.startswith("no baseline for ")
    assert "the nearest" not in message
    # a check that silently stops measuring is none
    assert refusal(new, old).startswith("no results for ")


def test_the_refusal_says_the_command(old: Path, new: Path):
    save(old, "1" * 10)
    save(new, "1" * 10)
    params = {"steps": 10, "loss": "dlr", "flip": True}
    threat = ThreatModel(norm="L2", eps=8 / 255)
    save(
        new,
        "1" * 10,
        model="dual",
        alpha=0.7,
        suite_params=params,
        threat_model=threat,
        seed=2,
        batch_size=5,
        warm_start=True,
    )
    assert refusal(old, new).endswith(
        "make one with: bench run --suite pgd --dataset digits --model dual --alpha 0.7 --n-examples 10 --norm L2 "
        f"--eps 8/255 --seed 2 --batch-size 5 --set steps=10 --set loss=dlr --set flip=true --warm-start "
        f"--results {old}"
    )


def test_errors_are_refused(old: Path, new: Path):
    save(old, "1" * 10)
    bad = save(new, "1ee" + "1" * 7)
    for message in (refusal(old, new), refusal(new, old)):
        assert f"(run {bad.run}) has errors in 2 rows" in message


def test_other_images_are_refused(old: Path, new: Path):
    save(old, "1" * 10)
    run = save(new, "1" * 10, checkpoint="d", salt=1)
    message = refusal(old, new)
    assert "input_hash differs" in message
    assert run.run in message


def test_folders_and_parameters_out_of_range(old: Path, new: Path):
    save(new, "1" * 10)
    assert f"no results folder '{old}'" in refusal(old, new)
    old.mkdir()
    assert f"no finished run in the baseline folder '{old}'" in refusal(old, new)
    assert f"no finished run in the results folder '{old}'" in refusal(new, old)
    for value in (-0.1, 1.0, float("nan")):
        assert f"--max-drop {value}" in refusal(new, new, max_drop=value)
    for value in (0.0, 1.0, float("nan")):
        assert f"--alpha {value}" in refusal(new, new, alpha=value)
    assert not check(new, new, max_drop=0.0).regressed

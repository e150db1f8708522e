"""The regression check: planted regressions are found, chance is none, and what cannot be compared is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.boards.check import Change, Comparison, Report, check, compared
from bench.boards.check_formats import text
from bench.errors import UnusableInput
from bench.results.certificates import CERTIFICATE_COLUMNS, CertificateFolder, Certification
from bench.results.flags import (
    BY_CHANCE,
    DECLARED,
    HIDDEN_ROUTES,
    OUTSIDE_TORCH,
    ROUTES_INSIDE,
    THOUGH,
    WEAKER,
)
from bench.results.schema import VERDICT_COLUMNS, Accuracy, Result
from bench.results.store import RunFolder, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

STATUS = {"1": "ok", "0": "ok", "e": "error"}
REST = (0.0, 0.0, -1, -1)  # distances and experts


def save(root: Path, pgd: str | None, clean: str | None = None, **fields: Any) -> Result:
    """A finished run whose rows come from one letter an example: 1 right, 0 wrong, e error; no `pgd`: no attack."""
    clean = clean or "1" * len(pgd or "")
    checkpoint, finished = fields.pop("checkpoint", "c"), fields.pop("finished", "2030-01-01T00:00:00Z")
    fingerprint, salt, word = fields.pop("fingerprint", "f" * 16), fields.pop("salt", 0), fields.pop("word", "")
    flags, model_flags = fields.pop("flags", ()), fields.pop("model_flags", ())
    rows = pd.DataFrame(
        [
            (i, f"{i + salt:016x}", 0, attack, "F", 0, 0, right == "1", right + mark == "11", *REST, STATUS[mark])
            for attack, marks in (("clean", clean), ("pgd", pgd))
            if marks is not None
            for i, (mark, right) in enumerate(zip(marks, clean, strict=True))
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    given = {"model": "moe-at", "dataset": "digits", "suite": "pgd", "suite_version": 1, "n_examples": len(clean)}
    spec = RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})
    info = ModelInfo(name=spec.model, architecture="cnn", checkpoint_sha256=checkpoint * 64, word=word)
    provenance = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": finished, "flags": flags}
    provenance |= {"model_flags": model_flags}
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
    (found,) = (row for row in report.rows if (row.measure, row.model, row.runs) == (measure, model, 1))
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
    expected = text(report)
    (line,) = (line for line in expected.splitlines() if line.startswith("regression"))
    assert line == (
        "regression: pgd on moe-at: RA fell by 40.00 percentage points (75.00 to 35.00): 9 images lost, 1 gained, "
        f"p = 0.011 (Holm; 0.011 alone), run {before.run} to run {after.run}"
    )
    assert expected.count("REGRESSION") == 1


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
    assert "regression" not in text(report).lower()


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


def test_one_family_for_the_whole_check(old: Path, new: Path):
    # moe-at: 6 lost, p = 1/64 = 0.016; alone, or beside runs and measures that nothing changed: no other can count
    save(old, "1" * 20)
    save(new, "0" * 6 + "1" * 14, checkpoint="d")
    for root in (old, new):
        save(root, "1" * 20, model="dense-at")
    assert row(check(old, new), "robust").p_adjusted == pytest.approx(1 / 64)
    assert check(old, new).regressed
    # dense-at: 3 lost and 3 gained of another suite, and clean accuracy as well: 3 · 1/64 = 0.047, 4 · 1/64 = 0.063
    marks = {"before": "1" * 10 + "0" * 3 + "1" * 7, "after": "0" * 3 + "1" * 17}
    save(old, marks["before"], model="other", suite="a")
    save(new, marks["after"], model="other", suite="a")
    save(old, marks["before"], model="third", suite="b", checkpoint="a")
    save(new, marks["after"], model="third", suite="b", checkpoint="b")
    report = check(old, new)
    assert row(report, "robust").p_adjusted == pytest.approx(3 / 64)
    assert report.regressed
    save(old, "1" * 20, clean="1" * 17 + "000", model="fourth", suite="c")
    save(new, "1" * 20, clean="000" + "1" * 17, model="fourth", suite="c")
    report = check(old, new)
    assert row(report, "robust").p > 0.01
    assert row(report, "robust").p_adjusted > 0.06
    assert not report.regressed


def test_too_few_examples_are_a_warning(old: Path, new: Path):
    # ½^5 = 0.031 < 0.05 for one test; for two 0.0625
    save(old, "1" * 5)
    save(new, "0" * 5, checkpoint="d")
    report = check(old, new)
    assert report.regressed
    (warning,) = report.warnings
    assert warning.startswith("clean on moe-at: SA of the baseline is 5 of 5, too few to show any regression")
    assert f"warning: {warning}" in text(report)


def test_a_baseline_with_little_to_lose_is_a_warning_however_many_examples_it_has(old: Path, new: Path):
    # of 3 robust examples at most 3 can be lost: ½³ = 0.125 is not below 0.05
    save(old, "111" + "0" * 57)
    save(new, "0" * 60, checkpoint="d")
    report = check(old, new)
    assert not report.regressed
    (warning,) = report.warnings
    assert "RA of the baseline is 3 of 60, too few to show any regression at alpha 0.05" in warning


def test_several_checkpoints_of_one_work_are_refused(old: Path, new: Path):
    # a model that was rolled back has the older run, which is reported and not repeated: the last one is not it
    save(old, "1" * 10, finished="2030-01-02T00:00:00Z", checkpoint="a")
    save(new, "0" * 10, finished="2030-01-01T00:00:00Z", checkpoint="a")
    save(new, "1" * 10, finished="2030-01-03T00:00:00Z", checkpoint="b")
    with pytest.raises(
        UnusableInput, match=r"there are 2 such runs in the results, of other checkpoints: keep one of "
    ):
        check(old, new)


def test_suites_of_several_checkpoints_are_refused(old: Path, new: Path):
    """A suite that was not run again tells of the weights that it was run with."""
    save(old, "1" * 10, checkpoint="a")
    save(new, "1" * 10, checkpoint="a")
    save(new, "1" * 10, suite="autoattack", checkpoint="b")
    with pytest.raises(UnusableInput, match=r"the results has runs of other checkpoints of .*, .* and .*: keep"):
        check(old, new)


def test_what_several_suites_lose_of_other_images_counts_together(old: Path, new: Path):
    """Of 1,000 images each of three suites loses 9 others, which alone is less than a point; RA-worst falls by 2.7."""
    for number, suite in enumerate(("pgd", "autoattack", "adaptive")):
        save(old, "1" * 1000, suite=suite)
        marks = "1" * 9 * number + "0" * 9
        save(new, marks + "1" * (1000 - len(marks)), suite=suite, checkpoint="d")
    report = check(old, new)
    (found,) = (row for row in report.rows if row.regressed)
    assert (found.measure, found.model, found.lost, found.gained) == ("worst", "moe-at", 27, 0)
    assert found.p == 2.0**-27
    assert str(found).startswith("adaptive + autoattack + pgd on moe-at: RA-worst fell by 2.70 percentage points")
    assert "image by image over these suites" in str(found)


def test_where_one_suite_alone_has_changed_it_is_tested_once(old: Path, new: Path):
    for suite, marks in (("pgd", "1" * 10), ("autoattack", "0" * 9 + "1")):
        save(old, "1" * 10, suite=suite)
        save(new, marks, suite=suite, checkpoint="d")
    assert [row.measure for row in check(old, new).rows] == ["clean_correct", "robust", "robust"]


def test_seeds_and_alphas_are_paired_with_their_own(old: Path, new: Path):
    for seed in (0, 1):
        for alpha in (0.5, 0.7):
            save(old, "1" * 10, model="dual", seed=seed, alpha=alpha)
            pgd = "0" * 10 if (seed, alpha) == (1, 0.7) else "1" * 10
            bad = save(new, pgd, model="dual", seed=seed, alpha=alpha, checkpoint="d")
    report = check(old, new)
    assert len(report.rows) == 4 + 2  # clean accuracy once for each α
    (found,) = (row for row in report.rows if row.regressed)
    assert (found.model, found.run) == ("dual α 0.7", bad.run)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seed": 3}, "seed 0 instead of 3"),
        ({"suite_version": 2}, "suite_version 1 instead of 2"),
        ({"suite_params": {"steps": 10}}, "--set none instead of steps=10"),
        ({"batch_size": 64}, "batch_size 128 instead of 64"),
        ({"alpha": 0.5}, "alpha None instead of 0.5"),
        ({"fingerprint": "0" * 16}, "other images"),
        ({"pgd": "1" * 8, "fingerprint": "0" * 16}, "n_examples 10 instead of 8, other images"),
    ],
)
def test_unlike_runs_are_refused_by_field(old: Path, new: Path, fields: dict[str, Any], expected: str):
    save(old, "1" * 10)
    save(old, "1" * 10, seed=9, suite_version=9, batch_size=9, alpha=0.9)  # further off than the first
    save(old, "1" * 10, model="dense-at")
    save(new, "1" * 10, model="dense-at")
    run = save(new, **{"pgd": "1" * 10, **fields})
    message = refusal(old, new)
    assert message.startswith("no baseline for pgd")
    assert run.run in message
    assert f"the nearest has {expected}" in message


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
        "make one on the commit that you trust with: bench run --suite pgd --dataset digits --model dual --alpha 0.7 "
        f"--n-examples 10 --norm L2 --eps 8/255 --seed 2 --batch-size 5 --set steps=10 --set loss=dlr "
        f"--set flip=true --warm-start "
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


def pooled(report: Report, measure: str = "robust") -> Comparison:
    (found,) = (row for row in report.rows if row.runs > 1 and row.measure == measure)
    return found


def test_a_drop_that_no_run_shows_alone_is_seen_in_all_of_them(old: Path, new: Path):
    # 3 of 40 lost in each of 3 runs, on 3 sets of images: ½³ = 0.125 alone, ½⁹ = 0.002 together
    for number in range(3):
        save(old, "1" * 40, model=f"m{number}", salt=100 * number)
        save(new, "1" * 37 + "000", model=f"m{number}", salt=100 * number, checkpoint="d")
    report = check(old, new)
    found = pooled(report)
    assert (found.suite, found.n, found.lost, found.p) == ("pgd", 120, 9, pytest.approx(1 / 512))
    assert [row.model for row in report.rows if row.regressed] == ["all 3 runs"]
    assert "regression: pgd on all 3 runs: RA fell by 7.50 percentage points" in text(report)


def test_the_same_images_lost_in_several_runs_are_no_more_evidence_than_once(old: Path, new: Path):
    # one model under three attack seeds loses the same 3 images: ½³, not ½⁹
    for seed in range(3):
        save(old, "1" * 40, seed=seed)
        save(new, "1" * 37 + "000", seed=seed, checkpoint="d")
    report = check(old, new)
    assert pooled(report).p == pytest.approx(1 / 8)
    assert not report.regressed


def test_a_drop_that_may_be_chance_fails_only_if_strict_and_says_how_many_examples_it_takes(old: Path, new: Path):
    save(old, "1" * 200)
    save(new, "000" + "1" * 197, checkpoint="d")
    report = check(old, new)
    found = row(report, "robust")
    # of n examples 1.5 % lost and none gained: ½^5 < 0.05 from 5 lost on, which 4.5 / 0.015 = 300 round to
    assert (found.verdict, report.failed, found.needed) == ("drop", False, pytest.approx(300, rel=0.02))
    assert "1.50 percentage points (100.00 to 98.50)" in text(report)
    assert f"; not significant with n = 200: at least {found.needed} examples are needed" in text(report)
    assert check(old, new, strict=True).failed
    assert not check(old, new, strict=True, max_drop=0.02).failed


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [("d", "stronger model or weaker attack"), ("c", "weaker attack, since the checkpoint is")],
)
def test_a_gain_beyond_chance_is_named_and_fails_only_if_strict(checkpoint: str, expected: str, old: Path, new: Path):
    save(old, "0" * 8 + "1" * 12)
    save(new, "1" * 20, checkpoint=checkpoint)
    report = check(old, new)
    assert (row(report, "robust").verdict, row(report, "robust").p, report.failed) == ("gain", 1 / 256, False)
    assert expected in text(report)
    assert check(old, new, strict=True).failed
    assert check(old, new, alpha=0.003, strict=True).failed is False


def test_what_attacked_nothing_is_never_ok(old: Path, new: Path):
    def nothing(root: Path, **fields: Any) -> Result:
        return save(root, None, clean="1" * 20, **fields)

    for root in (old, new):
        save(root, "1" * 20)
        nothing(root, suite="clean")
        nothing(root, suite="adaptive", model="dense-at")
    report = check(old, new)
    assert [row.measure for row in report.rows].count("robust") == 1
    (found,) = report.unmeasured
    assert (found.suite, found.model, found.fails, report.failed) == ("adaptive", "dense-at", False, False)
    save(old, "1" * 20, suite="adaptive")
    nothing(new, suite="adaptive")
    report = check(old, new)
    assert report.failed
    assert "missing: adaptive on moe-at: RA: the new run attacked nothing" in text(report)


def test_a_suite_that_ran_weaker_than_its_default_is_named(old: Path, new: Path):
    flag = f"{WEAKER}steps=10 (default 50)"
    for root in (old, new):
        run = save(root, "1" * 20, suite_params={"steps": 10}, flags=(flag, "another"))
    (warning,) = check(old, new).warnings
    assert warning == f"pgd[steps=10] on moe-at, digits Linf 0.2 (run {run.run}): {flag}"


def certify(root: Path, certified: str, method: str = "union", **fields: Any) -> None:
    """A certification from one letter an example: 1 certified, 0 not, s not supported."""
    status = {"1": "certified", "0": "not_certified", "s": "not_supported"}
    checkpoint = fields.pop("checkpoint", "c")
    rows = pd.DataFrame(
        [
            (i, f"{i:016x}", 0, method, "Linf", 0.2, status[mark], 0.2, 0, True, -1, "layer X" if mark == "s" else "")
            for i, mark in enumerate(certified)
        ],
        columns=list(CERTIFICATE_COLUMNS),
    ).astype(CERTIFICATE_COLUMNS)
    given = {
        "model": "moe-at",
        "dataset": "digits",
        "suite": "certify-bounds",
        "suite_version": 9,
        "n_examples": len(rows),
    }
    spec = RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})
    info = ModelInfo(name=spec.model, architecture="cnn", checkpoint_sha256=checkpoint * 64)
    clean = Accuracy.of(np.ones(len(rows), dtype=bool))
    provenance = {"params": {}, "environment": {}, "git_hash": None, "seconds": 1.0, "finished": "2030-01-01"}
    result = Certification.from_rows(spec, info, "f" * 16, clean, rows, **provenance)
    CertificateFolder(run_folder(root, spec, result.run)).finish(result, rows)


def test_certificates_are_compared_like_robustness(old: Path, new: Path):
    for root in (old, new):
        save(root, "1" * 20)
    certify(old, "1" * 15 + "0" * 5)
    assert not any(row.measure == "certified" for row in check(new, new).rows)
    report = check(old, new)
    assert report.failed
    assert "missing: certify-bounds on moe-at: certified: not in the results: make it with: bench certify" in text(
        report
    )
    assert any("no baseline for certify-bounds on moe-at" in warning for warning in check(new, old).warnings)
    certify(new, "0" * 9 + "1" * 7 + "0" * 4, checkpoint="d")
    report = check(old, new)
    found = row(report, "certified")
    assert (found.lost, found.gained, found.regressed) == (9, 1, True)
    assert found.p == pytest.approx(11 / 1024)


def test_a_method_that_is_no_longer_applicable_fails(old: Path, new: Path):
    for root in (old, new):
        save(root, "1" * 20)
    certify(old, "1" * 20)
    certify(new, "s" * 20, checkpoint="d")
    report = check(old, new)
    assert (report.failed, report.regressed) == (True, False)
    assert "certified: no certificate now: layer X" in text(report)


def test_the_advice_names_the_file_that_named_the_model(old: Path, new: Path):
    save(new, "1" * 10)
    save(old, "1" * 10)
    save(new, "1" * 10, seed=1, word="out/my.safetensors")
    assert "--model out/my.safetensors " in refusal(old, new)


@pytest.mark.slow
def test_noise_fails_at_most_five_percent_of_checks_and_a_real_drop_few_pass(capsys: pytest.CaptureFixture[str]):
    """100 checks of ten runs of 500 images each, with both measures; a share of examples flips by chance."""
    draw = np.random.default_rng(0)
    threat = ThreatModel(norm="Linf", eps=0.2)

    def change(number: int, measure: Any, lost: float, gained: float) -> Change:
        u = draw.random(500)
        before = draw.random(500) < 0.5 if measure == "robust" else np.ones(500, dtype=bool)
        after = before ^ np.where(before, u < lost, u < gained)
        info = ModelInfo(name=f"m{number}", architecture="cnn", checkpoint_sha256=f"{number}" * 64)
        spec = RunSpec(
            model=f"m{number}", dataset="digits", threat_model=threat, suite="pgd", suite_version=1, n_examples=500
        )
        side: Any = SimpleNamespace(spec=spec, model_info=info, run="r")
        return Change(f"m{number}", "pgd", "pgd", measure, np.arange(500), before, after, side, side)

    def alarms(checks: int, dropped: int, drop: float, max_drop: float = 0.0) -> float:
        failed = 0
        for _ in range(checks):
            changes = [
                change(number, measure, 0.06 + (2 * drop if number < dropped else 0), 0.06)
                for number in range(10)
                for measure in ("robust",)
            ]
            changes += [change(number, "clean_correct", 0.0, 0.0) for number in range(10)]
            failed += any(row.regressed for row in compared(changes, max_drop, 0.05))
        return failed / checks

    noise = alarms(100, 0, 0.0)
    missed_one = 1 - alarms(20, 1, 0.05)
    missed_all = 1 - alarms(20, 10, 0.02)
    print(f"false alarms {noise:.3f}; 5 points in one of ten runs missed {missed_one:.2f}, 2 in all {missed_all:.2f}")
    assert noise <= 0.05
    assert missed_one < 0.5
    assert missed_all < 0.05


@pytest.mark.parametrize(
    ("flag", "fails"),
    [
        ("outputs are probabilities", False),
        ("gradients masked: PGD breaks 15 of 32 in a ball that holds every image", True),
        ("logits have no gradient", True),
        (BY_CHANCE, True),
        (f"{HIDDEN_ROUTES}topk in block", True),
        (f"{OUTSIDE_TORCH}values read by Python", True),
        (f"{ROUTES_INSIDE}parts that are off open within the ball", True),
        (f"{DECLARED}routes{THOUGH} (gt in M)", True),
    ],
)
def test_a_flag_that_the_baseline_has_not_is_told_once_and_fails_where_it_keeps_from_a_rank(
    flag: str, fails: bool, old: Path, new: Path
):
    """Robust accuracy that rises behind masked gradients is no gain."""
    for suite in ("pgd", "autoattack"):
        save(old, "1" * 10 + "0" * 10, suite=suite, model_flags=("routes flip within the ball for 4% of images",))
        own = ("routes flip within the ball for 9% of images", flag)
        save(new, "1" * 10 + "0" * 10, suite=suite, model_flags=own)
    report = check(old, new)
    (told,) = report.unmeasured
    assert (str(told), told.head, told.fails) == (f"all suites on moe-at: RA: {flag}", "new flag", fails)
    assert report.failed == fails
    assert f"new flag: all suites on moe-at: RA: {flag}" in " ".join(text(report).split())
    assert check(old, new, strict=True).failed
    assert check(new, new).unmeasured == []
    assert check(new, old).unmeasured == []


def test_new_routes_that_adaptive_has_attacked_are_told_alone(old: Path, new: Path):
    for suite in ("pgd", "adaptive"):
        save(old, "1" * 20, suite=suite)
        save(new, "1" * 20, suite=suite, model_flags=(f"{ROUTES_INSIDE}m.router",))
    (told,) = check(old, new).unmeasured
    assert not told.fails


def test_a_flag_of_a_suite_names_it(old: Path, new: Path):
    save(old, "1" * 10 + "0" * 10)
    save(new, "1" * 10 + "0" * 10, flags=("square broke more than apgd",))
    assert [str(one) for one in check(old, new).unmeasured] == ["pgd on moe-at: RA: square broke more than apgd"]


def test_a_folder_that_is_its_own_baseline_is_told(old: Path):
    save(old, "1" * 20)
    assert check(old, old / ".." / "old").warnings == [
        "the baseline and the results are one folder: nothing can differ"
    ]
    assert not check(old, old).failed


def test_the_text_is_fitted_to_a_terminal(old: Path, new: Path):
    save(old, "1" * 40, model="a.long.name.of.a:model", flags=())
    save(new, "1" * 20 + "0" * 20, model="a.long.name.of.a:model", flags=("square broke more than apgd",))
    assert max(map(len, text(check(old, new)).splitlines())) > 100
    assert max(map(len, text(check(old, new), 80).splitlines())) <= 80

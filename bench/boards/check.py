"""The regression check: the runs of a results folder against a baseline's, example by example. Never imports torch.

A drop is a regression when it is larger than is tolerated and is not chance: one-sided exact McNemar test on the
examples that changed, adjusted over the runs by Holm's method. What cannot be compared is refused, never passed over.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from bench.errors import UnusableInput
from bench.results.metrics import clean_by_example, holm, mcnemar, robust_by_example
from bench.results.schema import suite_label
from bench.results.store import Run, read_runs
from bench.spec import RunSpec

Measure = Literal["robust", "clean_correct"]
Pair = tuple[Run, Run]  # baseline, now

#: What is the same in two runs of which one can be the other's baseline, and not a run of something else.
_SAME = ("model", "dataset", "threat_model", "suite")


@dataclass(frozen=True)
class Comparison:
    """One measure of a run and of its baseline, over the same `n` examples. Accuracies and the drop are fractions."""

    model: str
    suite: str
    measure: Measure
    n: int
    baseline: float
    now: float
    lost: int  # b: right in the baseline, wrong now
    gained: int  # c
    p: float
    p_adjusted: float
    regressed: bool
    baseline_run: str
    run: str

    @property
    def drop(self) -> float:
        """The baseline's accuracy minus the accuracy now."""
        return (self.lost - self.gained) / self.n

    def __str__(self) -> str:
        return (
            f"{self.suite} on {self.model}: {self.measure} fell by {100 * self.drop:.2f} percentage points "
            f"({100 * self.baseline:.2f} to {100 * self.now:.2f}), b = {self.lost}, c = {self.gained}, "
            f"p = {self.p_adjusted:.2g} (Holm; {self.p:.2g} alone), run {self.baseline_run} to run {self.run}"
        )


@dataclass(frozen=True)
class Report:
    """The comparisons, and what a reader should know of them."""

    rows: list[Comparison]
    warnings: list[str]

    @property
    def regressed(self) -> bool:
        """Whether any measure of any run got worse."""
        return any(row.regressed for row in self.rows)


def check(baseline_root: Path, results_root: Path, max_drop: float = 0.01, alpha: float = 0.05) -> Report:
    """Compares every run below `results_root` with the baseline's run of the same work and attack seed.

    A regression is (b − c) > max_drop · n and p < alpha, p Holm-adjusted over the runs, for each measure by itself.
    UnusableInput for parameters out of range, for a folder without runs, for a run that has no counterpart on the other
    side, and for a run with `error` rows.
    """
    if not 0 <= max_drop < 1:
        raise UnusableInput(f"--max-drop {max_drop} is not in [0, 1): write one percentage point as 0.01")
    if not 0 < alpha < 1:
        raise UnusableInput(f"--alpha {alpha} is not in (0, 1): write five percent as 0.05")
    warnings: list[str] = []
    baseline = _only(baseline_root, "baseline")
    results = _only(results_root, "results")
    for run in (results[key] for key in results if key not in baseline):
        raise _refusal(run, list(baseline.values()), "baseline", baseline_root)
    for run in (baseline[key] for key in baseline if key not in results):
        raise _refusal(run, list(results.values()), "results", results_root)

    pairs = [(baseline[key], results[key]) for key in results]
    rows = [row for measure in ("robust", "clean_correct") for row in _compare(pairs, measure, max_drop, alpha)]
    for row in rows:
        # At most what the baseline has right can be lost.
        right = round(row.baseline * row.n)
        if 0.5**right * len(pairs) >= alpha or right <= max_drop * row.n:
            warnings.append(
                f"{row.suite} on {row.model}: {row.measure} of the baseline is {right} of {row.n},"
                f" too few to show any regression at alpha {alpha:g}"
            )
    return Report(rows, warnings)


def render(report: Report) -> str:
    """The report as text: a table in percent, the warnings, and a line for each regression."""
    table = [
        {
            "model": row.model,
            "suite": row.suite,
            "measure": row.measure,
            "n": row.n,
            "baseline": f"{100 * row.baseline:.2f}",
            "now": f"{100 * row.now:.2f}",
            "drop": f"{100 * row.drop:.2f}",
            "b": row.lost,
            "c": row.gained,
            "p": f"{row.p:.2g}",
            "p (Holm)": f"{row.p_adjusted:.2g}",
            "verdict": "REGRESSION" if row.regressed else "ok",
        }
        for row in report.rows
    ]
    lines = [tabulate(table, headers="keys", tablefmt="simple", disable_numparse=True)]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"regression: {row}" for row in report.rows if row.regressed]
    return "\n".join(lines) + "\n"


def _only(root: Path, side: str) -> dict[tuple[str, int], Run]:
    """The runs of one side by work and seed; UnusableInput where there are several, of several checkpoints.

    Which of them is deployed the folder does not say: the one that finished last need not be.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    for run in read_runs(root):
        if run.result.errors:
            raise UnusableInput(f"{run} has errors in {run.result.errors} rows: remove {run.path} and run it again")
        found.setdefault((run.result.work, run.result.spec.seed), []).append(run)
    if not found:
        raise UnusableInput(f"there is no finished run in the {side} folder '{root}': make one with: bench run")
    for runs in found.values():
        if len(runs) > 1:
            folders = " and ".join(str(run.path) for run in runs)
            raise UnusableInput(
                f"{runs[0]}: the {side} have {len(runs)} such runs, of other checkpoints: keep one of {folders}"
            )
    return {key: run for key, (run,) in found.items()}


def _refusal(run: Run, others: list[Run], side: str, root: Path) -> UnusableInput:
    """Why `run` has no counterpart among `others`, the runs of `side`: what the nearest of them has otherwise."""
    spec = run.result.spec
    make = f"make one with: {spec.command(root)}"
    alike = [
        _differences(run, other)
        for other in others
        if all(getattr(other.result.spec, name) == getattr(spec, name) for name in _SAME)
    ]
    if not alike:
        return UnusableInput(f"no {side} for {run}: {make}")
    unlike = ", ".join(f"{name} {theirs} instead of {ours}" for name, (ours, theirs) in min(alike, key=len).items())
    return UnusableInput(f"no {side} for {run}: the nearest has {unlike}: {make}")


def _differences(run: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    names = [name for name in RunSpec.model_fields if name not in _SAME]
    values = {name: (getattr(run.result.spec, name), getattr(other.result.spec, name)) for name in names}
    values["fingerprint"] = (run.result.fingerprint, other.result.fingerprint)
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _measured(run: Run, measure: Measure) -> "pd.Series[bool]":
    """The measure, indexed by (idx, input_hash), so that only equal images are compared."""
    rows = run.verdicts()
    values = robust_by_example(rows) if measure == "robust" else clean_by_example(rows)
    hashes = rows.drop_duplicates("idx").set_index("idx")["input_hash"]
    return values.to_frame(measure).assign(input_hash=hashes).set_index("input_hash", append=True)[measure]


def _compare(pairs: list[Pair], measure: Measure, max_drop: float, alpha: float) -> list[Comparison]:
    counted = []
    for before, after in pairs:
        old, new = _measured(before, measure), _measured(after, measure)
        if not old.index.equals(new.index):
            raise UnusableInput(f"{after}: input_hash differs from the baseline's {before}: evaluate the same images")
        counted.append((old, new, int((old & ~new).sum()), int((~old & new).sum())))
    p = [mcnemar(lost, gained) for _, _, lost, gained in counted]
    return [
        Comparison(
            model=_model(after.result.spec),
            suite=suite_label(after.result.spec),
            measure=measure,
            n=len(old),
            baseline=float(old.mean()),
            now=float(new.mean()),
            lost=lost,
            gained=gained,
            p=alone,
            p_adjusted=adjusted,
            # 0.29 · 100 is a little below 29 in floating point
            regressed=lost - gained > max_drop * len(old) + 1e-9 and adjusted < alpha,
            baseline_run=before.result.run,
            run=after.result.run,
        )
        for (before, after), (old, new, lost, gained), alone, adjusted in zip(pairs, counted, p, holm(p), strict=True)
    ]


def _model(spec: RunSpec) -> str:
    return spec.model if spec.alpha is None else f"{spec.model} α {spec.alpha:g}"

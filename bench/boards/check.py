"""The regression check: the runs of a results folder against a baseline's, example by example. Never imports torch.

Every measure of every run is tested for a drop: exact one-sided McNemar test on the examples that changed. Beside it,
the runs of one suite are tested together, and of each model RA-worst over its suites. All these tests are one family,
adjusted by Holm's method (over those that can become significant at all: Tarone's), so that the chance of the attacks
fails a check with at most the probability alpha. That is of one set of weights: two trainings of one recipe may well
differ by more. Gains are tested as well, as a family of their own, since an attack that got weaker looks like a more
robust model. What cannot be compared is never passed over.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.boards.rows import grouped
from bench.errors import UnusableInput
from bench.results.certificates import (
    ANSWERED,
    DETERMINISTIC,
    ROUTES,
    SMOOTHED,
    Certificates,
    Certification,
    read_certificates,
    succeeded,
)
from bench.results.flags import HIDDEN_ROUTES, MASKED, OUTSIDE_TORCH, UNRANKED, WEAKER, takes_adaptive
from bench.results.metrics import adjusted, clean_by_example, mcnemar, robust_by_example, sign_flip, tarone
from bench.results.schema import Result, suite_label
from bench.results.store import Run, read_runs
from bench.results.table import Table
from bench.spec import RunSpec

Measure = Literal["robust", "worst", "clean_correct", "certified", "route-stable", "smoothed"]
Verdict = Literal["ok", "regression", "drop", "gain"]
Key = tuple[str, int]  # work and seed: what a baseline is paired over

#: What is the same in two runs of which one can be the other's baseline, and not a run of something else.
_SAME = ("model", "dataset", "threat_model", "suite")
#: What certificates are compared by: an example counts where any of these methods certifies it.
_CERTIFIED: dict[Measure, tuple[str, ...]] = {
    "certified": DETERMINISTIC,
    "route-stable": ROUTES[:1],
    "smoothed": SMOOTHED,
}
_MOST = 10**7  # examples; beyond it no number is given that a significant drop would need


def said(measure: Measure) -> str:
    """A measure as a table calls it."""
    return {"robust": "RA", "worst": "RA-worst", "clean_correct": "SA"}.get(measure, measure)


@dataclass(frozen=True)
class Comparison:
    """One measure of a run and of its baseline, over the same `n` examples; or of several runs of a suite together.

    Accuracies and the drop are fractions. p-values are one-sided, in the direction of the change, adjusted over the
    check.
    """

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
    verdict: Verdict
    needed: int | None  # of a drop that is not significant: how many examples would make it so, at these shares
    runs: int = 1
    baseline_run: str = ""
    run: str = ""
    checkpoint: str = ""  # the first hex digits; of a pooled comparison none
    same_checkpoint: bool = False

    @property
    def drop(self) -> float:
        """The baseline's accuracy minus the accuracy now."""
        return (self.lost - self.gained) / self.n

    @property
    def regressed(self) -> bool:
        """Whether it fell by more than is tolerated, beyond chance."""
        return self.verdict == "regression"

    def __str__(self) -> str:
        moved = "rose" if self.drop < 0 else "fell"
        of = f"run {self.baseline_run} to run {self.run}" if self.runs == 1 else f"{self.runs} runs together"
        of = "image by image over these suites" if self.measure == "worst" and self.runs == 1 else of
        text = (
            f"{self.suite} on {self.model}: {said(self.measure)} {moved} by {100 * abs(self.drop):.2f} percentage "
            f"points ({100 * self.baseline:.2f} to {100 * self.now:.2f}): {self.lost} images lost, "
            f"{self.gained} gained, p = {self.p_adjusted:.2g} (Holm; {self.p:.2g} alone), {of}"
        )
        if self.verdict == "drop":
            more = f"at least {self.needed:,} examples are needed" if self.needed else "more examples are needed"
            text += f"; not significant with n = {self.n:,}: {more}"
        if self.verdict == "gain":
            kind = "attack" if self.measure in ("robust", "worst") else "certificate"
            weaker = f"weaker {kind}, since the checkpoint is the same" if self.same_checkpoint else ""
            text += f": {weaker or f'stronger model or weaker {kind}'}"
        return text


@dataclass(frozen=True)
class Unmeasured:
    """What the new results should have and do not (`fails`), or what neither side has; or why a number cannot be
    believed as the baseline's can: a flag that this has not."""

    model: str
    suite: str
    measure: Measure
    why: str
    fails: bool
    new_flag: bool = False

    @property
    def head(self) -> str:
        """Its kind, in words."""
        return "new flag" if self.new_flag else "missing" if self.fails else "not compared"

    def __str__(self) -> str:
        return f"{self.suite} on {self.model}: {said(self.measure)}: {self.why}"


@dataclass(frozen=True)
class Report:
    """The comparisons, what could not be compared, and what a reader should know of both."""

    rows: list[Comparison]
    unmeasured: list[Unmeasured]
    warnings: list[str]
    alpha: float
    max_drop: float
    strict: bool

    @property
    def regressed(self) -> bool:
        """Whether any measure of any run got worse."""
        return any(row.regressed for row in self.rows)

    def fails(self, row: Comparison) -> bool:
        """Whether this row fails the check; strict: drops that may be chance and gains do as well."""
        return row.regressed or (self.strict and row.verdict != "ok")

    @property
    def failed(self) -> bool:
        """Whether the check fails."""
        return any(map(self.fails, self.rows)) or any(one.fails for one in self.unmeasured)


@dataclass(frozen=True)
class Change:
    """One measure on both sides (n,): of the same images, by their numbers in `Images`."""

    model: str
    suite: str
    pool: str
    measure: Measure
    images: NDArray[np.int64]
    old: NDArray[np.bool_]
    new: NDArray[np.bool_]
    before: Result | Certification
    after: Result | Certification

    @property
    def checkpoints(self) -> tuple[str, str]:
        """SHA-256 of the baseline's and of the new one."""
        return self.before.model_info.checkpoint_sha256, self.after.model_info.checkpoint_sha256

    @property
    def net(self) -> NDArray[np.int8]:
        """+1 lost, −1 gained."""
        return self.old.astype(np.int8) - self.new.astype(np.int8)


def check(
    baseline_root: Path, results_root: Path, max_drop: float = 0.01, alpha: float = 0.05, strict: bool = False
) -> Report:
    """Compares every run and certification below `results_root` with the baseline's of the same work and attack seed.

    A regression is (b − c) > max_drop · n and p < alpha, p adjusted over the whole check. `strict`: what fell by more
    than max_drop fails without significance, and what rose beyond chance fails, too.
    UnusableInput for parameters out of range, for a folder without runs, for a run that has no counterpart on the other
    side, and for a run with `error` rows. A certification that is missing in the results fails the check.
    """
    if not 0 <= max_drop < 1:
        raise UnusableInput(f"--max-drop {max_drop} is not in [0, 1): write one percentage point as 0.01")
    if not 0 < alpha < 1:
        raise UnusableInput(f"--alpha {alpha} is not in (0, 1): write five percent as 0.05")
    baseline, results = _only(baseline_root, "baseline"), _only(results_root, "results")
    for run in (results[key] for key in results if key not in baseline):
        raise _refusal(run, list(baseline.values()), "baseline", baseline_root)
    for run in (baseline[key] for key in baseline if key not in results):
        raise _refusal(run, list(results.values()), "results", results_root)
    images = Images()
    changes: list[Change] = []
    unmeasured: list[Unmeasured] = []
    warnings: list[str] = []
    if baseline_root.resolve() == results_root.resolve():
        warnings.append("the baseline and the results are one folder: nothing can differ")
    on_routes = {_deployed(run) for run in results.values() if run.result.spec.suite == "adaptive"}
    for key, after in results.items():
        changes += _of_runs(baseline[key], after, images, unmeasured)
        warnings += [f"{after}: {flag}" for flag in after.result.flags if flag.startswith(WEAKER)]
        told = {str(one) for one in unmeasured}
        unmeasured += _new_flags(baseline[key], after, told, strict, _deployed(after) in on_routes)
    changes = _once(changes)
    changes += _worst(changes)
    changes += _of_certificates(baseline_root, results_root, images, unmeasured, warnings)
    rows = compared(changes, max_drop, alpha)
    for row in (row for row in rows if row.runs == 1):
        # At most what the baseline has right can be lost.
        right = round(row.baseline * row.n)
        if right > max_drop * row.n and 0.5**right < alpha / len(rows):  # no tests can share alpha in more parts
            continue
        others = [other.lost + other.gained for other in rows if other is not row]
        if 0.5**right >= alpha / tarone([right, *others], alpha) or right <= max_drop * row.n:
            warnings.append(
                f"{row.suite} on {row.model}: {said(row.measure)} of the baseline is {right} of {row.n},"
                f" too few to show any regression at alpha {alpha:g}"
            )
    return Report(rows, unmeasured, warnings, alpha, max_drop, strict)


def _only(root: Path, side: str) -> dict[Key, Run]:
    """The runs of one side by work and seed; UnusableInput where there are several, of several checkpoints.

    Which of them is deployed the folder does not say: the one that finished last need not be.
    """
    found: dict[Key, list[Run]] = {}
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
                f"{runs[0]}: there are {len(runs)} such runs in the {side}, of other checkpoints: keep one of {folders}"
            )
    kept = [run for (run,) in found.values()]
    for runs in grouped(kept, _deployed).values():
        one, other = runs[0], next((run for run in runs if _weights(run) != _weights(runs[0])), None)
        if other is not None:  # each suite would tell of other weights
            raise UnusableInput(
                f"the {side} has runs of other checkpoints of {one.result.spec.model}, {one.path} and {other.path}:"
                " keep those of one, and run the suites of the other again"
            )
    return {key: run for key, (run,) in found.items()}


def _deployed(run: Run) -> tuple[str, str, str]:
    """The model that is deployed under a name: of each data set and norm another may be trained."""
    spec = run.result.spec
    return spec.model, spec.dataset, spec.threat_model.norm


def _weights(run: Run) -> str:
    return run.result.model_info.checkpoint_sha256


def _refusal(run: Run, others: list[Run], side: str, root: Path) -> UnusableInput:
    """Why `run` has no counterpart among `others`, the runs of `side`: what the nearest of them has otherwise."""
    spec = run.result.spec
    trusted = " on the commit that you trust" if side == "baseline" else ""
    make = f"make one{trusted} with: {spec.command(root, run.result.model_info.word)}"
    alike = [
        _differences(run, other)
        for other in others
        if all(getattr(other.result.spec, name) == getattr(spec, name) for name in _SAME)
    ]
    if not alike:
        return UnusableInput(f"no {side} for {run}: {make}")
    unlike = ", ".join(_unlike(name, *pair) for name, pair in min(alike, key=len).items())
    return UnusableInput(f"no {side} for {run}: the nearest has {unlike}: {make}")


def _unlike(name: str, ours: Any, theirs: Any) -> str:
    """What differs, in the words of the command line."""
    if name == "fingerprint":
        return "other images"
    if name == "suite_params":
        ours, theirs = (", ".join(f"{key}={value}" for key, value in one.items()) or "none" for one in (ours, theirs))
        return f"--set {theirs} instead of {ours}"
    return f"{name} {theirs} instead of {ours}"


def _differences(run: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    names = [name for name in RunSpec.model_fields if name not in _SAME]
    values = {name: (getattr(run.result.spec, name), getattr(other.result.spec, name)) for name in names}
    values["fingerprint"] = (run.result.fingerprint, other.result.fingerprint)
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _of_runs(before: Run, after: Run, images: "Images", unmeasured: list[Unmeasured]) -> list[Change]:
    """Clean accuracy, and robust accuracy where F was attacked on both sides; what attacked nothing is never `ok`."""
    spec = after.result.spec
    model, label = _model(spec), suite_label(spec)
    suite = f"{label}, seed {spec.seed}" if spec.seed else label
    old, new = before.rows(), after.rows()
    numbers = images.numbers(old, spec)
    if not np.array_equal(numbers, images.numbers(new, spec)):
        raise UnusableInput(f"{after}: input_hash differs from the baseline's {before}: evaluate the same images")

    def change(measure: Measure, of: Callable[[Table], NDArray[np.bool_]], suite: str, pool: str) -> Change:
        return Change(model, suite, pool, measure, numbers, of(old), of(new), before.result, after.result)

    changes = [change("clean_correct", clean_by_example, "clean", "clean")]
    if before.result.attacked and after.result.attacked:
        return [*changes, change("robust", robust_by_example, suite, label)]
    if spec.suite != "clean":
        sides = {"the baseline": before.result.attacked, "the new run": after.result.attacked}
        nothing = " and ".join(side for side, attacked in sides.items() if not attacked)
        why = f"{nothing} attacked nothing, which is no robust accuracy"
        unmeasured.append(Unmeasured(model, suite, "robust", why, fails=before.result.attacked))
    return changes


def _new_flags(before: Run, after: Run, told: set[str], strict: bool, on_routes: bool) -> list[Unmeasured]:
    """Signs that the new RA is too high which the baseline has not, each once for a model.

    They fail the check where they keep a model from a rank, or where its gradients hide something, since what hides
    behind masked gradients looks like a gain; new routes, where no suite has attacked them (`on_routes`: `adaptive`
    has); and all of them where it is strict.
    """

    def kinds(run: Run) -> dict[str, str]:  # the same flag may tell of another number of images
        flags = [*run.result.model_flags, *run.result.suite_flags]
        return {re.sub(r"\d[\d,.]*", "#", flag): flag for flag in flags if not flag.startswith(WEAKER)}

    known, spec = kinds(before), after.result.spec
    fresh = [flag for kind, flag in kinds(after).items() if kind not in known] if after.result.attacked else []
    found = []
    for flag in fresh:
        fails = strict or flag in UNRANKED or flag.startswith((HIDDEN_ROUTES, OUTSIDE_TORCH, *MASKED))
        fails = fails or (not on_routes and takes_adaptive(flag))
        suite = suite_label(spec) if flag in after.result.suite_flags else "all suites"
        found.append(Unmeasured(_model(spec), suite, "robust", flag, fails, new_flag=True))
    return [one for one in found if str(one) not in told]


class Images:
    """Numbers for what identifies an image, its data set, idx and input hash: only equal images are compared.

    Runs on the same ones share an array, for there may be many.
    """

    def __init__(self) -> None:
        self._number: dict[tuple[str, int, str], int] = {}
        self._known: dict[tuple[str, bytes, tuple[str, ...]], NDArray[np.int64]] = {}

    def numbers(self, rows: Table, spec: RunSpec) -> NDArray[np.int64]:
        """Of each example of these rows (n,)."""
        (_, idx), hashes = rows.examples, tuple(rows.hashes)
        key = (spec.dataset, idx.tobytes(), hashes)
        if key not in self._known:
            own = [(spec.dataset, *image) for image in zip(idx.tolist(), hashes, strict=True)]
            self._known[key] = np.array([self._number.setdefault(image, len(self._number)) for image in own])
        return self._known[key]


def _once(changes: Iterable[Change]) -> list[Change]:
    """Every suite has the clean rows of its model: where they say the same, they are compared once."""
    kept: dict[Any, Change] = {}
    for number, change in enumerate(changes):
        key: Any = number
        if change.measure == "clean_correct":
            key = (change.model, *change.checkpoints, id(change.images), change.net.tobytes())
        kept.setdefault(key, change)
    return list(kept.values())


def _worst(changes: Sequence[Change]) -> list[Change]:
    """RA-worst of each model of which several runs have changed: the images that none of its runs breaks.

    Each may lose a few images, and each of them others. Of one run alone it would be no other test.
    """
    robust = [change for change in changes if change.measure == "robust"]
    of_model = grouped(robust, lambda one: (one.model, one.after.spec.threat_model, id(one.images)))
    return [
        Change(
            own[0].model,
            " + ".join(change.suite for change in own),
            "RA-worst",
            "worst",
            own[0].images,
            np.logical_and.reduce([change.old for change in own]),
            np.logical_and.reduce([change.new for change in own]),
            own[0].before,
            own[0].after,
        )
        for own in of_model.values()
        if sum(bool(change.net.any()) for change in own) > 1
    ]


def _of_certificates(
    baseline_root: Path, results_root: Path, images: Images, unmeasured: list[Unmeasured], warnings: list[str]
) -> list[Change]:
    """What is certified on both sides; what the baseline has and the results have not fails."""
    old, new = _certifications(baseline_root, "baseline"), _certifications(results_root, "results")
    for one in (new[key] for key in new if key not in old):
        warnings.append(f"no baseline for {one.result.spec.suite} on {_model(one.result.spec)}: it is not compared")
    changes = []
    for key, before in old.items():
        spec = before.result.spec
        model, suite = _model(spec), suite_label(spec)
        if key not in new:
            make = spec.command(results_root, before.result.model_info.word)
            why = f"not in the results: make it with: {make}"
            unmeasured += [Unmeasured(model, suite, measure, why, fails=True) for measure in _shares(before, images)]
            continue
        after, mine, theirs = new[key], _shares(before, images), _shares(new[key], images)
        for measure in mine:
            if measure not in theirs:
                reasons = "; ".join(after.result.reasons) or "no method could be applied"
                unmeasured.append(Unmeasured(model, suite, measure, f"no certificate now: {reasons}", fails=True))
            elif not np.array_equal(mine[measure][0], theirs[measure][0]):
                raise UnusableInput(f"{after.path}: other images than the baseline's {before.path}: certify the same")
            else:
                counted = (*mine[measure], theirs[measure][1])
                changes.append(Change(model, suite, suite, measure, *counted, before.result, after.result))
    return changes


def _certifications(root: Path, side: str) -> dict[Key, Certificates]:
    found: dict[Key, Certificates] = {}
    for one in read_certificates(root):
        key = (one.result.spec.work_key(one.result.fingerprint), one.result.spec.seed)
        if key in found:
            folders = f"{found[key].path} and {one.path}"
            raise UnusableInput(
                f"there are several such certifications in the {side}, of other checkpoints: keep one of {folders}"
            )
        found[key] = one
    return found


def _shares(one: Certificates, images: Images) -> dict[Measure, tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Of each measure the images and whether they count; without those whose methods could not be applied."""
    spec = one.result.spec
    rows = one.rows.where(one.rows["eps"] == spec.threat_model.eps)
    answered = [
        method
        for method in rows.texts["method"].distinct()
        if rows.where(rows.are("method", method)).are("status", *ANSWERED).all()
    ]
    found: dict[Measure, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
    for measure, methods in _CERTIFIED.items():
        own = rows.where(rows.are("method", *(method for method in methods if method in answered)))
        if len(own):
            number, idx = own.examples
            counts = np.zeros(len(idx), dtype=bool)
            counts[number[succeeded(own)]] = True
            found[measure] = images.numbers(own, spec), counts
    return found


@dataclass(frozen=True)
class _Test:
    """A change of one run, or of several runs together; counts, and the one-sided p-values of a drop and of a gain."""

    changes: tuple[Change, ...]
    lost: int
    gained: int
    discordant: int  # examples whose changes do not cancel
    p_drop: float
    p_gain: float


def _test(changes: Sequence[Change]) -> _Test:
    nets = [change.net for change in changes]
    lost, gained = (int(sum((net == sign).sum() for net in nets)) for sign in (1, -1))
    if len(changes) == 1:
        return _Test(tuple(changes), lost, gained, lost + gained, mcnemar(lost, gained), mcnemar(gained, lost))
    net = np.zeros(1 + max(change.images.max() for change in changes), dtype=np.int64)  # by image, over all runs
    for change, own in zip(changes, nets, strict=True):
        net[change.images] += own
    return _Test(tuple(changes), lost, gained, int((net != 0).sum()), sign_flip(net), sign_flip(-net))


def compared(changes: list[Change], max_drop: float, alpha: float) -> list[Comparison]:
    """Each change, then those of one suite and measure together; tested as one family for drops, one for gains."""
    tests = [_test([change]) for change in changes]
    # where one run alone has changed, the pool would be the same test again
    changed = [test.changes[0] for test in tests if test.discordant]
    pools = grouped(changed, lambda change: (change.pool, change.measure))
    all_of = grouped(changes, lambda change: (change.pool, change.measure))
    tests += [_test(all_of[key]) for key, pool in pools.items() if len(pool) > 1]
    discordant = [test.discordant for test in tests]
    drops = adjusted([test.p_drop for test in tests], discordant, alpha)
    gains = adjusted([test.p_gain for test in tests], discordant, alpha)
    k = tarone(discordant, alpha)
    return [
        _comparison(test, drop, gain, k, max_drop, alpha) for test, drop, gain in zip(tests, drops, gains, strict=True)
    ]


def _comparison(test: _Test, drop: float, gain: float, k: int, max_drop: float, alpha: float) -> Comparison:
    first, alone = test.changes[0], len(test.changes) == 1
    n = sum(len(change.old) for change in test.changes)
    fell = test.lost - test.gained > max_drop * n + 1e-9  # 0.29 · 100 is a little below 29 in floating point
    verdict: Verdict = "ok"
    if fell:
        verdict = "regression" if drop < alpha else "drop"
    elif gain < alpha and first.measure != "clean_correct":
        verdict = "gain"
    rose = test.gained > test.lost
    return Comparison(
        model=first.model if alone else f"all {len(test.changes)} runs",
        suite=first.suite if alone else first.pool,
        measure=first.measure,
        n=n,
        baseline=sum(int(change.old.sum()) for change in test.changes) / n,
        now=sum(int(change.new.sum()) for change in test.changes) / n,
        lost=test.lost,
        gained=test.gained,
        p=test.p_gain if rose else test.p_drop,
        p_adjusted=gain if rose else drop,
        verdict=verdict,
        needed=_needed(test.lost / n, test.gained / n, n, alpha / k) if verdict == "drop" else None,
        runs=len(test.changes),
        baseline_run=first.before.run if alone else "",
        run=first.after.run if alone else "",
        checkpoint=first.after.model_info.checkpoint_sha256[:8] if alone else "",
        same_checkpoint=all(len(set(change.checkpoints)) == 1 for change in test.changes),
    )


def _needed(lost: float, gained: float, n: int, alpha: float) -> int | None:
    """The least number of examples at which a drop of these shares has p < alpha; None beyond what anyone runs."""

    def significant(examples: int) -> bool:
        return mcnemar(round(lost * examples), round(gained * examples)) < alpha

    high = n
    while not significant(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > max(1, high // 100):  # to 1 %: the shares themselves are known far less well
        middle = (low + high) // 2
        low, high = (low, middle) if significant(middle) else (middle, high)
    return high


def _model(spec: RunSpec) -> str:
    return spec.model if spec.alpha is None else f"{spec.model} α {spec.alpha:g}"

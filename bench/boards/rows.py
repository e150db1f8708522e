"""The rows of boards, computed from verdict rows alone: a subject on one evaluation set. Nothing is formatted here.

A subject is a model, its checkpoint, α, combine, the gates that are named in it, and the threat model. Shares are
fractions in [0, 1]. No torch.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.errors import UnusableInput
from bench.results.certificates import Certificates, CertifiedShares, certified_shares
from bench.results.flags import HIDDEN_ROUTES, OUTSIDE_TORCH, UNRANKED, WARM_START, takes_adaptive
from bench.results.metrics import (
    accuracy_after,
    clean_by_example,
    component_rates,
    first_broken_by,
    holm,
    mcnemar,
    robust_by_example,
    unique_kills,
)
from bench.results.schema import VERDICT_COLUMNS, Accuracy, Result, suite_label
from bench.results.store import Run, read_runs
from bench.results.table import Table
from bench.spec import NOT_FORCED, ModelInfo, RunSpec

#: The first version of suite `adaptive` that ranks: those before it missed paths.
ADAPTIVE_VERSION = 3
#: By how much (fraction) RA under PGD may exceed RA before it is flagged.
_PGD_GAP = 0.1

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Scores:
    """What the suites' own columns show, on one evaluation set. Over several runs an example counts at its worst."""

    clean: Accuracy
    ra: Accuracy | None  # under the default autoattack
    ra_by_seed: tuple[float, ...]  # of each of its runs, where there are several
    after: Mapping[str, float]  # by attack of the default autoattack: what is robust to it and to all before it
    under: Mapping[str, float]  # RA by suite, but for `clean`, `components` and the default autoattack
    weaker: frozenset[str]  # those of these suites that ran with settings weaker than their defaults
    components: Mapping[str, Accuracy]


#: How a row's name tells its weights from others'.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Lack:
    """Why a row has no rank, and the suite that has to be run for one; None: no suite helps."""

    why: str
    suite: str | None = None


@dataclass(frozen=True)
class Row:
    """A subject on one evaluation set. `rank`, `p_first` and `apart` are known once it is in a table."""

    result: Result  # of one of its runs on that set
    runs: tuple[Run, ...]  # all that cover the set
    lacks: tuple[Lack, ...]  # none: it is ranked
    idx: NDArray[np.int64]  # of its examples (n,), ascending
    robust: NDArray[np.bool_]  # (n,): to every attack that ran
    worst: Accuracy | None  # None: nothing attacked it
    scores: Scores
    first_broken_by: Mapping[str, int]  # examples, by suite and attack
    unique_kills: Mapping[str, int] | None  # None: not every attack has met every example
    flags: tuple[str, ...]
    certified: CertifiedShares = field(default_factory=CertifiedShares)
    rank: int | None = None
    p_first: float | None = None
    apart: str = ""  # what tells it from the table's other rows of the same model's name and α, where there are any

    @property
    def ranked(self) -> bool:
        """Whether all that a rank needs was run."""
        return not self.lacks

    @property
    def spec(self) -> RunSpec:
        """Of one of its runs: model, α, combine, data set and threat model are those of all."""
        return self.result.spec

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self.result.model_info

    @property
    def n(self) -> int:
        """Examples of the evaluation set."""
        return len(self.robust)

    @property
    def alpha(self) -> float | None:
        """A dual's α in this row."""
        return self.info.alpha if self.spec.alpha is None else self.spec.alpha

    @property
    def name(self) -> str:
        """The model, with a dual's α, since several are possible, and with what tells rows of one name apart."""
        words = [*([] if self.alpha is None else [f"α {self.alpha:g}"]), *([self.apart] if self.apart else [])]
        return f"{self.spec.model} ({', '.join(words)})" if words else self.spec.model

    @property
    def experts(self) -> str:
        """The architecture, of an MoE with how many experts are selected of how many."""
        info = self.info
        if info.num_experts is None:
            return info.architecture
        selected = "" if info.num_selected_experts is None else f"{info.num_selected_experts} of "
        return f"{selected}{info.num_experts} × {info.architecture}"

    @property
    def combine(self) -> str:
        """What a dual or an MoE mixes: logits or probabilities."""
        return self.spec.combine or self.info.combine or ""

    @property
    def suites(self) -> list[str]:
        """All suites that attacked the subject, with their versions."""
        return sorted({f"{run.result.spec.suite}-v{run.result.spec.suite_version}" for run in self.runs})

    @property
    def run_keys(self) -> list[str]:
        """The first digits of the keys of all runs."""
        return [run.result.run[:8] for run in self.runs]

    @property
    def order(self) -> tuple[bool, float, float, list[str]]:
        """Ranked rows first, the most robust at the top; the rest makes the order the same for the same runs."""
        alpha = "" if self.alpha is None else f"{self.alpha:g}"
        identity = [self.spec.model, alpha, self.combine, self.info.checkpoint_sha256[:12], ", ".join(self.run_keys)]
        return not self.ranked, -1 if self.worst is None else -self.worst.value, -self.scores.clean.value, identity


@dataclass(frozen=True)
class Board:
    """One data set and threat model: its rows by evaluation set (see `tables`), each table in order."""

    stem: str  # of its files
    title: str
    tables: tuple[tuple[Row, ...], ...]
    left_out: tuple[Run, ...]  # runs with errors
    results: Path

    @property
    def rows(self) -> list[Row]:
        """Those of all tables."""
        return [row for table in self.tables for row in table]


def finished_runs(results_root: Path) -> list[Run]:
    """All finished runs below `results_root`; UnusableInput if there is none or one cannot be used."""
    runs = read_runs(results_root)
    if not runs:
        stopped = len({path.parent for path in results_root.rglob("block-*.parquet")})
        way = f"{stopped} are not finished: start their commands again" if stopped else "run one with: bench run"
        raise UnusableInput(f"there is no finished run below '{results_root}': {way}")
    return runs


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their key, in the order of the first of each."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def board_rows(runs: Iterable[Run]) -> list[Row]:
    """The rows of all boards, in no order; runs with errors count in none, and may keep their subject from a rank."""
    by_subject = grouped(runs, _subject)
    return [row for subject in by_subject.values() for row in _rows(subject)]


def tables(rows: Sequence[Row], certificates: Sequence[Certificates]) -> list[list[Row]]:
    """The rows of one board, by evaluation set, each table in order, ranked and compared.

    Sets on which a model has a rank come first, then the larger ones: what no rank can be read from must not be what is
    read first.
    """
    sets = grouped(rows, lambda row: (-row.n, row.result.fingerprint))
    in_order = sorted(sets.items(), key=lambda item: (not any(row.ranked for row in item[1]), *item[0]))
    return [_ranked(table, certificates) for _, table in in_order]


def _ranked(table: list[Row], certificates: Sequence[Certificates]) -> list[Row]:
    """In order; with rank, what is certified, and the p-value of each ranked row against the first."""
    table = sorted(table, key=lambda row: row.order)
    others = [row for row in table[1:] if row.ranked]  # none without a first
    changes = [(table[0].robust, row.robust) for row in others]
    p = holm([mcnemar(int((a & ~b).sum()), int((~a & b).sum()), "two-sided") for a, b in changes])
    against_first = dict(zip(map(id, others), p, strict=True))
    of_name = grouped(table, lambda row: row.name)
    places: dict[int, int] = {}  # by how many examples are robust: rows that tie share a rank
    for place, row in enumerate(table, start=1):
        places.setdefault(int(row.robust.sum()), place)
    return [
        replace(
            row,
            apart=_apart(row, of_name[row.name]),
            rank=places[int(row.robust.sum())] if row.ranked else None,
            p_first=against_first.get(id(row)),
            certified=certified_shares(certificates, row.spec, row.info, row.result.fingerprint),
        )
        for row in table
    ]


def _apart(row: Row, namesakes: Sequence[Row]) -> str:
    """What tells a row from those of its table that have the same name: what of these is not the same in all."""

    def words(one: Row) -> tuple[str, ...]:
        gates = f"gates {', '.join(one.spec.gates)}" if one.spec.gates else "no gates named"
        return f"combine {one.combine}", gates, f"{CHECKPOINT} {one.info.checkpoint_sha256[:8]}"

    columns = zip(*map(words, namesakes), strict=True)
    return ", ".join(own for own, column in zip(words(row), columns, strict=True) if len(set(column)) > 1)


def _subject(run: Run) -> str:
    """The subject on whatever evaluation set: rows of one may count for another that it covers."""
    return run.result.spec.subject_key(run.result.model_info.checkpoint_sha256, fingerprint="")


def _default_autoattack(run: Run) -> bool:
    return suite_label(run.result.spec) == "autoattack"


def _adaptive(run: Run) -> bool:
    """Whether it is `adaptive` at no less than its standard budget; known adversarial examples only add to it."""
    spec = run.result.spec
    standard = spec.suite_params in ({}, {"budget": "large"}) and spec.suite_version >= ADAPTIVE_VERSION
    return spec.suite == "adaptive" and standard


def _lacks(covering: Sequence[Run], failed: Sequence[Run], info: ModelInfo, routed: bool) -> Iterator[Lack]:
    """What keeps a row from a rank. failed: runs of the same model with errors."""
    whole = {run.result.spec.suite for run in covering}
    for suite in dict.fromkeys(run.result.spec.suite for run in failed):
        if suite in RANKED_BY and suite not in whole:  # what it would have broken is not known
            yield Lack(f"suite `{suite}` ended in errors")
    default = [run for run in covering if _default_autoattack(run)]
    if not any(run.result.attacked for run in default):
        nothing = "suite `autoattack` had nothing to attack" if default else "no autoattack with its default parameters"
        yield Lack(nothing, None if default else "autoattack")
    if routed:
        yield from _lacks_adaptive(covering)
    for flag in dict.fromkeys(flag for run in covering for flag in run.result.model_flags):
        if flag in UNRANKED:
            yield Lack(f"its {flag}")
        elif flag.startswith(HIDDEN_ROUTES):
            yield Lack("not all its routes are shown (`bench doctor` tells what to do)")
        elif flag.startswith(OUTSIDE_TORCH):
            yield Lack("it chooses outside torch, where no attack follows")


def _lacks_adaptive(covering: Sequence[Run]) -> Iterator[Lack]:
    """What a routed model lacks of suite `adaptive`, which has to attack every gate that it sees."""
    runs = [run for run in covering if _adaptive(run)]
    unforced = [[flag for flag in run.result.suite_flags if NOT_FORCED in flag] for run in runs]
    if any(run.result.attacked and not flags for run, flags in zip(runs, unforced, strict=True)):
        return
    if nothing := [run for run in covering if run.result.spec.suite == "adaptive" and not run.result.attacked]:
        right = any(run.result.clean_accuracy.value for run in nothing)
        yield Lack("its routes are hidden from suite `adaptive`" if right else "suite `adaptive` had nothing to attack")
    elif runs:
        yield Lack(f"suite `adaptive` did not attack every gate ({'; '.join(dict.fromkeys(unforced[0]))})")
    else:
        yield Lack("no adaptive at its standard budget or more", "adaptive")


#: The suites that a rank is earned by.
RANKED_BY = ("autoattack", "adaptive")
#: The columns of verdict rows that attacks are compared by.
_COMPARED = ["idx", "attack", "target", "clean_correct", "robust", "status"]


def _rows(runs: list[Run]) -> list[Row]:
    """One row for each evaluation set that a subject was run on without errors."""
    subject, failed = ([run for run in runs if bool(run.result.errors) == errors] for errors in (False, True))
    rows_of = {run.path: run.rows() for run in subject}
    rows = []
    for own in grouped(subject, lambda run: run.result.fingerprint).values():
        examples = rows_of[own[0].path]
        shared = {run.path: _shared(rows_of[run.path], examples) for run in subject}
        n = len(examples.examples[1])
        covering = [run for run in subject if len(shared[run.path].examples[1]) == n]
        for run in own:
            if run not in covering:
                raise UnusableInput(f"{run} has other examples than {own[0]} but the same fingerprint: run it again")
        rows.append(_row({run.path: shared[run.path] for run in covering}, covering, own, failed))
    return rows


def _shared(verdicts: Table, other: Table) -> Table:
    """The rows of the examples of `other`: same place in the data set, same image."""
    (number, idx), (_, wanted) = verdicts.examples, other.examples
    if np.array_equal(idx, wanted) and (verdicts.hashes == other.hashes).all():  # nearly always
        return verdicts
    known = set(zip(wanted.tolist(), other.hashes, strict=True))
    there = [example in known for example in zip(idx.tolist(), verdicts.hashes, strict=True)]
    return verdicts.where(np.array(there, dtype=bool)[number])


def _row(rows_of: Mapping[Path, Table], covering: list[Run], own: list[Run], failed: list[Run]) -> Row:
    """The row of `own`, the runs on this evaluation set: all `covering` runs count in it, the scores are of its own.

    Only RA is that of a larger set's autoattack where there is none of its own, since the row may have a rank by it.

    `rows_of`: the rows of each of them, by its path. failed: as `_lacks` takes it.
    """
    one = own[0]
    ranked_by = [] if any(_default_autoattack(run) for run in own) else filter(_default_autoattack, covering)
    scores = _scores([*own, *ranked_by], rows_of)
    robust = np.logical_and.reduce([robust_by_example(rows_of[run.path]) for run in covering])
    clean = [clean_by_example(rows_of[run.path]) for run in covering]
    named = [_named(rows_of[run.path], run) for run in covering]
    first: dict[str, int] = {}
    for label, runs in grouped(covering, lambda run: suite_label(run.result.spec)).items():
        in_order = sorted(runs, key=lambda run: run.result.spec.seed)
        frames = [(rows_of[run.path], _attacks(run)) for run in in_order]
        first |= {f"{label}/{attack}": count for attack, count in first_broken_by(frames).items()}
    every = [f"{suite_label(run.result.spec)}/{attack}" for run in covering for attack in _attacks(run)]
    spec, info = one.result.spec, one.result.model_info
    dual = info.alpha is not None or spec.alpha is not None
    flags = [flag for run in covering for flag in run.result.model_flags]
    routed = dual or info.num_experts is not None or info.routing_visible
    routed = routed or any(map(takes_adaptive, flags))
    flags += ["SA differs between suites"] * any((other != clean[0]).any() for other in clean)
    if scores.ra is not None and "pgd" in scores.under:
        gap = scores.under["pgd"] - scores.ra.value
        flags += [f"PGD {100 * gap:.1f} points above AutoAttack"] * (gap > _PGD_GAP)
    flags += [f"{suite_label(run.result.spec)}: {flag}" for run in covering for flag in run.result.suite_flags]
    return Row(
        result=one.result,
        runs=tuple(covering),
        lacks=tuple(_lacks(covering, failed, info, routed)),
        idx=rows_of[one.path].examples[1],
        robust=robust,
        worst=Accuracy.of(robust) if any(run.result.attacked for run in covering) else None,
        scores=scores,
        first_broken_by=first,
        unique_kills=unique_kills(Table.joined(named, _COMPARED), every),
        flags=tuple(dict.fromkeys(flags)),
    )


def _named(verdicts: Table, run: Run) -> Table:
    """The rows with the suite before their attacks' names, but for `clean`, which is the same in all suites.

    What a warm start tried again is left out: the attack that had found it keeps it.
    """
    label, warm = suite_label(run.result.spec), verdicts.are("attack", WARM_START)
    cold = verdicts.where(~warm) if warm.any() else verdicts
    return cold.renamed("attack", lambda name: name if name == "clean" else f"{label}/{name}")


def _scores(own: list[Run], rows_of: Mapping[Path, Table]) -> Scores:
    """SA by the clean rows that every run has, and each suite's accuracy in its newest version."""
    clean = Accuracy.of(np.logical_and.reduce([clean_by_example(rows_of[run.path]) for run in own]))
    ra: Accuracy | None = None
    by_seed: tuple[float, ...] = ()
    after: dict[str, float] = {}
    under: dict[str, float] = {}
    weaker: set[str] = set()
    components: dict[str, Accuracy] = {}
    for label, runs in grouped(own, lambda run: suite_label(run.result.spec)).items():
        newest = max(run.result.spec.suite_version for run in runs)
        runs = [run for run in runs if run.result.spec.suite_version == newest]
        tables = [rows_of[run.path] for run in runs]
        rows = tables[0] if len(tables) == 1 else Table.joined(tables, list(VERDICT_COLUMNS))
        robust = Accuracy.of(robust_by_example(rows))
        if label == "autoattack":
            ra = robust if any(run.result.attacked for run in runs) else None
            if len({run.result.spec.seed for run in runs}) > 1:
                by_seed = tuple(Accuracy.of(robust_by_example(table)).value for table in tables)
            names = dict.fromkeys(name for run in runs for name in run.result.accuracy_after if name != "clean")
            shares = accuracy_after(rows, names)
            after = {name: shares[name] for name in names}
        elif label == "components":
            components = {name: Accuracy.of(rate) for name, rate in component_rates(rows).items()}
        elif any(run.result.attacked for run in runs):  # attacks on the parts alone say nothing of the whole
            under[label] = robust.value
            weaker |= {label} if any(run.result.weaker for run in runs) else set()
    return Scores(clean, ra, by_seed, after, under, frozenset(weaker), components)


def _attacks(run: Run) -> list[str]:
    """The attacks of its suite on F, in the order they ran."""
    return [attack for attack in run.result.accuracy_after if attack not in ("clean", WARM_START)]

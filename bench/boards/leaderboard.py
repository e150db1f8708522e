"""Boards: one CSV and one markdown file for each data set and threat model, computed from the verdict rows alone.

A row is a subject (model, checkpoint, α, combine, threat model) on one evaluation set. Accuracies are in percent with
two decimals. The same runs give the same bytes. Never imports torch.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
from tabulate import tabulate

from bench.errors import UnusableInput
from bench.files import write_if_changed
from bench.results.certificates import Certificates, board_cells, read_certificates
from bench.results.metrics import (
    accuracy_after,
    clean_by_example,
    component_rates,
    holm,
    mcnemar,
    robust_by_example,
    unique_kills,
)
from bench.results.schema import Accuracy, Result, suite_label
from bench.results.store import Run, ensure_writable, read_runs
from bench.spec import path_safe

#: CSV header → title in markdown; the columns of the attacks stand between the two.
_FIRST = {
    "rank": "rank",
    "model": "model",
    "objective": "objective",
    "experts": "experts",
    "gate": "gate",
    "alpha": "α",
    "combine": "combine",
    "extra_data": "extra data",
    "n": "n",
    "sa": "SA",
    "ra": "RA",
    "ra_seeds": "RA by seed",
}
_LAST = {
    "ra_e_fixed": "RA-E-fixed",
    "ra_e_any": "RA-E-any",
    "ra_r": "RA-R",
    "ra_worst": "RA-worst",
    "p_first": "p (vs first)",
    "unique_kills": "unique kills",
    "route_flip_rate": "route-flip rate",
    "certified_accuracy": "certified accuracy",
    "route_stable": "route-stable",
    "smoothed": "certified, smoothed model",
    "flags": "flags",
    "seeds": "seeds",
    "suite_version": "suite version",
    "trained": "trained",
    "run": "run",
}
_LEGEND = (
    "RA is the accuracy under AutoAttack with its default parameters, RA-worst the accuracy under all attacks that "
    "ran, example by example; both are upper bounds of the true robust accuracy. A row is ranked once AutoAttack has "
    "run on it with its default parameters, and on a routed or dual model suite `adaptive`, from v2 on and with at "
    "least its standard budget, as well. Percent; each RA with its 95 % Wilson interval. RA by seed: the range over "
    "the attack's seeds, where there are several; RA then counts each example at its worst. RA-E-fixed: F under PGD "
    "on the expert that the clean image is routed to; RA-E-any: under PGD on every expert, worst case; RA-R: under "
    "PGD on the router, for a change of route; the route-flip rate is how often that changes it. p (vs first): two-"
    "sided exact McNemar test of RA-worst against the first row's, example by example, over all ranked rows of the "
    "table adjusted by Holm. Unique kills: examples that this attack broke and no other that ran. Certified accuracy "
    "is a lower bound of the true robust accuracy, route-stable the share of images that no attack in the ball can "
    "send to another expert, of a dual to another of R's; the smoothed model is another classifier, certified in L2 "
    "and with a small failure probability."
)
#: The first version of suite `adaptive` that ranks: v1 could miss routes.
_ADAPTIVE_VERSION = 2
#: By how much (fraction) RA under PGD may exceed RA before it is flagged.
_PGD_GAP = 0.1
#: Columns that carry their interval, and what suite `components` has a column for.
_INTERVALS = {"ra", "ra_e_fixed", "ra_e_any", "ra_r", "ra_worst", "route_flip_rate"}
_COMPONENTS = {"RA-E-fixed", "RA-E-any", "RA-R", "route-flip rate"}
_LONG_FLAG = 30  # characters; a longer one is a footnote

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Board:
    """One data set and threat model: the stem of its two files, and their text."""

    stem: str
    markdown: str
    csv: str


@dataclass
class _Scores:
    """What the suites' own columns show; percent but for `clean`."""

    clean: float  # fraction
    cells: dict[str, str] = field(default_factory=dict)  # by CSV header
    after: dict[str, str] = field(default_factory=dict)  # by attack of the default autoattack
    under: dict[str, str] = field(default_factory=dict)  # by suite, but for `clean` and the default autoattack


@dataclass(frozen=True)
class Row:
    """A subject on one evaluation set, as its board shows it; `result` is one of its runs on that set."""

    ranked: bool
    worst: float  # fraction; -1 where nothing attacked it
    standing: "pd.Series[bool]"  # by idx: against every attack that ran
    result: Result
    n: int
    cells: dict[str, str]  # by CSV header; what is not known is empty or not there
    scores: _Scores
    flags: list[str]

    @property
    def order(self) -> tuple[bool, float, float, list[str]]:
        """Ranked rows first, the most robust at the top; the rest makes the order the same for the same runs."""
        identity = [self.cells[key] for key in ("model", "alpha", "combine", "checkpoint", "run")]
        return not self.ranked, -self.worst, -self.scores.clean, identity


def boards(results_root: Path) -> list[Board]:
    """The boards of all finished runs below `results_root`; UnusableInput if there is none or one cannot be used."""
    groups = sorted(_grouped(finished_runs(results_root), _stem).items())
    certificates = read_certificates(results_root)
    return [_board(stem, group, certificates) for stem, group in groups]


def finished_runs(results_root: Path) -> list[Run]:
    """All finished runs below `results_root`; UnusableInput if there is none or one cannot be used."""
    runs = read_runs(results_root)
    if not runs:
        raise UnusableInput(f"there is no finished run below '{results_root}': run one with: bench run")
    return runs


def board_rows(runs: Iterable[Run]) -> list[Row]:
    """The rows of all boards, in no order; runs with errors count in none."""
    sound = [run for run in runs if not run.result.errors]
    return [row for subject in _grouped(sound, _subject).values() for row in _rows(subject)]


def render(results_root: Path) -> str:
    """The boards' markdown, one after the other; raises as `boards` does."""
    return "\n".join(board.markdown for board in boards(results_root))


def write_boards(results_root: Path, out_dir: Path) -> list[Path]:
    """Writes `<dataset>_<norm>-<eps>.csv` and `.md` for every board and returns their paths.

    A file that would not change is left untouched. UnusableInput as `boards`, and for a folder that cannot be written.
    """
    made = boards(results_root)
    ensure_writable(out_dir)
    paths = []
    for board in made:
        for suffix, text in (("csv", board.csv), ("md", board.markdown)):
            paths.append(out_dir / f"{board.stem}.{suffix}")
            write_if_changed(paths[-1], text.encode())
    return paths


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _stem(run: Run) -> str:
    return f"{path_safe(run.result.spec.dataset)}_{run.result.spec.threat_model.folder}"


def _board(stem: str, runs: list[Run], certificates: list[Certificates]) -> Board:
    titles = sorted({f"{run.result.spec.dataset}, {run.result.spec.threat_model}" for run in runs})
    every = board_rows(runs)
    after = dict.fromkeys(attack for row in every for attack in row.scores.after)
    under = sorted({suite for row in every for suite in row.scores.under})
    attacks = {f"after_{attack}": f"after {attack}" for attack in after} | {f"ra_{s}": f"RA {s}" for s in under}
    tables = _grouped(every, lambda row: (-row.n, row.result.fingerprint))
    markdown, records = [f"# {'; '.join(titles)}", _LEGEND], []
    for (_, fingerprint), table in sorted(tables.items()):
        table.sort(key=lambda row: row.order)
        compared = _against_first(table)
        certified = [board_cells(certificates, r.result.spec, r.result.model_info, fingerprint) for r in table]
        lines = [
            _cells(row, rank) | p | own
            for rank, (row, p, own) in enumerate(zip(table, compared, certified, strict=True), start=1)
        ]
        records += lines
        n = table[0].n
        markdown += [f"## n = {n}: the first {n} examples of the archive (fingerprint {fingerprint[:12]})"]
        markdown += _markdown(table, lines, _FIRST | attacks | _LAST)
        markdown += _over_training_seeds(table)
    markdown += [
        f"Left out: {run}, for its {run.result.errors} rows with status `error`." for run in runs if run.result.errors
    ]
    bounds = [f"{key}_{bound}" for key in _FIRST | _LAST if key in _INTERVALS for bound in ("low", "high")]
    columns = [*_FIRST, *attacks, *_LAST, *bounds, "fingerprint", "checkpoint"]
    csv = pd.DataFrame(records, columns=columns).to_csv(index=False, lineterminator="\n")
    return Board(stem, "\n\n".join(markdown) + "\n", csv)


def _cells(row: Row, rank: int) -> dict[str, str]:
    after = {f"after_{attack}": value for attack, value in row.scores.after.items()}
    under = {f"ra_{suite}": value for suite, value in row.scores.under.items()}
    own = {"rank": str(rank) if row.ranked else "", "flags": "; ".join(row.flags)}
    return row.cells | row.scores.cells | after | under | own


def _against_first(table: list[Row]) -> list[dict[str, str]]:
    """Of each row its p-value against the first, where both are ranked."""
    others = [row for row in table[1:] if row.ranked]  # none without a first
    changes = [(table[0].standing, row.standing) for row in others]
    p = holm([mcnemar(int((a & ~b).sum()), int((~a & b).sum()), "two-sided") for a, b in changes])
    found = {id(row): f"{value:.2g}" for row, value in zip(others, p, strict=True)}
    return [{"p_first": found.get(id(row), "")} for row in table]


def _over_training_seeds(table: list[Row]) -> list[str]:
    """The ranges over the training seeds of each variant that has several in the table; nothing without any."""
    groups = _grouped(table, lambda row: (_variant(row), row.cells["alpha"], row.cells["combine"]))
    lines = []
    for (name, alpha, _), rows in sorted(groups.items()):
        seeds = {row.result.model_info.seed for row in rows}
        if len(seeds) > 1:
            cells = [row.cells | row.scores.cells for row in rows]
            ranges = [_range([cell[key] for cell in cells if cell.get(key)]) for key in ("sa", "ra", "ra_worst")]
            label = f"{name} (α = {alpha})" if alpha else name
            lines.append([_escaped(label), ", ".join(map(str, sorted(seeds, key=str))), *ranges])
    if not lines:
        return []
    headers = ["model", "training seeds", "SA", "RA", "RA-worst"]
    return [tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)]


def _variant(row: Row) -> str:
    """The model's name without its training seed."""
    return row.result.spec.model.removesuffix(f"-s{row.result.model_info.seed}")


def _range(percents: list[str]) -> str:
    """From the least to the largest; all alike are one."""
    if not percents:
        return "–"
    low, high = min(percents, key=float), max(percents, key=float)
    return low if low == high else f"{low}–{high}"


def _markdown(table: list[Row], lines: list[dict[str, str]], titles: dict[str, str]) -> list[str]:
    """The table, and under it the flags that are too long for a cell."""
    long = dict.fromkeys(flag for row in table for flag in row.flags if len(flag) > _LONG_FLAG)
    mark = {flag: f"[{number}]" for number, flag in enumerate(long, start=1)}
    body = []
    for row, line in zip(table, lines, strict=True):
        shown = {**line, "flags": "; ".join(mark.get(flag, flag) for flag in row.flags)}
        for key in [key for key in _INTERVALS if line.get(key)]:
            shown[key] = f"{line[key]} [{line[f'{key}_low']}, {line[f'{key}_high']}]"
        body.append([_escaped(shown.get(key, "")) or "–" for key in titles])
    headers = [_escaped(title) for title in titles.values()]
    text = tabulate(body, headers=headers, tablefmt="pipe", disable_numparse=True)
    notes = "\n".join(f"- {mark[flag]} {flag}" for flag in long)
    return [text, notes] if notes else [text]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _interval(key: str, accuracy: Accuracy) -> dict[str, str]:
    values = {key: accuracy.value, f"{key}_low": accuracy.low, f"{key}_high": accuracy.high}
    return {name: _percent(value) for name, value in values.items()}


def _subject(run: Run) -> str:
    """The subject on whatever evaluation set: rows of one may count for another that it covers."""
    return run.result.spec.subject_key(run.result.model_info.checkpoint_sha256, fingerprint="")


def _adaptive(run: Run) -> bool:
    """Whether it is `adaptive` at no less than its standard budget. Known witnesses to start from only add to it."""
    spec = run.result.spec
    strong = spec.suite_params in ({}, {"budget": "large"}) and spec.suite_version >= _ADAPTIVE_VERSION
    return spec.suite == "adaptive" and strong


def _versioned(run: Run) -> str:
    return f"{run.result.spec.suite}-v{run.result.spec.suite_version}"


def _rows(subject: list[Run]) -> list[Row]:
    """One row for each evaluation set that the subject was run on."""
    rows_of = {run.path: run.verdicts() for run in subject}
    rows = []
    for own in _grouped(subject, lambda run: run.result.fingerprint).values():
        examples = rows_of[own[0].path].loc[lambda frame: frame["attack"] == "clean", ["idx", "input_hash"]]
        shared = {run.path: rows_of[run.path].merge(examples, on=["idx", "input_hash"]) for run in subject}
        covering = [run for run in subject if shared[run.path]["idx"].nunique() == len(examples)]
        for run in own:
            if run not in covering:
                raise UnusableInput(f"{run} has other examples than {own[0]} but the same fingerprint: run it again")
        of_suites = {run.path: f"{suite_label(run.result.spec)}/" for run in covering}
        named = [shared[run.path].assign(suite=of_suites[run.path]) for run in covering]
        rows.append(_row(covering, pd.concat(named), own[0], _scores(own, rows_of)))
    return rows


def _row(covering: list[Run], verdicts: pd.DataFrame, one: Run, scores: _Scores) -> Row:
    """The row of `one`, a run on this evaluation set: all `covering` runs count in it, the scores are of its own.

    `verdicts` are the rows of all of them, with the column `suite`.
    """
    standing = robust_by_example(verdicts)
    named = verdicts["attack"].where(verdicts["attack"] == "clean", verdicts["suite"] + verdicts["attack"])
    # what a warm start tried again, the attack that had found it keeps
    kills = unique_kills(verdicts.assign(attack=named)[verdicts["attack"] != "warm-start"])
    spec, info = one.result.spec, one.result.model_info
    alpha = info.alpha if spec.alpha is None else spec.alpha
    experts = f"{info.num_selected_experts} of {info.num_experts} × {info.architecture}"
    labels = {suite_label(run.result.spec) for run in covering}
    attacked = any(run.result.attacked for run in covering)
    routed = info.num_experts is not None or alpha is not None or info.routing_visible
    unproven = routed and not any(_adaptive(run) for run in covering)
    flags = ["no adaptive attack"] * unproven + ["no autoattack"] * ("autoattack" not in labels)
    flags += [flag for run in covering for flag in run.result.model_flags]
    if {"ra", "pgd"} <= scores.cells.keys() | scores.under.keys():
        gap = (float(scores.under["pgd"]) - float(scores.cells["ra"])) / 100
        flags += [f"PGD {100 * gap:.1f} points above AutoAttack"] * (gap > _PGD_GAP)
    flags += [f"{suite_label(run.result.spec)}: {flag}" for run in covering for flag in run.result.flags]
    cells = {
        "model": spec.model,
        "objective": info.objective or "",
        "experts": info.architecture if info.num_experts is None else experts,
        "gate": info.gate or "",
        "alpha": "" if alpha is None else f"{alpha:g}",
        "combine": spec.combine or info.combine or "",
        "extra_data": {True: "yes", False: "no", None: ""}[info.additional_data],
        "n": str(len(standing)),
        **(_interval("ra_worst", Accuracy.of(standing)) if attacked else {"ra_worst": ""}),
        "unique_kills": ", ".join(f"{attack} {count}" for attack, count in kills.items()),
        "seeds": ", ".join(map(str, sorted({run.result.spec.seed for run in covering}))),
        "suite_version": ", ".join(sorted({_versioned(run) for run in covering})),
        "trained": f"{info.dataset}, {info.threat_model}: {info.trained}" if info.dataset else info.trained,
        "run": ", ".join(run.result.run[:8] for run in covering),
        "fingerprint": one.result.fingerprint[:12],
        "checkpoint": info.checkpoint_sha256[:12],
    }
    return Row(
        ranked="autoattack" in labels and not unproven,
        worst=float(standing.mean()) if attacked else -1.0,
        standing=standing,
        result=one.result,
        n=len(standing),
        cells=cells,
        scores=scores,
        flags=list(dict.fromkeys(flags)),
    )


def _scores(own: list[Run], rows_of: dict[Path, pd.DataFrame]) -> _Scores:
    """SA by the clean rows that every run has, and each suite's accuracy in its newest version.

    Over several runs (seeds) an example counts at its worst.
    """
    clean = float(clean_by_example(pd.concat([rows_of[run.path] for run in own])).mean())
    scores = _Scores(clean, {"sa": _percent(clean)})
    for label, runs in _grouped(own, lambda run: suite_label(run.result.spec)).items():
        newest = max(run.result.spec.suite_version for run in runs)
        runs = [run for run in runs if run.result.spec.suite_version == newest]
        rows = pd.concat([rows_of[run.path] for run in runs])
        robust = Accuracy.of(robust_by_example(rows))
        if label == "autoattack":
            scores.cells |= _interval("ra", robust)
            seeds = _grouped(runs, lambda run: run.result.spec.seed)
            if len(seeds) > 1:
                scores.cells["ra_seeds"] = _range([_percent(run.result.robust_accuracy.value) for run in runs])
            names = dict.fromkeys(name for run in runs for name in run.result.accuracy_after if name != "clean")
            after = accuracy_after(rows, names)
            scores.after = {name: _percent(after[name]) for name in names}
        elif label == "components":
            rates = {name: Accuracy.of(rate) for name, rate in component_rates(rows).items()}
            for name in _COMPONENTS.intersection(rates):
                scores.cells |= _interval(name.lower().replace("-", "_").replace(" ", "_"), rates[name])
        elif any(run.result.attacked for run in runs):  # attacks on the parts alone say nothing of the whole
            scores.under[label] = _percent(robust.value)
    return scores

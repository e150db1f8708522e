"""The boards' rows as RobustBench's `model_info` files, which RobustBench's own leaderboards are made from.

A row is `<dataset>/<norm>/<model>.json`; its accuracies are texts in percent, as RobustBench writes them. Importing
robustbench would import torch, and nothing of it is needed here.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.boards.columns import percent
from bench.boards.rows import Row, board_rows
from bench.files import write_if_changed
from bench.results.flags import MASKED
from bench.results.store import Run, ensure_writable
from bench.spec import ROBUSTBENCH_DATASETS, ROBUSTBENCH_NORMS, digest, path_safe

#: Flags that let AutoAttack's own number seem too high: its warnings, successes that were none, and what the model
#: shows of itself, beside what masks its gradients.
_DOUBTS = re.compile(r"autoattack: (AutoAttack: (?!engine)|.*re-check)|(S: |R: )?router |outputs |probe of ")


@dataclass(frozen=True)
class Written:
    """The files of the rows, and in words what has none; each a part of one line."""

    paths: list[Path]
    left_out: list[str]


def write_model_info(runs: Sequence[Run], out_dir: Path) -> Written:
    """Writes `<dataset>/<norm>/<model>.json` for every row that has the default `autoattack`.

    Those of other data sets and norms than RobustBench's are left out. Rows of one model have what tells them apart
    behind its name. A file that would not change is left untouched. UnusableInput for a folder that
    cannot be written.
    """
    ensure_writable(out_dir)
    fit: list[Row] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for row in board_rows(runs):
        if reason := _unfit(row):
            left_out[reason].append(_name(row))
        else:
            fit.append(row)
    files = {out_dir / path: row for path, row in _paths(fit).items()}
    for path, row in files.items():
        write_if_changed(path, (json.dumps(model_info(row), indent=2) + "\n").encode())
    said = [f"{reason}: {', '.join(sorted(names))}" for reason, names in sorted(left_out.items())]
    if failed := [str(run) for run in runs if run.result.errors]:
        said.append(f"runs with errors: {', '.join(failed)}")
    folders = {path.parent for path in files}
    if foreign := sorted(str(path) for folder in folders for path in folder.glob("*.json") if path not in files):
        said.append(f"of no row, and not touched: {', '.join(foreign)}")
    return Written(sorted(files), said)


def model_info(row: Row) -> dict[str, Any]:
    """RobustBench's fields of a row that has the default `autoattack`.

    `external`, the best known robust accuracy, is RA-worst. `unreliable` is what RobustBench calls an AutoAttack
    evaluation that is potentially so: on a route that nobody attacked, or flagged by AutoAttack itself. What nobody
    stated is empty or null.
    """
    spec, info = row.spec, row.info
    return {
        "link": info.link,
        "name": _name(row),
        "authors": info.authors,
        "additional_data": info.additional_data,
        "number_forward_passes": info.number_forward_passes,
        "dataset": spec.dataset,
        "venue": info.venue,
        "architecture": row.experts,
        "eps": spec.threat_model.eps_text,
        "clean_acc": percent(row.scores.clean.value),
        "reported": "",
        "autoattack_acc": "" if row.scores.ra is None else percent(row.scores.ra.value),
        "external": "" if row.worst is None else percent(row.worst.value),
        "footnote": _footnote(row),
        "unreliable": not row.ranked or any(_DOUBTS.match(flag) or flag.startswith(MASKED) for flag in row.flags),
    }


def _footnote(row: Row) -> str:
    """What RobustBench's board has no column for, and what would flatter if it were left out."""
    notes = [
        f"{row.spec.threat_model}, the first {row.n} test images",
        f"best known is the worst case, example by example, of {', '.join(row.suites)}",
    ]
    if any("adaptive" in lack.why for lack in row.lacks):
        notes.append("AutoAttack does not attack a route, so the accuracy may be too high")
    notes += [lack.why for lack in row.lacks]
    if row.info.additional_data is None:
        notes.append("extra data not stated")
    return "; ".join([*notes, *row.flags])


def _name(row: Row) -> str:
    return row.spec.model + ("" if row.alpha is None else f" (α = {row.alpha:g}, {row.combine})")


def _unfit(row: Row) -> str:
    """Why a row has no file; empty if it has one."""
    spec = row.spec
    if spec.dataset not in ROBUSTBENCH_DATASETS or spec.threat_model.norm not in ROBUSTBENCH_NORMS:
        return f"RobustBench has no board of {spec.dataset} {spec.threat_model.norm}"
    return "" if row.scores.ra else "without the default autoattack"


def _paths(rows: Sequence[Row]) -> dict[Path, Row]:
    """Each row's file below the folder of all; those that would share one say in their names where they differ."""
    groups: defaultdict[Path, list[Row]] = defaultdict(list)
    for row in rows:
        spec = row.spec
        groups[Path(spec.dataset, spec.threat_model.norm, path_safe(spec.model))].append(row)
    found = {}
    for stem, group in groups.items():
        marks = [_marks(row) for row in group]
        differing = [key for key in marks[0] if len({mark[key] for mark in marks}) > 1]
        for row, mark in zip(group, marks, strict=True):
            ends = "".join(f"_{key}-{path_safe(mark[key])}" for key in differing)
            found[stem.with_name(f"{stem.name}{ends}.json")] = row
    return found


def _marks(row: Row) -> dict[str, str]:
    """What a row is of: no two rows have the same."""
    return {
        "name": digest(row.spec.model)[:8],
        "alpha": "" if row.alpha is None else f"{row.alpha:g}",
        "combine": row.combine,
        "eps": row.spec.threat_model.eps_text,
        "n": str(row.n),
        "set": row.result.fingerprint[:12],
        "checkpoint": row.info.checkpoint_sha256[:12],
    }

"""Boards: one CSV and one markdown file for each data set and threat model, computed from the verdict rows alone.

The same runs give the same bytes. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from bench.boards.columns import Column, columns, record, span
from bench.boards.rows import Row, board_rows, finished_runs, grouped, tables
from bench.files import write_if_changed
from bench.results.certificates import Certificates, read_certificates
from bench.results.store import Run, ensure_writable
from bench.spec import dataset_folder

_LEGEND = (
    "RA is the accuracy under AutoAttack with its default parameters, RA-worst the accuracy under all attacks that "
    "ran, example by example; both are upper bounds of the true robust accuracy. A row is ranked once AutoAttack has "
    "run on it with its default parameters, and on a routed or dual model suite `adaptive`, from v3 on and with at "
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
_LONG_FLAG = 30  # characters; a longer one is a footnote


@dataclass(frozen=True)
class Board:
    """One data set and threat model: the stem of its two files, and their text."""

    stem: str
    markdown: str
    csv: str


def boards(results_root: Path) -> list[Board]:
    """The boards of all finished runs below `results_root`; UnusableInput if there is none or one cannot be used."""
    groups = sorted(grouped(finished_runs(results_root), _stem).items())
    certificates = read_certificates(results_root)
    return [_board(stem, group, certificates) for stem, group in groups]


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


def _stem(run: Run) -> str:
    return f"{dataset_folder(run.result.spec.dataset)}_{run.result.spec.threat_model.folder}"


def _board(stem: str, runs: list[Run], certificates: list[Certificates]) -> Board:
    titles = sorted({f"{run.result.spec.dataset}, {run.result.spec.threat_model}" for run in runs})
    every = tables(board_rows(runs), certificates)
    shown = columns([row for table in every for row in table])
    markdown = [f"# {'; '.join(titles)}", _LEGEND]
    for table in every:
        n, fingerprint = table[0].n, table[0].result.fingerprint
        markdown += [f"## n = {n}: the first {n} examples of the archive (fingerprint {fingerprint[:12]})"]
        markdown += _markdown(table, shown)
        markdown += _over_training_seeds(table)
    markdown += [
        f"Left out: {run}, for its {run.result.errors} rows with status `error`." for run in runs if run.result.errors
    ]
    csv = pd.DataFrame([record(row, shown) for table in every for row in table])
    return Board(stem, "\n\n".join(markdown) + "\n", csv.to_csv(index=False, lineterminator="\n"))


def _over_training_seeds(table: list[Row]) -> list[str]:
    """The ranges over the training seeds of each variant that has several in the table; nothing without any."""
    lines = []
    for (name, alpha, _), rows in sorted(grouped(table, _variant).items()):
        seeds = {row.info.seed for row in rows}
        if len(seeds) > 1:
            shares = [[row.scores.clean, row.scores.ra, row.worst] for row in rows]
            ranges = [span(share.value for share in each if share) or "–" for each in zip(*shares, strict=True)]
            label = f"{name} (α = {alpha})" if alpha else name
            lines.append([_escaped(label), ", ".join(map(str, sorted(seeds, key=str))), *ranges])
    if not lines:
        return []
    headers = ["model", "training seeds", "SA", "RA", "RA-worst"]
    return [tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)]


def _variant(row: Row) -> tuple[str, str, str]:
    """The model's name without its training seed, α and combine."""
    name = row.spec.model.removesuffix(f"-s{row.info.seed}")
    return name, "" if row.alpha is None else f"{row.alpha:g}", row.combine


def _markdown(table: list[Row], shown: Sequence[Column]) -> list[str]:
    """The table, and under it the flags that are too long for a cell."""
    long = dict.fromkeys(flag for row in table for flag in row.flags if len(flag) > _LONG_FLAG)
    mark = {flag: f"[{number}]" for number, flag in enumerate(long, start=1)}
    body = []
    for row in table:
        cells = {column.key: column.cell(row) for column in shown}
        cells["flags"] = "; ".join(mark.get(flag, flag) for flag in row.flags)
        body.append([_escaped(cell) or "–" for cell in cells.values()])
    headers = [_escaped(column.title) for column in shown]
    text = tabulate(body, headers=headers, tablefmt="pipe", disable_numparse=True)
    notes = "\n".join(f"- {mark[flag]} {flag}" for flag in long)
    return [text, notes] if notes else [text]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

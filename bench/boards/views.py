"""How a board looks: in a terminal, as markdown, LaTeX, HTML and CSV. All show the same columns. No torch."""

import html as escaping
import textwrap
from collections.abc import Callable, Sequence
from csv import DictWriter
from io import StringIO
from pathlib import Path
from typing import TypeVar

from tabulate import MIN_PADDING, tabulate

from bench.boards.columns import MAIN, ROUTED, Column, chosen, columns, percent, record, span
from bench.boards.rows import CHECKPOINT, Board, Row, grouped
from bench.results.store import Run
from bench.spec import RunSpec

T = TypeVar("T")

NEAR = 0.0005  # shares that two decimals of a percent hardly tell apart
_NARROWEST = 8  # characters that a terminal leaves of a model's name


def csv(board: Board) -> str:
    """Every column of every row."""
    shown, text = columns(board.rows), StringIO()
    records = [record(row, shown) for row in board.rows]
    writer = DictWriter(text, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def terminal(board: Board, keys: Sequence[str] = (), width: int | None = None) -> str:
    """One line a model, fitted to `width` columns where it is given, and below what flags and missing ranks mean."""
    shown = chosen(columns(board.rows), keys or MAIN)
    lines = [board.title]
    for table in board.tables:
        constant, varying = constants(table, shown)
        said = "".join(f", {column.title} {value}" for column, value in constant)
        lines += ["", *_wrapped(heading(table) + said, width)]
        body = [[_plain(column, row) for column in varying] for row in table]
        titles = [column.title for column in varying]
        names = [column.key for column in varying].index("model") if "model" in keys or not keys else None
        if width is not None and names is not None:
            _shorten(body, titles, names, width)
        first_unranked = next((at for at, row in enumerate(table) if not row.ranked), len(table))
        text = tabulate(body, headers=titles, tablefmt="simple", disable_numparse=True).splitlines()
        if 0 < first_unranked < len(table):  # ranked and unranked rows are set apart
            text.insert(2 + first_unranked, text[1])
        lines += [line.rstrip() for line in text]
        lines += [""] * any(row.flags or row.lacks for row in table)
        everywhere = [flag for flag in table[0].flags if len(table) > 1 and all(flag in row.flags for row in table)]
        lines += _wrapped(f"all rows: {'; '.join(everywhere)}", width) if everywhere else []
        for row in table:
            own = [flag for flag in row.flags if flag not in everywhere]
            lines += _wrapped(f"{row.name}: {'; '.join(own)}", width) if own else []
        for models, why, command in lacking(table, board.results, together=True):
            have = "have" if ", " in models else "has"
            lines += [*_wrapped(f"{models} {have} no rank: {why}", width), *([f"  {command}"] if command else [])]
    lines += [left_out(run) for run in board.left_out]
    lines += ["", *_wrapped(headline(board), width)]
    return "\n".join(lines) + "\n"


def headline(board: Board) -> str:
    """What the first table of a board says, in at most two sentences."""
    ranked = [row for row in next(iter(board.tables), ()) if row.rank is not None and row.worst is not None]
    if not ranked:
        return "No model has a rank yet: what is shown are upper bounds of the robust accuracy."
    first = ranked[0]
    assert first.worst is not None
    best = [row.name for row in ranked if row.worst is not None and row.worst.value == first.worst.value]
    most = "" if len(ranked) == 1 else "Most robust is " if len(best) == 1 else "Most robust are "
    share, names = percent(first.worst.value), " and ".join(best)
    text = f"{most}{names}: {share} % of {first.n} images withstand every attack that ran."
    if not first.worst.value:
        text = f"No ranked model withstands the attacks on any of {first.n} images."
    gaps = [(row.scores.ra.value - row.worst.value, row) for row in ranked if row.scores.ra and row.worst]
    gap, worst = max(gaps, key=lambda pair: pair[0], default=(0.0, first))
    if gap > NEAR and worst.scores.ra and worst.worst:
        text += (
            f" AutoAttack alone overstates {worst.name} most: it leaves {percent(worst.scores.ra.value)} %, all attacks"
            f" together {percent(worst.worst.value)} %."
        )
    return text


def _wrapped(text: str, width: int | None) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ") if width else [text]


def _shorten(body: list[list[str]], titles: list[str], at: int, width: int) -> None:
    """Cuts the names in column `at`, so that no line is longer than `width`, where that leaves enough of them."""
    padded = [title + " " * MIN_PADDING for title in titles]  # as tabulate does
    columns = list(zip(padded, *body, strict=True))
    others = sum(max(map(len, column)) for number, column in enumerate(columns) if number != at)
    room = max(_NARROWEST, width - others - 2 * (len(titles) - 1))
    for row in body:
        if len(row[at]) > room:  # both ends tell models apart: variant and baseline, or module and name
            head = (room - 1) // 2
            row[at] = f"{row[at][:head]}…{row[at][len(row[at]) - (room - 1 - head) :]}"


def _plain(column: Column, row: Row) -> str:
    """A cell of a terminal: of flags their number, of RA-worst its interval, too."""
    if column.key == "flags":
        return str(len(row.flags)) if row.flags else ""
    if column.key == "model":
        return row.name
    value = column.text(row)
    if column.key == "ra_worst" and row.worst is not None:
        return f"{value} [{100 * row.worst.low:.1f}, {100 * row.worst.high:.1f}]"
    return value or "–"


def markdown(board: Board, keys: Sequence[str] = ()) -> str:
    """The main columns with their legend, the routed models' own figures, and the rest inside <details>."""
    every = columns(board.rows)
    shown, routed = chosen(every, keys or MAIN), chosen(every, ROUTED)
    rest = [column for column in every if column not in shown or column.key == "model"]
    parts = [f"# {board.title}", _legend(shown)]
    for table in board.tables:
        constant, varying = constants(table, shown)
        parts.append(f"## {heading(table)}")
        if constant:
            parts.append(f"In all rows: {', '.join(f'{column.title} {value}' for column, value in constant)}.")
        ranked, unranked = ([row for row in table if row.ranked == yes] for yes in (True, False))
        if ranked:
            parts.append(_pipe(ranked, varying))
        if unranked:
            parts += ["### Without a rank", _pipe(unranked, [column for column in varying if column.key != "rank"])]
            lacks = [
                f"- {_code(name)}: {_escaped(why)}" + (f": {_code(command)}" if command else "")
                for name, why, command in lacking(unranked)
            ]
            parts.append("\n".join(lacks))
        if any(column.key == "flags" for column in varying) and any(row.flags for row in table):
            notes = [f"- {_code(row.name)}: {_escaped('; '.join(row.flags))}" for row in table if row.flags]
            parts += ["Flags:", "\n".join(notes)]
        if not keys and (own := [row for row in table if any(column.text(row) for column in routed[1:])]):
            known = [column for column in routed if any(column.text(row) for row in own)]
            parts += ["### Routed models", _legend(known), _pipe(own, known)]
        parts += _over_training_seeds(table)
        parts += ["<details>\n<summary>All other columns</summary>", _legend(rest), _pipe(table, rest), "</details>"]
    parts += [left_out(run) for run in board.left_out]
    return "\n\n".join(parts) + "\n"


def latex(board: Board, keys: Sequence[str] = ()) -> str:
    """A booktabs table for each evaluation set; the best ranked value of a column is bold."""
    shown = chosen(columns(board.rows), keys or MAIN)
    parts = [f"% {board.title}; needs \\usepackage{{booktabs}}"]
    for table in board.tables:
        constant, varying = constants(table, shown)
        said = "".join(f", {column.title} {value}" for column, value in constant)
        body = [cells(table, varying, row, _latex_cell) for row in table]
        align = "".join("l" if column.key in ("model", "flags") else "r" for column in varying)
        at = next((number for number, row in enumerate(table) if not row.ranked), len(table))
        lines = [" & ".join(cells) + r" \\" for cells in body]
        if 0 < at < len(table):
            lines.insert(at, r"\midrule")
        parts.append(
            "\n".join([
                f"% {heading(table)}{said}",
                rf"\begin{{tabular}}{{{align}}}",
                r"\toprule",
                " & ".join(_tex(column.title) for column in varying) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
            ])
        )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def html(board: Board, keys: Sequence[str] = ()) -> str:
    """A `<table>` for each evaluation set, to be embedded in a page; the best ranked value of a column is bold."""
    shown = chosen(columns(board.rows), keys or MAIN)
    parts = []
    for table in board.tables:
        constant, varying = constants(table, shown)
        said = "".join(f", {column.title} {value}" for column, value in constant)
        meanings = [(escaping.escape(column.meaning), escaping.escape(column.title)) for column in varying]
        heads = "".join(f'<th title="{meaning}">{title}</th>' for meaning, title in meanings)
        caption = escaping.escape(f"{board.title}: {heading(table)}{said}")
        lines = ['<table class="bench-board">', f"<caption>{caption}</caption>"]
        lines.append(f"<thead><tr>{heads}</tr></thead>")
        for kind in (True, False):
            if rows := [row for row in table if row.ranked == kind]:
                lines.append(f'<tbody class="{"ranked" if kind else "unranked"}">')
                for row in rows:
                    written = "".join(f"<td>{cell}</td>" for cell in cells(table, varying, row, _html_cell))
                    lines.append(f"<tr>{written}</tr>")
                lines.append("</tbody>")
        parts.append("\n".join([*lines, "</table>"]))
    return "\n\n".join(parts) + "\n"


def cells(table: Sequence[Row], shown: Sequence[Column], row: Row, cell: Callable[[str, str, bool], T]) -> list[T]:
    """Of each column the value, its interval and whether it is the best of the ranked rows, written by `cell`."""
    found = []
    for column in shown:
        values = [number for other in table if other.ranked and (number := column.number(other)) is not None]
        best = column.best and row.ranked and len(values) > 1 and column.number(row) == max(values)
        text = row.name if column.key == "model" else column.text(row)
        if column.key == "flags":
            text = str(len(row.flags)) if row.flags else ""
        interval = f"[{', '.join(column.bounds(row))}]" if column.interval and text else ""
        found.append(cell(text, interval, best))
    return found


def _latex_cell(text: str, interval: str, best: bool) -> str:
    value = rf"\textbf{{{_tex(text)}}}" if best else _tex(text) or "--"
    return value + (rf" {{\scriptsize {interval}}}" if interval else "")


def _html_cell(text: str, interval: str, best: bool) -> str:
    value = f"<b>{escaping.escape(text)}</b>" if best else escaping.escape(text) or "–"
    return value + (f" <small>{interval}</small>" if interval else "")


def _tex(text: str) -> str:
    special = {char: f"\\{char}" for char in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$"}
    return "".join(special.get(char, char) for char in " ".join(text.split()))


def heading(table: Sequence[Row]) -> str:
    """The evaluation set of a table."""
    n, fingerprint = table[0].n, table[0].result.fingerprint
    return f"n = {n}: the first {n} examples of the archive (fingerprint {fingerprint[:12]})"


def constants(table: Sequence[Row], shown: Sequence[Column]) -> tuple[list[tuple[Column, str]], list[Column]]:
    """The columns that have one and the same value in all of several rows, said once, and the others.

    How many examples there are, the heading says.
    """
    constant = []
    for column in shown:
        values = {column.text(row) for row in table}
        if len(table) > 1 and len(values) == 1 and column.key not in ("rank", "model", "flags"):
            constant.append((column, values.pop() or "not known"))
    said = [column for column, _ in constant]
    varying = [column for column in shown if column not in said]
    return [(column, value) for column, value in constant if column.key != "n"], varying


def lacking(table: Sequence[Row], results: Path | None = None, together: bool = False) -> list[tuple[str, str, str]]:
    """Of each row without a rank its model, what it lacks in words, and the command that supplies that, if one does.

    None is named where several checkpoints have the model's name: the command would attack the one that it means now.

    `together`: rows that one command supplies share a note. The command names the folder `results`, but not in files,
    which are the same wherever the results lie.
    """

    def missing(row: Row) -> tuple[str, RunSpec | None]:
        named = [lack.suite for lack in row.lacks if lack.suite]
        suites = ",".join(named) if len(named) == len(row.lacks) else ""  # a command that gives no rank misleads
        update = {"suite": suites, "suite_params": {}, "warm_start": False, "seed": 0, "model": ""}
        why = "; ".join(lack.why for lack in row.lacks)
        if suites and CHECKPOINT in row.apart:
            return f"{why}: run {suites.replace(',', ' and ')} on this checkpoint", None
        return why, row.spec.model_copy(update=update) if suites else None

    unranked = [row for row in table if row.lacks]
    alike = list(grouped(unranked, missing).values()) if together else [[row] for row in unranked]
    notes = []
    for rows in alike:
        why, spec = missing(rows[0])
        words = ",".join(dict.fromkeys(row.info.word or row.spec.model for row in rows))
        notes.append((", ".join(row.name for row in rows), why, spec.command(results, words) if spec else ""))
    return notes


def _legend(shown: Sequence[Column]) -> str:
    """A line for each column whose title does not say it all; those that mean the same share one."""
    meanings = grouped((column for column in shown if column.meaning), lambda column: column.meaning)
    return "\n".join(
        f"- {', '.join(_escaped(column.title) for column in own)}: {meaning}" for meaning, own in meanings.items()
    )


def _pipe(table: Sequence[Row], shown: Sequence[Column]) -> str:
    body = []
    for row in table:
        cells = {column.key: column.cell(row) for column in shown}
        if "flags" in cells:
            cells["flags"] = str(len(row.flags)) if row.flags else ""
        if "model" in cells:
            cells["model"] = row.name
        body.append([_escaped(cell) or "–" for cell in cells.values()])
    headers = [_escaped(column.title) for column in shown]
    return tabulate(body, headers=headers, tablefmt="pipe", disable_numparse=True)


def _over_training_seeds(table: Sequence[Row]) -> list[str]:
    """The ranges over the training seeds of each variant that has several in the table; nothing without any."""
    lines = []
    for (name, alpha, _), rows in sorted(grouped(table, _variant).items()):
        seeds = {row.info.seed for row in rows}
        if len(seeds) > 1:
            shares = [[row.scores.clean, row.scores.ra, row.worst] for row in rows]
            ranges = [span(share.value for share in each if share) or "–" for each in zip(*shares, strict=True)]
            label = f"{name} (α {alpha})" if alpha else name
            lines.append([_escaped(label), ", ".join(map(str, sorted(seeds, key=str))), *ranges])
    if not lines:
        return []
    headers = ["model", "training seeds", "SA", "RA", "RA-worst"]
    return [tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)]


def _variant(row: Row) -> tuple[str, str, str]:
    """The model's name without its training seed, α and combine."""
    name = row.spec.model.removesuffix(f"-s{row.info.seed}")
    return name, "" if row.alpha is None else f"{row.alpha:g}", row.combine


def left_out(run: Run) -> str:
    """Why a run is on no board."""
    return f"Left out, for its {run.result.errors} rows with status `error`: {run}."


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '').replace('|', '')}`"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

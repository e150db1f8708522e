"""The report of the regression check: as text, JSON, JUnit, markdown, and annotations of GitHub Actions. No torch."""

import json
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import asdict

from tabulate import MIN_PADDING, tabulate

from bench.boards.check import Comparison, Report, Unmeasured, said

_VERDICTS = {"ok": "ok", "regression": "REGRESSION", "drop": "drop?", "gain": "GAIN"}
_HEADS = {"regression": "regression", "drop": "not significant", "gain": "gain"}
#: No line of the table is longer in a file; the texts of these columns are broken into lines where they have to be.
_WIDTH, _BROKEN = 99, ("model", "suite")


def text(report: Report, width: int | None = None) -> str:
    """A table in percent, under 100 columns wide, and a line for whatever in it is not simply ok.

    width: of the terminal, if it is one, to which both are fitted.
    """
    table = _table(report)
    if width and width < _WIDTH:  # which weights they are is the least of what a narrow one has to tell
        table = [{key: cell for key, cell in row.items() if key != "weights"} for row in table]
    widths = _widths(table, min(width or _WIDTH, _WIDTH)) if table else None
    shown = tabulate(table, headers="keys", tablefmt="simple", disable_numparse=True, maxcolwidths=widths)
    lines = [f"{head}: {line}" for head, line, _ in _lines(report)]
    lines = [textwrap.fill(line, width, subsequent_indent="  ") for line in lines] if width else lines
    return "\n".join([*(line.rstrip() for line in shown.splitlines()), *lines]) + "\n"


def _widths(table: list[dict[str, str]], most: int) -> list[int | None]:
    """Of each column the most characters of a line; None: as many as it needs."""
    needs = {key: max(len(key) + MIN_PADDING, *(len(row[key]) for row in table)) for key in table[0]}
    room = most - sum(need for key, need in needs.items() if key not in _BROKEN) - 2 * (len(needs) - 1)
    first, second = (needs[key] for key in _BROKEN)
    if first + second > room:
        first = max(1, min(first, max(room - second, room - 12, room // 2)))
        second = max(1, min(second, room - first))
    widths = dict(zip(_BROKEN, (first, second), strict=True))
    return [widths.get(key) for key in table[0]]


def markdown(report: Report) -> str:
    """The verdict in bold, the table, and the lines: what a summary of a CI job shows."""
    table = [{key: cell.replace("|", "\\|") for key, cell in row.items()} for row in _table(report)]
    parts = [f"**bench check: {'failed' if report.failed else 'passed'}**"]
    parts.append(tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True))
    if lines := _lines(report):
        parts.append("\n".join(f"- {head}: {line}" for head, line, _ in lines))
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> str:
    """One object: `failed`, the parameters, every comparison and what could not be compared."""
    rows = [{**asdict(row), "drop": row.drop, "fails": report.fails(row)} for row in report.rows]
    whole = {
        "failed": report.failed,
        "alpha": report.alpha,
        "max_drop": report.max_drop,
        "strict": report.strict,
        "rows": rows,
        "unmeasured": [asdict(one) for one in report.unmeasured],
        "warnings": report.warnings,
    }
    return json.dumps(whole, indent=1) + "\n"


def junit(report: Report) -> str:
    """A test case for each comparison, and for what could not be compared."""
    failures = sum(map(report.fails, report.rows)) + sum(one.fails for one in report.unmeasured)
    count = len(report.rows) + len(report.unmeasured)
    suite = ET.Element("testsuite", name="bench check", tests=str(count), failures=str(failures))
    found: list[Comparison | Unmeasured] = [*report.rows, *report.unmeasured]
    for one in found:
        name = f"{said(one.measure)} {one.suite}"
        case = ET.SubElement(suite, "testcase", classname=one.model, name=name)
        fails = report.fails(one) if isinstance(one, Comparison) else one.fails
        if fails:
            ET.SubElement(case, "failure", message=str(one))
        elif isinstance(one, Unmeasured):
            ET.SubElement(case, "skipped", message=str(one))
        elif one.verdict != "ok":
            ET.SubElement(case, "system-out").text = str(one)
    if report.warnings:
        ET.SubElement(suite, "system-out").text = "\n".join(report.warnings)
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def github(report: Report) -> str:
    """The text, and GitHub Actions' annotations: an error for what fails, a warning for what else is to be known."""
    lines = [
        f"::{'error' if fails else 'warning'} title=bench check: {head}::{_annotation(line)}"
        for head, line, fails in _lines(report)
    ]
    return text(report) + "".join(f"{line}\n" for line in lines)


def _annotation(line: str) -> str:
    return line.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _table(report: Report) -> list[dict[str, str]]:
    return [
        {  # short titles, since each is padded: names shall have the room
            "model": row.model,
            "weights": row.checkpoint,
            "suite": row.suite,
            "of": said(row.measure),
            "n": str(row.n),
            "was → now": f"{100 * row.baseline:.2f} → {100 * row.now:.2f}",
            "drop": f"{100 * row.drop:.2f}",
            "p": f"{row.p_adjusted:.2g}",
            "verdict": _VERDICTS[row.verdict],
        }
        for row in report.rows
    ]


def _lines(report: Report) -> list[tuple[str, str, bool]]:
    """What is not simply ok: its kind, in words, and whether it fails the check."""
    lines = [("warning", warning, False) for warning in report.warnings]
    lines += [(one.head, str(one), one.fails) for one in report.unmeasured]
    return lines + [(_HEADS[row.verdict], str(row), report.fails(row)) for row in report.rows if row.verdict != "ok"]


FORMATS: Mapping[str, Callable[[Report], str]] = {
    "text": text,
    "json": as_json,
    "junit": junit,
    "markdown": markdown,
    "github": github,
}

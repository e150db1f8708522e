"""The report of the regression check as text."""

from tabulate import tabulate

from bench.boards.check import Report

_VERDICTS = {"ok": "ok", "regression": "REGRESSION", "drop": "drop?", "gain": "GAIN"}
_MEASURES = {"robust": "RA", "clean_correct": "SA"}


def text(report: Report) -> str:
    """A table in percent, under 100 columns wide, and a line for whatever in it is not simply ok."""
    table = [
        {
            "model": row.model,
            "checkpoint": row.checkpoint,
            "suite": row.suite,
            "of": _MEASURES.get(row.measure, row.measure),
            "n": row.n,
            "before": f"{100 * row.baseline:.2f}",
            "now": f"{100 * row.now:.2f}",
            "drop": f"{100 * row.drop:.2f}",
            "p (Holm)": f"{row.p_adjusted:.2g}",
            "verdict": _VERDICTS[row.verdict],
        }
        for row in report.rows
    ]
    widths = [18, None, 16, None, None, None, None, None, None, None]
    lines = [tabulate(table, headers="keys", tablefmt="simple", disable_numparse=True, maxcolwidths=widths)]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"{'missing' if one.fails else 'not compared'}: {one}" for one in report.unmeasured]
    heads = {"regression": "regression", "drop": "not significant", "gain": "gain"}
    lines += [f"{heads[row.verdict]}: {row}" for row in report.rows if row.verdict != "ok"]
    return "\n".join(lines) + "\n"

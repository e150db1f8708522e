"""A certification's table and its figure: what share is certified at which radius."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tabulate import tabulate

from bench.drawing import bars_of_sizes, name, steps_by_radius, style, svg
from bench.results.certificates import ANSWERED, ROUTES, STATUSES, Certification, succeeded
from bench.results.curves import last_radius, shares, sizes
from bench.results.table import Table
from bench.spec import ThreatModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The radii of the table of shares, as multiples of the run's ε.
_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_NOTE = "%: of all images; of a class, certified and right; of a route, certified."
_TITLES = {True: "share of images that keep their route", False: "certified accuracy"}


def table(result: Certification, rows: pd.DataFrame) -> str:
    """Markdown: each method at each ε that it was asked for, the statuses, and |S(ε)| where it is known.

    Below it, of methods with a radius of their own, the share of images at several radii.
    """
    headers, body = _rows(result, rows)
    body = [[cell.replace("|", "\\|") for cell in row] for row in body]
    text = tabulate(body, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"# {_title(result)}\n\n{text}\n\n{_NOTE}\n{_by_radius(rows, result.spec.threat_model, 'pipe')}"


def terminal(result: Certification, rows: pd.DataFrame, width: int | None = None) -> str:
    """The same as `table` in plain text, with reasons below, and lines of at most `width` columns where it is given."""
    (*headers, _), body = _rows(result, rows)
    shown = [at for at in range(len(headers)) if at < 3 or any(row[at] != "–" for row in body)]
    cells = [[row[at] for at in shown] for row in body]
    text = tabulate(cells, headers=[headers[at] for at in shown], tablefmt="simple", disable_numparse=True)
    unknown = {row[0] for row in body if "not_supported" in row[3]}
    reasons = dict.fromkeys(
        f"{row[0]}: {'not supported: ' if row[0] in unknown else ''}{row[-1]}" for row in body if row[-1] != "–"
    )
    said = [textwrap.fill(reason, width or 10**6, subsequent_indent="  ") for reason in (*reasons, _NOTE)]
    below = "\n".join(said)
    return f"{_title(result)}\n\n{text}\n\n{below}\n{_by_radius(rows, result.spec.threat_model, 'simple')}"


def _rows(result: Certification, rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The headers, and a row for each method and ε."""
    threat = result.spec.threat_model
    body = []
    for (method, _), own in rows.groupby(["method", "eps"], sort=False):
        statuses = own["status"].value_counts()
        sizes = own.loc[own["reachable"] >= 0, "reachable"].value_counts().sort_index()
        body.append([
            str(method),
            ThreatModel(norm=threat.norm, eps=own["eps"].iloc[0]).eps_text,
            _share(own),
            ", ".join(f"{status} {statuses[status]}" for status in STATUSES if status in statuses),
            ", ".join(f"{size}: {count}" for size, count in sizes.items()) or "–",
            "; ".join(dict.fromkeys(reason for reason in own["reason"] if reason)) or "–",
        ])  # fmt: skip
    return ["method", f"{threat.norm} ε", "%", "rows", "size of S(ε): rows", "reason"], body


def _title(result: Certification) -> str:
    title = f"{result.spec.suite} on {result.spec.model}, {result.spec.dataset}, n = {result.spec.n_examples}"
    alpha = "" if result.spec.alpha is None else f", α {result.spec.alpha:g}"
    return title + alpha + "".join(f", {key} {value}" for key, value in sorted(result.spec.suite_params.items()))


def _share(own: pd.DataFrame) -> str:
    if not own["status"].isin(ANSWERED).all():
        return "–"
    if (own["method"] == "smoothing-predict").all():
        return f"{100 * succeeded(Table.of(own)).mean():.2f} (accuracy)"
    if (own["method"] == "paper-formula").all():
        return f"{100 * ((own['radius'] >= own['eps']) & own['correct']).mean():.2f} (no certificate)"
    return f"{100 * succeeded(Table.of(own)).mean():.2f}"


def _by_radius(rows: pd.DataFrame, threat: ThreatModel, tablefmt: str) -> str:
    """A table of `shares` at multiples of ε; nothing where no method has a radius of its own."""
    lines = shares(rows)
    if not lines:
        return ""
    balls = [ThreatModel(norm=threat.norm, eps=multiple * threat.eps) for multiple in _MULTIPLES]
    body = [
        [f"{ball.eps:.4g}", *(f"{100 * y[np.searchsorted(x, ball.reach, 'right') - 1]:.2f}" for x, y in lines.values())]
        for ball in balls
    ]
    text = tabulate(body, [f"{threat.norm} radius", *lines], tablefmt=tablefmt, disable_numparse=True)
    return f"\n{text}\n\n%, by radius: the share of images that still count there.\n"


def curve(result: Certification, rows: pd.DataFrame) -> str:
    """The `figure` as SVG, whose bytes follow from the rows alone."""
    return svg(figure(result, rows))


def figure(result: Certification, rows: pd.DataFrame) -> "Figure":
    """The `shares`, and the share at the run's own ε where a method has no radius of its own.

    Below it, of routes, a histogram of |S(ε)|: a bar for each ε, the smallest size at the bottom.
    """
    from matplotlib.figure import Figure  # here, since only a certification that is finished draws

    threat, lines, reached = result.spec.threat_model, shares(rows), sizes(rows)
    of_routes = bool(set(result.certified) & set(ROUTES))
    points = {method: rate.value for method, rate in result.certified.items() if method not in lines}
    with style():
        drawn = Figure(figsize=(6, 7 if len(reached) else 3.6), layout="constrained")
        panels = drawn.subplots(2 if len(reached) else 1, squeeze=False)[:, 0]
        steps_by_radius(panels[0], lines, points, threat.eps, last_radius(lines, threat.eps, of_routes))
        title = f"{result.spec.suite} on {name(result.spec.model)}"
        panels[0].set(title=title, xlabel=f"{threat.norm} radius", ylabel=_TITLES[of_routes])
        for panel in panels[1:]:
            bars_of_sizes(panel, reached)
            panel.set(title="size of S(ε)", xlabel=f"{threat.norm} ε", ylabel="share of images")
        for panel in panels:
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
    return drawn

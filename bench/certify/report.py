"""A certification's table and its plot: what share is certified at which radius."""

from collections.abc import Mapping, Sequence
from math import isfinite

import jinja2
import numpy as np
import pandas as pd
from tabulate import tabulate

from bench.results.certificates import ANSWERED, ROUTES, SMOOTHED, STATUSES, Certification, succeeded
from bench.spec import ThreatModel

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999")
#: The radii of the table of shares, as multiples of the run's ε.
_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_TITLES = {True: "share of images that keep their route", False: "certified accuracy"}


def table(result: Certification, rows: pd.DataFrame) -> str:
    """Markdown: each method at each ε that it was asked for, the statuses, and |S(ε)| where it is known.

    Below it, of methods with a radius of their own, the share of images at several radii.
    """
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
            "; ".join(dict.fromkeys(reason.replace("|", "\\|") for reason in own["reason"] if reason)) or "–",
        ])  # fmt: skip
    headers = ["method", f"{threat.norm} ε", "%", "rows", "size of S(ε): rows", "reason"]
    title = f"# {result.spec.suite} on {result.spec.model}, {result.spec.dataset}, n = {result.spec.n_examples}"
    alpha = "" if result.spec.alpha is None else f", α {result.spec.alpha:g}"
    params = "".join(f", {key} {value}" for key, value in sorted(result.spec.suite_params.items()))
    text = tabulate(body, headers=headers, tablefmt="pipe", disable_numparse=True)
    note = "%: of all images; of a class, certified and right; of a route, certified."
    return f"{title}{alpha}{params}\n\n{text}\n\n{note}\n{_by_radius(shares(rows), threat)}"


def _share(own: pd.DataFrame) -> str:
    if not own["status"].isin(ANSWERED).all():
        return "–"
    if (own["method"] == "paper-formula").all():
        return f"{100 * ((own['radius'] >= own['eps']) & own['correct']).mean():.2f} (no certificate)"
    return f"{100 * succeeded(own).mean():.2f}"


def _by_radius(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], threat: ThreatModel) -> str:
    """A table of `shares` at multiples of ε; nothing where no method has a radius of its own."""
    if not lines:
        return ""
    balls = [ThreatModel(norm=threat.norm, eps=multiple * threat.eps) for multiple in _MULTIPLES]
    body = [
        [f"{ball.eps:.4g}", *(f"{100 * y[np.searchsorted(x, ball.reach, 'right') - 1]:.2f}" for x, y in lines.values())]
        for ball in balls
    ]
    text = tabulate(body, [f"{threat.norm} radius", *lines], tablefmt="pipe", disable_numparse=True)
    return f"\n{text}\n\n%, by radius: the share of images that still count there.\n"


def shares(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By method, the share of images (≥ 2,) that still count at each radius, as a step curve from radius 0.

    A route counts at all radii below its own; a class as well, where it is right. A method with one ε is a point.
    """
    found = {}
    for method, own in rows.groupby("method", sort=False):
        first = own.drop_duplicates("idx")
        if method in (*ROUTES[:2], *SMOOTHED):
            counts = first["radius"].notna() & (first["correct"] | first["method"].isin(ROUTES)) & (first["radius"] > 0)
            radii = np.sort(first.loc[counts, "radius"].to_numpy())
            finite = radii[np.isfinite(radii)]
            x = np.concatenate([[0.0], finite])
            found[str(method)] = (x, (len(radii) - np.arange(len(x))) / len(first))
    return found


def sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of images with each |S(ε)| (columns) at each ε (index) that the route's radius was asked for at."""
    own = rows[(rows["method"] == ROUTES[0]) & (rows["reachable"] >= 0)]
    return pd.crosstab(own["eps"], own["reachable"], normalize="index")


def curve(result: Certification, rows: pd.DataFrame) -> str:
    """An SVG of `shares`, and of the share at the run's own ε where a method has no radius of its own.

    Below it, of routes, a histogram of |S(ε)|: a bar for each ε, the smallest size at the bottom.
    """
    threat, lines = result.spec.threat_model, shares(rows)
    points = {method: rate.value for method, rate in result.certified.items() if method not in lines}
    ends = [float(x[-1]) for x, _ in lines.values() if len(x) > 1]
    right = max([threat.eps, *(end for end in ends if isfinite(end))])
    if set(result.certified) & set(ROUTES):  # beyond a few ε nothing is of interest
        right = min(right, 2 * threat.eps)
    return _svg(
        f"{result.spec.suite} on {result.spec.model}",
        f"{threat.norm} radius",
        _TITLES[bool(set(result.certified) & set(ROUTES))],
        right,
        lines,
        {method: (threat.eps, value) for method, value in points.items()},
        sizes(rows),
    )


_TEMPLATE = jinja2.Template(
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 {{ height }}" font-family="sans-serif" font-size="12">
<rect width="560" height="{{ height }}" fill="white"/>
<text x="60" y="22" font-size="14">{{ title }}</text>
{%- for y, label in y_ticks %}
<path d="M60 {{ y }}H540" stroke="#ddd"/><text x="54" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{%- endfor %}
{%- for x, label in x_ticks %}
<path d="M{{ x }} 310V315" stroke="black"/><text x="{{ x }}" y="328" text-anchor="middle">{{ label }}</text>
{%- endfor %}
<path d="M60 40V310H540" fill="none" stroke="black"/>
<text x="300" y="348" text-anchor="middle">{{ x_title }}</text>
<text x="16" y="175" text-anchor="middle" transform="rotate(-90 16 175)">{{ y_title }}</text>
{%- for name, colour, path, point in series %}
{%- if path %}
<path d="{{ path }}" fill="none" stroke="{{ colour }}" stroke-width="1.5"/>
{%- endif %}
{%- if point %}
<circle cx="{{ point[0] }}" cy="{{ point[1] }}" r="4" fill="{{ colour }}"/>
{%- endif %}
<text x="534" y="{{ 54 + 16 * loop.index0 }}" text-anchor="end" fill="{{ colour }}">{{ name }}</text>
{%- endfor %}
{%- if bars %}
<text x="60" y="385" font-size="14">size of S(ε), share of images</text>
{%- for y, label in y_ticks %}
<path d="M60 {{ y + 360 }}H540" stroke="#ddd"/><text x="54" y="{{ y + 364 }}" text-anchor="end">{{ label }}</text>
{%- endfor %}
{%- for x, label, parts in bars %}
{%- for size, colour, y, tall in parts %}
<rect class="size-{{ size }}" x="{{ x }}" y="{{ y }}" width="40" height="{{ tall }}" fill="{{ colour }}"/>
{%- endfor %}
<text x="{{ x + 20 }}" y="688" text-anchor="middle">{{ label }}</text>
{%- endfor %}
<path d="M60 400V670H540" fill="none" stroke="black"/>
<text x="300" y="708" text-anchor="middle">{{ x_title }} ε</text>
{%- for size, colour in legend %}
<text x="534" y="{{ 414 + 16 * loop.index0 }}" text-anchor="end" fill="{{ colour }}">|S(ε)| = {{ size }}</text>
{%- endfor %}
{%- endif %}
</svg>
""",
    autoescape=True,
)


def _svg(
    title: str,
    x_title: str,
    y_title: str,
    right: float,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Mapping[str, tuple[float, float]],
    sizes: pd.DataFrame,
) -> str:
    def at(x: float, y: float) -> tuple[float, float]:
        return round(60 + 480 * x / right, 2), round(310 - 270 * y, 2)

    def path(x: Sequence[float], y: Sequence[float]) -> str:
        kept = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if a <= right]
        start = at(*kept[0])
        steps = "".join(f"H{at(a, b)[0]}V{at(a, b)[1]}" for a, b in kept[1:])
        return f"M{start[0]} {start[1]}{steps}H{at(right, 0)[0]}"

    names = [*lines, *points]
    series = [
        (
            name,
            _COLOURS[number % len(_COLOURS)],
            path(*map(list, lines[name])) if name in lines else "",
            at(*points[name]) if name in points else None,
        )
        for number, name in enumerate(names)
    ]
    colours = {size: _COLOURS[number % len(_COLOURS)] for number, size in enumerate(sizes.columns)}
    bars = []
    for number, (eps, own) in enumerate(sizes.iterrows()):
        tops = own.cumsum()
        parts = [(size, colours[size], at(0, tops[size])[1] + 360, round(270 * own[size], 2)) for size in colours]
        bars.append((80 + 70 * number, f"{eps:.3g}", parts))
    return _TEMPLATE.render(
        height=720 if bars else 360,
        bars=bars,
        legend=list(colours.items()),
        title=title,
        x_title=x_title,
        y_title=y_title,
        y_ticks=[(at(0, y / 5)[1], f"{20 * y} %") for y in range(6)],
        x_ticks=[(at(right * x / 4, 0)[0], f"{right * x / 4:.3g}") for x in range(5)],
        series=series,
    )

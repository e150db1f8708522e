"""The figures, each as a function from what was measured to a drawing, or to None where there is nothing to show.

Every figure is as wide as a telephone's page and is told apart without colours. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from bench.boards.rows import Row
from bench.drawing import (
    BLUE,
    GREEN,
    GRID,
    INK,
    LINES,
    MARKERS,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    SERIES,
    Drawing,
    bars_of_sizes,
    sentence,
    shares_upward,
    steps_by_radius,
    style,
)
from bench.drawing import name as shown
from bench.report.details import (
    Model,
    by_class,
    by_eps,
    by_expert,
    by_label,
    certificate_of,
    chain,
    flow,
    sweeps,
    waterfall,
)
from bench.results.curves import last_radius, shares, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches
_LETTER = 0.062  # inches that a letter of a label takes
_LEGEND = 0.18  # inches of a legend's line
_MOST_CLASSES = 20
#: Marker, colour and line of what the chain consists of.
_CHAIN: dict[str, tuple[str, str, Any]] = {
    "certified": ("v", INK, "-"),
    "RA-worst": ("D", RED, "--"),
    "AutoAttack": ("o", ORANGE, "-."),
    "PGD": ("^", GREEN, ":"),
    "SA": ("s", BLUE, (0, (5, 1, 1, 1, 1, 1))),
}


def _panels(
    *heights: float, left: float = 0.68, right: float = 0.12, top: float = 0.1, gap: float = 0.5, bottom: float = 0.45
) -> "tuple[Figure, list[Axes]]":
    """A figure of panels of these heights below each other. All lengths are inches.

    They are set, not fitted: the reader's fonts are not those that would be measured here.
    """
    from matplotlib.figure import Figure

    height = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure, panels, y = Figure(figsize=(WIDTH, height)), [], height - top
    for own in heights:
        y -= own
        panels.append(figure.add_axes((left / WIDTH, y / height, (WIDTH - left - right) / WIDTH, own / height)))
        y -= gap
    return figure, panels


def _room(labels: Sequence[str]) -> float:
    """Inches beside the axes for such labels."""
    return 0.12 + _LETTER * max(map(len, labels), default=0)


def _legend(figure: "Figure", handles: Sequence[Any], columns: int = 3) -> None:
    """At the top left; `_lines_of` says how much room it takes there."""
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=columns, columnspacing=1.2, handletextpad=0.5,
        borderaxespad=0, labelspacing=0.3,
    )  # fmt: skip


def _lines_of(entries: int, columns: int = 3) -> float:
    return 0.12 + _LEGEND * ceil(entries / columns)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _across(axes: "Axes") -> None:
    """The x axis is a share, from 0 to 100 %."""
    axes.set_xlim(-0.015, 1.015)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    _percent(axes.xaxis)
    axes.grid(axis="x")


# --- of a board -------------------------------------------------------------------------------------------------------


def bounds(rows: Sequence[Row], names: bool = True) -> Drawing | None:
    """Of each row the bar certified ≤ true ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if all(row.worst is None for row in rows):
        return None
    labels = [shown(row.name) if names else "" for row in rows]
    used = dict.fromkeys(label for row in rows for label in chain(row))
    points = {label: how for label, how in _CHAIN.items() if label in used and label != "certified"}
    with style():
        handles: list[Any] = [Patch(facecolor=INK, label="certified")] * ("certified" in used)
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", label="the truth lies here"))
        handles += [
            Line2D([], [], marker=marker, color=colour, linestyle="", markeredgecolor=PAPER, label=label)
            for label, (marker, colour, _) in points.items()
        ]
        left = max(0.25, _room(labels))
        figure, (axes,) = _panels(
            0.24 * len(rows) + 0.06, left=left, right=0.2, top=_lines_of(len(handles)), bottom=0.3
        )
        _legend(figure, handles)
        for at, row in enumerate(rows):
            known = chain(row)
            if (worst := known.get("RA-worst")) is not None:
                proven = known.get("certified", 0.0)
                axes.barh(at, proven, 0.62, color=INK, edgecolor=INK, linewidth=0.8)
                open_bar: dict[str, Any] = {"facecolor": "none", "hatch": "////", "edgecolor": MUTED, "linewidth": 0.8}
                axes.barh(at, worst - proven, 0.62, left=proven, **open_bar)
                axes.plot([worst, known["SA"]], [at, at], "-", color=MUTED, linewidth=0.8, zorder=1)
            for label, (marker, colour, _) in reversed(points.items()):
                if label in known:  # RA-worst on top, and smaller than AutoAttack, which is often the same
                    size = {"RA-worst": 5.5, "AutoAttack": 8.0}.get(label, 6.5)
                    look: dict[str, Any] = {"color": colour, "markeredgecolor": PAPER, "markersize": size}
                    axes.plot(known[label], at, marker, markeredgewidth=0.6, **look)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), labels)
        axes.spines["left"].set_visible(False)
        _across(axes)
    told = "; ".join(f"{row.name}: {sentence(chain(row))}" for row in rows[:30])
    return Drawing(figure, "What is certified, and what attacks leave", f"{told}.")


def accuracy(rows: Sequence[Row]) -> Drawing | None:
    """SA against RA-worst, with 95 % intervals."""
    own = [(row, row.worst) for row in rows if row.worst is not None]
    if len(own) < 2:
        return None
    own.sort(key=lambda pair: (pair[1].value, -pair[0].scores.clean.value, pair[0].name))
    with style():
        figure, (axes,) = _panels(max(2.3, 0.17 * len(own)), right=0.3 + _room([shown(row.name) for row, _ in own]))
        left = max(0.0, 0.1 * int(10 * min(row.scores.clean.low for row, _ in own)))
        right = min(1.0, 0.1 * ceil(10 * max(row.scores.clean.high for row, _ in own)))
        top = min(1.0, 0.1 * ceil(10 * max(worst.high for _, worst in own)))
        heights = _apart([worst.value for _, worst in own], top * 0.17 / max(2.3, 0.17 * len(own)), top)
        edge = right + 0.07 * (right - left)
        for at, ((row, worst), height) in enumerate(zip(own, heights, strict=True)):
            clean, colour = row.scores.clean, SERIES[at % len(SERIES)]
            axes.errorbar(
                clean.value, worst.value,
                xerr=[[clean.value - clean.low], [clean.high - clean.value]],
                yerr=[[worst.value - worst.low], [worst.high - worst.value]],
                fmt=MARKERS[at % len(MARKERS)], color=colour, elinewidth=0.9, markersize=5.5, clip_on=False,
                markerfacecolor=colour if row.ranked else PAPER,
            )  # fmt: skip
            to_label: dict[str, Any] = {
                "color": MUTED,
                "linewidth": 0.5,
                "linestyle": "-",
                "clip_on": False,
                "zorder": 1,
            }
            axes.plot([clean.value, edge], [worst.value, height], **to_label)
            axes.text(edge + 0.015 * (right - left), height, shown(row.name), va="center", fontsize=7.5)
        axes.set(xlim=(left, right), xlabel="SA: right without an attack", ylabel="RA-worst: under all attacks")
        shares_upward(axes)
        axes.set_ylim(0, top)
        _percent(axes.xaxis)
        axes.grid(axis="x")
    told = "; ".join(f"{row.name}: {sentence({'SA': row.scores.clean.value, 'RA-worst': w.value})}" for row, w in own)
    hollow = "; hollow: without a rank" * any(not row.ranked for row, _ in own)
    return Drawing(figure, f"Accuracy and robustness (lines: 95 % intervals{hollow})", f"{told}.")


def _apart(values: Sequence[float], gap: float, top: float) -> list[float]:
    """The ascending values, moved as little as is needed to be `gap` apart and at most `top`, if there is room."""
    up: list[float] = []
    for value in values:
        up.append(max(value, up[-1] + gap) if up else value)
    down: list[float] = []
    for value in reversed(up):
        down.append(min(value, down[-1] - gap) if down else min(value, top))
    return down[::-1]


def alpha(rows: Sequence[Row]) -> Drawing | None:
    """The chain of each dual against α, where several were run."""
    found = sweeps(rows)
    if not found:
        return None
    points = {model: by_label([(row.alpha or 0.0, chain(row)) for row in own]) for model, own in found.items()}
    with style():
        top = _lines_of(len(_CHAIN)) + 0.2
        figure, panels = _panels(*[1.8] * len(found), top=top, gap=0.75)
        for axes, (model, own) in zip(panels, points.items(), strict=True):
            _lines(axes, own)
            axes.set(title=shown(model), xlabel="α, the weight of the robust branch", ylabel="share of images")
        _legend(figure, panels[0].get_legend_handles_labels()[0])
    told = "; ".join(
        f"{model}: " + ", ".join(f"α {row.alpha:g}: {sentence(chain(row))}" for row in own)
        for model, own in found.items()
    )
    return Drawing(figure, "Duals by α", f"{told}.")


def _lines(axes: "Axes", points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A line for each label of the chain."""
    for label, line in points.items():
        marker, colour, kind = _CHAIN[label]
        x, y = zip(*line, strict=True)
        axes.plot(x, y, marker=marker, color=colour, linestyle=kind, markeredgecolor=PAPER, label=label, clip_on=False)
    axes.locator_params(axis="x", nbins=6)
    shares_upward(axes)


# --- of a model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    """A line of the waterfall: what is left, and what was there before; a head has no bar of its own."""

    label: str
    before: float
    after: float
    said: str = ""
    head: bool = False


def attacks(model: Model) -> Drawing | None:
    """What each attack of each suite leaves, as a waterfall."""
    steps, worst = waterfall(model), model.row.worst
    if not steps or worst is None:
        return None
    clean = model.row.scores.clean.value
    bars = [_Bar("no attack (SA)", clean, clean, f"{100 * clean:.1f} %", head=True)]
    for suite in dict.fromkeys(step.suite for step in steps):
        own = [step for step in steps if step.suite == suite]
        if len(own) > 1:
            bars.append(_Bar(shown(suite), 0, 0, head=True))
        for step in own:
            if step.broke or len(own) == 1:
                alone = f", {step.alone} alone" if step.alone else ""
                label = shown(suite if len(own) == 1 else step.attack)
                bars.append(_Bar(label, step.before, step.after, f"−{step.broke}{alone}", head=len(own) == 1))
        idle = [step.attack for step in own if not step.broke]
        if len(own) > 1 and idle:
            label = shown(idle[0]) if len(idle) == 1 else f"{len(idle)} other attacks"
            bars.append(_Bar(label, own[-1].after, own[-1].after, "−0"))
    bars.append(_Bar("all attacks (RA-worst)", worst.value, worst.value, f"{100 * worst.value:.1f} %", head=True))
    with style():
        left = 0.08 + _room([bar.label for bar in bars])
        figure, (axes,) = _panels(0.185 * len(bars), left=left, right=0.5)
        for at, bar in enumerate(bars):
            axes.barh(at, bar.after, 0.7, color=INK if at in (0, len(bars) - 1) else BLUE, linewidth=0)
            if bar.before > bar.after:
                lost: dict[str, Any] = {"facecolor": "none", "hatch": "/////", "edgecolor": RED, "linewidth": 0.8}
                axes.barh(at, bar.before - bar.after, 0.7, left=bar.after, **lost)
            if bar.said:
                axes.text(bar.before + 0.012, at, bar.said, va="center", fontsize=7.5)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        for text, bar in zip(axes.get_yticklabels(), bars, strict=True):
            text.set_fontweight("bold" if bar.head else "normal")
        axes.spines["left"].set_visible(False)
        _across(axes)
        axes.set_xlabel("not yet broken; hatched: broken by this attack")
    told = "; ".join(f"{step.suite}, {step.attack}: {step.broke}, {100 * step.after:.1f} % left" for step in steps)
    return Drawing(
        figure,
        "Attack by attack: first broken by",
        f"{100 * clean:.1f} % of {model.row.n} images are right without an attack. Broken by {told}."
        f" All attacks together leave {100 * worst.value:.1f} %.",
    )


def experts(model: Model) -> Drawing | None:
    """Each expert's load, SA and RA-worst."""
    table = by_expert(model)
    if table is None:
        return None
    title = "By expert" + " of the robust branch" * (model.row.alpha is not None)
    labels = [f"{expert}\n{n}" for expert, n in table["images"].items()]
    return _grouped(table.drop(columns="images"), labels, title, "expert of the clean image, and its images")


def classes(model: Model) -> Drawing | None:
    """SA and RA-worst of each class."""
    table = by_class(model)
    if "RA-worst" not in table or len(table) < 2:
        return None
    title = "By class"
    if len(table) > _MOST_CLASSES:
        title = f"The {_MOST_CLASSES} least robust of {len(table)} classes"
        table = table.sort_values("RA-worst", kind="stable").head(_MOST_CLASSES)
    return _grouped(table.drop(columns="images"), [str(label) for label in table.index], title, "class")


def _grouped(table: pd.DataFrame, labels: Sequence[str], title: str, what: str) -> Drawing:
    """A group of bars for each row of the table, a bar for each column; a share of nothing is left out."""
    looks = {"load": (INK, "\\"), "SA": (BLUE, ""), "RA-worst": (ORANGE, "////")}
    width = 0.8 / len(table.columns)
    with style():
        two_lines = any("\n" in label for label in labels)
        figure, (axes,) = _panels(1.5, top=_lines_of(len(table.columns)), bottom=0.58 if two_lines else 0.45)
        for at, (column, values) in enumerate(table.items()):
            x = [number + (at - (len(table.columns) - 1) / 2) * width for number in range(len(table))]
            colour, hatch = looks[str(column)]
            look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0.8}
            axes.bar(x, values.fillna(0), width, label=str(column), **look)
        axes.set_xticks(range(len(table)), labels)
        axes.set_xlabel(what)
        shares_upward(axes)
        _legend(figure, axes.get_legend_handles_labels()[0])
    told = "; ".join(f"{index}: {sentence(dict(row.dropna()))}" for index, row in table.iterrows())
    return Drawing(figure, title, f"{told}.")


def flows(model: Model) -> Drawing | None:
    """Which expert the broken images went to, without and under attack."""
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path

    found = flow(model)
    if found is None:
        return None
    gap, wide, total = 0.02, 0.035, found.total
    sums = [found.counts.sum(axis=axis).tolist() for axis in (1, 0)]
    left, right = (_stacked(sizes_of, total, gap) for sizes_of in sums)
    moves = [(int(start), int(end), int(found.counts[start, end])) for start, end in np.argwhere(found.counts)]
    with style():
        figure, (axes,) = _panels(2.4, left=0.05, right=0.05, top=0.05, bottom=0.05)
        axes.set_axis_off()
        axes.set_xlim(-0.2, 1.2)
        axes.set_ylim(1 + gap * len(found.counts), -0.1)
        at_left, at_right = dict(left), dict(right)
        curve = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        for start, end, count in moves:
            top, end_top = at_left[start], at_right[end]
            at_left[start] = bottom = top + count / total
            at_right[end] = end_bottom = end_top + count / total
            there = [(wide, top), (0.5, top), (0.5, end_top), (1 - wide, end_top)]
            back = [(1 - wide, end_bottom), (0.5, end_bottom), (0.5, bottom), (wide, bottom), (wide, top)]
            colour, opacity = (GRID, 0.85) if start == end else (SERIES[start % len(SERIES)], 0.6)
            path = Path([*there, *back], curve)
            axes.add_patch(PathPatch(path, facecolor=colour, alpha=opacity, edgecolor=PAPER, linewidth=0.6))
        for tops, sizes_of, x, align, text_x in (
            (left, sums[0], 0.0, "right", -0.02),
            (right, sums[1], 1 - wide, "left", 1.02),
        ):
            for expert, size in enumerate(sizes_of):
                if size:
                    colour = SERIES[expert % len(SERIES)]
                    axes.add_patch(Rectangle((x, tops[expert]), wide, size / total, facecolor=colour))
                    middle = tops[expert] + size / total / 2
                    axes.text(text_x, middle, f"{expert} ({size})", ha=align, va="center", fontsize=8)
        axes.text(0, -0.03, "clean image", ha="left", va="bottom")
        axes.text(1, -0.03, "attacked image", ha="right", va="bottom")
    told = "; ".join(f"expert {start} to {end}: {count}" for start, end, count in moves)
    whose = " of the robust branch" * (model.row.alpha is not None)
    changed = f"changed for {found.moved} of {found.total} broken images"
    return Drawing(figure, f"Expert{whose} under {shown(found.suite)}: {changed}", f"{told}.")


def _stacked(sizes_of: Sequence[int], total: int, gap: float) -> dict[int, float]:
    """Where each of the stacked bars begins, with a gap below each that is not empty."""
    tops, y = {}, 0.0
    for at, size in enumerate(sizes_of):
        tops[at] = y
        y += size / total + gap * bool(size)
    return tops


def routes(model: Model) -> Drawing | None:
    """The share of images that keep their route, by radius, and how many experts a ball can reach."""
    found = certificate_of(model, "routes")
    if not found:
        return None
    one = found[0]
    threat, reached = one.result.spec.threat_model, sizes(one.rows.frame())
    every = shares(one.rows.frame())
    lines = {"routes": every["routes"]} if "routes" in every else every
    with style():
        panels_of = [1.3, 1.3] if len(reached) else [1.3]
        figure, panels = _panels(*panels_of, left=0.82, gap=0.62 + _lines_of(len(reached.columns)))
        _marked_radius(panels[0], lines, threat.eps, last_radius(lines, threat.eps, True))
        panels[0].set(xlabel=f"{threat.norm} radius", ylabel="images that keep\ntheir route")
        for panel in panels[1:]:
            bars_of_sizes(panel, reached)
            panel.set(xlabel=f"{threat.norm} ε", ylabel="images")
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, columnspacing=1, handletextpad=0.4)
    kept = sentence({method: share.value for method, share in one.result.certified.items()})
    told = f"Images whose route no attack inside ε {threat.eps_text} can change: {kept}."
    for at, row in reached.iterrows():
        counts = ", ".join(f"{size}: {100 * share:.1f} %" for size, share in row.items() if share)
        told += f" Experts within reach of {at:.3g}: {counts}."
    return Drawing(figure, "Route-stable share, and experts S(ε) within reach", told)


def smoothed(model: Model) -> Drawing | None:
    """Certified accuracy of the smoothed model, which is another classifier, by L2 radius."""
    found = certificate_of(model, "smoothing")
    lines = {
        f"{label}, σ {one.result.params['sigma']:g}": line
        for one in found
        for label, line in shares(one.rows.frame()).items()
        if label in one.result.certified
    }
    if not lines:
        return None
    threat = found[0].result.spec.threat_model
    with style():
        figure, (axes,) = _panels(1.5, top=_lines_of(len(lines), 1))
        _marked_radius(axes, lines, threat.eps, last_radius(lines, threat.eps, False))
        axes.set(xlabel="L2 radius", ylabel="certified accuracy")
        _legend(figure, axes.get_legend_handles_labels()[0], 1)
    told = sentence({
        f"{method}, σ {one.result.params['sigma']:g}, at {one.result.spec.threat_model}": share.value
        for one in found
        for method, share in one.result.certified.items()
    })  # fmt: skip
    return Drawing(figure, "The smoothed model, another classifier", f"Certified but for a small probability: {told}.")


def _marked_radius(axes: "Axes", lines: Mapping[str, tuple[np.ndarray, np.ndarray]], eps: float, right: float) -> None:
    steps_by_radius(axes, lines, {}, eps, right)
    axes.axvline(eps, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate("ε", (eps, 1), xytext=(3, -2), textcoords="offset points", va="top")
    axes.locator_params(axis="x", nbins=6)


def eps(model: Model) -> Drawing | None:
    """The chain against ε, where the model was run at several."""
    points = by_eps(model)
    if not points:
        return None
    with style():
        figure, (axes,) = _panels(1.6, top=_lines_of(len(points)))
        _lines(axes, points)
        axes.set(xlabel=f"{model.row.spec.threat_model.norm} ε", ylabel="share of images")
        axes.set_xlim(left=0)
        _legend(figure, axes.get_legend_handles_labels()[0])
    told = "; ".join(
        f"{label}: " + ", ".join(f"{100 * share:.1f} % at {at:g}" for at, share in line)
        for label, line in points.items()
    )
    return Drawing(figure, "Against ε", f"{told}.")


def training(model: Model) -> Drawing | None:
    """The epochs of its training: loss, SA and RA on held-out images, load, the router's margin and flips."""
    table = model.history
    if table is None or not len(table):
        return None
    numbers = table.select_dtypes("number").rename(columns=str)
    every = [str(column) for column in numbers]
    kinds: dict[str, list[str]] = {
        "loss": [c for c in every if c == "loss" or c.startswith("loss_")],
        "held-out accuracy": [c for c in every if c in ("val_sa", "val_ra", "val_ra_pgd")],
        "load": [c for c in every if "load_" in c and c.rpartition("_")[2].isdigit()],
        "routes that flip": [c for c in every if c.endswith("route_flip_rate")],
        "router's margin": [c for c in every if c.endswith("router_margin")],
    }
    kinds = {kind: columns[:12] for kind, columns in kinds.items() if columns}
    if not kinds:
        return None
    x = numbers["epoch"] if "epoch" in numbers else numbers.index.to_series()
    with style():
        figure, panels = _panels(*[0.85] * len(kinds), right=1.25, top=0.25, gap=0.42)
        for panel, (kind, columns) in zip(panels, kinds.items(), strict=True):
            for at, column in enumerate(columns):
                label = {"val_sa": "SA", "val_ra": "RA", "val_ra_pgd": "RA, PGD on the whole"}.get(column, column)
                look: dict[str, Any] = {"color": SERIES[at % len(SERIES)], "linestyle": LINES[at % len(LINES)]}
                panel.plot(x, numbers[column], marker="o" if len(x) < 2 else "", label=shown(label), **look)
            panel.set_title(kind, fontsize=8.5)
            panel.grid(axis="y")
            panel.locator_params(axis="x", integer=True, nbins=6)
            panel.locator_params(axis="y", nbins=4)
            if len(columns) > 1:
                panel.legend(loc="upper left", bbox_to_anchor=(1, 1.05), fontsize=7, handlelength=1.8, labelspacing=0.2)
        panels[-1].set_xlabel("epoch")
    last = numbers.iloc[-1]
    told = ", ".join(f"{column} {last[column]:.3g}" for columns in kinds.values() for column in columns)
    return Drawing(figure, "Training, by epoch", f"{len(table)} epochs. In the last: {told}.")


@dataclass(frozen=True)
class Kind:
    """A figure that there is: what it shows, and of what: a board's table, one model of it, or one in all its balls."""

    shows: str
    of: Literal["board", "model", "balls"]
    draw: Callable[[Sequence[Model]], Drawing | None]


def _of_rows(draw: Callable[[Sequence[Row]], Drawing | None]) -> Callable[[Sequence[Model]], Drawing | None]:
    return lambda models: draw([model.row for model in models])


def _of_one(draw: Callable[[Model], Drawing | None]) -> Callable[[Sequence[Model]], Drawing | None]:
    return lambda models: draw(models[0])


KINDS: Mapping[str, Kind] = {
    "bounds": Kind("certified ≤ true ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA of every model", "board", _of_rows(bounds)),
    "accuracy": Kind("SA against RA-worst of every model, with intervals", "board", _of_rows(accuracy)),
    "alpha": Kind("the same shares of duals against α", "board", _of_rows(alpha)),
    "attacks": Kind("what is left after each attack, and how many images it broke first", "model", _of_one(attacks)),
    "flow": Kind("from which expert to which the broken images went", "model", _of_one(flows)),
    "experts": Kind("each expert's load, SA and RA-worst", "model", _of_one(experts)),
    "classes": Kind("SA and RA-worst of each class", "model", _of_one(classes)),
    "routes": Kind("the share of images whose route is certified, by radius, and |S(ε)|", "model", _of_one(routes)),
    "eps": Kind("certified accuracy, RA-worst, AutoAttack and PGD against ε", "balls", _of_one(eps)),
    "smoothed": Kind("certified accuracy of the smoothed model, by radius", "balls", _of_one(smoothed)),
    "training": Kind("the epochs of the training, from the CSV beside the checkpoint", "balls", _of_one(training)),
}

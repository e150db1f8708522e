"""The figures, each as a function from what was measured to a drawing, or to None where there is nothing to show.

Every figure is as wide as a telephone's page and is told apart without colours. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    legend,
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
_MOST_CLASSES = 20
_CHAIN = {  # marker, colour
    "RA-worst": ("D", RED),
    "AutoAttack": ("o", ORANGE),
    "PGD": ("^", GREEN),
    "SA": ("s", BLUE),
}


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _across(axes: "Axes") -> None:
    """The x axis is a share, from 0 to 100 %."""
    from matplotlib.ticker import PercentFormatter

    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")


# --- of a board -------------------------------------------------------------------------------------------------------


def bounds(rows: Sequence[Row], names: bool = True) -> Drawing | None:
    """Of each row the bar certified ≤ true ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if all(row.worst is None for row in rows):
        return None
    with style():
        figure = _figure(0.75 + 0.24 * len(rows) if names else 0.95)
        axes = figure.subplots()
        used = dict.fromkeys(label for row in rows for label in chain(row))
        for at, row in enumerate(rows):
            known = chain(row)
            proven = known.get("certified", 0.0)
            if "RA-worst" in known:
                axes.barh(at, proven, 0.62, color=INK, edgecolor=INK, linewidth=0.8)
                axes.barh(
                    at, known["RA-worst"] - proven, 0.62, left=proven, facecolor="none", hatch="////", edgecolor=MUTED,
                    linewidth=0.8,
                )  # fmt: skip
                axes.plot([known["RA-worst"], known["SA"]], [at, at], "-", color=MUTED, linewidth=0.8, zorder=1)
            for label, (marker, colour) in _CHAIN.items():
                if label in known:
                    axes.plot(
                        known[label],
                        at,
                        marker,
                        color=colour,
                        markeredgecolor=PAPER,
                        markeredgewidth=0.6,
                        ms=6.5,
                        zorder=3,
                        clip_on=False,
                    )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [shown(row.name) for row in rows] if names else [""] * len(rows))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        _across(axes)
        handles: list[Any] = [Patch(facecolor=INK, label="certified")] * ("certified" in used)
        handles.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", label="the truth lies here"))
        handles += [
            Line2D([], [], marker=marker, color=colour, linestyle="", markeredgecolor=PAPER, label=label)
            for label, (marker, colour) in _CHAIN.items()
            if label in used
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, columnspacing=1.2, handletextpad=0.5)
    told = "; ".join(f"{row.name}: {sentence(chain(row))}" for row in rows[:30])
    return Drawing(figure, "What is certified, and what attacks leave", f"{told}.")


def accuracy(rows: Sequence[Row]) -> Drawing | None:
    """SA against RA-worst, with 95 % intervals."""
    own = [row for row in rows if row.worst is not None]
    if len(own) < 2:
        return None
    with style():
        figure = _figure(3.5)
        axes = figure.subplots()
        tall = sorted(own, key=lambda row: (row.worst.value if row.worst else 0, -row.order[2]))
        gap = 1.02 / max(14, len(tall))
        heights = _apart([row.worst.value for row in tall if row.worst], gap)
        left = min(row.scores.clean.low for row in own)
        left = max(0.0, 0.1 * int(10 * left - 0.5))
        for at, (row, height) in enumerate(zip(tall, heights, strict=True)):
            worst, clean = row.worst, row.scores.clean
            assert worst is not None
            colour = SERIES[at % len(SERIES)]
            axes.errorbar(
                clean.value, worst.value,
                xerr=[[clean.value - clean.low], [clean.high - clean.value]],
                yerr=[[worst.value - worst.low], [worst.high - worst.value]],
                fmt=MARKERS[at % len(MARKERS)], color=colour, elinewidth=0.9, markersize=5.5,
                markerfacecolor=colour if row.ranked else PAPER,
            )  # fmt: skip
            axes.plot(
                [clean.value, 1.0, 1.03],
                [worst.value, height, height],
                "-",
                color=MUTED,
                linewidth=0.5,
                clip_on=False,
                zorder=1,
            )
            axes.text(1.035, height, shown(row.name), va="center", fontsize=7.5, transform=axes.get_yaxis_transform())
        axes.set_xlim(left, 1)
        shares_upward(axes)
        from matplotlib.ticker import PercentFormatter

        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x")
        axes.set(xlabel="SA: right without an attack", ylabel="RA-worst: right under every attack")
    told = "; ".join(
        f"{row.name}: SA {100 * row.scores.clean.value:.1f} %, RA-worst {100 * row.worst.value:.1f} %"
        for row in own[:30]
        if row.worst
    )
    hollow = ", hollow: without a rank" * any(not row.ranked for row in own)
    return Drawing(figure, f"Accuracy and robustness (bars: 95 % intervals{hollow})", f"{told}.")


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The ascending values, moved up and down as little as is needed for `gap` between them within [0, 1]."""
    up: list[float] = []
    for value in values:
        up.append(value if not up else max(value, up[-1] + gap))
    down: list[float] = []
    for value in reversed(up):
        down.append(min(value, 1.0) if not down else min(value, down[-1] - gap))
    return down[::-1]


def alpha(rows: Sequence[Row]) -> Drawing | None:
    """The chain of each dual against α, where several were run."""
    found = sweeps(rows)
    if not found:
        return None
    with style():
        figure = _figure(0.5 + 2.4 * len(found))
        panels = figure.subplots(len(found), squeeze=False)[:, 0]
        for axes, (model, own) in zip(panels, found.items(), strict=True):
            points: dict[str, list[tuple[float, float]]] = {}
            for row in own:
                for label, share in chain(row).items():
                    points.setdefault(label, []).append((row.alpha or 0.0, share))
            _lines(axes, points)
            axes.set(title=shown(model), xlabel="α, the weight of the robust branch", ylabel="share of images")
        _outside(figure, panels[0])
    told = "; ".join(
        f"{model}: " + ", ".join(f"α {row.alpha:g}: {sentence(chain(row))}" for row in own)
        for model, own in found.items()
    )
    return Drawing(figure, "Duals by α", f"{told}.")


def _lines(axes: "Axes", points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A line for each label of the chain, with its own colour, marker and style."""
    known = {"certified": ("v", INK), **_CHAIN}
    for at, (label, line) in enumerate(points.items()):
        marker, colour = known.get(label, (MARKERS[at % len(MARKERS)], SERIES[at % len(SERIES)]))
        style_of = LINES[list(known).index(label)] if label in known else LINES[at % len(LINES)]
        axes.plot(
            *zip(*line, strict=True),
            marker=marker,
            color=colour,
            linestyle=style_of,
            markeredgecolor=PAPER,
            markeredgewidth=0.5,
            label=label,
        )
    shares_upward(axes)


def _outside(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.5)


# --- of a model -------------------------------------------------------------------------------------------------------


def attacks(model: Model) -> Drawing | None:
    """What each attack of each suite leaves, as a waterfall."""
    steps = waterfall(model)
    if not steps or model.row.worst is None:
        return None
    clean = model.row.scores.clean.value
    lines: list[tuple[str, bool, float, float, str]] = [("no attack (SA)", True, clean, clean, "")]
    for suite in dict.fromkeys(step.suite for step in steps):
        own = [step for step in steps if step.suite == suite]
        several = len(own) > 1
        if several:
            lines.append((suite, True, 0.0, 0.0, ""))
        for step in own:
            if step.broke or not several:
                alone = f", {step.alone} alone" if step.alone else ""
                label = f"  {step.attack}" if several else suite
                lines.append((label, not several, step.before, step.after, f"−{step.broke}{alone}"))
        idle = [step.attack for step in own if not step.broke]
        if several and idle:
            what = idle[0] if len(idle) == 1 else f"{len(idle)} other attacks"
            lines.append((f"  {what}", False, own[-1].after, own[-1].after, "−0"))
    worst = model.row.worst.value
    lines.append(("all together (RA-worst)", True, worst, worst, ""))
    with style():
        figure = _figure(0.5 + 0.19 * len(lines))
        axes = figure.subplots()
        for at, (_, _, before, after, text) in enumerate(lines):
            last = at in (0, len(lines) - 1)
            axes.barh(at, after, 0.7, color=BLUE if not last else INK, linewidth=0)
            if before > after:
                axes.barh(
                    at, before - after, 0.7, left=after, facecolor="none", hatch="/////", edgecolor=RED, linewidth=0.8
                )
            if text or last:
                said = text or f"{100 * after:.1f} %"
                axes.text(before + 0.012, at, said, va="center", fontsize=7.5)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_yticks(range(len(lines)), [shown(line[0]) if line[1] else "  " + shown(line[0]) for line in lines])
        for text_of, line in zip(axes.get_yticklabels(), lines, strict=True):
            text_of.set_fontweight("bold" if line[1] else "normal")
        axes.tick_params(axis="y", length=0)
        _across(axes)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("not yet broken (hatched: broken by this attack)")
    told = "; ".join(
        f"{step.suite}, {step.attack} broke {step.broke} and left {100 * step.after:.1f} %" for step in steps
    )
    return Drawing(
        figure,
        "Attack by attack: first broken by",
        f"{100 * clean:.1f} % of {model.row.n} images are right without an attack. {told}."
        f" All together leave {100 * worst:.1f} %.",
    )


def experts(model: Model) -> Drawing | None:
    """Each expert's load, SA and RA-worst."""
    table = by_expert(model)
    if table is None:
        return None
    title = "By expert" + (" of the robust branch" if model.row.alpha is not None else "")
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
    """A group of bars for each row of the table, a bar for each column; a share that nothing can have is left out."""
    with style():
        figure = _figure(2.3)
        axes = figure.subplots()
        width = 0.8 / len(table.columns)
        colours = {"load": INK, "SA": BLUE, "RA-worst": ORANGE}
        hatches = {"load": "", "SA": "", "RA-worst": "////"}
        for at, (column, values) in enumerate(table.items()):
            x = [number + (at - (len(table.columns) - 1) / 2) * width for number in range(len(table))]
            axes.bar(
                x,
                values.fillna(0),
                width,
                color=colours[str(column)],
                hatch=hatches[str(column)],
                edgecolor=PAPER,
                linewidth=0.8,
                label=str(column),
            )
        axes.set_xticks(range(len(table)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel(what)
        shares_upward(axes)
        _outside(figure, axes)
    told = "; ".join(
        f"{label}: {sentence(dict(row.dropna()))}"
        for label, (_, row) in zip(table.index, table.iterrows(), strict=True)
    )
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
        figure = _figure(2.5)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.22, 1.22)
        axes.set_ylim(1 + gap * len(found.counts), -0.06)
        at_left, at_right = dict(left), dict(right)
        curve = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        for start, end, count in moves:
            top, end_top = at_left[start], at_right[end]
            at_left[start] = bottom = top + count / total
            at_right[end] = end_bottom = end_top + count / total
            there = [(wide, top), (0.5, top), (0.5, end_top), (1 - wide, end_top)]
            back = [(1 - wide, end_bottom), (0.5, end_bottom), (0.5, bottom), (wide, bottom), (wide, top)]
            colour, alpha = (GRID, 0.85) if start == end else (SERIES[start % len(SERIES)], 0.6)
            path = Path([*there, *back], curve)
            axes.add_patch(PathPatch(path, facecolor=colour, alpha=alpha, edgecolor=PAPER, linewidth=0.6))
        for tops, sizes_of, x, align, text_x in (
            (left, sums[0], 0.0, "right", -0.02),
            (right, sums[1], 1 - wide, "left", 1.02),
        ):
            for expert, size in enumerate(sizes_of):
                if size:
                    box = Rectangle((x, tops[expert]), wide, size / total, facecolor=SERIES[expert % len(SERIES)])
                    axes.add_patch(box)
                    middle = tops[expert] + size / total / 2
                    axes.text(text_x, middle, f"{expert} ({size})", ha=align, va="center", fontsize=8)
        axes.text(0, -0.03, "clean image", ha="left", va="bottom", fontsize=8.5)
        axes.text(1, -0.03, "attacked image", ha="right", va="bottom", fontsize=8.5)
    told = "; ".join(f"expert {start} to {end}: {count}" for start, end, count in moves)
    whose = " of the robust branch" if model.row.alpha is not None else ""
    changed = f"{found.moved} of {found.total} broken images changed it"
    return Drawing(figure, f"Expert{whose} before and after {shown(found.suite)}: {changed}", f"{told}.")


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
    threat, lines, reached = one.result.spec.threat_model, shares(one.rows), sizes(one.rows)
    lines = {label: line for label, line in lines.items() if label == "routes"} or lines
    points = {method: rate.value for method, rate in one.result.certified.items() if method not in lines and not lines}
    with style():
        figure = _figure(4.2 if len(reached) else 2.3)
        panels = figure.subplots(2 if len(reached) else 1, squeeze=False)[:, 0]
        _marked_radius(panels[0], lines, points, threat.eps, last_radius(lines, threat.eps, True))
        panels[0].set(xlabel=f"{threat.norm} radius", ylabel="images that keep\ntheir route")
        for panel in panels[1:]:
            bars_of_sizes(panel, reached)
            panel.set(xlabel=f"{threat.norm} ε", ylabel="images")
            legend(panel, 3)
    kept = sentence({method: share.value for method, share in one.result.certified.items()})
    told = f"Images whose route no attack inside ε {threat.eps_text} can change: {kept}."
    for eps, row in reached.iterrows():
        told += (
            f" |S({eps:.3g})|: "
            + ", ".join(f"{size}: {100 * share:.1f} %" for size, share in row.items() if share)
            + "."
        )
    return Drawing(figure, "Route-stable share, and experts S(ε) within reach", told)


def smoothed(model: Model) -> Drawing | None:
    """Certified accuracy of the smoothed model, which is another classifier, by L2 radius."""
    found = certificate_of(model, "smoothing")
    if not found:
        return None
    lines = {
        f"{label}, σ {one.result.params['sigma']:g}": line
        for one in found
        for label, line in shares(one.rows).items()
        if label in one.result.certified
    }
    if not lines:
        return None
    eps = found[0].result.spec.threat_model.eps
    with style():
        figure = _figure(2.4)
        axes = figure.subplots()
        _marked_radius(axes, lines, {}, eps, last_radius(lines, eps, False))
        axes.set(xlabel="L2 radius", ylabel="certified accuracy")
        _outside(figure, axes, 1)
    told = sentence(
        {
            f"{m}, σ {one.result.params['sigma']:g}, at {one.result.spec.threat_model}": a.value
            for one in found
            for m, a in one.result.certified.items()
        }
    )
    return Drawing(figure, "The smoothed model, another classifier", f"Certified but for a small probability: {told}.")


def _marked_radius(
    axes: "Axes",
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Mapping[str, float],
    eps: float,
    right: float,
) -> None:
    steps_by_radius(axes, lines, points, eps, right)
    axes.axvline(eps, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate("ε", (eps, 1), xytext=(3, -2), textcoords="offset points", va="top")


def eps(model: Model) -> Drawing | None:
    """The chain against ε, where the model was run at several."""
    points = by_eps(model)
    if not points:
        return None
    norm = model.row.spec.threat_model.norm
    with style():
        figure = _figure(2.6)
        axes = figure.subplots()
        _lines(axes, points)
        axes.set(xlabel=f"{norm} ε", ylabel="share of images")
        axes.set_xlim(left=0)
        _outside(figure, axes)
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
        "held-out accuracy": [c for c in every if c in ("val_sa", "val_ra")],
        "share of routes that flip": [c for c in every if c.endswith("route_flip_rate")],
        "load": [c for c in every if "load_" in c and c.rpartition("_")[2].isdigit()],
        "router's margin": [c for c in every if c.endswith("router_margin")],
    }
    kinds = {kind: columns[:12] for kind, columns in kinds.items() if columns}
    with style():
        figure = _figure(0.2 + 1.5 * ((len(kinds) + 1) // 2))
        panels = figure.subplots((len(kinds) + 1) // 2, 2, squeeze=False).flatten()
        for panel, (kind, columns) in zip(panels, kinds.items(), strict=False):
            for at, column in enumerate(columns):
                x = numbers.get("epoch", numbers.index)
                panel.plot(
                    x,
                    numbers[column],
                    color=SERIES[at % len(SERIES)],
                    linestyle=LINES[at % len(LINES)],
                    marker="o" if len(x) < 2 else "",
                    label=shown(column.removeprefix("val_").upper() if column.startswith("val_") else column),
                )
            panel.set_title(kind, fontsize=8.5)
            panel.grid(axis="y")
            panel.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            if len(columns) <= 4:
                panel.legend(fontsize=6.5, handlelength=1.6, labelspacing=0.2)
        for panel in panels[len(kinds) :]:
            panel.set_axis_off()
    last = numbers.iloc[-1]
    told = ", ".join(f"{column} {last[column]:.3g}" for columns in kinds.values() for column in columns)
    return Drawing(figure, "Training, by epoch", f"{len(table)} epochs. In the last: {told}.")


@dataclass(frozen=True)
class Kind:
    """A figure that there is: what it shows, and of what, a board's table or one model of it."""

    shows: str
    of: Literal["board", "model"]
    draw: Callable[[Sequence[Model]], Drawing | None]


def _of_rows(draw: Callable[[Sequence[Row]], Drawing | None]) -> Callable[[Sequence[Model]], Drawing | None]:
    return lambda models: draw([model.row for model in models])


def _of_one(draw: Callable[[Model], Drawing | None]) -> Callable[[Sequence[Model]], Drawing | None]:
    return lambda models: draw(models[0])


KINDS: Mapping[str, Kind] = {
    "bounds": Kind("certified ≤ true ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA of every model", "board", _of_rows(bounds)),
    "accuracy": Kind("SA against RA-worst of every model, with intervals", "board", _of_rows(accuracy)),
    "alpha": Kind("the same shares of duals against α", "board", _of_rows(alpha)),
    "eps": Kind("the same shares of a model against ε", "model", _of_one(eps)),
    "attacks": Kind("what is left after each attack, and how many images it broke first", "model", _of_one(attacks)),
    "flow": Kind("from which expert to which the broken images went", "model", _of_one(flows)),
    "experts": Kind("each expert's load, SA and RA-worst", "model", _of_one(experts)),
    "classes": Kind("SA and RA-worst of each class", "model", _of_one(classes)),
    "routes": Kind("the share of images whose route is certified, by radius, and |S(ε)|", "model", _of_one(routes)),
    "smoothed": Kind("certified accuracy of the smoothed model, by radius", "model", _of_one(smoothed)),
    "training": Kind("the epochs of the training, from the CSV beside the checkpoint", "model", _of_one(training)),
}

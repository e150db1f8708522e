"""How figures look, and as what files they are written: the same bytes for the same numbers. Needs no module of bench.

Colours are those of Okabe and Ito, which colour-blind people tell apart; a series also has a marker, a line style or a
hatch of its own, so that a print without colours is read as well. Texts are never parsed as mathematics.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1a1b1e", "#62656b", "#d5d8dd", "#fefefe"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
MARKERS = "osD^vP"
LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "////", "----", "\\\\\\\\", "xxxx", "||||")

#: What a page may call these colours, so that it can show a figure in the dark.
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red", PURPLE: "purple", SKY: "sky",
}  # fmt: skip

_LONGEST = 28  # characters of a name in a figure
_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_DEFAULTS = ("font-family", "stroke-linejoin:miter", "stroke-linecap:square", "stroke-linecap:butt")
_RC: dict[Any, Any] = {
    "svg.hashsalt": "bench", "svg.fonttype": "none", "pdf.fonttype": 42, "text.parse_math": False,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.linewidth": 0.8,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.bottom": False, "ytick.left": False,  # the grid has lines
    "grid.color": GRID, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": 8, "legend.handlelength": 2.2,
    "lines.linewidth": 1.6, "lines.markersize": 5, "hatch.linewidth": 0.7, "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure, and in words what it is and shows."""

    figure: "Figure"
    title: str
    description: str


@contextmanager
def style() -> Iterator[None]:
    """Figures that are made inside look alike."""
    import matplotlib
    from cycler import cycler

    cycle = cycler(color=SERIES) + cycler(linestyle=LINES)
    with matplotlib.rc_context({**_RC, "axes.prop_cycle": cycle}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's fonts may have it
        yield


def name(text: str) -> str:
    """A user's word as a figure shows it: one line, cut in the middle if it is long."""
    line = _legal(text)
    half = (_LONGEST - 1) // 2
    return line if len(line) <= _LONGEST else f"{line[:half]}…{line[-half:]}"


def _legal(text: str) -> str:
    """One line, without the characters that XML forbids."""
    return " ".join(re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text).split())


def svg(figure: "Figure", background: str = "white") -> str:
    """A file of its own; words stay text."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def pdf(figure: "Figure") -> bytes:
    """A file of its own, with its fonts inside."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return buffer.getvalue()


def inline(drawing: Drawing, key: str, classes: dict[str, str]) -> str:
    """An `<svg>` to stand in a page: named for who does not see it, its colours by the page's variables.

    `key` begins every id, so that several figures in one page do not use each other's. The page has to have a class for
    every style: `classes` has their names by style, and gets those that are new. They are most of a figure's bytes.
    """
    root = ElementTree.fromstring(svg(drawing.figure, "none"))
    _drop_idle_clips(root)
    used = dict.fromkeys(re.findall(r"#([A-Za-z0-9_-]+)", ElementTree.tostring(root, encoding="unicode")))
    _slim(root, {old: f"{key}-{number}" for number, old in enumerate(used)}, classes)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    words = {"title": drawing.title, "desc": drawing.description}
    for at, (tag, text) in enumerate(words.items()):
        element = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        element.text = _legal(text)
        root.insert(at, element)
    root.attrib = {
        "role": "img", "viewBox": f"0 0 {width:g} {height:g}", "aria-labelledby": f"{key}-title {key}-desc",
        "style": f"max-width:{1.9 * width:.0f}px",
    }  # fmt: skip
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _drop_idle_clips(root: ElementTree.Element) -> None:
    """Takes the clip from every path whose corners are inside of it; what is drawn stays the same."""
    boxes = {}
    for clip in root.iter(f"{_NAMESPACE}clipPath"):
        x, y, width, height = (float(clip[0].get(name, 0)) for name in ("x", "y", "width", "height"))
        boxes[f"url(#{clip.get('id')})"] = (x, y, x + width, y + height)
    for path in root.iter(f"{_NAMESPACE}path"):
        if (clipped := path.get("clip-path")) in boxes:
            left, top, right, bottom = boxes[clipped]
            numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
            if all(left <= x <= right for x in numbers[::2]) and all(top <= y <= bottom for y in numbers[1::2]):
                del path.attrib["clip-path"]


def _slim(parent: ElementTree.Element, names: dict[str, str], classes: dict[str, str]) -> None:
    """Drops what a page does not need: whitespace, metadata, groups without an effect, ids that nobody names.

    The other ids are renamed by `names`.
    """
    parent.tag, parent.tail = parent.tag.removeprefix(_NAMESPACE), None
    if parent.tag not in ("text", "tspan"):
        parent.text = None
    attributes = {}
    for attribute, value in parent.attrib.items():
        value = re.sub(r"(?<=url\(#)[^)]+", lambda found: names[found[0]], value)
        if attribute == "id" and value in names:
            attributes["id"] = names[value]
        elif attribute == _LINK:
            attributes["href"] = f"#{names[value[1:]]}"
        elif attribute == "fill":
            attributes[attribute] = _themed(value)
        elif attribute == "style":
            themed = _themed(value)
            if found := re.search(r"fill:(url\([^)]+\));?", themed):  # of this figure alone
                attributes["fill"], themed = found[1], themed.replace(found[0], "")
            if themed:
                attributes["class"] = classes.setdefault(themed, f"s{len(classes)}")
        elif attribute == "clip-path":
            attributes[attribute] = value
        elif attribute == "d":
            attributes[attribute] = _straight(_short(value))
        elif attribute != "id" and not value.startswith("rotate(-0 "):
            attributes[attribute] = _short(value)
    parent.attrib = attributes
    kept: list[ElementTree.Element] = []
    for child in parent:
        if child.tag in (f"{_NAMESPACE}metadata", f"{_NAMESPACE}style"):
            continue
        if child.tag == f"{_NAMESPACE}clipPath" and child.get("id") not in names:
            continue
        if child.tag == f"{_NAMESPACE}path" and _themed(child.get("style", "")) == "fill:none":
            continue  # it is invisible
        _slim(child, names, classes)
        bare = child.tag == "g" and not child.attrib
        empty = child.tag == "defs" and not len(child)
        kept += list(child) if bare else [] if empty else [child]
    parent[:] = kept


def _themed(value: str) -> str:
    """A style in the page's colours and font, without what is the default."""
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    rules = [rule.strip().replace(": ", ":") for rule in value.split(";")]
    return ";".join(rule for rule in rules if rule and not rule.startswith(_DEFAULTS))


def _short(value: str) -> str:
    """Coordinates with one decimal."""
    value = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), value)
    return re.sub(r" ?([MLCQz]) ?", r"\1", " ".join(value.split()))


def _straight(path: str) -> str:
    """The path with its horizontal and vertical lines written as such."""
    drawn, at = "", ["", ""]
    for command, numbers in re.findall(r"([MLCQz])([^MLCQz]*)", path):
        to = numbers.split()[-2:] or at
        if command == "L" and to[1] == at[1]:
            command, numbers = "H", to[0]
        elif command == "L" and to[0] == at[0]:
            command, numbers = "V", to[1]
        drawn, at = drawn + command + numbers, to
    return drawn


def steps_by_radius(
    axes: "Axes",
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: Mapping[str, float],
    eps: float,
    right: float,
) -> None:
    """The share of images (0 to 1) that still count at each radius up to `right`, as step curves; `points` are shares
    at ε of what is known there alone.
    """
    for label, (x, y) in lines.items():
        axes.step([*x, right], [*y, y[-1]], where="post", label=label)
    for label, share in points.items():
        axes.plot([eps], [share], "o", label=label)
    axes.set_xlim(0, right)
    shares_upward(axes)


def bars_of_sizes(axes: "Axes", sizes: pd.DataFrame) -> None:
    """The share of images with each |S(ε)| (columns) at each ε (index), the smallest size at the bottom."""
    below = np.zeros(len(sizes))
    for at, (size, share) in enumerate(sizes.items()):
        axes.bar(
            [f"{eps:.3g}" for eps in sizes.index], share, bottom=below, label=f"|S(ε)| = {size}",
            color=SERIES[at % len(SERIES)], hatch=HATCHES[at % len(HATCHES)], edgecolor=PAPER, linewidth=0.8,
        )  # fmt: skip
        below = below + share.to_numpy()
    shares_upward(axes)


def shares_upward(axes: "Axes") -> None:
    """The y axis is a share, from 0 to 100 %."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y")


def sentence(shares: Mapping[str, float], most: int = 30) -> str:
    """`dense-at 62.0 %, moe-at 41.6 %`: what a figure shows, for who does not see it."""
    said = [f"{label} {100 * share:.1f} %" for label, share in list(shares.items())[:most]]
    return ", ".join(said) + (" …" if len(shares) > most else "")

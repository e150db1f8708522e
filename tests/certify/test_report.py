"""The table and the plot of a certification: shares by hand, and a figure that any viewer can read."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from bench.certify.report import curve, figure, table, terminal
from bench.results.certificates import CERTIFICATE_COLUMNS, Certification
from bench.results.schema import Accuracy
from bench.spec import ModelInfo, RunSpec, ThreatModel


def rows(method: str, radii: list[float], right: list[bool], eps: float = 0.2, status: str = "") -> pd.DataFrame:
    kept = ["certified" if radius > eps else "not_certified" for radius in radii]
    frame = pd.DataFrame({
        "idx": range(len(radii)),
        "input_hash": [f"{i:016x}" for i in range(len(radii))],
        "label": 0,
        "method": method,
        "norm": "L2",
        "eps": eps,
        "status": status or kept,
        "radius": radii,
        "predicted": 0,
        "correct": right,
        "reachable": [1 + (radius <= eps) for radius in radii],
        "reason": "a | b" if status else "",
    })  # fmt: skip
    return frame.astype(CERTIFICATE_COLUMNS)


def certification(frame: pd.DataFrame) -> Certification:
    spec = RunSpec(
        model="<m>", alpha=0.7, dataset="digits", threat_model=ThreatModel(norm="L2", eps=0.2), suite="certify-x",
        suite_version=1, suite_params={"n": 9}, n_examples=frame["idx"].nunique(),
    )  # fmt: skip
    info = ModelInfo(name="m", architecture="cnn", checkpoint_sha256="c" * 64)
    provenance: dict[str, Any] = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": "2030-01-01"}
    clean = Accuracy.of(np.ones(1, dtype=bool))
    return Certification.from_rows(spec, info, "f" * 16, clean, frame, params={}, **provenance)


RADII, RIGHT = [0.1, 0.3, 0.3, 0.0, np.inf], [True, True, False, True, True]


def test_the_table_by_hand():
    frame = pd.concat([rows("union", RADII, RIGHT), rows("union", RADII, RIGHT, 0.05)], ignore_index=True)
    text = table(certification(frame), frame)
    assert text.startswith("# certify-x on <m>, digits, n = 5, α 0.7, n 9\n")
    assert "| union    | 0.2    | 40.00 | certified 3, not_certified 2 | 1: 3, 2: 2" in text
    assert "| union    | 0.05   | 60.00 | certified 4, not_certified 1 | 1: 4, 2: 1" in text
    nothing = rows("network", RADII, RIGHT, status="not_applicable")
    line = table(certification(nothing), nothing).splitlines()[4]
    assert [cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]] == [
        "network", "0.2", "–", "not_applicable 5", "1: 3, 2: 2", "a / b",
    ]  # fmt: skip


def cells(text: str, first: str) -> list[list[str]]:
    """The body of the table whose head begins with that word."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    body = lines[start + 2 :]
    body = body[: body.index("")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body]


def test_a_terminal_gets_the_same_without_markup_and_the_reasons_below():
    frame = pd.concat([rows("union", RADII, RIGHT), rows("union", RADII, RIGHT, 0.05)], ignore_index=True)
    lines = terminal(certification(frame), frame).splitlines()
    assert lines[0] == "certify-x on <m>, digits, n = 5, α 0.7, n 9"
    assert lines[4].split(maxsplit=3) == ["union", "0.2", "40.00", "certified 3, not_certified 2  1: 3, 2: 2"]
    nothing = rows("network", RADII, RIGHT, status="not_applicable")
    lines = terminal(certification(nothing), nothing, 60).splitlines()
    assert lines[6] == "network: a | b"
    assert lines[2].split()[-1] == "rows"
    assert max(map(len, lines[5:])) <= 60


def test_the_share_at_several_radii_is_a_table():
    frame = pd.concat([rows("smoothing", RADII, RIGHT), rows("union", RADII, RIGHT)], ignore_index=True)
    # right, with radii 0.1, 0.3, 0 and inf, of five images; a radius is strict, and 0.2 is the run's own
    assert cells(table(certification(frame), frame), "L2 radius") == [
        ["0.05", "60.00"], ["0.1", "40.00"], ["0.15", "40.00"], ["0.2", "40.00"], ["0.3", "20.00"], ["0.4", "20.00"],
        ["0.6", "20.00"],
    ]  # fmt: skip
    alone = rows("union", RADII, RIGHT)
    assert "by radius" not in table(certification(alone), alone)
    dense = rows("routes", RADII, RIGHT, status="not_applicable")  # which has no route, and so no share of routes
    assert "by radius" not in table(certification(dense), dense)


def test_the_papers_share_is_called_no_certificate():
    frame = rows("paper-formula", RADII, RIGHT).assign(status="not_certified")
    assert cells(table(certification(frame), frame), "method")[0][2] == "40.00 (no certificate)"
    nothing = frame.assign(status="not_supported")
    assert cells(table(certification(nothing), nothing), "method")[0][2] == "–"


def test_the_histogram_of_reachable_experts_is_a_panel_of_its_own():
    frame = pd.concat([rows("routes", RADII, RIGHT, eps) for eps in (0.05, 0.2)], ignore_index=True)
    _, panel = figure(certification(frame), frame).axes
    # at 0.05 one of five images can be sent to two experts, at 0.2 two; the smallest size is at the bottom
    assert [(bar.get_y(), round(bar.get_height(), 9)) for bar in panel.patches] == [
        (0, 0.8),
        (0, 0.6),
        (0.8, 0.2),
        (0.6, 0.4),
    ]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.05", "0.2"]
    assert panel.get_legend_handles_labels()[1] == ["|S(ε)| = 1", "|S(ε)| = 2"]
    smooth = rows("smoothing", RADII, RIGHT)
    assert len(figure(certification(smooth), smooth).axes) == 1


def test_the_figure_has_the_shares_as_steps_and_a_point_where_there_is_one_radius():
    frame = pd.concat([rows("smoothing", RADII, RIGHT), rows("union", RADII, RIGHT)], ignore_index=True)
    (panel,) = figure(certification(frame), frame).axes
    assert (panel.get_title("left"), panel.get_xlabel()) == ("certify-x on <m>", "L2 radius")
    assert panel.get_ylabel() == "certified accuracy"
    steps, point = panel.lines
    # 60 % from 0 on, 40 % from 0.1, 20 % from 0.3, where the figure ends
    assert steps.get_drawstyle() == "steps-post"
    assert steps.get_xydata() == pytest.approx(np.array([[0, 0.6], [0.1, 0.4], [0.3, 0.2], [0.3, 0.2]]))
    assert point.get_xydata().tolist() == [[0.2, 0.4]]  # of five
    assert panel.get_legend_handles_labels()[1] == ["smoothing", "union"]
    assert panel.get_xlim() == (0, 0.3)


def test_the_picture_is_the_same_bytes_for_the_same_rows_and_its_words_are_text():
    frame = pd.concat([rows("smoothing", RADII, RIGHT), rows("union", RADII, RIGHT)], ignore_index=True)
    text = curve(certification(frame), frame)
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")]
    assert {"certify-x on <m>", "L2 radius", "certified accuracy", "smoothing", "union", "100%"} <= set(words)
    assert curve(certification(frame), frame) == text
    assert "dc:date" not in text


def test_the_figure_of_routes_ends_where_it_is_still_of_interest():
    frame = rows("routes", [0.1, 0.3, 5.0], [True] * 3)
    panel = figure(certification(frame), frame).axes[0]
    assert panel.get_xlim() == (0, 0.4)  # twice ε
    assert panel.get_ylabel() == "share of images that keep their route"

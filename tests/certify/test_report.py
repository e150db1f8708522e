"""The table and the plot of a certification: shares by hand, and a figure that any viewer can read."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from bench.certify.report import curve, shares, table
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
    clean = Accuracy.of(pd.Series([True]))
    return Certification.from_rows(spec, info, "f" * 16, clean, frame, params={}, **provenance)


RADII, RIGHT = [0.1, 0.3, 0.3, 0.0, np.inf], [True, True, False, True, True]


def test_the_share_at_each_radius_by_hand():
    found = shares(
        pd.concat([rows("smoothing", RADII, RIGHT), rows("routes", RADII, RIGHT), rows("union", RADII, RIGHT)])
    )
    assert set(found) == {"smoothing", "routes"}  # of bounds there is one radius
    # a wrong class never counts, an example without a radius does not even at 0
    x, y = found["smoothing"]
    assert x.tolist() == [0, 0.1, 0.3]
    assert y.tolist() == pytest.approx([3 / 5, 2 / 5, 1 / 5])
    x, y = found["routes"]
    assert x.tolist() == [0, 0.1, 0.3, 0.3]
    assert y.tolist() == pytest.approx([4 / 5, 3 / 5, 2 / 5, 1 / 5])


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


def test_the_share_at_several_radii_is_a_table():
    frame = pd.concat([rows("smoothing", RADII, RIGHT), rows("union", RADII, RIGHT)], ignore_index=True)
    # right, with radii 0.1, 0.3, 0 and inf, of five images; a radius is strict, and 0.2 is the run's own
    assert cells(table(certification(frame), frame), "L2 radius") == [
        ["0.05", "60.00"], ["0.1", "40.00"], ["0.15", "40.00"], ["0.2", "40.00"], ["0.3", "20.00"], ["0.4", "20.00"],
        ["0.6", "20.00"],
    ]  # fmt: skip
    alone = rows("union", RADII, RIGHT)
    assert "by radius" not in table(certification(alone), alone)


def test_the_papers_share_is_called_no_certificate():
    frame = rows("paper-formula", RADII, RIGHT).assign(status="not_certified")
    assert cells(table(certification(frame), frame), "method")[0][2] == "40.00 (no certificate)"
    nothing = frame.assign(status="not_supported")
    assert cells(table(certification(nothing), nothing), "method")[0][2] == "–"


def test_the_histogram_of_reachable_experts_is_a_picture_too():
    frame = pd.concat([rows("routes", RADII, RIGHT, eps) for eps in (0.05, 0.2)], ignore_index=True)
    picture = ElementTree.fromstring(curve(certification(frame), frame))
    bars = [part.attrib for part in picture.iter() if part.attrib.get("class", "").startswith("size-")]
    found = [(bar["class"], bar["x"], float(bar["y"]), float(bar["height"])) for bar in bars]
    # 270 high, from 670 upwards: at 0.05 one of five images can be sent to two experts, at 0.2 two
    assert found == [
        ("size-1", "80", 454, 216), ("size-2", "80", 400, 54), ("size-1", "150", 508, 162), ("size-2", "150", 400, 108),
    ]  # fmt: skip
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"size of S(ε), share of images", "|S(ε)| = 1", "|S(ε)| = 2", "0.05"} <= set(words)
    assert picture.attrib["viewBox"] == "0 0 560 720"
    smooth = rows("smoothing", RADII, RIGHT)
    assert ElementTree.fromstring(curve(certification(smooth), smooth)).attrib["viewBox"] == "0 0 560 360"


def test_the_plot_is_a_picture_of_the_shares():
    frame = pd.concat([rows("smoothing", RADII, RIGHT), rows("union", RADII, RIGHT)], ignore_index=True)
    text = curve(certification(frame), frame)
    picture = ElementTree.fromstring(text)
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"certify-x on <m>", "L2 radius", "certified accuracy", "smoothing", "union", "100 %"} <= set(words)
    # the axes end at (540, 40) for radius 0.3 and 100 %: the curve starts at 60 % and steps at 0.1 and 0.3
    assert 'd="M60.0 148.0H220.0V202.0H540.0V256.0H540.0"' in text
    (point,) = [element for element in picture.iter() if element.tag.endswith("circle")]
    assert (float(point.attrib["cx"]), float(point.attrib["cy"])) == (380, 202)  # 0.2 and 2 of 5
    assert curve(certification(frame), frame) == text


def test_the_plot_of_routes_ends_where_it_is_still_of_interest():
    frame = rows("routes", [0.1, 0.3, 5.0], [True] * 3)
    text = curve(certification(frame), frame)
    assert ">0.4<" in text  # twice ε
    assert "share of images that keep their route" in text

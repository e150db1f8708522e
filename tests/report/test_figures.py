"""The figures: what is drawn where, words for who does not see them, and nothing drawn where nothing is known."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from bench.boards.leaderboard import Stored
from bench.drawing import Drawing, inline, pdf, svg
from bench.report import figures
from bench.report.details import Model, boards_with_models
from bench.report.figures import KINDS

HISTORY = pd.DataFrame({
    "epoch": [1, 2], "loss": [2.0, 1.0], "val_sa": [0.5, 0.6], "val_ra": [0.2, 0.3], "load_0": [0.9, 0.8],
    "load_1": [0.1, 0.2], "load_entropy": [0.5, 0.6], "router_margin": [1.0, 2.0], "route_flip_rate": [0.5, 0.4],
    "lr": [0.1, 0.0],
})  # fmt: skip


@pytest.fixture(scope="module")
def models(results: Path) -> dict[str, Model]:
    found = boards_with_models(Stored.read(results), {"c" * 64: HISTORY})
    return {model.row.name: model for board, own in found for model in own if board.stem == "digits_Linf-0.2"}


@pytest.fixture(scope="module")
def drawn(models: dict[str, Model]) -> dict[str, Drawing]:
    """Every figure that there is of the board and of its MoE."""
    table = [models["dense"], models["moe"]]
    found = {word: kind.draw(table if kind.of == "board" else table[1:]) for word, kind in KINDS.items()}
    return {word: drawing for word, drawing in found.items() if drawing is not None}


def test_all_but_the_sweep_are_known_of_the_moe_and_few_of_the_dense_model(
    models: dict[str, Model], drawn: dict[str, Drawing]
):
    assert set(KINDS) - set(drawn) == {"alpha"}
    of_dense = {word for word, kind in KINDS.items() if kind.of != "board" and kind.draw([models["dense"]])}
    assert of_dense == {"attacks", "classes"}


def test_what_nothing_attacked_has_no_figure_of_attacks(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "clean")
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    assert {word for word, kind in KINDS.items() if kind.draw([model])} == {"experts"}


def widths(panel: Any) -> list[float]:
    return [round(bar.get_width(), 6) for bar in panel.patches]


def test_the_bar_of_bounds(drawn: dict[str, Drawing]):
    (panel,) = drawn["bounds"].figure.axes
    # dense: nothing certified, 6/8 left; moe: 1/8 certified, 2/8 left, so that the truth is between
    assert widths(panel) == [0.0, 0.75, 0.125, 0.125]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["dense", "moe"]
    assert (
        "moe: certified 12.5 %, RA-worst 25.0 %, AutoAttack 50.0 %, PGD 75.0 %, SA 87.5 %"
        in drawn["bounds"].description
    )


def test_the_waterfall(drawn: dict[str, Drawing]):
    (panel,) = drawn["attacks"].figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "no attack (SA)", "pgd", "autoattack", "apgd-ce", "square", "fab-t", "adaptive", "all attacks (RA-worst)",
    ]  # fmt: skip
    said = [text.get_text() for text in panel.texts]
    assert said == ["87.5 %", "−1", "−2", "−1", "−0", "−5", "25.0 %"]


def test_attacks_that_broke_nothing_more_share_a_line(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "adaptive", {"paths": {0: 1}, "targeted": {}, "square": {}, "averaged": {1: 0}})
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    drawing = figures.attacks(model)
    assert drawing is not None
    labels = [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()]
    assert labels[2:-1] == ["paths", "averaged", "2 other attacks"]


def test_the_flow_has_a_ribbon_for_each_way_and_says_how_many_changed(drawn: dict[str, Drawing]):
    assert drawn["flow"].title == "Expert under adaptive: changed for 3 of 5 broken images"
    assert drawn["flow"].description == "expert 0 to 0: 1; expert 0 to 1: 2; expert 1 to 0: 1; expert 1 to 1: 1."
    texts = [text.get_text() for text in drawn["flow"].figure.axes[0].texts]
    assert texts == ["0 (3)", "1 (2)", "0 (2)", "1 (3)", "clean image", "attacked image"]


def test_radius_figures_mark_eps(drawn: dict[str, Drawing]):
    curve, histogram = drawn["routes"].figure.axes
    assert [text.get_text() for text in curve.texts] == ["ε"]
    assert curve.lines[-1].get_xdata() == [0.2, 0.2]
    assert [round(bar.get_height(), 6) for bar in histogram.patches] == [0.5, 0.5]  # |S| = 1, 2
    assert drawn["smoothed"].figure.axes[0].lines[-1].get_xdata() == [0.25, 0.25]


def test_training_has_a_panel_for_each_kind_of_column(drawn: dict[str, Drawing]):
    titles = [panel.get_title("left") for panel in drawn["training"].figure.axes]
    assert titles == ["loss", "held-out accuracy", "load", "routes that flip", "router's margin"]


def test_duals_at_several_alphas(save_run: Any, tmp_path: Path):
    for alpha in (0.5, 0.9):
        save_run(tmp_path, "dual", "pgd", {"pgd": {0: 1}}, {"alpha": 0.7, "checkpoint_sha256": "e" * 64}, alpha=alpha)
    ((_, models),) = boards_with_models(Stored.read(tmp_path))
    drawing = KINDS["alpha"].draw(models)
    assert drawing is not None
    (panel,) = drawing.figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in panel.lines} == {
        "RA-worst": [[0.5, 0.75], [0.9, 0.75]],
        "PGD": [[0.5, 0.75], [0.9, 0.75]],
        "SA": [[0.5, 0.875], [0.9, 0.875]],
    }


def test_labels_beside_points_do_not_meet():
    spread = figures._apart([0.0, 0.0, 0.01, 0.9, 1.0], 0.1, 1.0)
    assert spread == pytest.approx([0.0, 0.1, 0.2, 0.9, 1.0])
    assert figures._apart([0.98, 0.99, 1.0], 0.1, 1.0) == pytest.approx([0.8, 0.9, 1.0])


def test_series_differ_without_colours(drawn: dict[str, Drawing]):
    for word in ("accuracy", "eps"):
        own = [line for line in drawn[word].figure.axes[0].lines if line.get_marker() not in ("", "None", "_", "|")]
        assert len({line.get_marker() for line in own}) == len(own), word
    for word in ("experts", "classes", "routes"):
        panel = drawn[word].figure.axes[-1]
        looks = {(bars[0].get_hatch(), bars[0].get_facecolor() == (0, 0, 0, 1)) for bars in panel.containers}
        assert len(looks) == len(panel.containers), word


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in KINDS if word != "alpha"])
def test_a_figure_is_a_whole_file_and_the_same_bytes_each_time(
    word: str, models: dict[str, Model], drawn: dict[str, Drawing]
):
    kind = KINDS[word]
    again = kind.draw(list(models.values()) if kind.of == "board" else [models["moe"]])
    assert again is not None
    if kind.of != "board":  # the order of a board's rows is the reader's
        assert svg(again.figure) == svg(drawn[word].figure)
    ElementTree.fromstring(svg(drawn[word].figure))


@pytest.mark.slow
def test_a_pdf_is_a_whole_file_and_the_same_bytes_each_time(drawn: dict[str, Drawing]):
    one = pdf(drawn["attacks"].figure)
    assert one.startswith(b"%PDF")
    assert one.endswith(b"%%EOF\n")
    assert pdf(drawn["attacks"].figure) == one


@pytest.mark.parametrize("word", [word for word in KINDS if word != "alpha"])
def test_inside_a_page_a_figure_has_a_name_and_words_and_ids_of_its_own(word: str, drawn: dict[str, Drawing]):
    styles: dict[str, str] = {}
    one, other = (ElementTree.fromstring(inline(drawn[word], key, styles)) for key in ("f1", "f2"))
    assert (one.get("role"), one.get("aria-labelledby")) == ("img", "f1-title f1-desc")
    assert (one[0].tag, one[0].text, one[1].tag) == ("title", drawn[word].title, "desc")
    assert len(one[1].text or "") > 10
    ids = [{element.get("id") for element in root.iter()} - {None} for root in (one, other)]
    assert not ids[0] & ids[1]
    text = " ".join([ElementTree.tostring(one, encoding="unicode"), *styles])
    named = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    assert named <= ids[0]
    assert not re.search(r"#[0-9a-f]{6}", text), "a colour that the page cannot change in the dark"


def test_a_users_words_are_text_whatever_they_are(save_run: Any, tmp_path: Path):
    for name in ("<script>alert(1)</script>", "a$x^2$_b", "_hidden", "模型", "two\nlines\x01", "&amp;", "x" * 200):
        save_run(tmp_path, name, "pgd", {"pgd": {0: 1}}, {"checkpoint_sha256": (name.encode().hex() + "0" * 64)[:64]})
    ((_, models),) = boards_with_models(Stored.read(tmp_path))
    for word in ("bounds", "accuracy"):
        drawing = KINDS[word].draw(models)
        assert drawing is not None
        root = ElementTree.fromstring(inline(drawing, "f", {}))
        words = {element.text for element in root.iter("text")}
        assert {"<script>alert(1)</script>", "a$x^2$_b", "_hidden", "模型", "two lines", "&amp;"} <= words, word
        assert max(len(text or "") for text in words) < 40
        assert not list(root.iter("script"))

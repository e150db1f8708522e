"""How figures are written: words that stay words, colours that a page can change."""

from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from bench.drawing import BLUE, Drawing, _straight, inline, name, pdf, sentence, style, svg


def figure(label: str = "a label") -> Figure:
    with style():
        drawn = Figure(figsize=(2, 1))
        axes = drawn.add_axes((0.1, 0.1, 0.8, 0.8))
        axes.bar([label], [1], color=BLUE, hatch="//")
    return drawn


def test_a_long_name_is_cut_in_the_middle_and_what_xml_forbids_is_left_out():
    assert name("moe-at") == "moe-at"
    assert name(" two\nlines\x00 \x1b[31m") == "two lines [31m"
    assert name("package.module.of_mine:" + 20 * "x") == "package.modul…xxxxxxxxxxxxx"


@pytest.mark.slow
def test_a_file_has_its_own_colours_on_white_and_its_words_as_text():
    root = ElementTree.fromstring(svg(figure("<&> $x$")))
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert BLUE in svg(figure())
    assert "#ffffff" in styles
    assert "<&> $x$" in [element.text for element in root.iter() if element.tag.endswith("text")]
    assert svg(figure()) == svg(figure())
    assert pdf(figure()) == pdf(figure())


def test_in_a_page_the_colours_are_the_pages_and_each_figure_has_its_own_ids():
    classes: dict[str, str] = {}
    text = inline(Drawing(figure(), "a <title>", "words"), "k", classes)
    root = ElementTree.fromstring(text)
    sheet = " ".join(classes)
    assert BLUE not in text + sheet
    assert "var(--blue)" in text + sheet
    assert "font-family" not in text + sheet
    used = {element.get("class") for element in root.iter()} - {None}
    assert used == set(classes.values())
    assert len(set(classes.values())) == len(classes) > 3
    before = dict(classes)
    assert inline(Drawing(figure(), "a <title>", "words"), "k", classes) == text  # the same styles are not named again
    assert classes == before
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(own).startswith("k-") for own in ids)
    assert (root[0].tag, root[0].text, root[1].text) == ("title", "a <title>", "words")
    # what is drawn on has no id that nobody uses, no metadata, and far fewer bytes
    assert len(text) < 0.7 * len(svg(figure()))


def test_a_path_is_written_shorter_and_stays_the_same():
    assert _straight("M0 0L3 0L3 4L1 2L1 2z") == "M0 0H3V4L1 2H1z"
    assert _straight("M1 1C2 2 3 3 4 4L4 9") == "M1 1C2 2 3 3 4 4V9"


@pytest.mark.parametrize(("height", "clipped"), [(0.5, 0), (2.0, 1)])
def test_a_bar_is_clipped_only_where_it_leaves_the_axes(height: float, clipped: int):
    own = figure()
    own.clear()
    axes = own.subplots()
    axes.bar([0], [height])
    axes.set_ylim(0, 1)
    text = inline(Drawing(own, "a title", "words"), "k", {})
    assert text.count('clip-path="url(#k-') == text.count("<clipPath") == clipped


def test_a_sentence_of_shares():
    assert sentence({"SA": 0.955, "RA": 0.5}) == "SA 95.5 %, RA 50.0 %"
    assert sentence({"a": 1.0, "b": 1.0}, most=1) == "a 100.0 % …"

"""The page: what it says, that it needs nothing else, and that a user's words stay words."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import registry
from bench.boards.columns import columns
from bench.boards.leaderboard import Stored, boards
from bench.boards.views import headline
from bench.errors import UnusableInput
from bench.report.beside import clean_images
from bench.report.details import boards_with_models
from bench.report.page import page, verdict

CLEAN = {idx: np.full((1, 2, 2), 0.1 * idx + 0.05, dtype=np.float32) for idx in range(8)}
HOSTILE = "<script>alert('x')</script>\"&{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "img", "input"}


def page_of(results: Path) -> str:
    return page(Stored.read(results), {}, lambda run: CLEAN)


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    return page_of(results)


class Elements(HTMLParser):
    """Every element with its attributes; those of one name close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.mark.slow
def test_the_page_is_well_formed_and_no_two_things_have_one_id(text: str):
    ids = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"] for tag, attributes in Elements(text).found if tag == "a"}
    assert {f"#{name}" for name in ids} >= anchors


def test_the_page_needs_nothing_else(text: str):
    for tag, attributes in Elements(text).found:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action"):
            assert re.match(r"data:|#", attributes.get(name) or "#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "default-src 'none'" in text


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(results: Path, text: str):
    assert page_of(results) == text


def test_it_says_what_is_known_of_a_model(text: str):
    said = Elements(text).said
    assert "25.00 % of 8 images withstand every attack that ran (95 % interval 7.15 to 59.07)" in said
    assert "50.00 % AutoAttack alone (2.0 times as many); 12.50 % are proven." in said
    assert "a <sign>" in said
    for title in ("Attack by attack", "By expert", "By class", "Against ε", "Route-stable share", "The smoothed model"):
        assert title in said
    assert "Adversarial examples" in said
    assert "class 0 → 1" in said


def test_a_ranked_board_comes_first(text: str):
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["digits, Linf 0.2", "digits, Linf 0.1"]


def test_every_number_has_its_run_and_command(results: Path, text: str):
    said = Elements(text).said
    for board, models in boards_with_models(Stored.read(results)):
        for model in models:
            for run in model.row.runs:
                assert run.result.run in said
                assert run.result.spec.command(board.results) in said
            for one in model.certificates:
                assert one.result.run in said
    assert "c" * 64 in said
    assert "f" * 64 in said


def test_the_command_that_judges_the_pictures_again_is_shown(results: Path, text: str):
    witnesses = {path.parent for path in results.rglob("witnesses.safetensors")}
    assert len(witnesses) == 2
    for folder in witnesses:
        assert f"<code>bench replay {folder}</code>" in text


def test_all_columns_of_the_board_are_there_and_the_main_ones_shown(results: Path, text: str):
    (board,) = (board for board in boards(results) if board.stem == "digits_Linf-0.2")
    table = text[text.index('<table class="board" id="digits_Linf-0.2') :]
    heads = re.findall(r'<th scope="col" class="([^"]*)" data-column="([^"]*)"', table[: table.index("</thead>")])
    assert [key for _, key in heads] == [column.key for column in columns(board.rows)]
    visible = [key for classes, key in heads if "off" not in classes]
    assert visible == ["rank", "model", "ra", "ra_worst", "certified_accuracy", "flags"]  # n and SA are all the same


def test_what_does_not_apply_is_left_out(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "clean", info={})
    said = Elements(page_of(tmp_path)).said
    assert "Nothing attacked it, so there is no robust accuracy." in said
    assert "No model has a rank yet" in said
    assert "<figure" not in page_of(tmp_path)
    for title in ("By expert", "By class", "Attack by attack", "Adversarial examples", "Flags"):
        assert title not in said


@pytest.mark.slow
def test_a_row_without_a_rank_has_no_figures_where_another_on_its_board_has_them(save_run: Any, tmp_path: Path):
    for model in ("dense", "other"):
        info = {"checkpoint_sha256": "d" * 64}
        save_run(tmp_path, model, "pgd", {"pgd": {0: 0}}, info, number=100, witnesses=True)
    before = page_of(tmp_path)
    save_run(tmp_path, "dense", "autoattack", {"apgd-ce": {0: 0}}, info)
    text = page_of(tmp_path)
    assert text.count("Attack by attack") == before.count("Attack by attack")  # of the other, and of the ranked row
    assert Elements(text).said.count("Its figures are those of its row on 8 images , where it has a rank.") == 1
    assert [page.count("<h4>Adversarial examples</h4>") for page in (before, text)] == [2, 1]
    assert '<a href="#digits_Linf-0.2-1">' in text


def test_what_is_no_certificate_is_no_source_of_a_share(save_run: Any, certify_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "pgd", {"pgd": {0: 1}})
    certify_run(tmp_path, "m", "certify-bounds", "paper-formula", [0.1] * 8)
    said = Elements(page_of(tmp_path)).said
    assert "certify-bounds v3, Linf 0.2 not applicable" in said
    assert "paper-formula" not in said


def test_runs_with_errors_are_named_and_count_nowhere(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "pgd", {"pgd": {0: 1}}, failed=True)
    said = Elements(page_of(tmp_path)).said
    assert "0 models, 1 run in" in said
    assert "Left out, for its 1 rows with status `error`: pgd on m" in said
    assert "Model by model" not in said


def test_images_that_are_not_there_are_said_and_commands_name_the_plugins(
    save_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_run(tmp_path, "m", "pgd", {"pgd": {0: 1}}, witnesses=True)
    monkeypatch.setattr(registry, "named_plugins", ["mine"])

    def nowhere(run: Any) -> Any:
        raise UnusableInput("no <images> here")

    said = Elements(page(Stored.read(tmp_path), {}, nowhere)).said
    assert "The clean images are not shown: no <images> here." in said
    assert said.count("bench --plugin mine replay ") == 1
    assert "bench replay" not in said


def test_a_users_words_are_escaped_everywhere(save_run: Any, certify_run: Any, tmp_path: Path):
    root = tmp_path / "<b>results"
    info = {"num_experts": 2, "num_selected_experts": 1, "objective": HOSTILE, "trained": HOSTILE, "word": HOSTILE}
    for suite in ("pgd", "autoattack"):
        save_run(root, HOSTILE, suite, {HOSTILE: {0: 1}}, info, flags=(HOSTILE,), witnesses=True)
    save_run(root, "other", "autoattack", {"apgd-ce": {0: 1}}, {"checkpoint_sha256": "d" * 64})
    certify_run(root, HOSTILE, "certify-routes", "routes", [0.1] * 8, [2] * 8, info)
    text = page_of(root)
    elements = Elements(text)
    tags = [tag for tag, _ in elements.found]
    assert (tags.count("script"), tags.count("b") > 0) == (1, True)
    assert "<b>results" not in text
    assert elements.said.count(HOSTILE) >= 20
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert html.escape("<script>alert") in drawn
    (command,) = {line for line in re.findall(r"<code>(bench replay .*?)</code>", text) if "pgd" in line}
    assert html.unescape(command).startswith("bench replay '")


@pytest.mark.slow  # 400 figures
def test_the_report_on_the_shipped_results_is_small_and_whole(tmp_path: Path):
    shipped = Path(__file__).parents[2] / "results"
    text = page(Stored.read(shipped), {}, clean_images(tmp_path))
    assert len(text.encode()) < 3_000_000
    elements = Elements(text)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    models = [attributes for tag, attributes in elements.found if attributes.get("class") == "model"]
    assert elements.said.count("Where the numbers come from") == len(models) > 20
    assert "Adversarial examples" in elements.said
    assert not re.search("The clean images are not shown[^.]*digits", elements.said)  # these need no folder


def test_verdicts_in_one_sentence(results: Path, save_run: Any, tmp_path: Path):
    rows = {row.name: row for board in boards(results) for row in board.rows if board.stem == "digits_Linf-0.2"}
    assert verdict(rows["dense"]) == (
        "75.00 % of 8 images withstand every attack that ran (95 % interval 40.93 to 92.85), as many as AutoAttack"
        " alone."
    )
    save_run(tmp_path, "m", "pgd", {"pgd": {0: 1}}, {})
    (board,) = boards(tmp_path)
    assert verdict(board.rows[0]).endswith("; it has no rank: no autoattack with its default parameters.")


def test_the_headline_names_the_first_and_the_greatest_gap(results: Path):
    (board,) = (board for board in boards(results) if board.stem == "digits_Linf-0.2")
    assert headline(board) == (
        "Most robust is dense: 75.00 % of 8 images withstand every attack that ran."
        " AutoAttack alone overstates moe most: it leaves 50.00 %, all attacks together 25.00 %."
    )

"""bench report and bench plot as commands: files that are whole, and one line for what cannot be drawn."""

from pathlib import Path
from typing import Any

import pytest

from bench.boards.leaderboard import Stored
from bench.errors import UnusableInput
from bench.report.details import boards_with_models
from bench.report.figures import KINDS
from bench.report.plot import drawn


@pytest.mark.slow
def test_the_report_is_one_file_and_the_command_prints_where_it_lies(results: Path, bench: Any, tmp_path: Path):
    status, out, err = bench("report", "--results", str(results), "--out", "deep/page.html")
    assert (status, out) == (0, "deep/page.html\n"), err
    text = (tmp_path / "deep" / "page.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert "are not those of the run" in text  # the digits are not what these tiny runs were made on


def test_a_report_is_a_page(bench: Any):
    assert bench("report", "--out", "page.txt")[::2] == (2, "error: --out page.txt: the report is a .html file\n")


def test_a_contradiction_gives_no_report(save_run: Any, certify_run: Any, bench: Any, tmp_path: Path):
    save_run(tmp_path / "results", "m", "pgd", {"pgd": {0: 1}})
    certify_run(tmp_path / "results", "m", "certify-bounds", "union", [0.2] * 8)
    status, out, err = bench("report")
    assert status == 1
    assert "method=union" in out
    assert "not what is certified" in err
    assert not (tmp_path / "report.html").exists()


def test_without_results_there_is_one_line(bench: Any):
    status, _, err = bench("report", "--results", "nowhere")
    assert status == 2
    assert err == "error: there is no results folder 'nowhere': make it with: bench run --results nowhere\n"


def test_figures_are_listed_with_a_sentence_each(bench: Any):
    status, out, _ = bench("plot")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(KINDS)
    assert all(len(line.split()) > 3 for line in out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_as_its_name_ends(ending: str, start: bytes, results: Path, bench: Any, tmp_path: Path):
    words = ("plot", "attacks", "--results", str(results), "--board", "digits_Linf-0.2", "--model", "moe")
    status, out, err = bench(*words, "--out", f"figure.{ending}")
    assert (status, out) == (0, f"figure.{ending}\n"), err
    assert (tmp_path / f"figure.{ending}").read_bytes().startswith(start)


def test_a_figure_is_not_written_where_it_cannot_be_drawn(results: Path, bench: Any, tmp_path: Path):
    for words, said in (
        (("flwo",), "error: unknown figure 'flwo': did you mean 'flow'?\n"),
        (
            ("flow", "--out", "a.png"),
            "error: --out a.png: a figure is written as .svg or .pdf, by the ending of its name\n",
        ),
    ):
        status, _, err = bench("plot", *words, "--results", str(results))
        assert (status, err) == (2, said)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def found(results: Path) -> Any:
    return boards_with_models(Stored.read(results))


def test_what_is_meant_is_asked_for(found: Any):
    def refused(word: str, board: str | None = None, model: str | None = None) -> str:
        with pytest.raises(UnusableInput) as error:
            drawn(word, found, board, model)
        return str(error.value)

    assert refused("bounds").endswith("name one by --board: digits_Linf-0.1, digits_Linf-0.2")
    assert refused("attacks", "digits_Linf-0.2").endswith("name one by --model: dense, moe")
    assert refused("bounds", "digits_0.1") == "--board digits_0.1: did you mean 'digits_Linf-0.1'?"
    assert refused("flow", None, "mo") == "--model mo: did you mean 'moe'?"
    assert refused("alpha") == "no figure 'alpha' (the same shares of duals against α) can be drawn of these results"
    assert "shows all models of a board" in refused("bounds", None, "moe")


def test_of_one_candidate_none_has_to_be_named(found: Any):
    for word in ("eps", "smoothed"):  # of the only model that has it, which is the same in all balls
        assert drawn(word, found, None, None).title
    assert drawn("flow", found, "digits_Linf-0.2", None).title

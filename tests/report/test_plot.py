"""bench report and bench plot as commands: files that are whole, and one line for what cannot be drawn."""

from pathlib import Path
from typing import Any

import pytest

from bench.report.figures import KINDS


def test_the_report_is_one_file_and_the_command_prints_where_it_lies(results: Path, bench: Any, tmp_path: Path):
    status, out, err = bench("report", "--results", str(results), "--out", "deep/page.html")
    assert (status, out) == (0, "deep/page.html\n"), err
    text = (tmp_path / "deep" / "page.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert "are not those of the run" in text  # the digits are not what these tiny runs were made on


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


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_as_its_name_ends(ending: str, start: bytes, results: Path, bench: Any, tmp_path: Path):
    words = ("plot", "attacks", "--results", str(results), "--board", "digits_Linf-0.2", "--model", "moe")
    status, out, err = bench(*words, "--out", f"figure.{ending}")
    assert (status, out) == (0, f"figure.{ending}\n"), err
    assert (tmp_path / f"figure.{ending}").read_bytes().startswith(start)


def test_what_is_meant_is_asked_for(results: Path, bench: Any, tmp_path: Path):
    def refused(*words: str) -> str:
        status, _, err = bench("plot", *words, "--results", str(results))
        assert status == 2
        assert err.count("\n") == 1
        assert not list(tmp_path.glob("*.svg"))
        return str(err)

    assert "unknown figure 'flwo': did you mean 'flow'?" in refused("flwo")
    assert "--out a.png: a figure is written as .svg or .pdf" in refused("flow", "--out", "a.png")
    assert "by --board: digits_Linf-0.1, digits_Linf-0.2" in refused("bounds")
    assert "by --model: dense, moe" in refused("attacks", "--board", "digits_Linf-0.2")
    assert "--board digits_0.1: did you mean 'digits_Linf-0.1'?" in refused("bounds", "--board", "digits_0.1")
    assert "--model mo: did you mean 'moe'?" in refused("flow", "--model", "mo")
    assert "nothing below" in refused("alpha")
    assert "shows all models of a board" in refused("bounds", "--model", "moe")


def test_of_one_candidate_none_has_to_be_named(results: Path, bench: Any, tmp_path: Path):
    for word in ("flow", "eps", "smoothed"):  # of the only model that has it, in whatever ball
        words = () if word != "flow" else ("--board", "digits_Linf-0.2")
        assert bench("plot", word, "--results", str(results), *words)[0] == 0
        assert (tmp_path / f"{word}.svg").exists()

"""How boards look: fitted to a terminal, compact in markdown, ready for a paper or a page."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import saved_runs

from bench.boards import views
from bench.boards.leaderboard import boards, write_boards
from bench.boards.rows import Board
from bench.errors import UnusableInput
from bench.results.flags import DECLARED, OUTSIDE_TORCH, WEAKER
from bench.results.schema import VERDICT_COLUMNS, Result
from bench.results.store import RunFolder, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

MOE = {"num_experts": 4, "num_selected_experts": 1}
LONG = "package.with.a.long.name.and_more.of_it:moe_of_mine"
REST = (0.0, 0.0, -1, -1, "ok")


def save(root: Path, suite: str, robust: str | None, model: str = "dense-at", **fields: Any) -> None:
    """A finished run of eight examples, all right without an attack; one letter an example: 1 robust, 0 broken."""
    info, flags, model_flags = (
        fields.pop(name, default) for name, default in (("info", {}), ("flags", ()), ("of", ()))
    )
    rows = pd.DataFrame(
        [
            (i, f"{i:016x}", 0, attack, "F", 0, 0, True, mark == "1", *REST)
            for attack, marks in (("clean", "1" * 8), (suite, robust))
            for i, mark in enumerate(marks or "")
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    given = {"model": model, "dataset": "digits", "suite": suite, "suite_version": 9, "n_examples": 8}
    spec = RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})
    known = ModelInfo(**{"name": model, "architecture": "cnn", "checkpoint_sha256": "c" * 64, **info})
    provenance = {"flags": flags, "model_flags": model_flags, "environment": {}, "git_hash": None, "seconds": 1.0}
    result = Result.from_rows(spec, known, "f" * 16, rows, finished="2030-01-01", **provenance)
    RunFolder(run_folder(root, spec, result.run)).finish(result, rows)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    results = tmp_path / "results"
    save(results, "autoattack", "11110000")
    save(results, "autoattack", "11100000", "second", flags=("a sign",))
    save(
        results,
        "autoattack",
        "11111100",
        LONG,
        info=MOE | {"word": "out/m.safetensors"},
    )
    save(results, "pgd", "11111111", "weak", suite_params={"steps": 1}, flags=(f"{WEAKER}steps=1 (default 50)",))
    (made,) = boards(results)
    return made


@pytest.mark.parametrize("width", [80, 120, None])
def test_a_terminal_has_one_line_a_model_and_none_longer_than_it_is_wide(board: Board, width: int | None):
    text = views.terminal(board, width=width)
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("rank"))
    shown = lines[start : start + 7]
    assert [line.split()[0] for line in shown] == ["rank", "------", "1", "2", "------", "–", "–"]
    assert shown[2].split()[1:] == ["dense-at", "50.00", "50.00", "[21.5,", "78.5]"]
    if width:
        assert max(map(len, shown)) <= width
        assert max(len(line) for line in lines if not line.startswith("  bench ")) <= width  # a command is copied whole
    whole = LONG in shown[6]
    assert whole == (width != 80)
    if width == 80:
        assert re.search(r"package\S*…\S*_mine", shown[6])


def test_flags_are_a_count_and_their_words_below(board: Board):
    lines = views.terminal(board).splitlines()
    (row,) = (line for line in lines if line.startswith("2 "))
    assert row.split()[-1] == "1"
    assert "second: autoattack: a sign" in lines


def test_a_flag_of_all_rows_is_told_once(tmp_path: Path):
    save(tmp_path, "autoattack", "11110000", flags=("a sign", "another"))
    save(tmp_path, "autoattack", "11100000", "second", flags=("a sign",))
    lines = views.terminal(boards(tmp_path)[0]).splitlines()
    assert "all rows: autoattack: a sign" in lines
    assert [line for line in lines if line.endswith("another")] == ["dense-at: autoattack: another"]
    assert not any(line.startswith("second: ") for line in lines)


def test_what_is_the_same_in_all_rows_is_said_once(board: Board):
    text = views.markdown(board)
    assert "In all rows: SA 100.00, certified not known." in text
    main = text.split("<details>")[0]
    assert "| SA" not in main
    assert "| n " not in main


def test_a_row_without_a_rank_says_what_it_lacks_and_the_command_for_it(board: Board):
    command = (
        "bench run --suite adaptive --dataset digits --model out/m.safetensors --n-examples 8 --norm Linf --eps 0.2 "
        "--seed 0 --batch-size 128"
    )
    text = views.markdown(board)
    assert f"- `{LONG}`: no adaptive at its standard budget or more: `{command}`\n" in text
    ranked, unranked = text.split("### Without a rank")
    assert LONG not in ranked
    assert LONG in unranked
    text_of_terminal = views.terminal(board)
    assert f"  {command} --results {board.results}\n" in text_of_terminal
    assert "--suite autoattack --dataset digits --model weak " in text_of_terminal


def test_rows_that_one_command_supplies_share_it(tmp_path: Path):
    for model in ("a", "b"):
        save(tmp_path, "pgd", "11110000", model)
    save(tmp_path, "pgd", "11110000", "c", info=MOE)
    text = views.terminal(boards(tmp_path)[0], width=80)
    assert "\na, b have no rank: no autoattack with its default parameters\n  bench run --suite autoattack " in text
    assert " --model a,b --n-examples 8 " in text
    assert "\nc has no rank: no autoattack with its default parameters; no adaptive" in text
    assert text.count("bench run") == 2


def test_a_command_that_gives_no_rank_is_not_offered(tmp_path: Path):
    save(tmp_path, "pgd", "11110000", of=("outputs depend on chance",))
    text = views.terminal(boards(tmp_path)[0])
    assert "has no rank: no autoattack with its default parameters; its outputs depend on chance\n" in text
    assert "bench run" not in text


def test_of_two_checkpoints_of_one_name_no_command_is_told_which_would_attack_one_alone(tmp_path: Path):
    save(tmp_path, "pgd", "11110000")
    assert " --model dense-at --n-examples" in views.terminal(boards(tmp_path)[0])
    save(tmp_path, "pgd", "11110000", info={"checkpoint_sha256": "1" * 64})
    text = " ".join(views.terminal(boards(tmp_path)[0]).split())
    assert "--model" not in text
    assert text.count("parameters: run autoattack on this checkpoint") == 1


def test_the_headline_is_of_the_first_table_and_claims_no_more_than_there_is(tmp_path: Path):
    rows = {"clean": "1" * 8, "apgd-ce": "11111110"}
    saved_runs.save(tmp_path, "autoattack", rows, model="few", fingerprint="8" * 16)
    (one,) = boards(tmp_path)
    assert views.headline(one) == "few: 87.50 % of 8 images withstand every attack that ran."
    for model in ("a", "b"):
        saved_runs.save(tmp_path, "autoattack", {"clean": "1" * 9, "apgd-ce": "0" * 9}, model=model)
    (both,) = boards(tmp_path)
    assert views.headline(both) == "No ranked model withstands the attacks on any of 9 images."


def test_of_an_moe_whose_k_is_not_known_the_experts_are_counted(tmp_path: Path):
    save(tmp_path, "autoattack", "1100", info={"num_experts": 4, "architecture": "Mine"})
    assert boards(tmp_path)[0].rows[0].experts == "4 × Mine"


@pytest.mark.parametrize("flag", ["outputs depend on chance", "outputs depend on the batch"])
def test_a_model_that_answers_by_chance_or_by_its_batch_has_no_rank(flag: str, tmp_path: Path):
    save(tmp_path, "autoattack", "11110000", of=(flag,))
    (made,) = boards(tmp_path)
    assert made.rows[0].rank is None
    assert f"dense-at has no rank: its {flag}" in views.terminal(made)


def test_choices_that_no_attack_can_follow_earn_no_rank_whatever_is_declared(tmp_path: Path):
    save(tmp_path, "autoattack", "11110000", of=(DECLARED, f"{OUTSIDE_TORCH}argmax in router"))
    (made,) = boards(tmp_path)
    assert made.rows[0].rank is None
    assert "dense-at has no rank: it chooses outside torch, where no attack follows" in views.terminal(made)


def test_routes_that_adaptive_could_not_see_earn_no_rank(tmp_path: Path):
    save(tmp_path, "autoattack", "11110000", info=MOE)
    save(tmp_path, "adaptive", None, info=MOE)
    (made,) = boards(tmp_path)
    assert made.rows[0].rank is None
    assert "its routes are hidden from suite `adaptive`" in views.terminal(made)


def test_a_suite_that_attacked_nothing_has_no_robust_accuracy(tmp_path: Path):
    save(tmp_path, "autoattack", None)
    (made,) = boards(tmp_path)
    (row,) = made.rows
    assert (row.rank, row.scores.ra, row.worst) == (None, None, None)


def test_a_suite_that_ran_weaker_than_its_default_is_named_in_its_column(board: Board):
    assert "RA pgd[steps=1] (weaker than its default)" in views.markdown(board)


def test_columns_are_chosen_by_name_and_the_csv_keeps_all(board: Board, tmp_path: Path):
    for view in (views.terminal, views.markdown, views.latex, views.html):
        text = view(board, ["model", "ra_worst", "seeds"])
        assert "seeds" in text
        assert "RA-worst" in text
        assert "rank</th>" not in text
    written = write_boards([board], tmp_path / "out", ["model"], ["csv", "md", "tex", "html"])
    assert [path.suffix for path in written] == [".csv", ".md", ".tex", ".html"]
    assert "ra_worst_low" in written[0].read_text()
    with pytest.raises(UnusableInput, match=r"^--columns ra_wrst: .*did you mean 'ra_worst'\?$"):
        views.markdown(board, ["ra_wrst"])


def test_latex_has_rules_intervals_and_the_best_in_bold(board: Board):
    text = views.latex(board)
    for rule in ("top", "mid", "bottom"):
        assert f"\\{rule}rule" in text
    assert r"1 & dense-at & \textbf{50.00} {\scriptsize [21.52, 78.48]}" in text
    assert r"\textbf{75.00}" not in text  # of a row without a rank
    assert r"moe\_of\_mine" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_compiles(board: Board, tmp_path: Path):
    head, tail = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}", "\\end{document}"
    (tmp_path / "a.tex").write_text(head + views.latex(board) + tail)
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_html_is_well_formed_and_escapes_names(tmp_path: Path):
    save(tmp_path, "autoattack", "11110000", "<script>alert(1)</script>")
    save(tmp_path, "autoattack", "11100000", "b & c")
    (made,) = boards(tmp_path)
    text = views.html(made)
    assert "<script>" not in text
    assert "<script>" not in views.markdown(made).replace("`<script>", "")
    assert "b &amp; c" in text
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(text)
    assert opened == []


def test_routed_models_have_a_second_table_of_their_own_figures(tmp_path: Path):
    save(tmp_path, "autoattack", "11110000")
    assert "### Routed models" not in views.markdown(boards(tmp_path)[0])
    save(tmp_path, "components", None, info=MOE)
    rows = pd.DataFrame(
        [
            (i, f"{i:016x}", 0, attack, "F", 0, 0, True, robust, 0.0, 0.0, 0, int(attack == "route"), "ok")
            for attack, robust in (("clean", True), ("expert-any:0", False), ("route", True))
            for i in range(8)
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    threat = ThreatModel(norm="Linf", eps=0.2)
    given: dict[str, Any] = {"model": "moe", "dataset": "digits", "threat_model": threat, "n_examples": 8}
    spec = RunSpec(**given, suite="components", suite_version=2)
    info = ModelInfo(name="moe", architecture="cnn", checkpoint_sha256="d" * 64)
    provenance: dict[str, Any] = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": "2030-01-01"}
    result = Result.from_rows(spec, info, "f" * 16, rows, **provenance)
    RunFolder(run_folder(tmp_path, spec, result.run)).finish(result, rows)
    second = views.markdown(boards(tmp_path)[0]).split("### Routed models")[1].split("<details>")[0]
    assert re.search(
        r"\| moe +\| 0.00 \[0.00, 32.44\] +\| 100.00 \[67.56, 100.00\] +\| 100.00 \[67.56, 100.00\] +\|", second
    )
    assert "dense-at" not in second


def test_the_last_sentence_of_a_terminal_names_the_first_and_what_autoattack_overstates_most(tmp_path: Path):
    save(tmp_path, "autoattack", "11111100")
    save(tmp_path, "autoattack", "11110000", "moe-at", info=MOE)
    save(tmp_path, "adaptive", "11000000", "moe-at", info=MOE)
    (made,) = boards(tmp_path)
    assert views.terminal(made).splitlines()[-1] == (
        "Most robust is dense-at: 75.00 % of 8 images withstand every attack that ran. AutoAttack alone overstates"
        " moe-at most: it leaves 50.00 %, all attacks together 25.00 %."
    )

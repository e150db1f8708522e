"""How the columns of a board write their values."""

from pathlib import Path

import pytest
from saved_runs import MOE, save

from bench.boards.columns import MAIN, ROUTED, Column, chosen, columns, percent, record, span
from bench.boards.leaderboard import boards
from bench.boards.rows import Board
from bench.errors import UnusableInput


@pytest.fixture
def board(tmp_path: Path) -> Board:
    save(tmp_path, "autoattack", {"clean": "1110", "apgd-ce": "110."}, info=MOE)
    (made,) = boards(tmp_path)
    return made


def test_percent_has_two_decimals_and_a_span_both_ends():
    assert percent(0.921875) == "92.19"
    assert span([0.5, 0.25, 0.75]) == "25.00–75.00"
    assert (span([0.5, 0.5]), span([])) == ("50.00", "")


def test_a_value_is_written_by_its_unit(board: Board):
    (row,) = board.rows
    by_key = {column.key: column for column in columns(board.rows)}
    # Wilson, k = 2, n = 4: ½ ± 0.349968
    assert by_key["ra"].cell(row) == "50.00 [15.00, 85.00]"
    assert (by_key["sa"].text(row), by_key["sa"].number(row)) == ("75.00", 0.75)
    assert by_key["experts"].cell(row) == "1 of 4 × resnet10"
    assert (by_key["p_first"].text(row), by_key["p_first"].bounds(row)) == ("", ("", ""))
    assert Column("p", "p", lambda _: 0.012345, unit="p").text(row) == "0.012"
    assert Column("x", "x", lambda _: 0.7).text(row) == "0.7"


def test_columns_of_the_suites_that_ran_are_there_and_keys_are_used_once(board: Board):
    keys = [column.key for column in columns(board.rows)]
    assert "after_apgd-ce" in keys
    assert len(keys) == len(set(keys))
    assert {*MAIN, *ROUTED} <= set(keys)
    assert [column.key for column in columns([])] == [key for key in keys if key != "after_apgd-ce"]


def test_columns_are_chosen_in_the_order_given_and_an_unknown_one_is_refused(board: Board):
    every = columns(board.rows)
    assert [column.key for column in chosen(every, ["ra", "model", "checkpoint"])] == ["ra", "model", "checkpoint"]
    with pytest.raises(UnusableInput, match=r"^--columns raworst: .* did you mean 'ra_worst'"):
        chosen(every, ["raworst"])


def test_a_record_has_the_ends_of_intervals_and_what_identifies_the_row(board: Board):
    found = record(board.rows[0], columns(board.rows))
    assert (found["ra"], found["ra_low"], found["ra_high"]) == ("50.00", "15.00", "85.00")
    assert (found["fingerprint"], found["checkpoint"]) == ("f" * 12, "c" * 12)

"""One channel for messages to a person: standard error, in order, above a bar, and less of it with --quiet."""

import io
import logging
import sys

import pytest

from bench import console


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel's state is global, and the logger's handlers are too."""
    monkeypatch.setattr(logging.getLogger("bench"), "handlers", [])
    monkeypatch.setattr(console, "_quiet", False)


def test_a_message_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]):
    console.say("first\n   second")
    console.note("third")
    assert capsys.readouterr() == ("", "first second\nthird\n")


def test_quiet_drops_notes_and_no_errors(capsys: pytest.CaptureFixture[str]):
    console.set_up(quiet=True)
    console.note("dropped")
    console.say("kept")
    logging.getLogger("bench.training").warning("%d images", 3)
    assert console.is_quiet()
    assert capsys.readouterr().err == "kept\n3 images\n"
    console.set_up()  # for each command
    console.note("expected")
    assert capsys.readouterr().err == "expected\n"


def test_setting_up_twice_says_nothing_twice(capsys: pytest.CaptureFixture[str]):
    others = logging.StreamHandler(io.StringIO())
    logging.getLogger("bench").addHandler(others)
    console.set_up()
    console.set_up()
    logging.getLogger("bench").warning("once")
    assert capsys.readouterr().err == "once\n"
    assert others in logging.getLogger("bench").handlers  # a user's own stays


def test_inside_hushed_notes_are_dropped_and_afterwards_not(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ZeroDivisionError), console.hushed():
        console.note(str(1 / 0))
    with console.hushed():
        console.note("dropped")
        with console.hushed(quiet=False):
            console.note("expected")
    console.note("after")
    assert capsys.readouterr().err == "expected\nafter\n"


def test_lines_go_above_a_bar_while_there_is_one(capsys: pytest.CaptureFixture[str]):
    lines: list[str] = []
    with console.above(lines.append):
        console.say("inside")
        console.note("inside\ntoo")
    console.say("after")
    assert lines == ["inside", "inside too"]
    assert capsys.readouterr().err == "after\n"


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="cp1252"))
    console.set_up()
    console.say("ε ≤ 8/255")
    assert raw.getvalue() == b"? ? 8/255\n"

"""Messages to a person: one channel, on standard error, in order.

Standard output holds results alone. Lines of the logger `bench` come here too.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_write: Callable[[str], object] | None = None  # above a bar, while one is on the screen
_quiet = False


def duration(seconds: float) -> str:
    """As a person says it: `0.4 s`, `12 s`, `3 min`, `2.5 h`, `4 days`."""
    for unit, size, most in (("s", 1.0, 90), ("min", 60.0, 90), ("h", 3600.0, 48)):
        count = seconds / size
        if count < most:
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.2g} {unit}"
    return f"{seconds / 86400:.0f} days"


def say(message: str) -> None:
    """One line that is always printed: an error, or where a result lies."""
    line = " ".join(part.strip() for part in message.splitlines())
    if _write is not None:
        _write(line)
    else:
        print(line, file=sys.stderr, flush=True)


def note(message: str) -> None:
    """One line about the work under way; `--quiet` drops it."""
    if not _quiet:
        say(message)


def is_quiet() -> bool:
    """Whether notes and bars are dropped."""
    return _quiet


@contextmanager
def hushed(quiet: bool = True) -> Iterator[None]:
    """Notes and bars are dropped inside, or with `quiet=False` not."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before


@contextmanager
def above(write: Callable[[str], object]) -> Iterator[None]:
    """Lines go through `write` inside, which keeps them above a bar."""
    global _write
    before, _write = _write, write
    try:
        yield
    finally:
        _write = before


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def set_up(quiet: bool = False) -> None:
    """Prepares the channel for one command; `--quiet` holds for that command alone."""
    global _quiet
    _quiet = quiet
    logger = logging.getLogger("bench")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Handler)] + [_Handler()]
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is replaced, not an error after the work
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

"""Errors that a user can mend, and hints for their messages. Imports nothing of the project."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UnusableInput(ValueError):
    """What the user gave cannot be used; the message is one line that names the value and the next step.

    The command line prints it and exits with status 2, without a traceback. What a file or a library brings along may
    have several lines: they are joined.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class TrainingFailed(RuntimeError):
    """The loss, its gradient or the router's scores are no longer finite; the message names the step."""


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """A user's code runs inside, which may fail in any way: that is the user's to mend.

    Raises:
        UnusableInput: `what`, and what was raised, in one line.
    """
    try:
        yield
    except UnusableInput:
        raise
    except (Exception, SystemExit) as error:
        raise UnusableInput(f"{what}: {in_one_line(error)}") from None


def in_one_line(error: BaseException) -> str:
    """The error's type and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` where a known name is near to `value`, otherwise the whole list of known names."""
    by_lower = {name.lower(): name for name in known}
    nearest = get_close_matches(value.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean '{by_lower[nearest[0]]}'?" if nearest else f"there are: {', '.join(by_lower.values())}"

"""The command line: which commands there are, and how they end. `bench.commands` has what each does."""

import errno
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer

from bench import console, registry
from bench.commands import reading, scoring, training
from bench.commands.options import DONE, FAILED, UNUSABLE
from bench.console import say
from bench.errors import TrainingFailed, UnusableInput

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="bench",
    help="Tells whether a Mixture-of-Experts image classifier is really robust.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "list": reading.list_,
    "show": reading.show,
    "train": training.train,
    "tune": training.tune,
    "run": scoring.run,
    "certify": scoring.certify,
    "leaderboard": reading.leaderboard,
    "report": reading.report,
    "plot": reading.plot,
    "check": reading.check,
    "replay": scoring.replay,
    "doctor": reading.doctor,
}
for _name, _command in COMMANDS.items():
    # The first paragraph, whole: typer cuts a longer text in the list of commands.
    app.command(_name, short_help=" ".join((_command.__doc__ or "").split("\n\n")[0].split()))(_command)


def _print_version(asked: bool) -> None:
    if asked:
        from bench import __version__

        print(f"bench {__version__}")
        raise typer.Exit


@app.callback()
def load_plugins(
    plugins: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="a module that registers suites, data sets …; may be repeated"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Tells whether a Mixture-of-Experts image classifier is really robust."""
    registry.named_plugins.clear()
    for module in plugins or ():
        registry.load_plugin(module)
        registry.named_plugins.append(module)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a regression or a failure, 2 unusable input, told in one line."""
    from typer.exceptions import TyperException

    # Libraries announce their own future here; nothing in it that a user of bench could mend.
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    # Of many small files arrow's own pool asks the system for memory in a way that can cost more than reading them.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "" not in sys.path:  # last: a user's model may import more of its folder when it is called
        sys.path.append("")
    console.set_up()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is told how to go on, as Ctrl-C is
    sys.exit(_dispatch(app, arguments, TyperException))


def _again(words: Sequence[str]) -> str:
    """The command that goes on where the one with these words was stopped."""
    more = ["--resume"] if "train" in words and "--resume" not in words else []
    kept = [word for word in words if word != "--restart"]
    return shlex.join(["bench", *kept, *more])


def _parser_message(error: Any) -> str:
    """The parser's own message, and the value that it does not name where a number is none."""
    message: str = error.format_message().rstrip(".").replace("Value error, ", "")
    named = [f"'{wrong['input']}'" for wrong in getattr(error.__cause__, "errors", list)()]
    message += "".join(f" (got {value})" for value in named if value not in message)
    return message if message.endswith("?") else f"{message}."


def _no_empty(words: Sequence[str]) -> None:
    """UnusableInput for an option whose value is empty, as of a variable that is not set."""
    for word, following in pairwise([*words, "end"]):
        option, equals, value = word.partition("=")
        if option.startswith("--") and not (value if equals else following):
            raise UnusableInput(f"{option} has an empty value: give it one, or leave it out")


def _dispatch(application: typer.Typer, arguments: Sequence[str] | None, parser_error: type[Exception]) -> Any:
    try:
        _no_empty(sys.argv[1:] if arguments is None else arguments)
        status = application(arguments, prog_name="bench", standalone_mode=False) or DONE
        if status == INTERRUPTED:
            say(f"stopped; this goes on: {_again(sys.argv[1:] if arguments is None else arguments)}")
        return status
    except UnusableInput as error:
        say(f"error: {error}")
        return UNUSABLE
    except parser_error as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "bench")
        say(f"error: {_parser_message(error)} See `{command} --help`.")
        return UNUSABLE
    except OSError as error:  # a folder where a file should be, a full disk: nothing that a traceback would explain
        again = "; make room, and start the same command again: it goes on from what is done"
        what = f"'{error.filename}': {error.strerror}" if error.filename else f"{error}"
        say(f"error: {what}{again if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ''}")
        return UNUSABLE
    except TrainingFailed as error:
        say(f"error: {error}")
        return FAILED

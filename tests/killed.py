"""Runs commands of bench in children that kill themselves at a given point.

A line of standard input is JSON: [the point (a key of KILLS, or a number of seconds), a file for the child's output,
the words of commands that run at once]; the answer is a line with each child's exit status. The parent has imported
what the commands need, which takes longer than the trainings do: three epochs of two steps each.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from forked import forked

from bench import cli, cluster, progress
from bench.evaluation import probes
from bench.training import loop, state

probes.STEPS = 4  # as in all tests


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def at_step(epoch: int, done: int) -> None:
    """Die after step `done` (from 1) of `epoch` (from 0)."""

    def on_step(_: Any, *step: Any) -> None:
        if step[:2] == (epoch, done):
            die()

    progress.TrainingProgress.on_step = on_step  # type: ignore[method-assign]


def writing(module: ModuleType, name: str, ending: str, number: int, how: Literal["before", "half", "after"]) -> None:
    """Die before, in the middle of, or after the `number`-th file with this ending that module.name writes."""
    write: Callable[..., None] = getattr(module, name)
    written: list[str] = []

    def killing(path: Path, *content: Any) -> None:
        if path.name.endswith(ending):
            written.append(path.name)
        now = path.name.endswith(ending) and len(written) == number
        if now and how == "before":
            die()
        if now and how == "half":
            os.fsync = lambda file: (os.ftruncate(file, os.fstat(file).st_size // 2), die())  # type: ignore[arg-type]
        write(path, *content)
        if now:
            die()

    setattr(module, name, killing)


def after_tasks(number: int) -> None:
    """Die when so many tasks are done on a Ray cluster."""
    done: list[object] = []
    finished = cluster.Queue.finished

    def finish(queue: cluster.Queue, *task: Any) -> None:
        finished(queue, *task)
        done.append(task)
        if len(done) == number:
            die()

    cluster.Queue.finished = finish  # type: ignore[method-assign]


KILLS: dict[str | None, Callable[[], None]] = {
    None: lambda: None,
    "in the first epoch": lambda: at_step(0, 1),
    "in the last epoch": lambda: at_step(2, 1),
    "between two states": lambda: writing(state, "write_atomically", ".state.pt", 2, "before"),
    "in the middle of a state": lambda: writing(state, "write_atomically", ".state.pt", 2, "half"),
    "after the last state": lambda: writing(state, "write_atomically", ".state.pt", 3, "after"),
    "after three tasks": lambda: after_tasks(3),
    "in the middle of the checkpoint": lambda: writing(loop, "save_checkpoint", ".safetensors", 1, "half"),
}


def killing(command: list[str], kill: str | float | None, output: int) -> None:
    """Run a command, whose output goes to a file, until it is killed."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    if isinstance(kill, float):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as sudden as SIGKILL, and the child sends it itself
        signal.setitimer(signal.ITIMER_REAL, kill)
    else:
        KILLS[kill]()
    cli.main(command)


def main() -> None:
    for line in sys.stdin:
        kill, log, commands = json.loads(line)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        children = [forked(partial(killing, command, kill, output)) for command in commands]
        os.close(output)
        for child in children:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()

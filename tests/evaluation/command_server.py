"""Runs commands in children of a process that has imported what they need; a program of test_processes.py.

Reads one JSON line for each call, [log, kills, words]: the command `words` is run in as many children at a time as
there are kills, each with the environment variables of torchrun. Child i writes to the file `log`.i; where kills[i]
is (n, how), it is killed by SIGKILL before, in the middle of or after the n-th file that it writes. The others are
terminated once they wait for it, as torchrun does it. Answers with the children's exit codes, a JSON line.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from forked import forked

from bench import cli
from bench.evaluation import evaluate, examine
from bench.results import store


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int, how: str) -> None:
    """From here on the `number`-th file that a result is written to is this process's last."""
    write, calls = store.write_atomically, list[Path]()

    def cut_in_half(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        die()

    def killing(path: Path, content: bytes) -> None:
        calls.append(path)
        now = len(calls) == number
        if now and how == "before":
            die()
        if now and how == "in":
            os.fsync = cut_in_half
        write(path, content)
        if now:
            die()

    store.write_atomically = killing


def tell_blocks() -> None:
    """Prints each block that is attacked on standard error."""
    attack = examine.Examiner.run

    def told(self: Any, number: int, *rest: Any) -> Any:
        print("attacked", number, file=sys.stderr)
        return attack(self, number, *rest)

    examine.Examiner.run = told  # type: ignore[method-assign]


def process(rank: int, kills: list[Any], log: str, words: list[str]) -> None:
    """One process of the command."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(kills)))
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if kills[rank]:
        kill_at(*kills[rank])
    elif any(kills):
        evaluate.time.sleep = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    cli.main(words)


def serve() -> None:
    tell_blocks()
    for line in sys.stdin:
        log, kills, words = json.loads(line)
        children = [forked(partial(process, rank, kills, log, words)) for rank in range(len(kills))]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    serve()

"""Commands of bench in children of one process that has imported what they need (`killed.py`), for tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Of a program: bits depend on the number of threads; it imports bench from here, and modules of the tests.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@contextmanager
def served(log: Path) -> Iterator[Callable[..., list[int]]]:
    """call(["run", …], …, kill="in the first epoch"): the exit status of each command; they run at the same time.

    kill: a key of `killed.KILLS`, or seconds (the status is then −14). What they print is in the file `log`.
    """
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "killed.py"], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip

        def call(*commands: Sequence[str], kill: str | float | None = None) -> list[int]:
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps([kill, str(log), commands]) + "\n")
            server.stdin.flush()
            return [int(server.stdout.readline()) for _ in commands]

        call(["--version"])  # so that no later call waits for what the server imports
        yield call

"""`bench run` on several processes, and killed by SIGKILL at any moment: the rows are those of an undisturbed run."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from served import ENVIRONMENT, ROOT

from bench.results.store import Run, read_runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]  # one server for all

SERVER = Path(__file__).with_name("command_server.py")

#: A kill of one process: at the n-th file that it writes, and whether before, in the middle of or after it.
Kill = tuple[int, str]
#: Exit status, and the blocks that were attacked, of each process.
Bench = Callable[..., tuple[list[int], list[list[int]]]]

WORDS = ["run", "--model", "moe-rt_er", "--suite", "pgd", "--set", "steps=3", "--n-examples", "29"]
WORDS += ["--eps", "0.3", "--batch-size", "10", "--device", "cpu", "--results"]
#: Three blocks of adversarial examples and rows; then the run's own, and its result.
FILES = 2 * 3 + 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """bench("run", …, kills=[None, (2, "in")]): the command on two processes, the second of which is killed."""
    log = tmp_path_factory.mktemp("server") / "log"
    with subprocess.Popen(
        [sys.executable, SERVER],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def call(*words: str | Path, kills: tuple[Kill | None, ...] = (None,)) -> tuple[list[int], list[list[int]]]:
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps([str(log), kills, list(map(str, words))]) + "\n")
            server.stdin.flush()
            statuses = json.loads(server.stdout.readline())
            logs = [Path(f"{log}.{rank}").read_text() for rank in range(len(kills))]
            assert not any("Traceback" in text for text in logs), logs
            return statuses, [[int(number) for number in re.findall("attacked ([0-9]+)", text)] for text in logs]

        yield call


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert bench(*WORDS, folder) == ([0], [[0, 1, 2]])
    (run,) = read_runs(folder)
    assert {path.name for path in run.path.iterdir()} == {"result.json", "verdicts.parquet", "witnesses.safetensors"}
    return run


def same(folder: Path, undisturbed: Run) -> None:
    """That the folder holds one run, and it is the undisturbed one in all but its times."""
    (run,) = read_runs(folder)
    pd.testing.assert_frame_equal(run.verdicts(), undisturbed.verdicts(), check_exact=True)
    times = {"seconds", "finished"}
    assert run.result.model_dump(exclude=times) == undisturbed.result.model_dump(exclude=times)
    witnesses = "witnesses.safetensors"
    assert (run.path / witnesses).read_bytes() == (undisturbed.path / witnesses).read_bytes()


@pytest.mark.parametrize(
    ("file", "how"),
    [(1, "before"), *((n, "in") for n in (1, 2, 5, 7, 8, 9)), (1, "after"), (6, "after"), (9, "after")],
)
def test_a_run_that_was_killed_is_finished_by_the_same_command(
    file: int, how: str, bench: Bench, undisturbed: Run, tmp_path: Path
):
    statuses, (first,) = bench(*WORDS, tmp_path, kills=((file, how),))
    assert statuses == [-9]
    done = (file if how == "after" else file - 1) // 2  # a block is done with its second file
    assert first == list(range(min(file + 1, 6) // 2))
    assert bool(list(tmp_path.rglob("result.json"))) == (file == FILES and how == "after")

    statuses, (second,) = bench(*WORDS, tmp_path)
    assert statuses == [0]
    assert second == list(range(done, 3))
    assert len(first) + len(second) <= 3 + 1
    same(tmp_path, undisturbed)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_rows(processes: int, bench: Bench, undisturbed: Run, tmp_path: Path):
    statuses, attacked = bench(*WORDS, tmp_path, kills=(None,) * processes)
    assert statuses == [0] * processes
    assert sorted(block for own in attacked for block in own) == [0, 1, 2]
    same(tmp_path, undisturbed)


def test_neighbouring_blocks_go_to_different_processes(bench: Bench, tmp_path: Path):
    # images in a folder lie class by class: costly blocks are neighbours
    words = ["70" if word == "29" else word for word in WORDS]
    _, attacked = bench(*words, tmp_path, kills=(None,) * 3)
    assert sorted(map(len, attacked)) == [2, 2, 3]
    assert all(later - earlier == 3 for own in attacked for earlier, later in pairwise(own))


def test_a_process_that_dies_takes_only_its_own_block_along(bench: Bench, undisturbed: Run, tmp_path: Path):
    _, dealt = bench(*WORDS, tmp_path / "whole", kills=(None, None))
    rank = max(range(2), key=lambda rank: len(dealt[rank]))  # it has two blocks, and dies in the second
    folder = tmp_path / "killed"
    statuses, first = bench(*WORDS, folder, kills=tuple((4, "in") if i == rank else None for i in range(2)))
    assert statuses[rank] == -9
    assert first == dealt
    lost = first[rank][1]

    statuses, second = bench(*WORDS, folder, kills=(None,) * 3)
    assert statuses == [0] * 3
    assert [block for own in second for block in own] == [lost]
    same(folder, undisturbed)


def test_torchrun_starts_such_processes(torchrun: Any, undisturbed: Run, tmp_path: Path):
    out, _ = torchrun(2, "-m", "bench", *WORDS, tmp_path, "--json")
    (result,) = json.loads(out)  # of the two, one speaks
    assert result["run"] == undisturbed.result.run
    same(tmp_path, undisturbed)

"""A Ray cluster attacks the blocks: which comes first, and that the rows are those of one process, whoever dies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.cluster import Queue, Task
from bench.results.store import read_runs

#: A suite whose first process to attack block 1 is killed there.
MORTAL = """
import os, signal
from pathlib import Path
import torch
from bench.suites.base import SUITES, Suite

@SUITES.register("mortal")
class Mortal(Suite):
    def attack(self, block):
        marker = Path(os.environ["MORTAL"])
        if block.seed != 0 and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        x_adv = (block.x + 0.2 * torch.randn_like(block.x).sign()).clamp(0, 1)
        yield block.attempt("noise", block.rows, x_adv[block.rows])
"""


def task(model: str, block: int, forwards: float) -> Task:
    return Task(model, 0, block, f"pgd on {model}", forwards)


def test_the_costliest_block_comes_first_by_passes_then_by_seconds():
    cheap, dear = [task("cheap", n, 10) for n in range(2)], [task("dear", n, 100) for n in range(3)]
    queue = Queue([*cheap, *dear])
    assert queue.pop() == dear[0]  # by passes, while nothing was timed
    queue.finished(dear[0], 2.0)  # 0.02 s a pass: a cheap block is expected to take 0.2 s
    assert [queue.expected(cheap[0]), queue.expected(dear[1])] == [pytest.approx(0.2), 2.0]
    assert queue.pop() == dear[1]
    queue.finished(dear[1], 0.1)
    queue.drop(("dear", 0))
    assert [queue.pop(), queue.pop()] == cheap
    assert not queue.tasks


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--on", "slurm"), "--on slurm: there is one engine, ray: write --on ray or --on ray=ADDRESS"),
        (("--on", "ray", "--warm-start"), "--warm-start starts a run from those before it: run it without --on ray"),
    ],
)
def test_what_cannot_be_done_is_refused(words: tuple[str, ...], wanted: str, bench: Callable[..., Any], shelve: Any):
    pytest.importorskip("ray")
    shelve(Path("checkpoints"), "moe-at")
    status, _, err = bench("run", "--suite", "pgd", "--n-examples", "4", "--model", "moe-at", *words)
    assert (status, err.splitlines()[-1]) == (2, f"error: {wanted}")


@pytest.mark.slow
def test_rows_are_those_of_one_process_though_a_worker_is_killed(
    tmp_path: Path, bench: Callable[..., Any], shelve: Any, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bench[ray]'")
    shelve(tmp_path / "checkpoints", "moe-at", "dense-at")
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    marker = tmp_path / "killed"
    monkeypatch.setenv("MORTAL", str(marker))
    words = ("run", "--suite", "mortal,clean", "--n-examples", "12", "--batch-size", "4")
    words += ("--model", "moe-at,dense-at", "--device", "cpu")
    status, _, err = bench("--plugin", "mortal", *words, "--results", "spread", "--on", "ray")
    assert status == 0, err
    assert marker.exists()
    assert err.count("its process died, another one attacks it") == 1
    assert err.count(" blocks: block ") == 12  # 2 models × 2 suites × 3 blocks, none twice
    assert bench("--plugin", "mortal", *words, "--results", "alone")[0] == 0  # nobody is killed any more
    spread, alone = read_runs(tmp_path / "spread"), read_runs(tmp_path / "alone")
    assert [run.result.run for run in spread] == [run.result.run for run in alone]
    for one, other in zip(spread, alone, strict=True):
        pd.testing.assert_frame_equal(one.verdicts(), other.verdicts())
        assert one.result.environment["threads"] == other.result.environment["threads"]

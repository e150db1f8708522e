"""Commands that are killed at random moments, again and again, and then left alone: nothing is lost or half-written.

BENCH_KILLS sets how often each is killed; by default three times. On Ray, whose cluster takes seconds to start, it
is by default once, after three blocks.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from settled import settled

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("served")]  # one server for all


@pytest.fixture(scope="module")
def bench(serve: Callable[..., Any]) -> Callable[..., tuple[int, str]]:
    """bench("run", …, kill=0.3): a command's exit status (−14: killed after so many seconds) and what it printed.

    kill: as `served` takes it; −9 is then the status of what was killed at a point.
    """

    def call(*words: str, kill: str | float | None = None) -> tuple[int, str]:
        (status,), said = serve(words, kill=kill)
        return status, said

    return call


SUBJECT = ["--dataset", "digits", "--model", "moe-standard", "--device", "cpu"]
TINY = ["n_train=200", "n_val=50", "epochs=4", "width=4", "val_steps=1", "inner_steps=1"]
WORDS = {
    "train": ["train", "moe-rt_er", "--device", "cpu", *(word for pair in TINY for word in ("--set", pair))],
    "run": ["run", "--suite", "pgd,components", "--set", "steps=10", "--n-examples", "40", "--batch-size", "8"],
    "certify": ["certify", "--method", "routes", "--n-examples", "60", "--batch-size", "10"],
    "leaderboard": ["leaderboard"],
    "check": ["check", "--format", "json"],
}
WORDS["run on Ray"] = [*WORDS["run"], "--on", "ray"]
KILLS = os.environ.get("BENCH_KILLS")
NO_RAY = "Ray is not installed: pip install 'bench[ray]'"
#: Commands that read results, of which `check` writes nothing but what it prints.
READERS = ("leaderboard", "check")


def command(name: str, folder: Path, results: Path) -> list[str]:
    """The command's words for files below `folder`; a training that left a state is resumed."""
    if name == "train":
        resume = ["--resume"] if list(folder.rglob("*.state*")) else []
        return [*WORDS[name], "--checkpoints", str(folder / "checkpoints"), *resume]
    if name == "leaderboard":
        return [*WORDS[name], "--results", str(results), "--out", str(folder)]
    if name == "check":
        return [*WORDS[name], "--results", str(results), "--baseline", str(results)]
    return [*WORDS[name], *SUBJECT, "--results", str(folder)]


@pytest.mark.parametrize("name", [name for name in WORDS if name != "run on Ray" or KILLS])
def test_what_was_killed_ends_as_the_undisturbed(name: str, bench: Callable[..., Any], tmp_path: Path):
    if name == "run on Ray":
        pytest.importorskip("ray", reason=NO_RAY)
    results = tmp_path / "results"
    if name in READERS:
        assert bench(*command("run", results, results))[0] == 0
        assert bench(*command("certify", results, results))[0] == 0
    read = settled(results)
    started = time.perf_counter()
    status, whole = bench(*command(name, tmp_path / "whole", results))
    assert status == 0, whole
    seconds = time.perf_counter() - started
    killed, draws = 0, random.Random(name)
    while killed < int(KILLS or 3):
        status, said = bench(*command(name, tmp_path / "killed", results), kill=draws.uniform(0.02, seconds))
        assert status in (0, -14), said
        if status:
            killed += 1
        else:  # faster than it was undisturbed, as on a machine that is no longer busy: again, from the beginning
            shutil.rmtree(tmp_path / "killed", ignore_errors=name == "check")
            seconds *= 0.8
    status, said = bench(*command(name, tmp_path / "killed", results))
    assert status == 0, said
    assert settled(tmp_path / "killed") == settled(tmp_path / "whole")
    assert settled(results) == read
    if name == "check":
        assert said == whole


def test_what_was_killed_on_a_cluster_ends_as_one_process_does(bench: Callable[..., Any], tmp_path: Path):
    pytest.importorskip("ray", reason=NO_RAY)
    status, said = bench(*command("run on Ray", tmp_path / "killed", tmp_path), kill="after three tasks")
    assert status == -9, said
    assert len(list((tmp_path / "killed").rglob("block*"))) >= 3
    for folder in ("killed", "whole"):  # blocks are there for any process: another cluster would only take longer
        status, said = bench(*command("run", tmp_path / folder, tmp_path))
        assert status == 0, said
    assert settled(tmp_path / "killed") == settled(tmp_path / "whole")

"""Work on a Ray cluster: which task comes first, and that what is made is what one process makes, whoever dies."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from bench.certify.run import certification_of, certify
from bench.cluster import Blocks, Queue, Task, Trainings, Worker, on_ray
from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.evaluation.plan import RunRequest, plan_on
from bench.registry import CERTIFIERS, SUITES
from bench.results.certificates import read_certificates
from bench.results.store import read_runs
from bench.training.loop import Trainer

#: A suite whose first process to attack block 1 is killed there.
MORTAL = """
import os, signal
from pathlib import Path
import torch
from bench.suites.base import Suite
from bench.registry import SUITES

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

#: The first worker that has written the state of an epoch is killed.
MORTAL_TRAINING = """
import os, signal
from pathlib import Path
from bench.training.loop import Trainer

save, marker = Trainer._save_state, Path(os.environ["MORTAL"])

def save_and_die(trainer):
    save(trainer)
    if not marker.exists():
        marker.write_text(str(trainer.path))
        os.kill(os.getpid(), signal.SIGKILL)

if os.getpid() != int(os.environ["DRIVER"]):
    Trainer._save_state = save_and_die
"""
#: Of a training that takes a second.
TINY = [word for key in ("n_train=200", "n_val=50", "epochs=2", "val_steps=1", "width=4") for word in ("--set", key)]


def task(model: str, block: int, forwards: float) -> Task:
    return Task((model, 0, block), (model, 0), f"block {block} of pgd on {model}", forwards)


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


def test_what_starts_from_another_of_the_same_command_is_not_trained_beside_it(tiny_spec: Any, tmp_path: Path):
    specs = [tiny_spec("dense-at", seed=1), tiny_spec("moe-at", seed=1, init="dense-at")]
    with pytest.raises(UnusableInput, match=r"^'moe-at-s1' starts from 'dense-at-s1', .*: train 'dense-at-s1' first"):
        Trainings(specs, tmp_path, tmp_path, resume=False, restart=False)
    Trainings([specs[0], tiny_spec("moe-at", init="dense-at")], tmp_path, tmp_path, resume=False, restart=False)


@pytest.fixture(autouse=True)
def _plugins_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin of these tests registers or replaces in this process is gone after the test."""
    monkeypatch.setattr(SUITES, "_items", {name: SUITES[name] for name in SUITES})
    monkeypatch.setattr(Trainer, "_save_state", Trainer._save_state)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets workers import what lies in the test's folder; the file by which one knows that another was killed."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'bench[ray]'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MORTAL", str(tmp_path / "killed"))
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    return tmp_path / "killed"


@pytest.mark.slow
def test_a_worker_certifies_single_blocks(bench: Callable[..., Any], shelve: Any):
    shelve(Path("checkpoints"), "moe-at", "moe-standard")
    words = ("certify", "--method", "routes", "--n-examples", "10", "--batch-size", "4", "--model")
    models = ("moe-at", "moe-standard", "missing.safetensors")
    assert bench(*words, ",".join(models[:2]), "--results", "alone")[0] == 0
    digits, certifier = open_dataset("digits"), {"certify-routes": CERTIFIERS["routes"]()}
    request = RunRequest(suites=(), dataset="digits", models=models, n_examples=10, batch_size=4)
    asked = plan_on(digits, certifier, request, Path("data"), [Path("checkpoints")], Path("spread"))
    worker = Worker(Blocks(asked, Path("spread"), certification_of, certify), "cpu", (), torch.get_num_threads())
    tasks = worker.work.tasks()
    assert [(task.what, task.cost) for task in tasks] == [
        ((model, 0, block), cost) for model in models[:2] for block, cost in enumerate([4, 4, 2])
    ]
    for task in tasks:
        assert worker.do(task.what, again=False) > 0
    assert worker.work.tasks() == []
    assert not read_certificates(Path("spread"))  # the result is the command's to write
    assert bench(*words, ",".join(models[:2]), "--results", "spread")[0] == 0
    spread, alone = read_certificates(Path("spread")), read_certificates(Path("alone"))
    for one, other in zip(spread, alone, strict=True):
        pd.testing.assert_frame_equal(one.rows.frame(), other.rows.frame())


@pytest.mark.slow
def test_weights_are_those_of_one_process_though_a_worker_is_killed(
    tmp_path: Path, workers: Path, bench: Callable[..., Any], shelve: Any
):
    (tmp_path / "mortal_training.py").write_text(MORTAL_TRAINING)
    shelve(tmp_path / "spread", "dense-at")  # by another spec, so that this training is refused
    words = ("train", "dense-at,moe-standard", "--seed", "0,1", *TINY, "--device", "cpu")
    words += ("--set", "inner_steps=1")
    status, out, err = bench("--plugin", "mortal_training", *words, "--checkpoints", "spread", "--on", "ray")
    assert (status, err.count("error: ")) == (2, 1), err
    assert "dense-at.safetensors' was made by another spec and is not overwritten" in err
    assert workers.read_text().startswith(str(tmp_path / "spread"))
    assert err.count("its process died, another one does it") == 1
    assert bench(*words, "--checkpoints", "alone")[0] == 0
    names = {path.name for path in (tmp_path / "alone" / "digits" / "Linf").glob("*.safetensors")}
    assert names == {f"{name}.safetensors" for name in ("dense-at", "dense-at-s1", "moe-standard", "moe-standard-s1")}
    assert len(out.splitlines()) == len(names) - 1
    for name in names - {"dense-at.safetensors"}:
        one, other = (load_file(tmp_path / folder / "digits" / "Linf" / name) for folder in ("spread", "alone"))
        assert {key: value.tobytes() for key, value in one.items()} == {
            key: value.tobytes() for key, value in other.items()
        }


@pytest.mark.slow
def test_rows_are_those_of_one_process_though_a_worker_is_killed(
    tmp_path: Path, workers: Path, bench: Callable[..., Any], shelve: Any
):
    shelve(tmp_path / "checkpoints", "moe-at", "dense-at")
    (tmp_path / "mortal.py").write_text(MORTAL)
    words = ("run", "--suite", "mortal,clean", "--n-examples", "12", "--batch-size", "4")
    words += ("--model", "moe-at,dense-at", "--device", "cpu")
    status, _, err = bench("--plugin", "mortal", *words, "--results", "spread", "--on", "ray")
    assert status == 0, err
    assert workers.exists()
    assert err.count("its process died, another one does it") == 1
    assert err.count(" done: block ") == 12  # 2 models × 2 suites × 3 blocks, none twice
    assert bench("--plugin", "mortal", *words, "--results", "alone")[0] == 0  # nobody is killed any more
    spread, alone = read_runs(tmp_path / "spread"), read_runs(tmp_path / "alone")
    assert [run.result.run for run in spread] == [run.result.run for run in alone]
    for one, other in zip(spread, alone, strict=True):
        pd.testing.assert_frame_equal(one.verdicts(), other.verdicts())
        assert one.result.environment["threads"] == other.result.environment["threads"]


@pytest.mark.parametrize(
    ("on", "said", "hint"),
    [
        ("ray", "--on ray: no cluster could be started", ""),
        ("ray=a:1", "--on ray=a:1: no cluster could be reached", "; if it asks for a token, set RAY_AUTH_MODE=token"),
    ],
)
def test_a_cluster_that_does_not_start_is_one_line(on: str, said: str, hint: str, monkeypatch: pytest.MonkeyPatch):
    """Ray raises a plain Exception where a node of this machine is not there in time."""

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=late))
    work: Any = SimpleNamespace(tasks=lambda: [None])
    with pytest.raises(UnusableInput, match=f"^{said}: The current node timed out during startup{hint}$"):
        on_ray(on, work, "cpu", print)

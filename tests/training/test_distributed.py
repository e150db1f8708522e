"""Training on several processes: real ones on the CPU, beside one with as large batches."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served import ENVIRONMENT, ROOT
from torch import Tensor

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.checkpoints import checkpoint_path, load_checkpoint, read_header
from bench.spec import TrainSpec
from bench.training.data import read_training_data
from bench.training.loop import Trainer, train

NONE = Path("nowhere")  # digits needs no data
DIGITS = open_dataset("digits")
Specs = Callable[..., TrainSpec]

pytestmark = pytest.mark.slow

#: Sums are taken in another order, and what rounding changes passes through PGD's signs and a few optimiser steps.
NEAR = {"rtol": 0, "atol": 5e-6}

PROGRAM = Path(__file__).parent / "programs" / "several_processes.py"


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., list[dict[str, list[str]]]]:
    """drive(2, {"a": spec}, "trouble"): run that scenario; the errors of each process, by the job's name."""

    def call(processes: int, specs: dict[str, TrainSpec], scenario: str) -> list[dict[str, list[str]]]:
        jobs = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        words = [sys.executable, PROGRAM, tmp_path, scenario, str(processes)]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return [json.loads((tmp_path / f"errors.{rank}.json").read_text()) for rank in range(processes)]

    return call


def alone(spec: TrainSpec, path: Path, processes: int) -> dict[str, Tensor]:
    """The last weights that one process finds with a batch as large as the given number of processes have together."""
    wide = spec.model_copy(
        update={"recipe": spec.recipe.model_copy(update={"batch_size": processes * spec.recipe.batch_size})}
    )
    run = Trainer(wide, DIGITS, read_training_data(wide, DIGITS, NONE), path, "cpu")
    last: dict[str, Tensor] = {}
    run.train(on_epoch=lambda _: last.update({k: v.clone() for k, v in run.model.state_dict().items()}))
    return last


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **NEAR, msg=lambda text, key=key: f"{key}: {text}")


def table(path: Path) -> list[dict[str, float]]:
    """The metrics file beside a checkpoint, without its times."""
    names, *rows = [line.split(",") for line in path.with_suffix(".csv").read_text().splitlines()]
    times = ("seconds", "data_seconds", "images_per_second")
    return [{k: float(v) for k, v in zip(names, row, strict=True) if k not in times} for row in rows]


def alike(a: Path, b: Path) -> None:
    """That two metrics files say the same, but for their times and for rounding.

    AdvMoE's attack begins where its gradient is next to nothing, so that rounding decides some of its signs.
    """
    rows, others = table(a), table(b)
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=0, abs=2e-4)


# --- the same training ------------------------------------------------------------------------------------------------


def test_two_processes_train_every_kind_of_model_as_one_with_twice_the_batch_does(
    drive: Callable[..., Any], tiny_spec: Specs, tmp_path: Path
):
    augmented: dict[str, Any] = {"norm": "group", "flip": True, "translate": 1}
    specs = {
        # batches of 2 · 32 and one of 27, so 14 and 13
        "dual": tiny_spec("dual-jtdmoe", n_train=91, batch_size=32, **augmented),
        "advmoe": tiny_spec("moe-advmoe", n_train=91, batch_size=32, **augmented),
        # the last batch is one image, which the second process is without
        "dense": tiny_spec("dense-at", n_train=129, batch_size=32, ema_decay=0.9, **augmented),
        # two images a process and four experts: two at least have none, in each step
        "idle": tiny_spec("moe-at", n_train=19, batch_size=2, epochs=1, **augmented),
    }
    drive(2, specs, "every_kind")
    for name, spec in specs.items():
        last = [load_file(tmp_path / f"{name}.{rank}.last") for rank in range(2)]
        assert all(torch.equal(last[0][key], last[1][key]) for key in last[0]), name
        path, one = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-one.safetensors"
        near(last[0], alone(spec, one, 2))
        alike(path, one)
        near(load_checkpoint(path)[0].state_dict(), load_checkpoint(one)[0].state_dict())
        headers = [read_header(path), read_header(one)]
        assert [header.processes for header in headers] == [2, 1]
        assert headers[0].validation == headers[1].validation
        assert headers[0].experts == headers[1].experts
        assert headers[0].train_images == headers[1].train_images


# --- three processes, and what can go wrong ---------------------------------------------------------------------------


class Stop(Exception):
    """What a test stops a training by."""


def test_three_processes_agree_and_stop_together(drive: Callable[..., Any], tiny_spec: Specs, tmp_path: Path):
    specs = {
        # batches of 3 · 4 and one of two images, so that one process has none
        "remainder": tiny_spec("moe-standard", n_train=38, batch_size=4, norm="group"),
        "batch-norm": tiny_spec("moe-standard", n_train=60, batch_size=8),
        "failing": tiny_spec("moe-rt_er", n_train=60, batch_size=10),
        "resumed": tiny_spec("moe-at", n_train=60),
    }
    paths = {name: tmp_path / f"{name}.safetensors" for name in specs}

    def stop(_: Any) -> None:
        raise Stop

    resumed = Trainer(
        specs["resumed"], DIGITS, read_training_data(specs["resumed"], DIGITS, NONE), paths["resumed"], "cpu"
    )
    with pytest.raises(Stop):
        resumed.train(on_epoch=stop)
    for part in ("moe-standard", "moe-rt_er"):
        train(tiny_spec(part, epochs=1), NONE, tmp_path / "parts", "cpu")

    errors = drive(3, specs, "trouble")
    assert errors[0] == errors[1] == errors[2]
    last = {name: [load_file(tmp_path / f"{name}.{r}.last") for r in range(3)] for name in ("remainder", "batch-norm")}
    one = tmp_path / "one.safetensors"
    near(last["remainder"][0], alone(specs["remainder"], one, 3))
    alike(paths["remainder"], one)

    # statistics of a process's own batches: at the end all have those of the first
    buffers = [key for key in last["batch-norm"][0] if "running" in key or "tracked" in key]
    assert buffers
    for name, (first, *others) in last.items():
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first), name

    # what one process raises stops all of them, in the step where it is, and the best epoch so far is kept
    stopped = paths["failing"].with_suffix(".stopped.safetensors")
    kept = f"the best epoch so far is kept at '{stopped}'"
    assert errors[0]["failing"] == ["TrainingFailed", f"planted at epoch 2, step 2: lower lr; {kept}"]
    assert read_header(stopped).epochs == 1
    assert read_header(stopped).processes == 3
    assert not paths["failing"].exists()

    # nor does one process go on with what three have begun, or three with one's
    kind, message = errors[0]["resumed"]
    assert kind == "UnusableInput"
    other = "belongs to another spec, other data or another number of processes: "
    assert message.startswith(f"'{paths['resumed'].with_suffix('.state.pt')}' {other}")
    assert "\n" not in message
    spec = specs["failing"]
    with pytest.raises(UnusableInput, match=other):
        Trainer(spec, DIGITS, read_training_data(spec, DIGITS, NONE), paths["failing"], "cpu").train(resume=True)

    assert errors[0]["dual"] == 0


def test_two_machines_of_the_command_train_as_one_process_with_twice_the_batch(tmp_path: Path):
    # 151 images are a batch of 2 · 60 and one of 31, of which the processes have 16 and 15
    settings = ["norm=group", "n_train=151", "n_val=60", "epochs=2", "width=4", "inner_steps=2", "val_steps=1"]
    settings += ["flip=true", "translate=1", "batch_size=60"]
    words = ["train", "moe-rt_er", "--dataset", "digits", "--device", "cpu", "--checkpoints", tmp_path / "two"]
    words += [word for setting in settings for word in ("--set", setting)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # what torchrun sets on each of two machines with one process; that it starts such processes has a test of its own
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "bench", *words],
            cwd=ROOT,
            env=ENVIRONMENT | world | {"RANK": str(rank), "GROUP_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [machine.communicate(timeout=600) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], errors
    two = checkpoint_path(tmp_path / "two", "digits", "Linf", "moe-rt_er")
    assert errors[1][0] == ""  # the first process alone reports
    assert errors[0][0].startswith(f"{two}: SA ")
    assert errors[0][0].count("\n") == 1

    spec = TrainSpec.model_validate(read_header(two).training)
    wide = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"batch_size": 120})})
    one = train(wide, NONE, tmp_path / "one", "cpu")
    near(load_checkpoint(two)[0].state_dict(), load_checkpoint(one)[0].state_dict())
    alike(two, one)
    assert [read_header(path).processes for path in (two, one)] == [2, 1]

    # the same spec in one process is another training
    with pytest.raises(UnusableInput, match=f"^'{two}' was made by another number of processes and is not overwrit"):
        train(spec, NONE, tmp_path / "two", "cpu")

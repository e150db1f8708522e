"""A training that is killed, by SIGKILL and at the worst moments, and the same command with --resume."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served import ENVIRONMENT, ROOT

from bench.models.checkpoints import checkpoint_path, read_header

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("served")]  # one server for all

Bench = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def bench(serve: Callable[..., Any]) -> Bench:
    """bench("train", …, kill="in the first epoch"): a command's exit status and what it printed."""

    def call(*words: str, kill: str | None = None) -> tuple[int, str]:
        (status,), said = serve(words, kill=kill)
        return status, said

    return call


#: The settings of each variant's training.
SETTINGS = {
    "moe-rt_er": ["inner_steps=1", "flip=true", "translate=1"],
    "dual-jtdmoe": ["inner_steps=1", "precision=bf16-mixed", "channels_last=true"],
    "moe-advmoe": ["inner_steps=1", "optimizer=adam", "lr=0.01", "schedule=cosine"],
}


def command(variant: str, folder: Path) -> list[str]:
    settings = ["n_train=200", "n_val=50", "epochs=3", "width=4", "val_steps=1", *SETTINGS[variant]]
    where = ["--dataset", "digits", "--device", "cpu", "--checkpoints", str(folder)]
    return ["train", variant, *where, *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """undisturbed("moe-rt_er"): the checkpoint of a training that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def train(variant: str) -> Path:
        path = checkpoint_path(folder, "digits", "Linf", variant)
        if not path.is_file():
            status, message = bench(*command(variant, folder))
            assert status == 0, message
        return path

    return train


def rows(path: Path) -> list[list[str]]:
    """The metrics file beside a checkpoint, without its times, which are the last three columns."""
    lines = [line.split(",") for line in path.with_suffix(".csv").read_text().splitlines()]
    assert lines[0][-3:] == ["seconds", "data_seconds", "images_per_second"]
    return [line[:-3] for line in lines]


def same(path: Path, whole: Path) -> None:
    """That two trainings have ended with the same bits, and have left no state."""
    tensors, others = load_file(path), load_file(whole)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert rows(path) == rows(whole)
    header, other = read_header(path), read_header(whole)
    assert (header.validation, header.experts, header.epochs) == (other.validation, other.experts, other.epochs)
    assert not list(path.parent.glob("*.pt"))


#: What lies there after a kill (a dot for a file that was being written), and the first epoch that follows.
LEFT = {
    "in the first epoch": ([], 1),
    "in the last epoch": ([".csv", ".state-before.pt", ".state.pt"], 3),
    "between two states": ([".csv", ".state-before.pt"], 2),
    "in the middle of a state": ([".", ".csv", ".state-before.pt"], 2),
    "after the last state": ([".csv", ".state-before.pt", ".state.pt"], None),
    "in the middle of the checkpoint": ([".", ".csv", ".state-before.pt", ".state.pt"], None),
}


@pytest.mark.parametrize(
    ("variant", "kill"),
    [
        *(("moe-rt_er", kill) for kill in LEFT if kill != "in the last epoch"),
        *((variant, "between two states") for variant in ("dual-jtdmoe", "moe-advmoe")),
    ],
)
def test_a_training_that_was_killed_ends_bit_by_bit_as_the_undisturbed_one(
    variant: str, kill: str, bench: Bench, undisturbed: Callable[[str], Path], tmp_path: Path
):
    assert bench(*command(variant, tmp_path), kill=kill)[0] == -9
    path = checkpoint_path(tmp_path, "digits", "Linf", variant)
    left, epoch = LEFT[kill]
    files = [file.name for file in path.parent.glob("*")]
    assert sorted("." if name.startswith(".") else name.removeprefix(variant) for name in files) == left

    status, message = bench(*command(variant, tmp_path), "--resume")
    assert status == 0, message
    done = [int(line.split()[2].split("/")[0]) for line in message.splitlines() if line.startswith(f"{variant} epoch ")]
    assert done == ([] if epoch is None else list(range(epoch, 4)))
    same(path, undisturbed(variant))


def test_a_killed_training_is_refused_until_it_is_resumed_or_restarted(
    bench: Bench, undisturbed: Callable[[str], Path], tmp_path: Path
):
    assert bench(*command("moe-rt_er", tmp_path), kill="in the last epoch")[0] == -9
    path = checkpoint_path(tmp_path, "digits", "Linf", "moe-rt_er")
    before = path.with_suffix(".state.pt").read_bytes()
    status, message = bench(*command("moe-rt_er", tmp_path))
    (line,) = [line for line in message.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert "--resume" in line
    assert "--restart" in line
    assert path.with_suffix(".state.pt").read_bytes() == before
    shutil.copytree(tmp_path, tmp_path / "copy")
    status, message = bench(*command("moe-rt_er", tmp_path / "copy"), "--restart")
    assert status == 0, message
    assert "epoch 1/3" in message
    same(checkpoint_path(tmp_path / "copy", "digits", "Linf", "moe-rt_er"), undisturbed("moe-rt_er"))
    words = [sys.executable, "-m", "bench", *command("moe-rt_er", tmp_path), "--resume"]  # by a process of its own
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: SA ")
    assert done.stderr.count("epoch 3/3") == 1
    same(path, undisturbed("moe-rt_er"))

"""A training that is killed, by SIGKILL and at the worst moments, and the same command with --resume."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file

from bench.models.checkpoints import checkpoint_path, read_header

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # bits depend on the number of threads

pytestmark = pytest.mark.slow

#: Runs commands in children of a process that has imported what they need, which takes longer than the trainings.
#: Three epochs of two steps; each entry of KILLS sets a command up to be killed at one point.
SERVER = """
    import json, os, signal, sys
    import sklearn.datasets
    from bench import cli, progress
    from bench.training import loop as training

    ENDINGS = {"state": ".state.pt", "checkpoint": ".safetensors"}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def at_step(*where):
        progress.TrainingProgress.on_step = lambda self, *step: die() if step[:2] == where else None

    def writing(kind, number, how):
        # at the number-th file of that kind
        module, name = {"state": (training, "write_atomically"), "checkpoint": (training, "save_checkpoint")}[kind]
        write, calls = getattr(module, name), []

        def killing(path, *content):
            calls.append(path.name) if path.name.endswith(ENDINGS[kind]) else None
            now = path.name.endswith(ENDINGS[kind]) and len(calls) == number
            if now and how == "before":
                die()
            if now and how == "half":
                os.fsync = lambda file: (os.ftruncate(file, os.fstat(file).st_size // 2), die())
            write(path, *content)
            if now:
                die()

        setattr(module, name, killing)

    KILLS = {
        None: lambda: None,
        "in the first epoch": lambda: at_step(0, 1),
        "in the last epoch": lambda: at_step(2, 1),
        "between two states": lambda: writing("state", 2, "before"),
        "in the middle of a state": lambda: writing("state", 2, "half"),
        "after the last state": lambda: writing("state", 3, "after"),
        "in the middle of the checkpoint": lambda: writing("checkpoint", 1, "half"),
    }

    for line in sys.stdin:
        kill, log, words = json.loads(line)
        child = os.fork()
        if not child:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            KILLS[kill]()
            cli.main(words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Bench = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """bench("train", …, kill="in the first epoch"): a command's exit status and what it printed."""
    log = tmp_path_factory.mktemp("server") / "log"
    words = [sys.executable, "-c", dedent(SERVER)]
    with subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def call(*words: str, kill: str | None = None) -> tuple[int, str]:
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps([kill, str(log), words]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, log.read_text()

        yield call


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
            status, said = bench(*command(variant, folder))
            assert status == 0, said
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
        *(("moe-rt_er", kill) for kill in LEFT),
        *((variant, kill) for variant in ("dual-jtdmoe", "moe-advmoe") for kill in list(LEFT)[1:3]),
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

    status, said = bench(*command(variant, tmp_path), "--resume")
    assert status == 0, said
    done = [int(line.split()[1].split("/")[0]) for line in said.splitlines() if line.startswith("epoch ")]
    assert done == ([] if epoch is None else list(range(epoch, 4)))
    same(path, undisturbed(variant))


def test_a_command_of_its_own_resumes_too(bench: Bench, undisturbed: Callable[[str], Path], tmp_path: Path):
    assert bench(*command("moe-rt_er", tmp_path), kill="in the last epoch")[0] == -9
    words = [sys.executable, "-m", "bench", *command("moe-rt_er", tmp_path), "--resume"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path = checkpoint_path(tmp_path, "digits", "Linf", "moe-rt_er")
    assert done.stdout.startswith(f"{path}: SA ")
    same(path, undisturbed("moe-rt_er"))

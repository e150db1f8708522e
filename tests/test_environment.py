"""Devices by name, versions, and the commit of the code."""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import environment
from bench.environment import PACKAGES, World, git_hash, torch_device, versions
from bench.errors import UnusableInput


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "word", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_a_device_by_its_name(monkeypatch: pytest.MonkeyPatch, gpus: int, word: str, device: str):
    set_gpus(monkeypatch, gpus)
    assert torch_device(word) == device
    torch.device(torch_device(word))


@pytest.mark.parametrize(("gpus", "word"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, gpus: int, word: str):
    set_gpus(monkeypatch, gpus)
    with pytest.raises(
        UnusableInput, match=f"^device '{word}' is not there: torch sees {gpus} CUDA devices, take cpu$"
    ):
        torch_device(word)


@pytest.mark.parametrize("word", ["gpu", "", "CPU", "cpu:0", "auto:1", "cuda:x", "cuda:²", "cuda:-1", "cuda:0:1"])
def test_a_device_that_is_none(monkeypatch: pytest.MonkeyPatch, word: str):
    set_gpus(monkeypatch, 2)
    with pytest.raises(UnusableInput, match=f"^unknown device '{word}': there are auto, cpu, cuda"):
        torch_device(word)


PROCESSES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """variables(RANK="1", …): these, and no other, say which of several processes this is."""

    def put(**values: str) -> None:
        for name in PROCESSES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "world"),
    [
        ({}, (0, 1, 1, 0)),
        ({"WORLD_SIZE": "", "RANK": ""}, (0, 1, 1, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}, (0, 1, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (3, 4, 2, 1)),
    ],
)
def test_which_of_several_processes_this_is(values: dict[str, str], world: tuple[int, ...], variables: Any):
    variables(**values)
    assert World.here() == world


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but RANK is not set: start the command with `torchrun --nproc-per-node 2",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two' is no whole number from 1 on: unset it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0' is no whole number from 1 on"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK '-1' is no whole number from 0 on"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE 'x' is no whole number"),
    ],
)
def test_variables_that_cannot_be_are_named(values: dict[str, str], expected: str, variables: Any):
    variables(**values)
    with pytest.raises(UnusableInput) as refused:
        World.here()
    assert str(refused.value).startswith(expected)


def test_one_training_process_is_one_in_an_interactive_slurm_shell(variables: Any):
    from bench.training.loop import _fabric

    slurm = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "4", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    variables(**{f"SLURM_{name}": value for name, value in slurm.items()}, SLURM_NODELIST="here", SLURM_NNODES="1")
    assert _fabric("cpu", "32", routed=False).world_size == 1


def test_versions_of_what_decides_a_verdict(monkeypatch: pytest.MonkeyPatch):
    found = versions()
    assert list(found) == ["python", *PACKAGES]
    assert (found["python"], found["torch"]) == (platform.python_version(), version("torch"))
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "surely-not-installed"))
    assert versions()["surely-not-installed"] == "missing"


def test_the_environment_is_text():
    found = environment.environment("cpu", 4)
    assert (found["device"], found["threads"]) == ("cpu", "4")
    assert set(versions()) < set(found)
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the code's layout that the commit is asked of."""
    for folder in ("bench", "models", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "bench" / "environment.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "bench" / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git_hash.cache_clear()
    yield tmp_path
    git_hash.cache_clear()


def commit(folder: Path) -> str:
    def git(*words: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *name, *words], cwd=folder, capture_output=True, text=True, check=True).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    return git("rev-parse", "HEAD").strip()


def test_outside_a_checkout_there_is_no_commit(checkout: Path):
    assert git_hash() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_what_is_installed_inside_a_checkout_of_something_else_has_no_commit(checkout: Path):
    (checkout / ".gitignore").write_text("bench\n")
    commit(checkout)
    assert git_hash() is None


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        (None, ""),
        ("results/file", ""),
        ("bench/file", "-dirty"),
        ("models/new", "-dirty"),
        ("models/zoo/weights", ""),
        ("pyproject.toml", "-dirty"),
    ],
)
def test_the_commit_says_whether_the_code_differs_from_it(checkout: Path, changed: str | None, dirty: str):
    head = commit(checkout)
    if changed is not None:
        (checkout / changed).parent.mkdir(exist_ok=True)
        (checkout / changed).write_text("2")
    assert git_hash() == head + dirty

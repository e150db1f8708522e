"""Devices by name, versions, and the commit of the code."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from bench import environment
from bench.environment import PACKAGES, git_hash, torch_device, versions
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


@pytest.mark.parametrize("word", ["gpu", "", "CPU", "cpu:0", "auto:1", "cuda:x", "cuda:-1", "cuda:0:1"])
def test_a_device_that_is_none(monkeypatch: pytest.MonkeyPatch, word: str):
    set_gpus(monkeypatch, 2)
    with pytest.raises(UnusableInput, match=f"^unknown device '{word}': there are auto, cpu, cuda"):
        torch_device(word)


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
@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        (None, ""),
        ("results/file", ""),
        ("bench/file", "-dirty"),
        ("models/new", "-dirty"),
        ("pyproject.toml", "-dirty"),
    ],
)
def test_the_commit_says_whether_the_code_differs_from_it(checkout: Path, changed: str | None, dirty: str):
    head = commit(checkout)
    if changed is not None:
        (checkout / changed).write_text("2")
    assert git_hash() == head + dirty

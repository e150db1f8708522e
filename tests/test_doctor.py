"""What the machine has of what bench needs."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.doctor import examine


def found(data_root: Path, *checkpoints: Path) -> dict[str, tuple[str, bool]]:
    return {what: (text, fine) for what, text, fine in examine(data_root, checkpoints)}


def test_versions_devices_imports_data_and_models_are_told(tmp_path: Path, shelve: Any):
    shelve(tmp_path, "moe-at")
    told = found(tmp_path, tmp_path)
    assert told["bench"] == (bench.__version__, True)
    for package in ("torch", "torchattacks", "pyautoattack", "robustbench"):
        assert told[package] == (version(package), True)
    assert told["import autoattack"] == told["import robustbench"] == ("works, mended by bench.compat", True)
    assert "CUDA devices" in told
    assert told["data: digits"] == ("500 test images", True)
    missing, fine = told["data: cifar10"]
    assert (str(tmp_path) in missing, fine) == (True, True)  # nobody has to have it
    assert told["models: digits"] == ("moe-at", True)
    assert told["models: cifar10"] == ("none", True)
    assert "data: imagefolder" not in told


@pytest.mark.parametrize("module", ["robustbench", "autoattack", "bench.compat"])
def test_a_suite_that_does_not_import_is_told(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import bench.compat  # noqa: F401

    monkeypatch.setitem(sys.modules, module, None)
    told = found(tmp_path)
    text, fine = told["import autoattack" if module == "autoattack" else "import robustbench"]
    assert not fine
    assert module in text


def test_partial_copies_are_told(data_root: Path):
    text, fine = found(data_root)["data: tinyimagenet"]
    assert fine
    assert "a partial copy" in text

"""What is built from the repository, and how it lives beside a user's own `models`."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # which is built once

SHIPPED = sorted(path.relative_to(ROOT) for path in (ROOT / "models" / "zoo").rglob("*.safetensors"))
_LEFT_OUT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["exclude-package-data"]
LEFT_OUT = sorted(path for path in SHIPPED if any(path.match(glob) for glob in _LEFT_OUT["bench.models"]))
WEIGHTS = sorted(set(SHIPPED) - set(LEFT_OUT))
CODE = sorted(path.relative_to(ROOT) for path in [*(ROOT / "models").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
#: A user's network; its package or module is called `models`, as ours is in the repository.
OWN = """
from torch import nn

class MyNet(nn.Sequential):
    pass

def build():
    return MyNet(nn.Flatten(), nn.Linear(64, 10))
"""


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed, with no PYTHONPATH but the one that is named."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, since setuptools writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("bench", "models"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    run(sys.executable, "-c", code, cwd=copy)
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and nothing else, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    words = ("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", *words, cwd=folder)
    return folder


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def installed(path: Path) -> str:
    """Where a file of the repository lies in a distribution: `models/moe.py` is `bench/models/moe.py`."""
    return str(Path("bench") / path if path.parts[0] == "models" else path)


def test_the_wheel_has_code_and_weights_in_a_bare_environment(bare: Path, tmp_path: Path):
    assert WEIGHTS
    assert LEFT_OUT
    assert not [path for path in LEFT_OUT if (site_packages(bare) / installed(path)).exists()]
    for path in CODE + WEIGHTS:
        there = site_packages(bare) / installed(path)
        assert there.is_file(), path
        assert not there.is_symlink(), path
        assert sha256(there.read_bytes()) == sha256((ROOT / path).read_bytes())
    recipes = {path.name for path in (ROOT / "bench/training/recipes").glob("*.yaml")}
    assert recipes == {path.name for path in (site_packages(bare) / "bench/training/recipes").glob("*.yaml")}
    for name in ("page.html", "parts.html", "page.css", "page.js"):
        assert (site_packages(bare) / "bench/report" / name).is_file()
    assert {path.name for path in site_packages(bare).iterdir()} & {"models", "tests", "benchmarks"} == set()
    code = "import bench, sys; print(bench.__version__, 'torch' in sys.modules, bench.__file__)"
    version, torch, file = run(bare / "bin/python", "-c", code, cwd=tmp_path).stdout.split()
    assert (torch, Path(file)) == ("False", site_packages(bare) / "bench/__init__.py")
    assert (bare / "bin/bench").is_file()
    assert (site_packages(bare) / f"bench-{version}.dist-info").is_dir()


def test_the_sdist_holds_what_the_wheel_does(wheel: Path):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {str(Path(*Path(member.name).parts[1:])): member for member in archive.getmembers()}
    assert wheel.stat().st_size < 20_000_000
    with zipfile.ZipFile(wheel) as archive:
        packed = [name for name in archive.namelist() if name.startswith("bench/")]
    assert {installed(path) for path in CODE + WEIGHTS} <= set(packed)
    for name in packed:
        assert members[name].isfile(), name  # no link, which would point at nothing


@pytest.fixture
def command(bare: Path) -> dict[str, tuple[str, ...]]:
    """The two ways to call the command line, with this interpreter's libraries and the wheel's code."""
    script = "import sys; from bench.cli import main; sys.path.pop(0); main()"  # as the script `bench` has it
    return {"bench": (sys.executable, "-c", script), "python -m bench": (sys.executable, "-m", "bench")}


def write_own(folder: Path, kind: str) -> str:
    """A user's own `models` in the folder, and what `--model` calls it."""
    if kind == "package":
        (folder / "models").mkdir()
        (folder / "models" / "__init__.py").touch()
        (folder / "models" / "mymoe.py").write_text(OWN)
        return "models.mymoe:build"
    (folder / "models.py").write_text(OWN)
    return "models:build"


@pytest.mark.parametrize(("kind", "spoken"), [("package", "python -m bench"), ("module", "bench")])
def test_beside_a_users_own_models(
    kind: str, spoken: str, command: dict[str, tuple[str, ...]], bare: Path, tmp_path: Path
):
    word, path = write_own(tmp_path, kind), str(site_packages(bare))
    options = ("--suite", "clean", "--n-examples", "20", "--model", f"{word},dense-at", "--json")
    own, ours = json.loads(run(*command[spoken], "run", *options, cwd=tmp_path, PYTHONPATH=path).stdout)
    assert (own["model_info"]["name"], own["model_info"]["architecture"]) == (word, "MyNet")
    assert (ours["model_info"]["name"], ours["model_info"]["architecture"]) == ("dense-at", "small_cnn")
    code = f"""
import bench, {word.partition(":")[0]}, models
from bench import load_model
from bench.models.base import Classifier
assert isinstance(load_model("dense-at"), Classifier)
print(bench.__file__, models.__file__)
"""
    ours_file, own_file = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path).stdout.split()
    assert Path(ours_file).is_relative_to(bare)
    assert Path(own_file).is_relative_to(tmp_path)


def test_a_models_file_that_fails_is_not_imported(command: dict[str, tuple[str, ...]], bare: Path, tmp_path: Path):
    (tmp_path / "models.py").write_text("raise RuntimeError('imported')\n")
    path = str(site_packages(bare))
    for words in command.values():
        assert "dual" in run(*words, "list", "variants", cwd=tmp_path, PYTHONPATH=path).stdout
    options = ("--suite", "clean", "--n-examples", "20", "--model", "dense-at", "--json")
    (result,) = json.loads(run(*command["python -m bench"], "run", *options, cwd=tmp_path, PYTHONPATH=path).stdout)
    assert result["spec"]["n_examples"] == 20

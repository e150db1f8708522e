"""The example plugin of docs/, installed as a package: all that it adds is found, trained, attacked and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("plugin")]  # which is installed once

EXAMPLE = ROOT / "docs" / "example-plugin"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path that holds the installed plugin."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in EXAMPLE.rglob("*"):
        if path.suffix in (".py", ".toml", ".yaml"):
            (source / path.relative_to(EXAMPLE)).parent.mkdir(exist_ok=True)
            (source / path.relative_to(EXAMPLE)).write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True)
    return target


def call(*words: str, cwd: Path, paths: list[Path], code: int = 0) -> subprocess.CompletedProcess[str]:
    return python("-m", "bench", *words, cwd=cwd, paths=paths, code=code)


def python(*words: str, cwd: Path, paths: list[Path], code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_what_an_installed_plugin_adds_is_there_by_name(plugin: Path, tmp_path: Path):
    added = {"suites": "noise", "datasets": "corners", "objectives": "smooth", "recipes": "corners"}
    added["variants"] = "moe-smooth"
    assert added["variants"] in call("list", "variants", cwd=tmp_path, paths=[plugin]).stdout.splitlines()
    code = f"from bench.catalogue import names; print([name in names(what) for what, name in {added}.items()])"
    for paths, there in (([plugin], True), ([], False)):
        assert python("-c", code, cwd=tmp_path, paths=paths).stdout == f"{[there] * 5}\n"


def test_a_plugins_variant_is_trained_attacked_and_named_with_its_origin(plugin: Path, tmp_path: Path):
    call("train", "moe-smooth", "--dataset", "corners", cwd=tmp_path, paths=[plugin])
    options = ("--dataset", "corners", "--suite", "clean,noise", "--set", "draws=3", "--json")
    clean, noise = json.loads(call("run", *options, cwd=tmp_path, paths=[plugin]).stdout)
    assert clean["clean_accuracy"]["value"] > 0.5
    assert noise["robust_accuracy"]["value"] <= clean["clean_accuracy"]["value"]
    assert noise["flags"] == ["weaker than the default: draws=3 (default 10)"]
    info = noise["model_info"]
    assert (info["name"], info["objective"], info["architecture"]) == ("moe-smooth", "smooth", "linear")
    assert info["trained"].endswith(", a variant of bench-example")


def test_a_module_is_loaded_by_name_without_being_installed(tmp_path: Path):
    words = ("--plugin", "bench_example.suites", "--plugin", "bench_example.variants")
    assert "moe-smooth" in call(*words, "list", "variants", cwd=EXAMPLE, paths=[]).stdout.splitlines()
    refused = call("--plugin", "bench_example.gone", "list", "suites", cwd=EXAMPLE, paths=[], code=2)
    assert refused.stderr.startswith(
        "error: plugin 'bench_example.gone' (bench_example) cannot be loaded: ModuleNotFound"
    )
    (tmp_path / "twice.py").write_text(
        "from bench.models.variants import VARIANTS\nVARIANTS.register('dual')(VARIANTS['moe-at'])\n"
    )
    refused = call("--plugin", "twice", "list", "variants", cwd=tmp_path, paths=[], code=2)
    assert "plugin 'twice' (twice) cannot be loaded: ValueError: variant 'dual' is registered twice" in refused.stderr
    assert "Traceback" not in refused.stderr

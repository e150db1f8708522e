"""The regression check of our own CI: the shipped models pass, and a copy that was made weaker fails."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.models.checkpoints import ZOO, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """The words of `bench` in tox.ini's environment `regression`, for results in the test's own folder."""
    section = (ROOT / "tox.ini").read_text().partition("[testenv:regression]")[2].partition("\n[")[0]
    found = re.findall(r"^ +bench (.+)$", section, re.MULTILINE)
    places = {"{env_tmp_dir}{/}": f"{tmp_path}/", ".ci/baseline": f"{ROOT}/.ci/baseline"}
    for name, place in places.items():
        found = [words.replace(name, place) for words in found]
    return [words.split() for words in found]


@pytest.mark.slow
def test_the_shipped_models_pass(commands: list[list[str]], bench: Bench):
    run, check = commands
    assert bench(*run)[0] == 0
    status, out, _ = bench(*check)
    assert status == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense-at", "moe-rt_er"])
def test_a_copy_that_was_made_weaker_fails(name: str, commands: list[list[str]], bench: Bench, tmp_path: Path):
    """By noise of a quarter of their spread on its weights."""
    shutil.copytree(ZOO, tmp_path / "zoo")
    path = tmp_path / "zoo" / "digits" / "Linf" / f"{name}.safetensors"
    model, header, _ = load_checkpoint(path)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.25 * parameter.std() * torch.randn_like(parameter)
    save_checkpoint(path, model, header)
    run, check = commands
    assert bench(*run, "--checkpoints", str(tmp_path / "zoo"))[0] == 0
    status, out, _ = bench(*check)
    assert status == 1, out
    assert any("REGRESSION" in line and name in line for line in out.splitlines()), out

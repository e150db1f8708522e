"""The regression check of our own CI: the shipped models pass, and a copy that was made weaker fails."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.boards.check import check as compare
from bench.models.checkpoints import ZOO, load_checkpoint, save_checkpoint
from bench.results.schema import Result
from bench.results.store import RunFolder, read_runs, run_folder

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


@pytest.mark.slow
def test_twenty_reruns_with_other_attack_seeds_never_fail(bench: Bench, tmp_path: Path):
    """Each is held up to the run of seed 0 as if it had that seed, since the check compares equal seeds alone."""

    def run(seed: int) -> Path:
        found = tmp_path / f"found-{seed}"
        words = ("--suite", "pgd", "--set", "steps=10", "--model", "moe-rt_er", "--n-examples", "50")
        assert bench("run", *words, "--seed", str(seed), "--device", "cpu", "--results", str(found))[0] == 0
        (one,) = read_runs(found)
        spec, known = one.result.spec.model_copy(update={"seed": 0}), one.result
        provenance = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": "2030-01-01"}
        result = Result.from_rows(spec, known.model_info, known.fingerprint, one.verdicts(), **provenance)
        root = tmp_path / f"seed-{seed}"
        RunFolder(run_folder(root, spec, result.run)).finish(result, one.verdicts())
        return root

    baseline = run(0)
    reports = [compare(baseline, run(seed)) for seed in range(1, 21)]
    assert not any(report.failed for report in reports)
    assert any(row.lost + row.gained for report in reports for row in report.rows)  # they are other attacks

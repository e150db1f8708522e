"""What is mended of the installed suites: robustbench imports, and its calls of autoattack work."""

import sys
import warnings
from pathlib import Path
from typing import Any

import jinja2
import pyautoattack
import pytest
import torch

import bench.compat
from bench.errors import UnusableInput
from bench.spec import ThreatModel


def test_robustbench_imports_and_uses_the_adapters():
    import autoattack
    import robustbench.eval

    assert autoattack.AutoAttack is robustbench.eval.AutoAttack is bench.compat.AutoAttack
    assert robustbench.eval.EvaluationState is bench.compat.EvaluationState
    assert sys.modules["autoattack.state"].EvaluationState is bench.compat.EvaluationState
    assert callable(robustbench.load_model)


def test_an_installed_autoattack_is_not_replaced(monkeypatch: pytest.MonkeyPatch):
    own = object()
    monkeypatch.setitem(sys.modules, "autoattack", own)
    bench.compat._install()
    assert sys.modules["autoattack"] is own


def test_nothing_is_warned_of_or_filtered_for_good():
    before = list(warnings.filters)
    bench.compat._install()
    assert warnings.filters == before


def test_autoattack_takes_the_old_signature(planted: Any):
    data, model = planted.data(), planted.broken()
    old = bench.compat.AutoAttack(model, norm="Linf", eps=0.02, version="standard", log_path=None, device="cpu", seed=1)
    old.attacks_to_run = ["apgd-ce"]
    x_adv = old.run_standard_evaluation(data.x, data.y, bs=24)
    new = pyautoattack.AutoAttack(model, norm="Linf", eps=0.02, seed=1)
    new.attacks_to_run = ["apgd-ce"]
    expected, _ = new.run_standard_evaluation(data.x, data.y, batch_size=24)
    assert torch.equal(x_adv, expected)
    assert not torch.equal(x_adv, data.x)


def test_log_file_is_refused(planted: Any):
    with pytest.raises(UnusableInput, match=r"log_path 'log\.txt'"):
        bench.compat.AutoAttack(planted.broken(), log_path="log.txt")


def test_flags_of_a_state_have_a_mean(tmp_path: Path):
    state = pyautoattack.state.EvaluationState({"apgd-ce"}, path=tmp_path / "state.json")
    state.robust_flags = torch.tensor([True, False, True, True])
    read = bench.compat.EvaluationState.from_disk(tmp_path / "state.json")
    assert read.robust_flags is not None
    assert read.robust_flags.mean().item() == 0.75
    assert bench.compat.EvaluationState({"apgd-ce"}).robust_flags is None


@pytest.mark.parametrize("state", [False, True])
def test_robustbench_benchmarks_a_model(
    state: bool, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import robustbench.eval

    data = planted.data()
    monkeypatch.setattr(robustbench.eval, "load_clean_dataset", lambda *_: (data.x, data.y))
    clean, robust = robustbench.eval.benchmark(
        planted.broken(),
        n_examples=24,
        eps=0.2,
        batch_size=24,
        aa_state_path=tmp_path / "state.json" if state else None,
    )
    assert (clean, robust) == (pytest.approx(23 / 24), 0)
    assert "Clean accuracy: 95.83%" in capsys.readouterr().out


def test_benchmark_is_robustbenchs_on_our_images_with_our_seed(
    planted: Any, cut_autoattack: Any, capfd: pytest.CaptureFixture[str]
):
    import robustbench.data
    import robustbench.eval

    data, model = planted.data(), planted.broken()
    loaders = dict(robustbench.data._clean_dataset_loaders)
    threat = ThreatModel(norm="Linf", eps=0.02)  # the margin, but for the noise: some examples withstand
    cut_autoattack(2, 2, 50)
    found = {seed: bench.compat.benchmark(model, data.x, data.y, "imagenet", threat, seed) for seed in (1, 2)}
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=0.02, seed=1)
    x_adv, y_adv = attack.run_standard_evaluation(data.x, data.y, batch_size=24)
    assert torch.equal(found[1].x_adv, x_adv)
    assert torch.equal(found[1].fooled, y_adv != data.y)
    assert not torch.equal(found[2].x_adv, x_adv)
    robust = (model(x_adv).argmax(1) == data.y).float().mean().item()
    assert (found[1].clean, found[1].robust) == (pytest.approx(23 / 24), pytest.approx(robust))
    assert 0 < robust < 23 / 24
    assert robustbench.data._clean_dataset_loaders == loaders
    assert robustbench.eval.AutoAttack is bench.compat.AutoAttack
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", "Clean accuracy: 95.83%")


def test_a_template_of_robustbenchs_own_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import robustbench.leaderboard.template

    folder = tmp_path / "planted_boards" / "boards"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    loader = robustbench.leaderboard.template.PackageLoader("planted_boards", "boards")
    environment = jinja2.Environment(loader=loader)
    assert environment.get_template("leaderboard.html.j2").render(models=[]).startswith('<table class="datatable">')
    (folder / "leaderboard.html.j2").write_text("their own")
    assert jinja2.Environment(loader=loader).get_template("leaderboard.html.j2").render() == "their own"

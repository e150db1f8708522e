"""Hyper-parameters by trials: which points are drawn, on which images they are scored, and what a rerun repeats."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from bench import tune as tuning
from bench.datasets.base import fingerprint, open_dataset
from bench.errors import UnusableInput
from bench.models.checkpoints import checkpoint_path, read_header
from bench.models.variants import VARIANTS
from bench.results.store import read_runs
from bench.settings import parse_grid
from bench.training.data import read_training_data
from bench.training.loop import train
from bench.training.recipes import train_spec
from bench.tune import Search, Trial, best, draw, open_search, own_grid, table_path, tune

DIGITS = open_dataset("digits")
TINY = {"n_train": 200, "n_val": 50, "epochs": 1, "val_steps": 1, "width": 4}


def search(variant: str, grid: dict[str, list[Any]] | None = None, seed: int = 0, **fixed: Any) -> Search:
    return open_search(variant, DIGITS, DIGITS.threat_model, None, fixed, grid or {}, seed)


def test_each_method_searches_its_own_parameters():
    grids = {name: set(search(name).grid) for name in ("dense-at", "moe-at", "moe-at-argmax", "dual-jtdmoe")}
    assert grids == {
        "dense-at": {"lr"},
        "moe-at": {"lr", "balance"},
        "moe-at-argmax": {"lr"},  # its router is not trained
        "dual-jtdmoe": {"lr", "balance", "alpha", "beta", "expert_term", "expert_reduction"},
    }


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.parts is None])
def test_every_value_of_every_grid_is_a_setting_of_its_variant(variant: str):
    for key, values in own_grid(train_spec(variant, DIGITS, DIGITS.threat_model)).items():
        for value in values:
            train_spec(variant, DIGITS, DIGITS.threat_model, settings={key: value})


def test_the_first_trial_is_the_recipes_own_and_none_comes_twice():
    grid = {"beta": [1.0, 6.0], "lr": [0.1, 0.3, 0.9], "balance": [0.5]}
    points = draw(search("moe-rt_er-published", grid, expert_term="second", expert_reduction="sum"), 6)
    assert points[0] == {"beta": 6.0, "lr": 0.3, "balance": 0.5}  # digits' recipe, and the objective's defaults
    assert {(point["beta"], point["lr"]) for point in points} == {(b, lr) for b in (1, 6) for lr in (0.1, 0.3, 0.9)}


def test_fewer_trials_are_the_beginning_of_more_and_another_seed_draws_others():
    for variant, seed in (("moe-rt_er", 0), ("moe-trades", 1), ("moe-at-paths", 2)):
        asked = search(variant, seed=seed)
        assert [draw(asked, n) for n in range(1, 9)] == [draw(asked, 9)[:n] for n in range(1, 9)]
    assert draw(search("moe-rt_er"), 9) != draw(search("moe-rt_er", seed=1), 9)


@pytest.mark.parametrize(
    ("variant", "grid", "fixed", "message"),
    [
        ("dual", {}, {}, "'dual' is put together from moe-standard and moe-rt_er, not trained"),
        ("moe-rt_er", {"beta": [1.0]}, {"beta": 2.0}, "--grid beta: it is fixed by --set beta"),
        ("moe-rt_er", {"betaa": [1.0]}, {}, "'moe-rt_er' has no such parameter"),
        ("moe-rt_er", {"beta": [1.0, -1.0]}, {}, "beta: Input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_trains(
    variant: str, grid: dict[str, list[Any]], fixed: dict[str, Any], message: str
):
    with pytest.raises(UnusableInput, match=message):
        search(variant, grid, **fixed)


def test_a_trial_starts_from_the_users_own_dense_model(tmp_path: Path, tiny_spec: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.training.loop.ZOO", tmp_path / "nothing shipped")
    train(tiny_spec("dense-at", epochs=1), Path("nowhere"), tmp_path, "cpu")
    started = search("moe-at", {"lr": [0.3]}, init="dense-at", balance=0.5, inner_steps=1, **TINY)
    (trial,) = tune(started, 1, 4, Path("nowhere"), tmp_path, "cpu")
    assert trial.settings == {"lr": 0.3}
    (header,) = [read_header(path) for path in (tmp_path / "tuning").rglob("moe-at.safetensors")]
    assert header.init["init"].name == "dense-at"


def test_the_training_that_is_printed_starts_from_what_the_trials_did(
    tmp_path: Path, tiny_spec: Any, monkeypatch: pytest.MonkeyPatch, bench: Any
):
    own = train(tiny_spec("dense-at", epochs=1), Path("nowhere"), tmp_path, "cpu")
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [Trial({"lr": 0.1}, 0.9, 0.2, 3.0)])
    words = ["tune", "moe-at", "--trials", "1", "--checkpoints", str(tmp_path), "--set", "init=dense-at"]
    assert bench(*words)[1].endswith(f" --set init=dense-at --set lr=0.1 --checkpoints {tmp_path}\n")
    (own.parent / "moe-at.safetensors").touch()
    assert bench(*words)[1].endswith(f" --set init={own} --set lr=0.1 --checkpoints {tmp_path}/tuned\n")


def test_more_trials_than_points_are_refused_with_their_number():
    with pytest.raises(UnusableInput, match=r"--trials 5: the grid of 'dense-at' has 3 points \(lr\): ask for 1 … 3"):
        draw(search("dense-at"), 5)


def test_the_grids_words():
    assert parse_grid(["beta=0.3,1", "expert_term=all"]) == {"beta": [0.3, 1], "expert_term": ["all"]}
    for wrong in ("beta", "beta=", "beta=1,,2"):
        with pytest.raises(UnusableInput, match=f"--grid '{wrong}' is not of the form"):
            parse_grid([wrong])


def test_the_best_has_the_highest_ra_then_sa_and_is_the_earliest():
    trials = [Trial({"beta": n}, sa, ra, 1.0) for n, (sa, ra) in enumerate([(0.9, 0.4), (0.8, 0.5), (0.9, 0.5)] * 2)]
    assert best(trials).settings == {"beta": 2}
    starved = Trial({"beta": 9}, 1.0, 1.0, 1.0, dead_experts=1)
    assert best([starved, *trials]).settings == {"beta": 2}
    assert best([starved, replace(starved, ra=0.1)]) == starved  # where all have starved one


def test_experts_without_load_are_counted_in_the_epoch_that_is_kept(tmp_path: Path):
    asked = search("moe-at", {"balance": [0.5]}, **TINY)
    tune(asked, 1, 20, tmp_path, tmp_path)
    (path,) = (tmp_path / "tuning").rglob("moe-at.csv")
    kept = read_header(path.with_suffix(".safetensors")).validation
    assert kept is not None
    table = pd.read_csv(path)
    loads = [f"load_{expert}" for expert in range(4)]
    table[loads] = (0.0, 0.0, 0.0, 1.0)  # of other epochs
    table.loc[table["epoch"] == kept["epoch"], loads] = (0.001, 0.5, 0.009, 0.49)
    table.to_csv(path, index=False)
    (trial,) = tune(asked, 1, 20, tmp_path, tmp_path)
    assert trial.dead_experts == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["moe-at", "dense-at"])
def test_trials_are_scored_on_held_out_images_and_a_rerun_trains_nothing(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = search(variant, {"lr": [0.3, 0.1]}, **TINY | ({"balance": 0.5} if variant == "moe-at" else {}))
    first = tune(asked, 2, 20, tmp_path, tmp_path)
    assert [trial.settings for trial in first] == [{"lr": 0.3}, {"lr": 0.1}]
    data = read_training_data(asked.spec, DIGITS, tmp_path)
    held_out = data.held_out[:20]
    assert not set(held_out.tolist()) & set(data.train.tolist())
    runs = read_runs(tmp_path / "tuning")
    pixels = data.images.floats(held_out)
    assert {run.result.fingerprint for run in runs} == {fingerprint(pixels, data.images.y[held_out])}
    assert {run.result.spec.suite for run in runs} == {"adaptive" if variant == "moe-at" else "autoattack"}
    table = pd.read_csv(table_path(tmp_path, asked.spec))
    assert table["ra"].tolist() == [trial.ra for trial in first]
    fixed = [*TINY, *(["balance"] if variant == "moe-at" else [])]
    assert list(table.columns) == [*fixed, "lr", "sa", "ra", "images", "dead_experts", "seconds"]
    assert table["images"].tolist() == [20, 20]

    monkeypatch.setattr("bench.training.loop.Trainer", None)
    monkeypatch.setattr("bench.evaluation.evaluate.evaluate", None)
    assert tune(asked, 2, 20, tmp_path, tmp_path) == first


def test_a_table_of_other_trials_is_not_overwritten(tmp_path: Path):
    asked = search("dense-at", {"lr": [0.3, 0.1]}, **TINY)
    path = table_path(tmp_path, asked.spec)
    path.parent.mkdir(parents=True)
    path.write_bytes(tuning._table(asked.fixed, [Trial({"lr": 0.1}, 0.9, 0.5, 1.0, images=20)]))
    before = path.read_bytes()
    for other, images in (
        (search("dense-at", {"lr": [0.3, 0.2]}, **TINY), 20),
        (search("dense-at", {"lr": [0.3, 0.1]}, **TINY | {"width": 5}), 20),
        (asked, 21),
    ):
        with pytest.raises(UnusableInput, match=f"{path.name} has trials of other settings: move it"):
            tune(other, 2, images, tmp_path, tmp_path)
    assert path.read_bytes() == before
    tune(asked, 2, 20, tmp_path, tmp_path)
    assert pd.read_csv(path)["lr"].tolist() == [0.3, 0.1]


def test_a_table_with_a_setting_of_none_is_its_own(tmp_path: Path):
    path = tmp_path / "table.csv"
    path.write_bytes(tuning._table({"clip_grad_norm": None}, [Trial({"lr": 0.1}, 0.9, 0.5, 1.0, images=20)]))
    tuning._refuse_another(path, [{"clip_grad_norm": None, "lr": 0.1, "images": 20}])
    with pytest.raises(UnusableInput, match="has trials of other settings"):
        tuning._refuse_another(path, [{"clip_grad_norm": 1.0, "lr": 0.1, "images": 20}])


def test_more_images_than_are_held_out_are_refused(tmp_path: Path):
    with pytest.raises(UnusableInput, match="--n-examples 51 is more than the 50 held-out images"):
        tune(search("dense-at", **TINY), 1, 51, tmp_path, tmp_path)


def test_the_command_prints_the_training_of_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any):
    trials = [Trial({"lr": 0.1}, 0.9, 0.2, 3.0), Trial({"lr": 0.3}, 0.9, 0.5, 3.0)]
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: trials)
    status, out, _ = bench("tune", "dense-at", "--trials", "2", "--checkpoints", str(tmp_path), "--set", "epochs=3")
    assert status == 0
    assert out.splitlines()[-2:] == [
        "best: SA 90.00% RA 50.00%; this trains it:",
        "bench train dense-at --dataset digits --seed 0 --data-root data --set epochs=3 --set lr=0.3"
        f" --checkpoints {tmp_path}",
    ]
    there = tmp_path / "digits" / "Linf" / "dense-at.safetensors"
    there.parent.mkdir(parents=True)
    there.touch()
    trials[:] = [Trial({"lr": 0.1}, 0.9, 0.0, 3.0)]
    out = bench("tune", "dense-at", "--trials", "1", "--checkpoints", str(tmp_path))[1]
    assert "best: SA 90.00% RA 0.00% (no trial is robust: chosen by SA); this trains it:\nbench train dense-at" in out
    assert out.endswith(f" --set lr=0.1 --checkpoints {tmp_path}/tuned\n")


def test_a_model_of_a_folder_is_found_however_the_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any
):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    there = checkpoint_path(tmp_path, f"imagefolder:{tmp_path}/own", "Linf", "dense-at")
    there.parent.mkdir(parents=True)
    there.touch()
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [Trial({"lr": 0.1}, 0.9, 0.2, 3.0)])
    words = ("tune", "dense-at", "--trials", "1", "--checkpoints", str(tmp_path), "--dataset", "imagefolder:own")
    assert bench(*words)[1].endswith(f" --set lr=0.1 --checkpoints {tmp_path}/tuned\n")


def test_the_training_that_is_printed_has_the_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any):
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: [Trial({"lr": 0.1}, 0.9, 0.2, 3.0)])
    words = ("tune", "dense-at", "--trials", "1", "--checkpoints", str(tmp_path))
    assert "\nbench --plugin json train dense-at " in bench("--plugin", "json", *words)[1]


def test_a_grid_of_what_there_is_not_is_refused_as_it_was_written():
    with pytest.raises(UnusableInput, match=r"^--grid bta: 'moe-rt_er' has no such parameter: did you mean 'beta'"):
        search("moe-rt_er", {"bta": [1.0]})

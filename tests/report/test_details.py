"""The numbers behind the figures, by hand."""

from pathlib import Path
from typing import Any

import pytest

from bench.boards.leaderboard import Stored, boards
from bench.report.details import (
    Model,
    boards_with_models,
    by_class,
    by_eps,
    by_expert,
    by_label,
    certificate_of,
    chain,
    flow,
    sweeps,
    waterfall,
)


@pytest.fixture(scope="module")
def models(results: Path) -> dict[str, Model]:
    """By board and name."""
    return {
        f"{board.stem} {model.row.name}": model
        for board, own in boards_with_models(Stored.read(results))
        for model in own
    }


@pytest.fixture
def moe(models: dict[str, Model]) -> Model:
    return models["digits_Linf-0.2 moe"]


def test_the_chain_has_what_is_known(models: dict[str, Model], moe: Model):
    # of eight images one is wrong; adaptive broke five, AutoAttack three of them, PGD one; one is certified
    assert chain(moe.row) == {"certified": 1 / 8, "RA-worst": 2 / 8, "AutoAttack": 4 / 8, "PGD": 6 / 8, "SA": 7 / 8}
    assert chain(models["digits_Linf-0.2 dense"].row) == {"RA-worst": 6 / 8, "AutoAttack": 6 / 8, "SA": 7 / 8}


def test_a_waterfall_begins_each_suite_with_all_images_and_ends_with_the_strongest(moe: Model):
    steps = [(step.suite, step.attack, step.before, step.after, step.broke) for step in waterfall(moe)]
    assert steps == [
        ("pgd", "pgd", 7 / 8, 6 / 8, 1),
        ("autoattack", "apgd-ce", 7 / 8, 5 / 8, 2),
        ("autoattack", "square", 5 / 8, 4 / 8, 1),
        ("autoattack", "fab-t", 4 / 8, 4 / 8, 0),
        ("adaptive", "paths", 7 / 8, 2 / 8, 5),
    ]
    assert {step.alone for step in waterfall(moe)} == {None}  # square never met what apgd-ce had broken


def test_unique_kills_are_those_of_the_board(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "pgd", {"pgd": {0: 1, 1: 1}})
    save_run(tmp_path, "m", "autoattack", {"apgd-ce": {1: 1, 2: 1, 3: 1}})
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    assert [(step.attack, step.alone) for step in waterfall(model)] == [("pgd", 1), ("apgd-ce", 2)]


def test_of_several_versions_and_seeds_the_newest_and_lowest_is_shown(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "autoattack", {"apgd-ce": {0: 1}}, version=2)
    save_run(tmp_path, "m", "autoattack", {"apgd-ce": {0: 1, 1: 1}}, seed=1)
    save_run(tmp_path, "m", "autoattack", {"apgd-ce": {0: 1, 1: 1, 2: 1}}, seed=0)
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    assert [step.broke for step in waterfall(model)] == [3]


def test_the_flow_is_that_of_the_suite_that_broke_most(models: dict[str, Model], moe: Model):
    found = flow(moe)
    assert found is not None
    # 0 → 1, 1 → 0, 2 (expert 0) stays, 3 (expert 1) stays, 4 (expert 0) → 1
    assert found.suite == "adaptive"
    assert found.counts.tolist() == [[1, 2], [1, 1]]
    assert (found.total, found.moved) == (5, 3)
    assert flow(models["digits_Linf-0.2 dense"]) is None


def test_rates_by_expert_and_by_class(models: dict[str, Model], moe: Model):
    table = by_expert(moe)
    assert table is not None
    # expert 0: images 0, 2, 4, 6, of which 6 withstands all; expert 1: 1, 3, 5, 7, of which 7 is wrong, 5 withstands
    assert table.to_dict("index") == {
        0: {"images": 4, "load": 0.5, "SA": 1.0, "RA-worst": 0.25},
        1: {"images": 4, "load": 0.5, "SA": 0.75, "RA-worst": 0.25},
    }
    assert by_expert(models["digits_Linf-0.2 dense"]) is None
    assert by_class(moe)["RA-worst"].to_dict() == {0: 0.0, 1: 0.5, 2: 0.5, 3: 0.0}
    assert by_class(moe)["SA"].to_dict() == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5}


def test_an_expert_without_images_has_a_load_of_nothing_and_no_accuracy(save_run: Any, tmp_path: Path):
    save_run(tmp_path, "m", "pgd", {"pgd": {}}, {"num_experts": 3, "num_selected_experts": 1})
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    table = by_expert(model)
    assert table is not None
    assert (table["images"].tolist(), table["load"].tolist()) == ([4, 4, 0], [0.5, 0.5, 0.0])
    assert table["SA"].isna().tolist() == [False, False, True]


def test_against_eps_all_begin_with_the_clean_accuracy(models: dict[str, Model], moe: Model):
    assert by_eps(moe) == {
        "certified": [(0.0, 7 / 8), (0.1, 1 / 8), (0.2, 1 / 8)],
        "RA-worst": [(0.0, 7 / 8), (0.1, 7 / 8), (0.2, 2 / 8)],
        "PGD": [(0.0, 7 / 8), (0.1, 7 / 8), (0.2, 6 / 8)],
        "AutoAttack": [(0.0, 7 / 8), (0.2, 4 / 8)],
    }
    assert by_eps(models["digits_Linf-0.2 dense"]) == {}


def test_points_by_label():
    assert by_label([(1, {"a": 0.5}), (2, {"a": 0.25, "b": 1})]) == {"a": [(1, 0.5), (2, 0.25)], "b": [(2, 1)]}


def test_a_sweep_is_one_checkpoint_at_several_alphas(save_run: Any, tmp_path: Path):
    dual = {"checkpoint_sha256": "e" * 64, "alpha": 0.7}
    for alpha in (0.9, 0.5):
        save_run(tmp_path, "dual", "pgd", {"pgd": {}}, dual, alpha=alpha)
    save_run(tmp_path, "other", "pgd", {"pgd": {}}, {"checkpoint_sha256": "f" * 64, "alpha": 0.7}, alpha=0.7)
    (board,) = boards(tmp_path)
    (found,) = sweeps(board.rows).items()
    assert (found[0], [row.alpha for row in found[1]]) == ("dual", [0.5, 0.9])


def test_certificates_are_those_of_this_model_in_its_own_norm(models: dict[str, Model], moe: Model):
    assert [one.result.spec.suite for one in certificate_of(moe, "routes")] == ["certify-routes"]
    assert [one.result.spec.suite for one in certificate_of(moe, "smoothing")] == ["certify-smoothing"]
    assert certificate_of(models["digits_Linf-0.2 dense"], "routes") == []

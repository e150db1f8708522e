"""docs/reproduction.md is what the committed results give, and its verdicts follow from them."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.models.checkpoints import read_header

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks/reproduction.py")))


@pytest.mark.slow
def test_the_page_is_what_the_results_give(script: Any):
    assert script.page() == script.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("only_first", "only_second", "verdict"),
    [
        (20, 1, "holds for these models"),
        (1, 20, "does not hold for these models"),
        (3, 1, "cannot be told at this scale"),
        (0, 0, "cannot be told at this scale"),
    ],
)
def test_a_verdict_needs_a_difference_beyond_chance(script: Any, only_first: int, only_second: int, verdict: str):
    both = 30
    first = pd.Series([True] * (both + only_first) + [False] * only_second)
    second = pd.Series([True] * both + [False] * only_first + [True] * only_second)
    test = script.Test("SA", "a", "b", first, second)
    assert test.changed == (only_first, only_second)
    claim = script.Claim("title", "asked", [test])
    ((_, (adjusted,)),) = script.adjusted([(None, [claim])])
    assert adjusted.tests[0].verdict == verdict


def test_what_other_attacks_break_is_compared_on_the_images_that_autoattack_leaves_of_both(script: Any):
    """It leaves the first 10 of one and the first 12 of the other; others break 8 of these 10, and 1."""
    left = np.arange(40) < 10, np.arange(40) < 12
    worst = np.arange(40) < 2, (np.arange(40) < 12) & (np.arange(40) != 1)
    found = {model: {"RA, autoattack": ra, "RA-worst": own} for model, ra, own in zip("ab", left, worst, strict=True)}
    data = script.Scored(None, dict.fromkeys(found))
    object.__setattr__(data, "series", found.__getitem__)
    (test,) = data.left_open("a", "b")
    assert (test.what, test.a.tolist(), test.b.sum()) == ("of 10 images", [False] * 2 + [True] * 8, 1)
    assert test.changed == (8, 1)
    assert data.left_open("a", "c") == []
    found["b"]["RA, autoattack"] = np.arange(40) > 20
    assert data.left_open("a", "b") == []  # no image is left of both


def test_a_difference_has_the_interval_of_paired_shares(script: Any):
    """8 of 100 for the first alone, 2 for the second: 6 ± 1.96 · √(10 − 36 / 100) points."""
    a, b = np.arange(100) < 8, (np.arange(100) >= 8) & (np.arange(100) < 10)
    assert script.Test("SA", "a", "b", a, b).difference == "+6.0 [-0.1, +12.1]"
    assert script.Test("SA", "a", "b", a, a).difference == "+0.0 [+0.0, +0.0]"


def test_models_count_under_the_same_attacks(script: Any):
    def run(suite: str, version: int, seed: int) -> SimpleNamespace:
        return SimpleNamespace(
            result=SimpleNamespace(spec=SimpleNamespace(suite=suite, suite_version=version, seed=seed))
        )

    kept = [run("adaptive", 3, 0), run("pgd", 1, 0)]
    assert script.alike([run("adaptive", 2, 0), kept[0], run("adaptive", 3, 1), kept[1]]) == kept


def test_joint_and_separate_training_are_compared_where_they_start_alike(script: Any):
    right = dict.fromkeys(("SA", "RA, pgd", "RA, autoattack", "RA-worst"), np.arange(10) < 5)
    board = SimpleNamespace(rows=[SimpleNamespace(spec=SimpleNamespace(dataset="digits"))])

    def joint(**starts: dict[str, str]) -> Any:
        headers = {
            model: SimpleNamespace(
                init={role: SimpleNamespace(name=name) for role, name in own.items()},
                architecture=None,
                validation={},
                parts={},
            )
            for model, own in starts.items()
        }
        data = script.Scored(board, dict.fromkeys(("dual", "dual-jtdmoe", "moe-rt_er", "moe-standard")), headers)
        object.__setattr__(data, "series", lambda _: right)
        found = {claim.title.partition(" of ")[0]: claim for claim in script.claims(data)}
        price = found["The dual model is more accurate than its robust branch, and less robust"]
        assert "not put to the test" in price.note  # both branches are as accurate
        return found["Joint training"]

    start = {"moe-standard": {"init": "dense-standard"}}
    assert len(joint(**start, **{"dual-jtdmoe": {"init_standard": "dense-standard", "init": "dense-at"}}).tests) == 4
    other = joint(**start, **{"dual-jtdmoe": {"init_standard": "dense-at"}})
    assert (len(other.tests), "dense-at in joint" in other.open) == (0, True)
    assert "random weights in joint" in joint(**start).open
    assert len(joint().tests) == 4


def test_no_verdict_where_epochs_were_chosen_unlike(script: Any):
    header = read_header(ROOT / "models/zoo/digits/Linf/moe-at.safetensors")
    both = {"sa": 0.9, "ra": 0.5, "epoch": 3.0}
    headers = {
        "dense-at": read_header(ROOT / "models/zoo/digits/Linf/dense-at.safetensors"),
        "by-pgd": header.model_copy(update={"validation": both}),
        "undefended": header.model_copy(update={"validation": both, "objective": "standard"}),
        "by-experts": header.model_copy(update={"validation": {**both, "ra_pgd": 0.6}}),
    }
    branches = {"robust": SimpleNamespace(file="by-experts.safetensors")}
    headers["together"] = header.model_copy(update={"validation": {}, "parts": branches})
    data = script.Scored(None, dict.fromkeys([*headers, "unknown"]), headers)
    right = {model: np.arange(100) < 20 * number for number, model in enumerate(data.rows)}
    object.__setattr__(data, "series", lambda model: {"SA": right[model]})

    def verdict(first: str, second: str) -> str:
        claim = script.Claim("title", "asked", data.compare(first, second, ["SA"]))
        ((_, (adjusted,)),) = script.adjusted([(None, [claim])])
        return str(adjusted.tests[0].verdict)

    unlike = "no verdict: epochs chosen by different rules"
    assert verdict("by-experts", "by-pgd") == verdict("by-pgd", "by-experts") == unlike
    assert verdict("together", "by-pgd") == unlike  # its robust branch is by experts
    assert "for these models" in verdict("together", "by-experts")
    (test,) = data.compare("by-experts", "by-pgd", ["SA"])
    assert test.row()["p (Holm)"] == "–"
    for other in ("dense-at", "undefended", "unknown"):
        assert "for these models" in verdict("by-pgd", other)
        assert "for these models" in verdict("by-experts", other)


def test_methods_are_compared_over_their_training_seeds(script: Any):
    """Welch's t of 36, 40, 44 % against 26, 30, 34 %: 10 / √(2 · 16 / 3) = 3.06 at 4 degrees of freedom.

    By image, the shares of seeds differ by 1/3 on 8 of 100, by 2/3 on 8 and by 1 on 2: their mean is 0.1, their
    variance (58 / 9 - 1) / 99, and t = 0.1 / √(0.055 / 100) = 4.26 at 99 degrees of freedom.
    """
    right = {"moe-rt_er": 40, "moe-rt_er-s1": 36, "moe-rt_er-s2": 44, "moe-at": 30, "moe-at-s1": 26, "moe-at-s2": 34}
    shares = {model: np.arange(100) < count for model, count in {**right, "moe-trades": 10, "dense-at": 60}.items()}

    def row(model: str) -> SimpleNamespace:
        seed = int(model[-1]) if "-s" in model else 0
        return SimpleNamespace(
            ranked=model != "dense-at", result=SimpleNamespace(model_info=SimpleNamespace(seed=seed))
        )

    whats = ("SA", "RA, pgd", "RA, autoattack", "RA-worst")
    data = SimpleNamespace(
        rows={m: row(m) for m in shares},
        series=lambda m: dict.fromkeys(whats, shares[m]),
        by_experts=lambda m: m == "moe-trades" or None,
    )
    lines = script.over_seeds(data)
    assert [line.split("|")[1:4] for line in lines[5].splitlines()[2:]] == [
        [" moe-rt_er ", " 3       ", " 40.0 (36.0 – 44.0) "], [" moe-at    ", " 3       ", " 30.0 (26.0 – 34.0) "]
    ]  # fmt: skip
    (verdict,) = lines[7].splitlines()[2:]
    assert [cell.strip() for cell in verdict.split("|")[3:8]] == ["+10.0", "0.038", "holds", "4.6e-05", "holds"]
    # of two boards with the same test each p is twice as large
    (verdict,) = script.over_seeds(data, [data, SimpleNamespace(**vars(data))])[7].splitlines()[2:]
    assert [cell.strip() for cell in verdict.split("|")[4:8]] == [
        "0.075", "cannot be told with these seeds", "9.2e-05", "holds"
    ]  # fmt: skip
    shares |= {f"moe-at{seed}": shares[f"moe-rt_er{seed}"] for seed in ("", "-s1", "-s2")}
    (verdict,) = script.over_seeds(data)[7].splitlines()[2:]
    assert [cell.strip() for cell in verdict.split("|")[4:8:2]] == ["1", "1"]
    data.by_experts = lambda model: model != "dense-at"
    (verdict,) = script.over_seeds(data)[7].splitlines()[2:]
    assert verdict.split("|")[1:3] == [" moe-rt_er, and experts ", " moe-at, and experts "]
    data.by_experts = lambda model: model.startswith("moe-at")
    assert script.over_seeds(data)[7] == ""  # chosen unlike
    data.by_experts = lambda model: model == "moe-at"
    assert [line.split("|")[2].strip() for line in script.over_seeds(data)[5].splitlines()[2:]] == ["3", "2"]
    data.rows = {model: row(model) for model in ("moe-at", "moe-rt_er")}
    assert script.over_seeds(data) == []  # one seed each


def test_passes_of_a_training_step_and_of_an_answer(script: Any):
    """AT: 10 inner steps and the loss. RT-ER: two attacks, F(x'), and the second expert's answers to both images."""
    assert script.passes("dense-at") == script.passes("moe-at") == (11, 1)
    assert script.passes("moe-rt_er") == (23, 1)
    assert script.passes("moe-at-paths")[0] == 4 * 11 + 1  # every expert by itself, and F(x) for the router
    assert script.passes("dual-jtdmoe")[1] == 2


def test_all_trials_of_joint_training_are_told_with_their_intervals(script: Any, monkeypatch: pytest.MonkeyPatch):
    table = pd.DataFrame({
        "beta": [6.0, 1.0], "lr": [0.1, 0.1], "sa": [0.9, 0.8], "ra": [0.0, 0.25], "dead_experts": 0, "seconds": 1.0,
        "images": 200,
    })  # fmt: skip
    monkeypatch.setitem(script.joint.__globals__, "trials", lambda _: {"dual-jtdmoe": table})
    lines = script.joint(SimpleNamespace(board=None))[-1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    assert cells == [
        ["beta", "SA", "RA"],  # lr is the same in both
        ["6.0", "90.0 [85.1, 93.4]", "0.0 [0.0, 1.9]"],
        ["1.0", "80.0 [73.9, 85.0]", "25.0 [19.5, 31.4]"],
    ]
    monkeypatch.setitem(script.joint.__globals__, "trials", lambda _: {})
    assert script.joint(SimpleNamespace(board=None)) == []


def test_a_dual_is_compared_with_itself_at_its_least_and_largest_alpha(script: Any, monkeypatch: pytest.MonkeyPatch):
    right = {0.5: (90, 10), 0.7: (80, 20), 1.0: (70, 40)}
    found = {
        alpha: {"SA": np.arange(100) < clean, "RA-worst": np.arange(100) < robust}
        for alpha, (clean, robust) in right.items()
    }
    rows = {alpha: SimpleNamespace(spec=SimpleNamespace(alpha=alpha)) for alpha in right}
    monkeypatch.setitem(script.by_alpha.__globals__, "accuracies", lambda row: found[row.spec.alpha])
    data = script.Scored(None, {}, {}, {"dual": rows})
    clean, robust = data.ends("dual")
    assert (clean.first, clean.second, clean.changed) == ("dual, α = 0.5", "dual, α = 1", (20, 0))
    assert (robust.first, robust.second, robust.changed) == ("dual, α = 1", "dual, α = 0.5", (30, 0))
    assert [line.split("|")[2].strip() for line in script.by_alpha(data)[5].splitlines()[2:]] == ["0.5", "0.7", "1"]
    few = {alpha: rows[alpha] for alpha in (0.7, 0.5)}
    tests = script.Scored(None, {}, {}, {"dual": rows, "dual-jtdmoe": few}).compare("dual-jtdmoe", "dual", ["SA"])
    assert [(test.first, test.second, test.a.sum()) for test in tests] == [
        ("dual-jtdmoe, α = 0.5", "dual, α = 0.5", 90), ("dual-jtdmoe, α = 0.7", "dual, α = 0.7", 80)
    ]  # fmt: skip
    assert script.Scored(None, {}).ends("dual") == script.by_alpha(script.Scored(None, {})) == []

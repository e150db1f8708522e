"""The rows of boards: every number from the verdicts, who is ranked, and in which order."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from saved_runs import MOE, markdown, save, table

from bench.boards import views
from bench.boards.leaderboard import boards
from bench.errors import UnusableInput
from bench.results.flags import DECLARED, HIDDEN_ROUTES, ROUTES_INSIDE, THOUGH, UNRANKED
from bench.results.store import RunFolder, run_folder
from bench.spec import NO_GRADIENT, NOT_FORCED

#: what keeps a row from a rank
AUTOATTACK = "no autoattack with its default parameters"
ADAPTIVE = "no adaptive at its standard budget or more"
#: what suite `components` fills in
COMPONENTS = [
    *[key + bound for key in ("ra_e_fixed", "ra_e_any", "ra_r") for bound in ("", "_low", "_high")],
    *["route_flip_rate_low", "route_flip_rate_high"],
]


def test_a_set_without_a_ranked_row_comes_last_however_large(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "11111", "pgd": "11111"}, fingerprint="a" * 16)
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1111"}, fingerprint="b" * 16)
    save(tmp_path, "autoattack", {"clean": "111", "apgd-ce": "100"}, fingerprint="c" * 16)
    (board,) = boards(tmp_path)
    assert [[row.n for row in table] for table in board.tables] == [[3], [5], [4]]


def test_every_column_by_hand(tmp_path: Path):
    info = {
        **MOE,
        "alpha": 0.7,
        "objective": "jtdmoe",
        "additional_data": False,
        "combine": "probs",
        "trained": "digits, 10 epochs",
    }
    clean = save(tmp_path, "clean", {"clean": "1111011111"}, info=info, model="dual-jtdmoe")
    auto = save(
        tmp_path,
        "autoattack",
        {"clean": "1111011111", "apgd-ce": "1100.11111", "apgd-t": "10...11111"},
        order=["apgd-ce", "apgd-t", "square"],
        info=info,
        model="dual-jtdmoe",
        seed=7,
        suite_version=2,
        flags=("square broke more than apgd",),
    )
    row = table(tmp_path).loc["dual-jtdmoe"]
    assert row.drop(["run"]).to_dict() == {
        "rank": "",
        "model": "dual-jtdmoe",
        "objective": "jtdmoe",
        "experts": "1 of 4 × resnet10",
        "gate": "softmax",
        "alpha": "0.7",
        "combine": "probs",
        "extra_data": "no",
        "n": "10",
        "sa": "90.00",
        "ra": "60.00",
        # Wilson, k = 6, n = 10: centre (0.6 + 0.192073) / 1.384146 = 0.572247,
        # half width 1.416010 · sqrt(0.24/10 + 3.841459/400) = 1.416010 · sqrt(0.033604) = 0.259574
        "ra_low": "31.27",
        "ra_high": "83.18",
        "ra_seeds": "",
        "after_apgd-ce": "70.00",
        "after_apgd-t": "60.00",
        "after_square": "60.00",  # it ran last and has no rows here: nothing changed
        **dict.fromkeys(COMPONENTS, ""),
        "ra_worst": "60.00",
        "ra_worst_low": "31.27",
        "ra_worst_high": "83.18",
        "p_first": "",
        "first_broken_by": "autoattack/apgd-ce 2, autoattack/apgd-t 1",
        "unique_kills": "",  # apgd-t has not met what apgd-ce broke
        "route_flip_rate": "",
        "certified_accuracy": "",
        "route_stable": "",
        "smoothed": "",
        "flags": "autoattack: square broke more than apgd",
        "no_rank": ADAPTIVE,
        "seeds": "0, 7",
        "suite_version": "autoattack-v2, clean-v1",
        "trained": "digits, 10 epochs",
        "fingerprint": "f" * 12,
        "checkpoint": "c" * 12,
    }
    assert row["run"] == f"{auto.run[:8]}, {clean.run[:8]}"
    text = markdown(tmp_path)
    assert text.startswith("# digits, Linf 0.2\n\n- rank: by RA-worst, among rows on which AutoAttack has run")
    assert "## n = 10: the first 10 examples of the archive (fingerprint ffffffffffff)" in text
    assert text.count(" 60.00 [31.27, 83.18] ") == 2  # RA, and RA-worst
    # certified; RA by seed, RA-E-fixed, RA-E-any, RA-R, p, unique kills, route-flip rate, two of what is certified
    assert text.count("| –") == 1 + 9
    assert "- `dual-jtdmoe (α 0.7)`: autoattack: square broke more than apgd" in text
    assert f"- `dual-jtdmoe (α 0.7)`: {ADAPTIVE}: `bench run --suite adaptive --dataset digits " in text


def test_worst_case_is_taken_over_examples_not_over_averages(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1100"})  # 50 %
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "0011"})  # 50 %, the other half
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra"], row["ra_pgd"], row["ra_worst"]) == ("50.00", "50.00", "0.00")


def test_attacks_on_the_parts_do_not_count(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1110"})
    save(tmp_path, "components", {"clean": "1111", "expert 1": "0000"}, target="expert:1")
    row = table(tmp_path).loc["dense-at"]
    assert row["ra_worst"] == "75.00"
    assert "ra_components" not in row


def test_seeds_of_one_suite_make_one_worst_case(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "1111", "a": "1101", "b": "10.1"})
    save(tmp_path, "autoattack", {"clean": "1111", "a": "1111", "b": "0111"}, seed=1)
    row = table(tmp_path).loc["dense-at"]
    # after a: example 2 falls; after b: 1 falls by seed 0 and 0 by seed 1
    assert (row["after_a"], row["after_b"], row["ra"], row["seeds"]) == ("75.00", "25.00", "25.00", "0, 1")


def test_other_parameters_have_their_own_column(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1000"}, suite_params={"version": "rand"})
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1100"}, suite_params={"steps": 10})
    save(tmp_path, "torchattacks:FGSM", {"clean": "1111", "FGSM": "1110"})
    save(tmp_path, "torchattacks:FGSM", {"clean": "1111", "FGSM": "1111"}, model="other")
    rows = table(tmp_path)
    row = rows.loc["dense-at"]
    assert [column for column in rows if column.startswith(("ra_", "after"))] == [
        *["ra_seeds", "ra_autoattack[version=rand]", "ra_pgd[steps=10]", "ra_torchattacks:FGSM"],
        *["ra_e_fixed", "ra_e_any", "ra_r", "ra_worst", "ra_low", "ra_high"],
        *[f"{key}_{bound}" for key in ("ra_e_fixed", "ra_e_any", "ra_r", "ra_worst") for bound in ("low", "high")],
    ]
    assert (row["ra"], row["ra_autoattack[version=rand]"], row["ra_worst"]) == ("", "25.00", "25.00")
    assert row["no_rank"] == AUTOATTACK
    assert rows.loc["other", "ra_pgd[steps=10]"] == ""
    assert "| RA torchattacks:FGSM" in markdown(tmp_path)


def test_an_older_version_counts_in_the_worst_case_alone(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "0111"})
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1101"}, suite_version=2)
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra_pgd"], row["ra_worst"], row["suite_version"]) == ("75.00", "50.00", "pgd-v1, pgd-v2")


@pytest.mark.parametrize(
    ("info", "fields"),
    [
        (MOE, {}),
        ({"alpha": 0.5}, {}),
        ({}, {"alpha": 0.5}),
        ({"routing_visible": True}, {"model": "my.module:factory"}),
    ],
)
def test_routed_rows_are_ranked_with_adaptive_only(tmp_path: Path, info: dict[str, Any], fields: dict[str, Any]):
    routed = {"info": info, "model": "routed", **fields}
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1000"})
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1110"}, **routed)
    save(tmp_path, "adaptive", {"clean": "1111", "routes": "1110"}, suite_params={"steps": 1}, **routed)
    rows = table(tmp_path)
    assert list(rows["rank"]) == ["1", ""]
    assert list(rows["ra_worst"]) == ["25.00", "75.00"]  # the routed row comes below, however high
    assert rows["no_rank"].iloc[1] == ADAPTIVE
    save(tmp_path, "adaptive", {"clean": "1111", "routes": "1110"}, suite_version=1, **routed)
    assert list(table(tmp_path)["rank"]) == ["1", ""]
    save(tmp_path, "adaptive", {"clean": "1111", "routes": "1010"}, **routed)
    rows = table(tmp_path)
    assert list(rows["rank"]) == ["1", "2"]
    assert list(rows["ra_worst"]) == ["50.00", "25.00"]
    assert list(rows["no_rank"]) == ["", ""]


def test_order_by_worst_then_clean_then_name(tmp_path: Path):
    marks = {"d": ("1111", "1000"), "a": ("1100", "1100"), "c": ("1110", "110."), "b": ("1110", "1100")}
    for model, (clean, pgd) in marks.items():
        save(tmp_path, "autoattack", {"clean": clean, "apgd-ce": pgd}, model=model)
        save(tmp_path, "clean", {"clean": clean}, model=model)
    save(tmp_path, "clean", {"clean": "1111"}, model="unattacked")
    rows = table(tmp_path)
    assert list(rows["model"]) == ["b", "c", "a", "d", "unattacked"]
    assert list(rows["rank"]) == ["1", "1", "1", "4", ""]  # those that tie share one
    assert rows.loc["unattacked", ["sa", "ra_worst"]].to_list() == ["100.00", ""]  # SA is no robustness


def test_a_weak_attack_alone_earns_no_rank_and_neither_does_an_autoattack_that_failed(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1000"}, model="attacked")
    save(tmp_path, "torchattacks:GN", {"clean": "1111", "GN": "1111"}, model="noise")
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "111e"}, model="noise")
    rows = table(tmp_path)
    assert list(zip(rows["model"], rows["rank"], rows["ra_worst"], strict=True)) == [
        ("attacked", "1", "25.00"),
        ("noise", "", "100.00"),
    ]
    assert rows.loc["noise", "no_rank"] == f"suite `autoattack` ended in errors; {AUTOATTACK}"


def test_what_makes_adaptive_fail_earns_no_rank_by_autoattack(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1110"})
    save(tmp_path, "torchattacks:GN", {"clean": "1111", "GN": "11ee"})
    assert table(tmp_path).loc["dense-at", "rank"] == "1"  # no rank is earned by that
    save(tmp_path, "adaptive", {"clean": "1111", "deployed": "11ee"})
    row = table(tmp_path).loc["dense-at"]
    assert (row["rank"], row["no_rank"]) == ("", "suite `adaptive` ended in errors")
    save(tmp_path, "adaptive", {"clean": "1111", "deployed": "1110"}, seed=1)
    row = table(tmp_path).loc["dense-at"]
    assert (row["rank"], row["ra_worst"]) == ("1", "75.00")


def test_unlike_examples_are_not_ranked_together(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "11", "apgd-ce": "11"}, model="few", fingerprint="2" * 16)
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1000"}, model="many", fingerprint="4" * 16)
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1110"}, model="other", fingerprint="5" * 16)
    rows = table(tmp_path)
    assert list(zip(rows["model"], rows["rank"], rows["n"], strict=True)) == [
        ("many", "1", "4"),
        ("other", "1", "4"),
        ("few", "1", "2"),
    ]
    headings = [line for line in markdown(tmp_path).splitlines() if line.startswith("##")]
    assert [heading[-14:] for heading in headings] == [" 444444444444)", " 555555555555)", " 222222222222)"]


def test_a_superset_counts_in_the_worst_case(tmp_path: Path):
    few = save(tmp_path, "pgd", {"clean": "1111", "pgd": "1110"}, fingerprint="4" * 16)
    many = save(tmp_path, "autoattack", {"clean": "111111", "apgd-ce": "101101"}, fingerprint="6" * 16)
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "0000"}, info={"checkpoint_sha256": "d" * 64})
    rows = table(tmp_path)
    large, small = (rows[rows["fingerprint"] == digit * 12].iloc[0] for digit in "64")
    assert (large["n"], large["ra"], large["ra_worst"]) == ("6", "66.67", "66.67")  # the four do not cover the six
    assert large["run"] == many.run[:8]
    # example 1 falls to the larger run, 3 to the smaller; another checkpoint's run does not count
    assert (small["n"], small["ra"], small["ra_worst"]) == ("4", "75.00", "50.00")  # RA is the larger run's on the four
    assert small["run"] == f"{many.run[:8]}, {few.run[:8]}"


def test_same_positions_with_other_pixels_cover_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1110"}, fingerprint="4" * 16)
    made = save(tmp_path, "autoattack", {"clean": "11111", "apgd-ce": "00000"}, fingerprint="6" * 16)
    path = run_folder(tmp_path, made.spec, made.run)
    rows = pd.read_parquet(path / "verdicts.parquet")
    RunFolder(path).finish(made, rows.assign(input_hash="0" + rows["input_hash"].str[:15]))
    assert list(table(tmp_path)["ra_worst"]) == ["0.00", "75.00"]

    made = save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "0000"}, fingerprint="4" * 16)
    path = run_folder(tmp_path, made.spec, made.run)
    rows = pd.read_parquet(path / "verdicts.parquet")
    RunFolder(path).finish(made, rows.assign(input_hash="0" + rows["input_hash"].str[:15]))
    with pytest.raises(UnusableInput, match=r"other examples than .* the same fingerprint"):
        boards(tmp_path)


def test_a_warm_started_run_has_its_own_column_counts_in_the_worst_case_and_is_no_default(tmp_path: Path):
    warm = {"warm_start": True}
    save(tmp_path, "pgd", {"clean": "1110", "pgd": "111."})
    save(tmp_path, "pgd", {"clean": "1110", "warm-start": "0...", "pgd": ".11."}, **warm)
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra_pgd"], row["ra_pgd[warm_start=True]"], row["ra_worst"]) == ("75.00", "50.00", "50.00")
    save(tmp_path, "autoattack", {"clean": "1110", "warm-start": "00..", "apgd-ce": "..1."}, **warm)
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra"], row["ra_autoattack[warm_start=True]"], row["ra_worst"]) == ("", "25.00", "25.00")
    assert (row["rank"], row["no_rank"]) == ("", AUTOATTACK)


@pytest.mark.parametrize(
    ("fields", "ranked"),
    [
        ({}, True),
        ({"suite_params": {"budget": "large"}}, True),
        ({"warm_start": True}, True),  # it has broken what earlier runs had, and then attacked as by default
        ({"suite_params": {"budget": "small"}}, False),
        ({"suite_params": {"budget": "small"}, "warm_start": True}, False),
        ({"suite_params": {"recipe": "trial"}}, False),
        ({"flags": ("adaptive: 120 of 4,096 paths attacked",)}, True),
    ],
)
def test_a_routed_row_is_ranked_for_an_adaptive_run_of_the_standard_budget_or_more(
    fields: dict[str, Any], ranked: bool, tmp_path: Path
):
    save(tmp_path, "autoattack", {"clean": "111", "apgd-ce": "011"}, info=MOE)
    save(tmp_path, "adaptive", {"clean": "111", "route-aware": "00."}, info=MOE, **fields)
    row = table(tmp_path).loc["dense-at"]
    assert (row["rank"], row["no_rank"]) == (("1", "") if ranked else ("", ADAPTIVE))
    assert row["ra_worst"] == "33.33"


def test_a_routed_row_whose_gate_was_not_forced_is_told_so_and_not_to_run_the_same_again(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "111", "apgd-ce": "011"}, info=MOE)
    flags = (f"adaptive: moe.router: {NOT_FORCED}",)
    save(tmp_path, "adaptive", {"clean": "111", "route-aware": "00."}, info=MOE, flags=flags)
    row = table(tmp_path).loc["dense-at"]
    assert row["no_rank"] == "suite `adaptive` did not attack every gate (moe.router: its scores cannot be forced)"
    assert "bench run" not in views.markdown(*boards(tmp_path))


def test_what_one_attack_alone_broke_is_counted_by_hand(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "111110", "pgd": "00111."})
    save(tmp_path, "autoattack", {"clean": "111110", "apgd-ce": "0111..", "square": ".110.."})
    save(tmp_path, "autoattack", {"clean": "111110", "apgd-ce": "0111..", "square": ".110.."}, seed=1)
    save(tmp_path, "components", {"clean": "111110", "pgd": "111100"}, target="expert:0")
    save(tmp_path, "clean", {"clean": "111110", "warm-start": "00.0.."}, warm_start=True)
    # what a warm start tries again counts for nobody
    # 0: both suites; 1: pgd; 3: Square, with both seeds; 4: a part, not F; 5: wrong from the start
    row = table(tmp_path).loc["dense-at"]
    assert row["first_broken_by"] == "autoattack/apgd-ce 1, autoattack/square 1, pgd/pgd 2"
    assert row["unique_kills"] == ""  # Square has not met example 0


def test_unique_kills_are_known_where_every_attack_met_every_example(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "11110", "pgd": "0011."})
    save(tmp_path, "torchattacks:FGSM", {"clean": "11110", "FGSM": "0101."})
    assert table(tmp_path).loc["dense-at", "unique_kills"] == "pgd/pgd 1, torchattacks:FGSM/FGSM 1"


def test_ranked_rows_are_compared_with_the_first(tmp_path: Path):
    for model, marks in {"first": "1" * 10, "second": "1110000001", "third": "1000000001"}.items():
        save(tmp_path, "autoattack", {"clean": "1" * 10, "apgd-ce": marks}, model=model)
    save(tmp_path, "pgd", {"clean": "1" * 10, "pgd": "0" * 10}, model="unranked")
    rows = table(tmp_path)
    # second: 6 lost, 0 gained: 2 / 2⁶ = 0.03125; third: 2 / 2⁸ = 0.0078, doubled by Holm
    assert rows["p_first"].to_dict() == {"first": "", "second": "0.031", "third": "0.016", "unranked": ""}


def test_several_seeds_of_an_attack_are_a_range_and_the_worst_case(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1110"})
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "0011"}, seed=1)
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra"], row["ra_seeds"], row["ra_worst"]) == ("25.00", "50.00–75.00", "25.00")


def test_training_seeds_are_rows_and_a_range(tmp_path: Path):
    for name, seed, marks in (("moe-at", 0, "1110"), ("moe-at-s1", 1, "1000"), ("moe-at-s11", 11, "1100")):
        info = {"seed": seed, "checkpoint_sha256": f"{seed:064}"}
        save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": marks}, model=name, info=info)
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1111"}, model="dense-at", info={"seed": 0})
    (board,) = boards(tmp_path)
    assert views.markdown(board).count("training seeds") == 1
    last = [line.strip("| ").split() for line in views.markdown(board).splitlines() if line.startswith("| moe-at ")][-2]
    assert " ".join(last).replace(" | ", "|") == "moe-at|0, 1, 11|100.00|25.00–75.00|25.00–75.00"


def test_pgd_far_above_autoattack_is_flagged(tmp_path: Path):
    for model, marks in (("near", "1" * 8 + "00"), ("far", "1" * 7 + "000")):
        save(tmp_path, "pgd", {"clean": "1" * 10, "pgd": "1" * 9 + "0"}, model=model)
        save(tmp_path, "autoattack", {"clean": "1" * 10, "apgd-ce": marks}, model=model)
    assert table(tmp_path)["flags"].to_dict() == {"near": "", "far": "PGD 20.0 points above AutoAttack"}


def test_what_is_known_of_the_model_is_said_once(tmp_path: Path):
    for suite in ("pgd", "autoattack"):
        save(tmp_path, suite, {"clean": "11", suite: "11"}, model_flags=("outputs are probabilities",))
    assert table(tmp_path).loc["dense-at", "flags"] == "outputs are probabilities"
    assert table(tmp_path).loc["dense-at", "rank"] == "1"


def test_a_clean_accuracy_that_differs_between_suites_is_flagged(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "110", "apgd-ce": "11."})
    save(tmp_path, "pgd", {"clean": "101", "pgd": "1.1"})  # the same accuracy, on other images
    assert "SA differs between suites" in table(tmp_path).loc["dense-at", "flags"]


@pytest.mark.parametrize("flag", UNRANKED)
def test_a_model_that_is_no_function_of_the_image_has_no_rank(flag: str, tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "11", "apgd-ce": "11"}, model_flags=(flag,))
    assert table(tmp_path).loc["dense-at", "rank"] == ""


def test_hidden_routes_have_no_rank_and_routes_inside_or_no_gradient_need_adaptive(tmp_path: Path):
    for model, flag in (
        ("dense", "other"),
        ("hidden", f"{HIDDEN_ROUTES}gt in M"),
        ("inside", f"{ROUTES_INSIDE}m.router"),
        ("flat", NO_GRADIENT),
        ("none", f"{DECLARED}routes{THOUGH} (argmax in M)"),
    ):
        save(tmp_path, "autoattack", {"clean": "11", "apgd-ce": "11"}, model=model, model_flags=(flag,))
    assert table(tmp_path)["rank"].to_dict() == {"dense": "1"} | dict.fromkeys(("hidden", "inside", "flat", "none"), "")
    for model in ("hidden", "inside", "flat", "none"):
        save(tmp_path, "adaptive", {"clean": "11", "route": "11"}, model=model)
    ranks = table(tmp_path)["rank"].to_dict()
    assert ranks["hidden"] == ""
    assert sorted(ranks[model] for model in ("dense", "inside", "flat", "none")) == ["1"] * 4


def test_adaptive_that_attacked_nothing_proves_nothing(tmp_path: Path):
    save(tmp_path, "autoattack", {"clean": "11", "apgd-ce": "11"}, model="m", model_flags=(f"{ROUTES_INSIDE}router",))
    save(tmp_path, "adaptive", {"clean": "11"}, model="m")
    save(tmp_path, "adaptive", {"clean": "00"}, model="all wrong", model_flags=(f"{ROUTES_INSIDE}router",))
    assert table(tmp_path).loc["m", "rank"] == ""
    (board,) = boards(tmp_path)
    lacks = {row.name: [str(lack) for lack in row.lacks] for row in board.rows}
    assert any("its routes are hidden from suite `adaptive`" in lack for lack in lacks["m"])
    assert any("suite `adaptive` had nothing to attack" in lack for lack in lacks["all wrong"])


def test_rows_of_one_name_are_told_apart_by_what_differs(tmp_path: Path):
    for weights, marks in (("a", "1100"), ("b", "1110")):
        save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": marks}, info={"checkpoint_sha256": 64 * weights})
    for combine in ("logits", "probs"):
        save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1100"}, combine=combine, model="other")
    for gates in ((), ("none",), ("a.gate", "b.gate")):
        save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1100"}, gates=gates, model="gated")
    save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "1000"}, model="alone")
    (board,) = boards(tmp_path)
    names = [row.name for row in board.rows]
    assert sorted(names) == [
        "alone",
        "dense-at (checkpoint aaaaaaaa)",
        "dense-at (checkpoint bbbbbbbb)",
        "gated (gates a.gate, b.gate)",
        "gated (gates none)",
        "gated (no gates named)",
        "other (combine logits)",
        "other (combine probs)",
    ]
    assert all(f"| {name} " in views.markdown(board) for name in names)


def test_where_nothing_is_finished_what_was_stopped_is_told(tmp_path: Path):
    with pytest.raises(UnusableInput, match=r"no finished run below '.*': run one with: bench run$"):
        boards(tmp_path)
    for run in ("a", "b"):
        blocks = tmp_path / "digits" / run / "blocks"
        blocks.mkdir(parents=True)
        for number in range(2):
            (blocks / f"block-{number:05d}.parquet").touch()
    with pytest.raises(UnusableInput, match="2 are not finished: start their commands again"):
        boards(tmp_path)

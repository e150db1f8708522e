"""RobustBench's JSON: the board's numbers, nothing that flatters, and RobustBench renders it."""

import json
from pathlib import Path
from typing import Any

import pytest
import saved_runs

import bench.compat  # noqa: F401  # makes robustbench importable
from bench.boards.columns import percent
from bench.boards.robustbench import write_model_info
from bench.boards.rows import board_rows, finished_runs
from bench.cli import main
from bench.errors import UnusableInput
from bench.results.flags import MASKED
from bench.results.schema import Result
from bench.spec import ThreatModel

MOE = {"num_experts": 4, "num_selected_experts": 1, "additional_data": False}
DUAL = {**MOE, "alpha": 0.7, "combine": "probs"}
DENSE = {"additional_data": True, "link": "https://x.org", "authors": "A, B", "venue": "ICML"}
#: As in RobustBench's files.
FIELDS = {
    **dict.fromkeys(["link", "name", "authors", "dataset", "venue", "architecture", "eps", "clean_acc"], str),
    **dict.fromkeys(["reported", "autoattack_acc", "external", "footnote"], str),
    "additional_data": bool,
    "number_forward_passes": int,
    "unreliable": bool,
}


def save(
    root: Path,
    suite: str,
    marks: str,
    clean: str = "11101",
    info: dict[str, Any] | None = None,
    flags: tuple[str, ...] = (),
    model_flags: tuple[str, ...] = (),
    checkpoint: str = "c",
    threat: tuple[Any, float] = ("Linf", 8 / 255),
    **fields: Any,
) -> Result:
    """A finished run on cifar10, one letter an example: 1 robust, 0 broken, e error."""
    attacks = {"clean": clean} if suite == "clean" else {"clean": clean, suite: marks}
    return saved_runs.save(
        root,
        suite,
        attacks,
        info={"architecture": "resnet10", "checkpoint_sha256": checkpoint * 64, **(info or DENSE)},
        fingerprint=f"{len(clean)}" * 16,
        flags=flags,
        model_flags=model_flags,
        **{"dataset": "cifar10", "threat_model": ThreatModel(norm=threat[0], eps=threat[1]), **fields},
    )


def written(root: Path) -> tuple[dict[str, Any], list[str]]:
    """The files' contents by their paths below the folder, and the lines about the rest."""
    done = write_model_info(finished_runs(root / "results"), root / "out")
    return {str(path.relative_to(root / "out")): json.loads(path.read_text()) for path in done.paths}, done.left_out


def test_every_field_by_hand(tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000")
    save(tmp_path / "results", "pgd", "10101")
    files, left_out = written(tmp_path)
    assert files == {
        "cifar10/Linf/dense-at.json": {
            "link": "https://x.org",
            "name": "dense-at",
            "authors": "A, B",
            "additional_data": True,
            "number_forward_passes": 1,
            "dataset": "cifar10",
            "venue": "ICML",
            "architecture": "resnet10",
            "eps": "8/255",
            "clean_acc": "80.00",
            "reported": "",
            "autoattack_acc": "40.00",
            "external": "20.00",  # only example 0 withstands both
            "footnote": "Linf 8/255, the first 5 test images; best known is the worst case, example by example, of"
            " autoattack-v1, pgd-v1; PGD 20.0 points above AutoAttack",
            "unreliable": False,
        }
    }
    assert left_out == []
    assert {key: type(value) for key, value in files["cifar10/Linf/dense-at.json"].items()} == FIELDS


def test_numbers_are_the_boards(tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11001")
    save(tmp_path / "results", "autoattack", "01101", seed=1)
    save(tmp_path / "results", "autoattack", "11101", suite_params={"version": "rand"})
    files, _ = written(tmp_path)
    (row,) = board_rows(finished_runs(tmp_path / "results"))
    assert row.scores.ra is not None
    (info,) = files.values()
    assert (info["clean_acc"], info["autoattack_acc"]) == (
        percent(row.scores.clean.value),
        percent(row.scores.ra.value),
    )
    assert info["autoattack_acc"] == "40.00"  # examples 1 and 4


@pytest.mark.parametrize(("model", "info"), [("moe-at", MOE), ("dual", DUAL), ("my:model", {"routing_visible": True})])
def test_route_that_nobody_attacked_is_unreliable(model: str, info: dict[str, Any], tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000", model=model, info=info)
    ((path, found),) = written(tmp_path)[0].items()
    assert path == f"cifar10/Linf/{model.replace(':', '_')}.json"
    assert found["unreliable"] is True
    assert "AutoAttack does not attack a route, so the accuracy may be too high; " in found["footnote"]
    assert "no adaptive at its standard budget or more" in found["footnote"]
    assert found["name"] == ("dual (α = 0.7, probs)" if model == "dual" else model)
    save(tmp_path / "results", "adaptive", "10000", model=model, info=info)
    ((_, found),) = written(tmp_path)[0].items()
    assert (found["unreliable"], found["external"]) == (False, "20.00")
    assert "no adaptive" not in found["footnote"]
    assert "does not attack" not in found["footnote"]


def test_what_the_model_shows_of_itself_is_unreliable_too(tmp_path: Path):
    for model, flag in (("masked", "R: router gradient zero on 100% of images"), ("fine", "routes flip for 50%")):
        save(tmp_path / "results", "autoattack", "11000", model=model, model_flags=(flag,))
    found = written(tmp_path)[0].values()
    assert {info["name"]: info["unreliable"] for info in found} == {"masked": True, "fine": False}


@pytest.mark.parametrize("beginning", MASKED)
def test_masked_gradients_are_unreliable(beginning: str, tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000", model_flags=(f"{beginning} and so on",))
    (found,) = written(tmp_path)[0].values()
    assert found["unreliable"] is True


@pytest.mark.parametrize(
    ("flag", "unreliable"),
    [
        ("AutoAttack: points with zero gradient", True),
        ("square: 3 successes that the re-check does not confirm", True),
        ("partial copy: 1,000 of 10,000 test images", False),
    ],
)
def test_what_autoattack_itself_doubts_is_unreliable(flag: str, unreliable: bool, tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000", flags=(flag,))
    (found,) = written(tmp_path)[0].values()
    assert found["unreliable"] is unreliable
    assert found["footnote"].endswith(f"; autoattack: {flag}")


def test_what_nobody_stated_is_not_made_up(tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000", info={"number_forward_passes": 2})
    (found,) = written(tmp_path)[0].values()
    assert (found["additional_data"], found["authors"], found["venue"]) == (None, "", "")
    assert "extra data not stated" in found["footnote"]
    assert found["number_forward_passes"] == 2


def test_what_has_no_file_is_said(tmp_path: Path):
    results = tmp_path / "results"
    save(results, "autoattack", "11000", dataset="digits")
    save(results, "autoattack", "11000", dataset="digits", model="moe-at")
    save(results, "autoattack", "11000", threat=("L1", 12.0))
    save(results, "pgd", "11000", model="only-pgd")
    save(results, "autoattack", "11000", model="other", suite_params={"version": "rand"})
    bad = save(results, "autoattack", "1100e", model="failed")
    assert written(tmp_path) == ({}, [
        "RobustBench has no board of cifar10 L1: dense-at",
        "RobustBench has no board of digits Linf: dense-at, moe-at",
        "without the default autoattack: only-pgd, other",
        f"runs with errors: autoattack on failed, cifar10 Linf 8/255 (run {bad.run})",
    ])  # fmt: skip
    assert list((tmp_path / "out").iterdir()) == []


def test_models_do_not_overwrite_each_other(tmp_path: Path):
    results = tmp_path / "results"
    for alpha in (0.3, 0.7):
        save(results, "autoattack", "11000", model="dual", info={**DUAL, "alpha": alpha}, alpha=alpha)
    for checkpoint in "de":
        save(results, "autoattack", "11000", checkpoint=checkpoint, model="again")
    save(results, "autoattack", "11000", threat=("L2", 0.5))
    save(results, "autoattack", "11000")
    save(results, "autoattack", "110", clean="110", model="set")
    save(results, "autoattack", "11000", model="set", threat=("Linf", 2 / 255))
    for model in ("a:b", "a/b"):
        save(results, "autoattack", "11000", model=model)
    files, _ = written(tmp_path)
    assert {path for path in files if "a_b" not in path} == {
        "cifar10/L2/dense-at.json",
        "cifar10/Linf/dense-at.json",
        "cifar10/Linf/again_checkpoint-dddddddddddd.json",
        "cifar10/Linf/again_checkpoint-eeeeeeeeeeee.json",
        "cifar10/Linf/dual_alpha-0.3.json",
        "cifar10/Linf/dual_alpha-0.7.json",
        "cifar10/Linf/set_eps-2_255_n-5_set-555555555555.json",
        "cifar10/Linf/set_eps-8_255_n-3_set-333333333333.json",
    }
    assert {info["name"] for path, info in files.items() if "a_b_name-" in path} == {"a:b", "a/b"}
    assert files["cifar10/L2/dense-at.json"]["eps"] == "0.5"


def test_same_runs_same_bytes_and_what_is_not_ours_is_named(tmp_path: Path):
    save(tmp_path / "results", "autoattack", "11000")
    assert written(tmp_path)[1] == []
    path = tmp_path / "out/cifar10/Linf/dense-at.json"
    before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino)
    stale = path.with_name("stale.json")
    stale.write_text("{}")
    assert written(tmp_path)[1] == [f"of no row, and not touched: {stale}"]
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert sorted(path.parent.iterdir()) == [path, stale]


def test_nothing_to_show(tmp_path: Path):
    with pytest.raises(UnusableInput, match="no results folder"):
        write_model_info(finished_runs(tmp_path / "nowhere"), tmp_path)
    save(tmp_path / "results", "autoattack", "11000")
    (tmp_path / "file").touch()
    with pytest.raises(UnusableInput, match="cannot be written"):
        write_model_info(finished_runs(tmp_path / "results"), tmp_path / "file")


def test_robustbench_renders_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from robustbench.leaderboard.template import generate_leaderboard

    save(tmp_path / "results", "autoattack", "11100", model="weak<b>", info={"link": 'x"y'})
    save(tmp_path / "results", "pgd", "00000", model="weak<b>", info={"link": 'x"y'})
    save(tmp_path / "results", "autoattack", "11000", model="moe-at", info=MOE)
    save(tmp_path / "results", "autoattack", "10000")
    written(tmp_path)
    html = generate_leaderboard("cifar10", "Linf", models_folder=str(tmp_path / "out"))
    assert html == capsys.readouterr().out.removesuffix("\n")
    cells = [
        [cell.split(">", 1)[1] for cell in row.replace("</td>", "").replace("\n", "").split("<td")[1:]]
        for row in html.split("<tr>")[2:]
    ]
    assert [row[0] for row in cells] == ["1", "2", "3"]
    assert [row[2:7] for row in cells] == [  # by the best known accuracy
        ["80.00%", "40.00%", "40.00%", "yes", "no"],
        ["80.00%", "20.00%", "20.00%", "no", "yes"],
        ["80.00%", "60.00%", "0.00%", "no", "unknown"],
    ]
    assert cells[0][1].startswith('<a href="">moe-at</a><br>Linf 8/255, the first 5 test images; ')
    assert cells[2][1].startswith('<a href="x&#34;y">weak&lt;b&gt;</a>')
    assert cells[1][7:] == ["resnet10", "ICML</tr></table>".removesuffix("</table>")]


def test_the_command_says_what_it_wrote_and_what_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save(tmp_path / "results", "autoattack", "11000")
    save(tmp_path / "results", "autoattack", "11000", dataset="digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["leaderboard", "--format", "robustbench", "--out", "out"])
    assert (stopped.value.code, *capsys.readouterr()) == (
        0,
        "",
        "out/cifar10/Linf/dense-at.json\nleft out: RobustBench has no board of digits Linf: dense-at\n",
    )

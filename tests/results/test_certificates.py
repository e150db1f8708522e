"""Certificates in the store, on the boards, and against what attacks have found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.boards import views
from bench.boards.leaderboard import boards
from bench.errors import UnusableInput
from bench.registry import CERTIFIERS
from bench.results.certificates import (
    BELIEVED,
    CERTIFICATE_COLUMNS,
    CertificateFolder,
    Certification,
    CertifiedShares,
    certified_shares,
    check_certificates,
    conflicts,
    read_certificates,
)
from bench.results.schema import VERDICT_COLUMNS, Accuracy, Result
from bench.results.store import RunFolder, read_runs, run_folder
from bench.results.table import Table
from bench.spec import ModelInfo, RunSpec, ThreatModel

INFO = ModelInfo(name="m", architecture="cnn", checkpoint_sha256="c" * 64)
PROVENANCE: dict[str, Any] = {"environment": {}, "git_hash": None, "seconds": 1.0, "finished": "2030-01-01"}
MARKS = {"1": "certified", "0": "not_certified", "a": "abstain", "-": "not_applicable", "s": "not_supported"}


def spec(suite: str, n: int, **fields: Any) -> RunSpec:
    given = {"model": "m", "dataset": "digits", "suite": suite, "n_examples": n}
    given["suite_version"] = BELIEVED.get(suite, 1)
    return RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})


def frame(norm: str = "Linf", **columns: Any) -> pd.DataFrame:
    """Rows of `methods`, {(method, ε): one letter an example}; class 0 is right, `wrong` has where it is not."""
    methods, wrong = columns.pop("methods"), columns.pop("wrong", ())
    rows = []
    for (method, eps), marks in methods.items():
        for i, mark in enumerate(marks):
            status = MARKS[mark]
            radius = {"certified": eps, "not_certified": 0.0}.get(status, np.nan)
            row = (i, f"{i:016x}", 0, method, norm, eps, status, radius, int(i in wrong), i not in wrong, -1, "")
            rows.append(row)
    return pd.DataFrame(rows, columns=list(CERTIFICATE_COLUMNS)).astype(CERTIFICATE_COLUMNS).assign(**columns)


def save(root: Path, rows: pd.DataFrame, suite: str = "certify-bounds", **fields: Any) -> Certification:
    info = INFO.model_copy(update=fields.pop("info", {}))
    params = fields.pop("params", {})
    made = spec(suite, rows["idx"].nunique(), **fields)
    clean = Accuracy.of(np.ones(made.n_examples, dtype=bool))
    result = Certification.from_rows(made, info, "f" * 16, clean, rows, params=params, **PROVENANCE)
    CertificateFolder(run_folder(root, made, result.run)).finish(result, rows)
    return result


def attack(
    root: Path, rows: list[tuple[Any, ...]], n: int = 3, suite: str = "pgd", wrong: tuple[int, ...] = (), **fields: Any
) -> Result:
    """A run with clean rows for n images of class 0, and rows of (idx, attack, class, robust, linf, l2, expert).

    Images that are `wrong` are taken for class 1.
    """
    clean = [(i, "clean", int(i in wrong), i not in wrong, 0.0, 0.0, 0) for i in range(n)]
    frame = pd.DataFrame(
        [
            (i, f"{i:016x}", 0, name, "F", int(i in wrong), c, i not in wrong, ok, a, b, 0, e, "ok")
            for i, name, c, ok, a, b, e in clean + rows
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    made = spec(suite, n, **fields)
    result = Result.from_rows(made, INFO, "f" * 16, frame, **PROVENANCE)
    RunFolder(run_folder(root, made, result.run)).finish(result, frame)
    return result


def test_a_certification_is_what_its_rows_amount_to_and_lies_among_the_runs(tmp_path: Path):
    rows = frame(methods={("union", 0.2): "1101", ("route-stable", 0.2): "1000", ("routes", 0.1): "1111"}, wrong=(1,))
    made = save(tmp_path, rows)
    # certified and right: images 0 and 3; the rows of another ε than the run's are in no share
    assert {method: share.value for method, share in made.certified.items()} == {"union": 0.5, "route-stable": 0.25}
    assert made.statuses == {
        "union": {"certified": 3, "not_certified": 1},
        "route-stable": {"certified": 1, "not_certified": 3},
    }
    attack(tmp_path, [], n=4)
    (read,) = read_certificates(tmp_path)
    assert read.result == made
    pd.testing.assert_frame_equal(read.rows.frame(), rows)
    assert read.path.relative_to(tmp_path).parts[:4] == ("digits", "Linf-0.2", "certify-bounds-v3", "m")
    assert [run.result.spec.suite for run in read_runs(tmp_path)] == ["pgd"]
    with pytest.raises(ValueError, match="rows of 4 examples, not of 5"):
        Certification.from_rows(spec("x", 5), INFO, "f", made.clean_accuracy, rows, params={}, **PROVENANCE)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"status": "sure"}, "status is none of"),
        ({"method": "hope"}, "method is none of"),
        ({"method": "paper-formula"}, "never are"),
        ({"method": "smoothing-predict"}, "never are"),
        ({"radius": 0.1}, "radius below its ε"),
        ({"radius": np.nan}, "radius below its ε"),
        ({"predicted": -1}, "predicts nothing"),
        ({"idx": 0}, "several rows"),
        ({"eps": 1}, "columns or their types"),
        ({"norm": pd.Series(["Linf", None], dtype="str")}, "norm is missing"),
    ],
)
def test_rows_that_no_certification_can_have_are_refused(change: dict[str, Any], expected: str):
    rows = frame(methods={("union", 0.2): "11"})
    check_certificates(Table.of(rows))
    with pytest.raises(ValueError, match=expected):
        check_certificates(Table.of(rows.assign(**change)))


def test_a_method_that_could_not_be_applied_has_no_share(tmp_path: Path):
    made = save(tmp_path, frame(methods={("network", 0.2): "--"}))
    assert made.certified == {}
    assert made.statuses == {"network": {"not_applicable": 2}}
    assert certified_shares(read_certificates(tmp_path), made.spec, INFO, "f" * 16) == CertifiedShares()


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    made = save(tmp_path, frame(methods={("union", 0.2): "10"}))
    file = run_folder(tmp_path, made.spec, made.run) / "result.json"
    claim = json.loads(file.read_text())
    claim["certified"]["union"]["value"] = 1.0
    file.write_text(json.dumps(claim))
    with pytest.raises(UnusableInput, match="the result says certified"):
        read_certificates(tmp_path)
    (file.parent / "certificates.parquet").unlink()
    with pytest.raises(UnusableInput, match=r"result\.json cannot be used"):  # what it is now, nobody can tell
        read_runs(tmp_path)


def test_the_boards_columns_by_hand(tmp_path: Path):
    attack(tmp_path, [], n=4)
    given = {"methods": {("union", 0.2): "1100", ("soft", 0.2): "1010"}, "wrong": (0,)}
    save(tmp_path, frame(**given))
    # at 0.1 all are certified, which does not hold at 0.2; at 0.3 image 3 is, which does
    save(tmp_path, frame(methods={("union", 0.1): "1111"}), threat_model=ThreatModel(norm="Linf", eps=0.1))
    save(tmp_path, frame(methods={("union", 0.3): "0001"}), threat_model=ThreatModel(norm="Linf", eps=0.3))
    save(tmp_path, frame("L2", methods={("union", 0.5): "1111"}), threat_model=ThreatModel(norm="L2", eps=0.5))
    routes = frame(methods={("routes", 0.1): "1110", ("routes-ball", 0.1): "1111"})
    far = routes.assign(radius=routes["radius"] + 0.15 * (routes["idx"] < 2))
    save(tmp_path, far, "certify-routes", threat_model=ThreatModel(norm="Linf", eps=0.1))
    smoothed = frame("L2", methods={("smoothing", 0.5): "11a0", ("smoothing-predict", 0.5): "0000"}, wrong=(1,))
    l2 = ThreatModel(norm="L2", eps=0.5)
    save(tmp_path, smoothed, "certify-smoothing", threat_model=l2, params={"sigma": 0.25})
    other = frame(methods={("union", 0.2): "1111"})
    save(tmp_path, other, info={"checkpoint_sha256": "d" * 64})  # another checkpoint
    save(tmp_path, other, alpha=0.7)
    (board,) = boards(tmp_path)
    text = views.csv(board)
    line = dict(zip(text.splitlines()[0].split(","), text.splitlines()[1].split(","), strict=False))
    # images 1 (union), 2 (soft), 3 (at 0.3); image 0 is certified for a wrong class
    assert line["certified_accuracy"] == "75.00"
    assert line["route_stable"] == "50.00"
    assert "25.00 (smoothed, σ 0.25, L2 0.5)" in text
    save(tmp_path, smoothed, "certify-smoothing", threat_model=l2, params={"sigma": 0.25, "failure_probability": 0.1})
    text = views.csv(boards(tmp_path)[0])
    assert "25.00 (smoothed, σ 0.25, L2 0.5, wrong with probability 0.1)" in text
    assert "certified, smoothed model" in views.markdown(board)


def test_smaller_balls_alone_fill_no_column(tmp_path: Path):
    made = attack(tmp_path, [], n=2)
    save(tmp_path, frame(methods={("union", 0.1): "11"}), threat_model=ThreatModel(norm="Linf", eps=0.1))
    assert certified_shares(read_certificates(tmp_path), made.spec, INFO, "f" * 16) == CertifiedShares()


BREAKS: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("inside", {}, (1, "pgd", 3, False, 0.1, 0.4, 0)),
    ("on the ball, as single precision has it", {}, (1, "pgd", 3, False, 0.2 + 5e-7, 0.4, 0)),
    ("by an attack that knows no ε, legally", {"suite": "torchattacks:CW"}, (1, "CW", 3, False, 0.1, 0.4, 0)),
    ("by another norm's attack", {"threat_model": ThreatModel(norm="L2", eps=9.0)}, (1, "cw", 3, False, 0.19, 5.0, 0)),
]


@pytest.mark.parametrize(("name", "fields", "row"), BREAKS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_certified_example_that_is_broken_is_a_conflict(
    name: str, fields: dict[str, Any], row: tuple[Any, ...], tmp_path: Path, bench: Callable[..., tuple[int, str, str]]
):
    attack(tmp_path / "r", [row], **fields)
    save(tmp_path / "r", frame(methods={("union", 0.2): "110"}))
    (found,) = conflicts(read_runs(tmp_path / "r"), read_certificates(tmp_path / "r"))
    assert (found.certificate["idx"], found.certificate["status"], found.witness["adv_pred"]) == (1, "certified", 3)
    status, out, err = bench("leaderboard", "--results", str(tmp_path / "r"), "--out", str(tmp_path / "boards"))
    assert status == 1
    both = out.strip().splitlines()
    assert "certify-bounds-v3" in both[0]
    assert "method=union" in both[0]
    assert f"{fields.get('suite', 'pgd').replace(':', '_')}-v1" in both[1]
    assert f"attack={row[1]}" in both[1]
    assert "error: 1 predictions" in err
    assert not (tmp_path / "boards").exists()


FINE: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("beyond", {}, (1, "pgd", 3, False, 0.201, 0.4, 0)),
    ("not certified", {}, (2, "pgd", 3, False, 0.1, 0.4, 0)),
    ("still that class", {}, (1, "pgd", 0, True, 0.1, 0.4, 0)),
    ("another route alone", {}, (1, "pgd", 0, True, 0.1, 0.4, 2)),
    ("another α", {"alpha": 0.9}, (1, "pgd", 3, False, 0.1, 0.4, 0)),
    ("another mixing", {"combine": "logits"}, (1, "pgd", 3, False, 0.1, 0.4, 0)),
    ("another model of that file", {"model": "m@ensemble"}, (1, "pgd", 3, False, 0.1, 0.4, 0)),
]


@pytest.mark.parametrize(("name", "fields", "row"), FINE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_contradict_is_none(name: str, fields: dict[str, Any], row: tuple[Any, ...], tmp_path: Path):
    attack(tmp_path, [row], **fields)
    save(tmp_path, frame(methods={("union", 0.2): "110"}))
    assert conflicts(read_runs(tmp_path), read_certificates(tmp_path)) == []


def test_a_clean_prediction_contradicts_too_and_so_does_a_route(tmp_path: Path):
    attack(tmp_path, [(0, "route", 0, True, 0.1, 0.4, 2), (1, "route", 0, True, 0.3, 0.9, 2)])
    save(tmp_path, frame(methods={("union", 0.2): "001"}, wrong=(2,)))  # certified for class 1, and F answers class 0
    save(tmp_path, frame(methods={("routes", 0.05): "111", ("routes", 0.2): "111"}, predicted=0), "certify-routes")
    found = conflicts(read_runs(tmp_path), read_certificates(tmp_path))
    # the clean row and its attack rows; the route of image 0 changed inside, that of image 1 outside
    assert sorted((one.certificate["method"], one.certificate["idx"], one.witness["attack"]) for one in found) == [
        ("routes", 0, "route"),
        ("union", 2, "clean"),
    ]


def test_an_answer_that_may_lie_outside_the_box_contradicts_only_what_needs_no_box(tmp_path: Path):
    rows: list[tuple[Any, ...]] = [(0, "CW", 3, True, 0.1, 0.4, 2), (1, "CW", 3, False, 0.1, 0.4, 2)]
    attack(tmp_path, rows, suite="torchattacks:CW", wrong=(1,))
    save(tmp_path, frame(methods={("union", 0.2): "110"}, wrong=(1,)))
    routes = frame(methods={("routes", 0.2): "110", ("routes-lp", 0.2): "110", ("routes-ball", 0.2): "110"})
    save(tmp_path, routes.assign(predicted=0), "certify-routes")
    found = conflicts(read_runs(tmp_path), read_certificates(tmp_path))
    # image 0 was not broken, and image 1 never stood: nobody has looked whether these answers are legal
    assert [(one.certificate["method"], one.certificate["idx"]) for one in found] == [
        ("routes-ball", 0),
        ("routes-ball", 1),
    ]


@pytest.mark.slow
def test_nothing_that_is_stored_contradicts_itself():
    stored = Path(__file__).parents[2] / "results"
    runs = read_runs(stored)
    assert runs
    assert conflicts(runs, read_certificates(stored)) == []


def test_what_an_older_version_certified_is_not_believed(tmp_path: Path):
    assert {f"certify-{name}": kind.version for name, kind in CERTIFIERS.items() if kind.version > 1} == BELIEVED
    rows = frame(methods={("network", 0.2): "111"})
    save(tmp_path, rows, suite_version=2)
    assert read_certificates(tmp_path) == []
    save(tmp_path, rows)
    assert [one.result.spec.suite_version for one in read_certificates(tmp_path)] == [3]


def test_what_is_never_certain_contradicts_nothing(tmp_path: Path):
    attack(tmp_path, [(0, "pgd", 3, False, 0.1, 0.1, 0)])
    l2 = ThreatModel(norm="L2", eps=0.5)
    save(tmp_path, frame("L2", methods={("smoothing", 0.5): "111"}), "certify-smoothing", threat_model=l2)
    assert conflicts(read_runs(tmp_path), read_certificates(tmp_path)) == []


def test_an_l1_certificate_is_held_against_l1_runs(tmp_path: Path):
    l1 = ThreatModel(norm="L1", eps=1.0)
    attack(tmp_path, [(0, "apgd", 3, False, 0.1, 0.4, 0)], threat_model=l1)
    attack(tmp_path, [(1, "pgd", 3, False, 0.001, 0.01, 0)])  # whose L1 distance nobody has kept
    save(tmp_path, frame("L1", methods={("union", 1.0): "111"}), threat_model=l1)
    (found,) = conflicts(read_runs(tmp_path), read_certificates(tmp_path))
    assert found.certificate["idx"] == 0

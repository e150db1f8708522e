"""The results folder: what is written is whole, what is read fits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pandas as pd
import pytest
from verdict_rows import INFO, PROVENANCE, ROWS, frame, result, spec

from bench.errors import UnusableInput
from bench.results import store
from bench.results.schema import Result
from bench.results.store import RunFolder, ensure_writable, read_runs, run_folder
from bench.results.witnesses import FILE, Witnesses
from bench.spec import dataset_folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A finished run below tmp_path."""
    made = result(ROWS)
    folder = RunFolder(run_folder(tmp_path, made.spec, made.run))
    folder.finish(made, ROWS)
    return folder


def test_layout_and_round_trip(tmp_path: Path, folder: RunFolder):
    made = result(ROWS)
    assert folder.path == tmp_path / "digits" / "Linf-8_255" / "pgd-v1" / "m" / made.run
    odd = run_folder(tmp_path, spec(dataset="imagefolder:/a b", suite="torchattacks:FGSM", model="a.b:c"), "k")
    assert odd == tmp_path / dataset_folder("imagefolder:/a b") / "Linf-8_255" / "torchattacks_FGSM-v1" / "a.b_c" / "k"
    assert sorted(path.name for path in folder.path.iterdir()) == ["result.json", "verdicts.parquet"]
    assert folder.finished() == made
    (run,) = read_runs(tmp_path)
    assert (run.result, run.path) == (made, folder.path)
    pd.testing.assert_frame_equal(run.verdicts(), ROWS)
    text = (folder.path / "result.json").read_text()
    assert text.endswith("}\n")
    assert text.startswith('{\n "schema_version": 1,\n "spec": {\n')


def test_what_a_kill_has_left_of_the_blocks_goes_when_the_run_is_found(folder: RunFolder):
    left = folder.path / "blocks" / "block-00000.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"")
    assert folder.finished() == result(ROWS)
    assert not left.parent.exists()


def test_a_block_of_a_run_that_another_process_finishes_meanwhile_is_not_missed(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def taken_away(path: Path, data: bytes) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(store, "write_atomically", taken_away)
    folder.write_block(0, ROWS, {})
    with pytest.raises(FileNotFoundError):  # nobody has finished this one
        RunFolder(tmp_path / "unfinished").write_block(0, ROWS, {})


def test_a_block_that_comes_after_its_run_was_finished_leaves_nothing(tmp_path: Path):
    """As by a worker of a cluster whose command was killed, and typed again."""
    folder = RunFolder(tmp_path / "run")
    folder.finish(result(ROWS), ROWS)
    folder.write_block(0, ROWS, {}, Witnesses(np.array([1]), ("pgd",), np.zeros((1, 1, 2, 2), dtype="float32")))
    assert {path.name for path in folder.path.iterdir()} == {"result.json", "verdicts.parquet"}


def test_attacks_stay_in_the_order_they_ran(tmp_path: Path):
    rows = frame(clean="1111", square="1011", apgd="1.01")
    made = Result.from_rows(spec(), INFO, "f", rows, ["square", "apgd", "last"], **PROVENANCE)
    RunFolder(tmp_path / "run").finish(made, rows)
    assert list(read_runs(tmp_path)[0].result.accuracy_after) == ["clean", "square", "apgd", "last"]


def written(folder: RunFolder) -> set[int]:
    return {block.index for block in folder.read_blocks()}


def test_blocks_come_back_with_their_side_data(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert (written(folder), folder.finished()) == (set(), None)
    side = {"flags": ["ünusual"], "passes": {"pgd": {"forwards": 8}}, "seconds": 0.5, "errors": []}
    folder.write_block(11, frame(2, clean="10", pgd="0."), {})
    folder.write_block(3, frame(0, clean="11", pgd="10"), side)
    assert sorted(path.name for path in (tmp_path / "run" / "blocks").iterdir()) == [
        "block-00003.parquet",
        "block-00011.parquet",
    ]
    assert written(folder) == {3, 11}
    assert [(block.index, block.side) for block in folder.read_blocks()] == [(3, side), (11, {})]
    assert [block.index for block in folder.read_blocks(known={3})] == [11]
    joined = pd.concat([block.rows for block in folder.read_blocks()], ignore_index=True)
    assert folder.finished() is None
    folder.finish(result(joined), joined)
    assert not (tmp_path / "run" / "blocks").exists()
    assert folder.finished() == result(joined)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_block_is_not_written(tmp_path: Path, kept: int):
    folder = RunFolder(tmp_path)
    for index in (0, 1):
        folder.write_block(index, ROWS, {})
    torn = tmp_path / "blocks" / "block-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:kept])
    (tmp_path / "blocks" / ".block-00002.parquet.0123").write_bytes(b"PAR1")
    (tmp_path / "blocks" / "block-00004.parquet").symlink_to("nowhere")
    ROWS.drop(columns="robust").to_parquet(tmp_path / "blocks" / "block-00005.parquet")
    assert written(folder) == {0}
    folder.write_block(1, ROWS, {})
    assert written(folder) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(("call", "replaced"), [("write_block", 0), ("finish", 0), ("finish", 1)])
def test_killed_in_the_middle_of_writing(tmp_path: Path, call: str, replaced: int):
    """SIGKILL before the file number `replaced` gets its name: the run is unfinished, its blocks are all there."""
    folder = RunFolder(tmp_path / "run")
    folder.write_block(0, ROWS, {})
    ROWS.to_pickle(tmp_path / "rows")
    (tmp_path / "result").write_text(result(ROWS).model_dump_json())
    child = f"""
        import os, signal, pandas as pd
        from pathlib import Path
        from bench.results.schema import Result
        from bench.results.store import RunFolder
        rows, folder, replace, left = pd.read_pickle("rows"), RunFolder(Path("run")), os.replace, [{replaced}]
        def kill(*paths):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            replace(*paths)
        os.replace = kill
        if {call!r} == "finish":
            folder.finish(Result.model_validate_json(Path("result").read_text()), rows)
        folder.write_block(1, rows, {{}})
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", dedent(child)], cwd=tmp_path, env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert folder.finished() is None
    assert read_runs(tmp_path) == []
    assert written(folder) == {0}
    folder.finish(result(ROWS), ROWS)
    assert [run.result for run in read_runs(tmp_path)] == [result(ROWS)]


def edited(**changes: Any) -> Callable[[Path], None]:
    """Changes values of result.json, by their dotted path."""

    def edit(path: Path) -> None:
        file = path / "result.json"
        content = json.loads(file.read_text())
        for key, value in changes.items():
            *outer, last = key.split("__")
            inner = content
            for name in outer:
                inner = inner[name]
            inner[last] = value
        file.write_text(json.dumps(content))

    return edit


def half(path: Path) -> None:
    (path / "result.json").write_bytes((path / "result.json").read_bytes()[:200])


def rewritten(rows: pd.DataFrame) -> Callable[[Path], None]:
    return lambda path: rows.to_parquet(path / "verdicts.parquet", index=False)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (half, "result.json cannot be used (Invalid JSON"),
        (
            lambda path: (path / "result.json").write_text("[1]"),
            "result.json cannot be used (Input should be an object",
        ),
        (lambda path: (path / "result.json").write_bytes(b"\xff\xfe"), "result.json cannot be used"),
        (edited(schema_version=2), "schema_version Input should be 1"),
        (edited(score=1), "score Extra inputs"),
        (edited(spec__threat_model__eps=-1), "spec.threat_model.eps"),
        (edited(spec__model="other"), "run key"),
        (edited(model_info__checkpoint_sha256="d" * 64), "run key"),
        (edited(subject="0"), "subject key 0"),
        (edited(spec__n_examples=5), "rows of 4 examples, not of 5"),
        (edited(clean_accuracy__n=5), "clean accuracy's n 5"),
        (edited(clean_accuracy__value=0.8), "clean accuracy 0.8, its spec and rows give 0.75"),
        (edited(robust_accuracy__value=0.5), "robust accuracy 0.5"),
        (edited(robust_accuracy__value=float("nan")), "robust accuracy nan, its spec and rows give 0.25"),
        (edited(accuracy_after__pgd=0.5), "accuracy after pgd 0.5"),
        (edited(errors=1), "errors 1"),
        (lambda path: (path / "verdicts.parquet").unlink(), "verdicts.parquet cannot be used ("),
        (lambda path: (path / "verdicts.parquet").write_bytes(b"PAR1"), "verdicts.parquet cannot be used"),
        (rewritten(ROWS.drop(columns="l2")), "'l2', 'float64'"),
        (rewritten(ROWS.iloc[:-1]), "robust accuracy"),
        (rewritten(frame(clean="1110", pgd="1e0.")), "errors 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, folder: RunFolder, spoil: Callable[[Path], None], expected: str
):
    spoil(folder.path)
    for read in (lambda: [run.verdicts() for run in read_runs(tmp_path)], folder.finished):
        with pytest.raises(UnusableInput) as refused:
            read()
        assert expected in str(refused.value)
        assert str(folder.path) in str(refused.value)
        assert "run again" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_finish_refuses_a_result_of_other_rows(tmp_path: Path):
    with pytest.raises(ValueError, match="robust accuracy"):
        RunFolder(tmp_path).finish(result(ROWS), frame(clean="1110", pgd="110."))
    assert list(tmp_path.iterdir()) == []


def test_runs_are_sorted_and_unfinished_ones_passed_over(tmp_path: Path):
    for name in ("b", "a", "c"):
        made = result(ROWS, model=name)
        RunFolder(tmp_path / name).finish(made, ROWS)
    RunFolder(tmp_path / "under way").write_block(0, ROWS, {})
    assert [run.result.spec.model for run in read_runs(tmp_path)] == ["a", "b", "c"]
    with pytest.raises(UnusableInput, match=r"no results folder '.*nowhere'"):
        read_runs(tmp_path / "nowhere")


def test_links_are_followed_and_a_run_that_is_reached_twice_is_read_once(tmp_path: Path):
    made = result(ROWS)
    RunFolder(tmp_path / "disk" / "run").finish(made, ROWS)
    (tmp_path / "results").mkdir()
    for name in ("one", "other"):
        (tmp_path / "results" / name).symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "results", target_is_directory=True)
    (run,) = read_runs(tmp_path / "results")
    assert (run.path, run.result) == (tmp_path / "results" / "one" / "run", made)


def test_a_folder_that_is_removed_meanwhile_holds_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    RunFolder(tmp_path / "run").finish(result(ROWS), ROWS)
    RunFolder(tmp_path / "under way").write_block(0, ROWS, {})
    walk = os.walk

    def removing(*given: Any, **more: Any) -> Any:
        for found in walk(*given, **more):
            if found[0].endswith("blocks"):
                shutil.rmtree(found[0])
            yield found

    monkeypatch.setattr(os, "walk", removing)
    assert [run.path.name for run in read_runs(tmp_path)] == ["run"]


@pytest.mark.parametrize("name", [b"~", b"~root", b"r\xe9sultats", b"a b", "ε".encode()])
def test_a_folder_of_any_name_is_written_and_found(name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    root = Path(os.fsdecode(name))  # relative: pyarrow expands a leading `~`
    folder = RunFolder(root / "run")
    witnesses = Witnesses(np.array([1]), ("pgd",), np.zeros((1, 1, 2, 2), dtype="float32"))
    folder.write_block(0, ROWS, {}, witnesses)
    assert written(folder) == {0}
    folder.finish(result(ROWS), ROWS, witnesses)
    assert [run.verdicts().equals(ROWS) for run in read_runs(root)] == [True]
    assert len(Witnesses.read(folder.path / FILE)) == 1
    assert os.listdir(b".") == [name]


def test_folder_that_cannot_be_written(tmp_path: Path):
    ensure_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/results")):
        with pytest.raises(UnusableInput, match=f"'{root}' cannot be written"):
            ensure_writable(root)


def test_rows_that_no_run_can_have_are_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="exactly one clean row"):
        RunFolder(tmp_path).write_block(0, ROWS.iloc[1:], {})
    assert not (tmp_path / "blocks").exists()

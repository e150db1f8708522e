"""Boards as files: one for each data set and threat model, the same bytes for the same runs."""

from pathlib import Path

import pytest
from saved_runs import markdown, save, table

from bench.boards.leaderboard import boards, write_boards
from bench.errors import UnusableInput
from bench.spec import ThreatModel, dataset_folder


def test_one_board_for_each_data_set_and_threat(tmp_path: Path):
    results, out = tmp_path / "results", tmp_path / "boards"
    save(results, "pgd", {"clean": "11", "pgd": "10"})
    save(results, "pgd", {"clean": "11", "pgd": "10"}, threat_model=ThreatModel(norm="L2", eps=8 / 255))
    save(results, "pgd", {"clean": "11", "pgd": "10"}, dataset="imagefolder:/my data")
    assert [path.name for path in write_boards(boards(results), out)] == [
        *["digits_L2-8_255.csv", "digits_L2-8_255.md", "digits_Linf-0.2.csv", "digits_Linf-0.2.md"],
        *[f"{dataset_folder('imagefolder:/my data')}_Linf-0.2.{suffix}" for suffix in ("csv", "md")],
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in write_boards(boards(results), out)
    )


def test_same_runs_same_bytes(tmp_path: Path):
    def fill(root: Path, models: str) -> None:
        for model in models:
            save(root, "pgd", {"clean": "1111", "pgd": "1100"}, model=model)
            save(root, "autoattack", {"clean": "1111", "b": "110.", "a": "11.."}, model=model, flags=("x" * 40,))

    fill(tmp_path / "one", "abc")
    fill(tmp_path / "two", "cab")
    written = write_boards(boards(tmp_path / "one"), tmp_path / "out")
    before = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in written]
    assert write_boards(boards(tmp_path / "two"), tmp_path / "out") == written
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in written] == before
    save(tmp_path / "two", "pgd", {"clean": "1111", "pgd": "0000"}, model="d")
    write_boards(boards(tmp_path / "two"), tmp_path / "out")
    assert all(path.read_bytes() != data for path, (data, _, _) in zip(written, before, strict=True))


def test_text_does_not_break_the_table(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "11", "pgd": "10"}, info={"trained": "a|b\nc"}, flags=("p|q",))
    lines = [line for line in markdown(tmp_path).splitlines() if line.startswith("|")]
    assert len(lines) == 3 + 3
    assert len({line.replace("\\|", "").count("|") for line in lines[:3]}) == 1
    assert len({line.replace("\\|", "").count("|") for line in lines[3:]}) == 1
    assert table(tmp_path).loc["dense-at", "trained"] == "a|b\nc"


def test_nothing_to_show(tmp_path: Path):
    with pytest.raises(UnusableInput, match="no results folder"):
        boards(tmp_path / "nowhere")
    with pytest.raises(UnusableInput, match="no finished run below"):
        markdown(tmp_path)
    save(tmp_path / "results", "pgd", {"clean": "11", "pgd": "10"})
    (tmp_path / "file").touch()
    with pytest.raises(UnusableInput, match="cannot be written"):
        write_boards(boards(tmp_path / "results"), tmp_path / "file")


def test_a_run_with_errors_is_left_out_and_named(tmp_path: Path):
    save(tmp_path, "pgd", {"clean": "1111", "pgd": "1110"})
    bad = save(tmp_path, "autoattack", {"clean": "1111", "apgd-ce": "0ee0"})
    row = table(tmp_path).loc["dense-at"]
    assert (row["ra"], row["ra_worst"]) == ("", "75.00")
    assert bad.run[:8] not in row["run"]
    note = f"Left out, for its 2 rows with status `error`: autoattack on dense-at, digits Linf 0.2 (run {bad.run})."
    assert markdown(tmp_path).endswith(f"\n\n{note}\n")

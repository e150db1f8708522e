"""Atomic file writes."""

import os
import stat
from pathlib import Path

import pytest

from bench.files import write_atomically, write_if_changed


@pytest.fixture(autouse=True)
def short_probes() -> None:
    """Everything as it is outside tests."""


def test_atomic_write_leaves_nothing_behind_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_folder_is_flushed_to_disk_after_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        flushed.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", record)
    write_atomically(tmp_path / "a", b"new")
    assert flushed == [(False, False), (True, True)]


def test_a_file_that_would_not_change_is_left_untouched(tmp_path: Path):
    for content, changes in ((b"one", True), (b"one", False), (b"two", True)):
        before = (tmp_path / "a").stat().st_ino if (tmp_path / "a").exists() else None
        write_if_changed(tmp_path / "a", content)
        assert ((tmp_path / "a").stat().st_ino != before, (tmp_path / "a").read_bytes()) == (changes, content)

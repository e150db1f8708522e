"""A full disk, a folder that is read-only, two commands at once: one line, nothing half-written, nothing lost."""

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from settled import settled

TINY = [
    word
    for pair in ("n_train=200", "n_val=50", "epochs=2", "width=4", "val_steps=1", "inner_steps=1")
    for word in ("--set", pair)
]
SUBJECT = ["--model", "moe-at", "--n-examples", "12", "--batch-size", "4", "--results", "{out}/results"]
COMMANDS = {
    "train": ["train", "moe-at", *TINY, "--checkpoints", "{out}/checkpoints"],
    "run": ["run", "--suite", "clean,pgd", "--set", "steps=2", *SUBJECT],
    "certify": ["certify", "--method", "routes", *SUBJECT],
    "leaderboard": ["leaderboard", "--out", "{out}/boards"],
    "report": ["report", "--out", "{out}/report.html"],
    "plot": ["plot", "attacks", "--out", "{out}/attacks.svg"],
}
ALL = [pytest.param(name, marks=[] if name == "run" else pytest.mark.slow) for name in COMMANDS]


class _Refusing:
    """An audit hook, which cannot be taken off again: `after` so many files and folders none is made below `root`."""

    root = ""
    after = error = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(self.root):
            return
        self.after -= 1
        if self.after < 0:
            raise OSError(self.error, os.strerror(self.error), os.fspath(path))


refusing = _Refusing()
sys.addaudithook(refusing)


@contextmanager
def refused(root: Path, after: int, error: int) -> Iterator[None]:
    refusing.root, refusing.after, refusing.error = str(root), after, error
    try:
        yield
    finally:
        refusing.root = ""


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def command(bench: Callable[..., Any], shelve: Any) -> Callable[..., tuple[int, list[str]]]:
    """command("run", "out"): what it writes goes below the folder `out`; exit status and lines of errors."""
    shelve(Path("checkpoints"), "moe-at")

    def call(name: str, out: str) -> tuple[int, list[str]]:
        words = [word.format(out=out) for word in COMMANDS[name]]
        words += ["--resume"] if name == "train" and list(Path(out).rglob("*.state*")) else []
        words += ["--device", "cpu"] if name in ("train", "run", "certify") else []
        status, _, err = bench(*words)
        return status, [line for line in err.splitlines() if line.startswith("error:") or "Traceback" in line]

    return call


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_loses_nothing(name: str, command: Callable[..., Any], tmp_path: Path):
    if name in ("leaderboard", "report", "plot"):
        assert command("run", ".")[0] == 0
    assert command(name, "whole") == (0, [])
    sizes = sorted({path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()})
    for size in (0, sizes[-1] - 1):
        with full(size):
            status, errors = command(name, "full")
        assert (status, len(errors)) == (2, 1), errors
        assert errors[0].startswith("error: 'full/")
        assert errors[0].endswith(
            "': File too large; make room, and start the same command again: it goes on from what is done"
        )
        assert unfinished(tmp_path / "full") == []
    assert command(name, "full") == (0, [])
    assert settled(tmp_path / "full") == settled(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_written_is_told_in_one_line_and_loses_nothing(
    name: str, command: Callable[..., Any], tmp_path: Path
):
    if name in ("leaderboard", "report", "plot"):
        assert command("run", ".")[0] == 0
    with refused(tmp_path / "whole", 10**6, errno.EROFS):
        assert command(name, "whole") == (0, [])
        writes = 10**6 - refusing.after
    for after in (0, writes // 2, writes - 1):
        folder = tmp_path / f"refused-{after}"
        with refused(folder, after, errno.EROFS):
            status, errors = command(name, folder.name)
        assert (status, len(errors)) == (2, 1), errors
        assert "Read-only file system" in errors[0]
        assert unfinished(folder) == []
        assert command(name, folder.name) == (0, [])
        assert settled(folder) == settled(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.xdist_group("served")
def test_two_commands_at_once_lose_nothing(serve: Callable[..., Any], tmp_path: Path):
    """Two runs and a certification, each by two processes at a time."""
    model = ["--model", "moe-standard", "--device", "cpu"]
    run = ["run", "--suite", "clean,pgd", "--set", "steps=5", "--n-examples", "12", "--batch-size", "3", *model]
    certify = ["certify", "--method", "routes", "--n-examples", "12", "--batch-size", "3", *model]
    for folder, commands in (("alone", [run, certify]), ("at once", [run, run, certify, certify])):
        words = [[*command, "--results", str(tmp_path / folder)] for command in commands]
        for at_once in [words] if folder == "at once" else [[one] for one in words]:
            statuses, said = serve(*at_once)
            assert statuses == [0] * len(at_once), said
    assert settled(tmp_path / "at once") == settled(tmp_path / "alone")
    assert not list((tmp_path / "at once").rglob("blocks"))

"""The state files of an unfinished training: whole or not used, and never executed."""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import UnusableInput
from bench.training.state import StateFiles

CPU = torch.device("cpu")
KEY = ["spec", "images", 1]


def state(epoch: int) -> dict[str, Any]:
    return {"key": KEY, "weights": torch.full((100,), float(epoch))}


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    """The state files of a training after its second epoch."""
    files = StateFiles(tmp_path / "dense-at.safetensors")
    assert not files.exist()
    assert files.read(KEY, CPU) is None
    files.write(state(1))
    files.write(state(2))
    return files


def epoch_of(files: StateFiles) -> float:
    found = files.read(KEY, CPU)
    assert found is not None
    return float(found["weights"][0])


def test_the_newest_is_read_and_the_one_before_it_is_kept(files: StateFiles):
    assert files.exist()
    assert epoch_of(files) == 2
    files.newest.unlink()
    assert files.exist()
    assert epoch_of(files) == 1


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda data, part=part: data[: int(part * len(data))] for part in (0.0, 0.05, 0.25, 0.5, 0.75)),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    ],
)
def test_a_damaged_newest_is_passed_over_and_does_not_replace_the_one_before(
    damage: Callable[[bytes], bytes], files: StateFiles, caplog: pytest.LogCaptureFixture
):
    files.newest.write_bytes(damage(files.newest.read_bytes()))
    again = StateFiles(files.checkpoint)
    assert epoch_of(again) == 1
    assert caplog.messages == [f"'{files.newest}' is damaged or not a state of bench: using the state before it"]
    again.write(state(3))
    assert epoch_of(again) == 3
    again.newest.unlink()
    assert epoch_of(again) == 1


def sealed(content: object) -> bytes:
    """What torch.save makes of it, behind the digest that a state has."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def test_nothing_is_executed(files: StateFiles, malicious: Callable[[Path], object], tmp_path: Path):
    executed = tmp_path / "executed"
    for content in (b"nonsense", pickle.dumps(malicious(executed), 2), sealed(malicious(executed))):
        for path in (files.newest, files.before):
            path.write_bytes(content)
        with pytest.raises(UnusableInput, match=rf"^'{files.newest}' is damaged .*: start again with --restart$"):
            files.read(KEY, CPU)
    assert not executed.exists()


def test_a_state_of_another_training_is_refused(files: StateFiles):
    with pytest.raises(UnusableInput, match=rf"^'{files.newest}' belongs to another spec, .* with --restart$"):
        files.read([*KEY[:2], 2], CPU)


def test_what_a_killed_training_has_left_is_removed_and_nothing_else(files: StateFiles):
    folder = files.checkpoint.parent
    temporary = [folder / name for name in (".dense-at.state.pt.1f", ".dense-at.safetensors.2e")]
    others = [folder / name for name in (".dense-at-s1.state.pt.1f", "dense-at-s1.state.pt", "dense-at.csv")]
    for file in (*temporary, *others):
        file.write_bytes(b"")
    files.remove()
    assert sorted(folder.iterdir()) == sorted(others)

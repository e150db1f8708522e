"""What lies beside the results: the images of a run, and how its model was trained."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.errors import UnusableInput
from bench.report.beside import clean_images, histories


def run_on(dataset: str, fingerprint: str) -> Any:
    return SimpleNamespace(
        result=SimpleNamespace(spec=SimpleNamespace(dataset=dataset, n_examples=3), fingerprint=fingerprint)
    )


def test_images_are_shown_where_they_are_those_of_the_run(tmp_path: Path):
    from bench.datasets.base import open_dataset

    data = open_dataset("digits").evaluation_set(tmp_path, 3)
    images = clean_images(tmp_path)
    found = images(run_on("digits", data.fingerprint))
    assert list(found) == [0, 1, 2]
    assert (found[2] == data.x[2].numpy()).all()
    with pytest.raises(UnusableInput, match="are not those of the run"):
        images(run_on("digits", "0" * 64))


def test_images_that_are_not_there_are_a_reason(tmp_path: Path):
    with pytest.raises(UnusableInput, match="is not a folder"):
        clean_images(tmp_path / "nowhere")(run_on("cifar10", "0" * 64))
    with pytest.raises(UnusableInput, match="unknown data set"):
        clean_images(tmp_path)(run_on("of-a-plugin", "0" * 64))


def test_a_training_belongs_to_the_checkpoint_beside_it(tmp_path: Path):
    folder = tmp_path / "digits" / "Linf"
    folder.mkdir(parents=True)
    (folder / "moe-at.safetensors").write_bytes(b"weights")
    (folder / "moe-at.csv").write_text("epoch,loss\n1,2.5\n")
    (folder / "alone.csv").write_text("epoch,loss\n1,2.5\n")
    (folder / "empty.safetensors").write_bytes(b"others")
    (folder / "empty.csv").write_text("")
    found = histories([tmp_path, tmp_path / "nowhere"])
    assert list(found) == [hashlib.sha256(b"weights").hexdigest()]
    assert found[hashlib.sha256(b"weights").hexdigest()]["loss"].tolist() == [2.5]

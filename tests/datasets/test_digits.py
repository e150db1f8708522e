"""scikit-learn's digits: the split, and the constants that were worked out once."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from bench.datasets.base import Split, open_dataset
from bench.errors import UnusableInput

DIGITS = open_dataset("digits")
NONE = Path("nowhere")  # it needs no root


def test_the_split_is_the_archive_cut_in_two() -> None:
    archive = load_digits()
    train, test = DIGITS.read("train", NONE), DIGITS.read("test", NONE)
    assert torch.equal(torch.cat([train.x, test.x]).squeeze(1).double(), torch.from_numpy(archive.images))
    assert torch.cat([train.y, test.y]).tolist() == archive.target.tolist()
    assert (len(train.y), len(test.y)) == (1297, 500)
    assert (train.x.dtype, train.y.dtype, train.x.shape[1:]) == (torch.uint8, torch.int64, DIGITS.input_shape)


@pytest.mark.parametrize(("split", "n"), [("train", 1297), ("test", 500)])
def test_a_beginning(split: Split, n: int) -> None:
    images, whole = DIGITS.read(split, NONE, 7), DIGITS.read(split, NONE)
    assert torch.equal(images.x, whole.x[:7])
    assert torch.equal(images.y, whole.y[:7])
    assert images.available == images.published == whole.available == n


def test_white_is_one() -> None:
    x = DIGITS.read("train", NONE).floats()
    assert (x.min(), x.max()) == (0, 1)


def test_mean_and_std_are_the_training_images() -> None:
    x = DIGITS.read("train", NONE).floats()
    assert x.mean().item() == pytest.approx(DIGITS.mean[0], abs=5e-5)
    assert x.std().item() == pytest.approx(DIGITS.std[0], abs=5e-5)


def test_evaluation_set() -> None:
    data = DIGITS.evaluation_set(NONE, None)
    assert (len(data), data.note) == (500, "")
    with pytest.raises(UnusableInput, match="--n-examples 501 is more than the 500 test images"):
        DIGITS.evaluation_set(NONE, 501)

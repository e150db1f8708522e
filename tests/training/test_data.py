"""The images of a training, and those that it holds out."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.datasets.base import fingerprint, open_dataset
from bench.errors import UnusableInput
from bench.models.checkpoints import read_header
from bench.spec import Recipe, TrainSpec
from bench.training.data import read_training_data, split
from bench.training.loop import train
from bench.training.sampling import hold_out

NONE = Path("nowhere")  # digits needs no data
DIGITS = open_dataset("digits")
Specs = Callable[..., TrainSpec]


@pytest.mark.parametrize(("n_train", "of"), [(200, 250), (None, 1297)])
def test_the_images_are_split_as_the_recipe_says_without_overlap(n_train: int | None, of: int, tiny_spec: Specs):
    data = read_training_data(tiny_spec("dense-at", n_train=n_train), DIGITS, NONE)
    assert len(data.images.y) == of
    train_set, held_out = set(data.train.tolist()), set(data.held_out.tolist())
    assert (len(train_set), len(held_out)) == (of - 50, 50)
    assert not train_set & held_out
    # what a checkpoint was trained on is found again from its recipe alone
    again = split(1297, Recipe(n_train=n_train, n_val=50))
    assert [part.tolist() for part in again] == [data.train.tolist(), data.held_out.tolist()]


def test_the_fingerprint_is_of_the_images_that_are_trained_on(tiny_spec: Specs):
    data = read_training_data(tiny_spec("dense-at"), DIGITS, NONE)
    images = DIGITS.read("train", NONE, 250)
    indices, _ = hold_out(250, 200, 50)
    assert data.fingerprint == fingerprint(images.x[indices], images.y[indices])


def test_too_few_images_are_refused(tiny_spec: Specs):
    with pytest.raises(UnusableInput, match=r"^digits has 1,297 training images .* fewer than .* = 1,300 asked for: "):
        read_training_data(tiny_spec("dense-at", n_train=1250), DIGITS, NONE)
    with pytest.raises(UnusableInput, match=r"^digits has 1,297 training images .* 1,298 asked for: "):
        read_training_data(tiny_spec("dense-at", n_train=None, n_val=1297), DIGITS, NONE)


def test_the_benchmark_of_held_out_images_scores_those_that_the_recipe_holds_out(tiny_spec: Specs, tmp_path: Path):
    accuracies = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/held_out.py"))["accuracies"]
    path = train(tiny_spec("dense-at", val_steps=50), NONE, tmp_path, "cpu")
    sa, ra, n = accuracies(path, NONE)
    validation = read_header(path).validation
    assert (sa, n) == (validation["sa"], 50)
    assert ra == pytest.approx(validation["ra"], abs=0.05)  # PGD-50 as well, from another random start

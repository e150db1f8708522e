"""The contract of every data set, and opening one by its name."""

from pathlib import Path

import pytest
import torch

from bench.datasets.base import Dataset, EvalSet, Images, Split, fingerprint, open_dataset
from bench.errors import UnusableInput
from bench.registry import DATASETS
from bench.spec import ThreatModel

NONE = Path("nowhere")


class Two(Dataset):
    """Two test images of a published five, 1×1, white = 4; what a test changes is given to it."""

    name = "two"
    num_classes = 2
    input_shape = (1, 1, 1)
    mean = (0.5,)
    std = (0.5,)
    threat_model = ThreatModel(norm="Linf", eps=0.1)
    recipe = "digits"

    def __init__(self, pixels: tuple[int, int] = (1, 4), labels: tuple[int, int] = (0, 1), published: int = 5) -> None:
        self.pixels, self.labels, self.published = pixels, labels, published

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        x = torch.tensor(self.pixels, dtype=torch.uint8).view(2, 1, 1, 1)
        return Images(x[:limit], torch.tensor(self.labels)[:limit], 4, 2, self.published)


@pytest.mark.parametrize("name", list(DATASETS))
def test_states_its_constants(name: str) -> None:
    if argument := DATASETS.argument(name):
        pytest.skip(f"{name} finds its constants in {argument}")
    dataset = open_dataset(name)
    assert dataset.name == name
    assert len(dataset.mean) == len(dataset.std) == dataset.input_shape[0]
    assert all(0 < value < 1 for value in dataset.mean + dataset.std)


@pytest.mark.parametrize(
    ("name", "threat", "recipe"),
    [
        ("digits", "Linf 0.2", "digits"),
        ("cifar10", "Linf 8/255", "cpu-cifar10"),
        ("tinyimagenet", "Linf 2/255", "cpu-tinyimagenet"),
    ],
)
def test_default_threat_and_recipe(name: str, threat: str, recipe: str) -> None:
    dataset = open_dataset(name)
    assert (str(dataset.threat_model), dataset.recipe) == (threat, recipe)


def test_images_that_come_again_are_noted() -> None:
    assert Two(published=2).evaluation_set(NONE, None).note == ""
    said = "1 of 2 images are copies of others, so intervals and p-values are too narrow"
    assert Two((4, 4), published=2).evaluation_set(NONE, None).note == said
    assert Two((4, 4)).evaluation_set(NONE, None).note == f"partial copy: 2 of 5 test images; {said}"


@pytest.mark.parametrize("name", ["digits:foo", "digits:", "cifar10:/data"])
def test_an_argument_that_is_not_taken(name: str) -> None:
    with pytest.raises(UnusableInput, match=f"'{name.partition(':')[0]}' takes no argument: '{name}'"):
        open_dataset(name)


@pytest.mark.parametrize("name", ["imagefolder", "imagefolder:"])
def test_an_argument_that_is_missing(name: str) -> None:
    with pytest.raises(UnusableInput, match=f"'{name}' has no PATH: write it as imagefolder:PATH"):
        open_dataset(name)


def test_an_unknown_name() -> None:
    with pytest.raises(UnusableInput, match="unknown data set 'cifar': did you mean 'cifar10'"):
        open_dataset("cifar")


def test_evaluation_set_is_the_beginning_in_floats() -> None:
    data: EvalSet = Two().evaluation_set(NONE, None)
    assert data.x.dtype == torch.float32
    assert data.x.flatten().tolist() == [0.25, 1.0]  # 1/4 and 4/4
    assert data.y.tolist() == data.idx.tolist() == [0, 1]
    first = Two().evaluation_set(NONE, 1)
    assert (len(first), first.x.tolist(), first.idx.tolist()) == (1, [[[[0.25]]]], [0])


@pytest.mark.parametrize(("published", "note"), [(5, "partial copy: 2 of 5 test images"), (2, ""), (0, "")])
def test_a_partial_copy_is_noted(published: int, note: str) -> None:
    assert Two(published=published).evaluation_set(NONE, 1).note == note


@pytest.mark.parametrize("n", [0, -1])
def test_n_examples_below_one(n: int) -> None:
    with pytest.raises(UnusableInput, match=f"--n-examples {n} must be at least 1"):
        Two().evaluation_set(NONE, n)


def test_n_examples_above_what_there_is() -> None:
    with pytest.raises(UnusableInput, match="--n-examples 3 is more than the 2 test images of two"):
        Two().evaluation_set(NONE, 3)


def test_fingerprint_is_of_pixels_and_labels_alone() -> None:
    def of(dataset: Two, n: int | None = None) -> str:
        return dataset.evaluation_set(NONE, n).fingerprint

    same = of(Two())
    assert same == of(Two(published=2)) == of(Two(), 2)
    others = [of(Two(pixels=(1, 3))), of(Two(labels=(0, 0))), of(Two(), 1), of(Two(pixels=(4, 1), labels=(1, 0)))]
    assert len({same, *others}) == 5


def test_fingerprint_tells_shapes_apart() -> None:
    x = torch.rand(2, 1, 4, 2)
    assert fingerprint(x, torch.zeros(2)) != fingerprint(x.view(2, 1, 2, 4), torch.zeros(2))

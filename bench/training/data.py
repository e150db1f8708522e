"""The images that a training uses, and which of them it holds out."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from bench.datasets.base import Dataset, Images, fingerprint
from bench.errors import UnusableInput
from bench.spec import Recipe, TrainSpec
from bench.training.sampling import hold_out

logger = logging.getLogger("bench")


@dataclass(frozen=True)
class TrainingData:
    """Training images, and the indices of those trained on and held out; the fingerprint is of those trained on."""

    images: Images
    train: Tensor
    held_out: Tensor

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.images.x[self.train], self.images.y[self.train])


def images_wanted(recipe: Recipe) -> int | None:
    """How many training images a recipe reads; None for all."""
    return None if recipe.n_train is None else recipe.n_train + recipe.n_val


def split(available: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Indices of the images that a recipe trains on and holds out, of a data set with `available` training images."""
    return hold_out(min(available, images_wanted(recipe) or available), recipe.n_train, recipe.n_val)


def read_training_data(spec: TrainSpec, dataset: Dataset, root: Path) -> TrainingData:
    """The data set's training images, as many as the recipe asks for; UnusableInput where there are too few."""
    recipe = spec.recipe
    wanted = images_wanted(recipe)
    images = dataset.read("train", root, wanted)
    if len(images.y) < (wanted or recipe.n_val + 1):
        raise UnusableInput(
            f"{spec.dataset} has {len(images.y):,} training images at '{root}', fewer than the n_train + n_val ="
            f" {wanted or recipe.n_val + 1:,} asked for: lower them with --set n_train=… or --set n_val=…"
        )
    if 0 < images.available < images.published:
        logger.warning("%s: partial copy: %d of %d training images", spec.dataset, images.available, images.published)
    return TrainingData(images, *split(len(images.y), recipe))

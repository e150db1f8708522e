"""What a data set is to the harness.

Axes: N = images, C = channels, H, W = height and width. Pixels are in [0, 1] once they are floats.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from bench.errors import UnusableInput
from bench.registry import DATASETS
from bench.spec import ThreatModel

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Images:
    """A split, or its beginning, as stored: integer pixels and labels.

    x: (N, C, H, W) uint8, white = `white`; y: (N,) int64; `available` images of the split lie at the data root, of the
    `published` ones that the full archive has (0 where nobody publishes a count).
    """

    x: Tensor
    y: Tensor
    white: int
    available: int
    published: int

    def floats(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """The chosen images as float32 in [0, 1], (n, C, H, W)."""
        return self.x[indices].float().div_(self.white)


@dataclass(frozen=True)
class EvalSet:
    """What a model is scored on: x (N, C, H, W) float32 in [0, 1], y (N,), idx (N,) positions in the archive's order.

    `fingerprint` is a SHA-256 over shape, pixels and labels: two sets with one fingerprint are the same images.
    `note`: in words, what is unusual about the set (a partial copy, repeated images), or empty.
    """

    x: Tensor
    y: Tensor
    idx: Tensor
    fingerprint: str
    note: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor, note: str = "") -> Self:
        """Of images and labels in the archive's order; images that come again are noted beside `note`."""
        again = len(x) - len({input_hash(image) for image in x})
        repeated = f"{again} of {len(x)} images are copies of others, so intervals and p-values are too narrow"
        notes = "; ".join(filter(None, (note, repeated * bool(again))))
        return cls(x, y, torch.arange(len(y)), fingerprint(x, y), notes)

    def __len__(self) -> int:
        return len(self.y)


def fingerprint(x: Tensor, y: Tensor) -> str:
    """SHA-256 (hex) over the shape, the float32 pixels and the int64 labels."""
    sha = hashlib.sha256(repr(tuple(x.shape)).encode())
    sha.update(x.float().contiguous().cpu().numpy().tobytes())
    sha.update(y.long().contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def input_hash(x: Tensor) -> str:
    """16 hex digits of a SHA-256 over one image's float32 pixels."""
    return hashlib.sha256(x.float().contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


class Dataset(ABC):
    """A data set: its constants, and how its images are read. Subclasses register with `DATASETS`.

    mean, std: per channel, in pixels of [0, 1], for the normalisation inside the models. `threat_model` is what it is
    attacked with, and `recipe` what it is trained by, by default. What follows the
    name and a colon, where it is registered with one, is given to the constructor; most take none.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threat_model: ThreatModel
    recipe: str

    @abstractmethod
    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images in the archive's order (all: None).

        UnusableInput where the data are missing or damaged, naming the folder or file and the next step.
        """

    def evaluation_set(self, root: Path, n_examples: int | None) -> EvalSet:
        """The first `n_examples` test images (all: None); UnusableInput if there are fewer, with their number."""
        if n_examples is not None and n_examples <= 0:
            raise UnusableInput(f"--n-examples {n_examples} must be at least 1")
        images = self.read("test", root, n_examples)
        if n_examples is not None and n_examples > len(images.y):
            raise UnusableInput(
                f"--n-examples {n_examples} is more than the {len(images.y)} test images of {self.name}"
            )
        partial = 0 < images.available < images.published
        note = f"partial copy: {images.available:,} of {images.published:,} test images" if partial else ""
        return EvalSet.of(images.floats(), images.y, note)


def open_dataset(name: str) -> Dataset:
    """The data set called `name`; what follows a colon (`imagefolder:PATH`) is its argument.

    UnusableInput for an unknown name, an argument that is missing, or one that is not taken.
    """
    kind, colon, argument = name.partition(":")
    cls: Callable[..., Dataset] = DATASETS[kind]
    if wanted := DATASETS.argument(kind):
        if not argument:
            raise UnusableInput(f"data set '{name}' has no {wanted}: write it as {kind}:{wanted}")
        return cls(argument)
    if colon:
        raise UnusableInput(f"data set '{kind}' takes no argument: '{name}' is written '{kind}'")
    return cls()

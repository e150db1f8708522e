"""Handwritten digits, 8×8 and grey: scikit-learn's copy of the UCI test set, which needs no network."""

from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch

from bench.datasets.base import Dataset, Images, Split
from bench.registry import DATASETS
from bench.spec import ThreatModel

N_TRAIN, N_TEST = 1297, 500


@cache
def _archive() -> tuple[torch.Tensor, torch.Tensor]:
    """All images (1797, 8, 8) and classes (1797,); read once, and never written to.

    From the package's file, as its `load_digits` reads it: to import that takes a second, for scipy's statistics.
    """
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(file), dtype=np.uint8, delimiter=","))
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].long()


@DATASETS.register("digits")
class Digits(Dataset):
    """1,797 images, white = 16; in the archive's order, the first 1,297 train and the last 500 test."""

    name = "digits"
    num_classes = 10
    input_shape = (1, 8, 8)
    mean = (0.3059,)
    std = (0.3755,)
    threat_model = ThreatModel(norm="Linf", eps=0.2)
    recipe = "digits"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images, (n, 1, 8, 8); `root` is not looked at."""
        images, classes = _archive()
        part = slice(N_TRAIN) if split == "train" else slice(N_TRAIN, None)
        x, y = images[part].unsqueeze(1).clone(), classes[part].clone()
        return Images(
            x[:limit], y[:limit], white=16, available=len(y), published=N_TRAIN if split == "train" else N_TEST
        )

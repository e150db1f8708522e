"""Handwritten digits, 8×8 and grey: scikit-learn's copy of the UCI test set, which needs no network."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.datasets.base import Dataset, Images, Split
from bench.registry import DATASETS
from bench.spec import ThreatModel

N_TRAIN, N_TEST = 1297, 500


@cache
def _archive() -> tuple[Any, Any]:
    """All images (1797, 8, 8) and classes; read once, and never written to."""
    from sklearn.datasets import load_digits  # a second, that only this data set should cost

    archive = load_digits()
    return archive.images, archive.target


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
        x = torch.from_numpy(images[part]).to(torch.uint8).unsqueeze(1)
        y = torch.from_numpy(classes[part]).long().clone()
        return Images(
            x[:limit], y[:limit], white=16, available=len(y), published=N_TRAIN if split == "train" else N_TEST
        )

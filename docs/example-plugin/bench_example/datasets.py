"""Data set `corners`: which of four corners of a noisy image is bright."""

from pathlib import Path

import torch

from bench.datasets.base import Dataset, Images, Split
from bench.registry import DATASETS
from bench.spec import ThreatModel


@DATASETS.register("corners")
class Corners(Dataset):
    """Made from random numbers, so that there is nothing to download; 8×8, grey."""

    name = "corners"
    num_classes = 4
    input_shape = (1, 8, 8)
    mean = (0.3,)
    std = (0.2,)
    threat_model = ThreatModel(norm="Linf", eps=0.1)
    recipe = "corners"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        count, seed = (400, 0) if split == "train" else (100, 1)
        x = torch.randint(0, 128, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        y = torch.arange(count) % 4
        for image, label in zip(x, y.tolist(), strict=True):
            top, left = 4 * (label // 2), 4 * (label % 2)
            image[:, top : top + 4, left : left + 4] += 100
        return Images(x[:limit], y[:limit], white=255, available=count, published=0)

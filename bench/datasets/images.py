"""Image files: how one is decoded, and how a list of them becomes a split.

Axes: C = channels, H, W = height and width. Images are RGB, so C = 3.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.datasets.base import Images
from bench.errors import UnusableInput


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image file, from its header; UnusableInput, naming the file, if it is no image."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _unreadable(path, error)


def decode(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """One image file as (3, H, W) uint8: grey and palette images become RGB, transparency is dropped.

    UnusableInput, naming the file, if it cannot be decoded, is not of `size` = (H, W), or has over 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            # before decoding: a header that claims a huge image costs nothing
            if (image.height, image.width) != size:
                raise UnusableInput(
                    f"{path} is {image.height}×{image.width} pixels, not {size[0]}×{size[1]}: images of a data set "
                    f"have one size, as ε is in pixels of the native image; resize them beforehand"
                )
            # Pillow clips these to 255 without a word
            if image.mode.startswith(("I", "F")):
                raise UnusableInput(f"{path} has more than 8 bits a channel: convert it to 8 bits beforehand")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except UnusableInput:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    if not path.exists():
        raise UnusableInput(f"{path} is missing: copy it from the archive again") from None
    why = " ".join(str(error).split())
    raise UnusableInput(f"{path} cannot be read as an image ({why}): replace or remove it") from None


def interleave(classes: Sequence[Sequence[Path]]) -> list[tuple[Path, int]]:
    """(file, label) of every class's first image, then of every class's second …: any beginning is balanced."""
    return [(path, label) for row in zip_longest(*classes) for label, path in enumerate(row) if path is not None]


def read_images(listed: Sequence[tuple[Path, int]], size: tuple[int, int], limit: int | None, published: int) -> Images:
    """The first `limit` of the `listed` (file, label), decoded; `available` is the number listed."""
    chosen = listed[:limit]
    x = np.empty((len(chosen), 3, *size), np.uint8)
    for i, (path, _) in enumerate(chosen):
        x[i] = decode(path, size)
    y = torch.tensor([label for _, label in chosen], dtype=torch.int64)
    return Images(torch.from_numpy(x), y, white=255, available=len(listed), published=published)

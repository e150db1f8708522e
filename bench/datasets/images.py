"""Image files: how one is decoded, and how a list of them becomes a split.

Axes: C = channels, 3 (RGB) or 1 (grey), H, W = height and width.
"""

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from bench.datasets.base import Images
from bench.errors import UnusableInput


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image file, from its header; UnusableInput, naming the file, if it is no image."""
    try:
        with _hushed(), Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _unreadable(path, error)


def decode(path: Path, shape: tuple[int, int, int], resize: bool = False) -> NDArray[np.uint8]:
    """One image file as `shape` = (C, H, W) uint8; transparency is dropped.

    For C = 3 grey and palette images become RGB. `resize`: one of another size is brought to that of `shape`, a
    square, by its shorter side, and the middle is kept.

    Raises:
        UnusableInput: it names the file, which cannot be decoded, is not H×W pixels large, has over 8 bits a channel,
            or, for C = 1, has colours.
    """
    channels, *size = shape
    try:
        with _hushed(), Image.open(path) as image:
            # before decoding: a header that claims a huge image costs nothing
            if [image.height, image.width] != size and not resize:
                raise UnusableInput(
                    f"{path} is {image.height}×{image.width} pixels, not {size[0]}×{size[1]}: images of a data set "
                    f"have one size, as ε is in pixels of the native image; imagefolder:PATH:size=N resizes and crops"
                )
            if _is_deep(image):
                raise UnusableInput(f"{path} has more than 8 bits a channel: convert it to 8 bits beforehand")
            colours = image.convert("RGB")
            if resize:  # on Pillow's images, as most training scripts have it
                from torchvision.transforms.functional import center_crop
                from torchvision.transforms.functional import resize as resize_shorter

                colours = center_crop(resize_shorter(colours, size[:1]), size)
            pixels = np.asarray(colours).transpose(2, 0, 1)
    except UnusableInput:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _unreadable(path, error)
    if channels == 1 and (pixels != pixels[:1]).any():
        raise UnusableInput(f"{path} has colours: read the folder as imagefolder:PATH, or make its images grey")
    return pixels[:channels]


def _hushed() -> AbstractContextManager[object]:
    """Without Pillow's warning of an image of very many pixels: none of another size than the data set's is decoded."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a channel has over 8 bits, of which Pillow would drop the lower ones without a word."""
    if image.mode.startswith(("I", "F")):
        return True
    for tile in image.tile:
        options = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        # what lies in the file, such as RGB;16B of a PNG; BMP's BGR;16 is 16 bits a pixel. A PPM states its white.
        if any(re.search(r";16[BLN]|;12", option) for option in options if isinstance(option, str)):
            return True
        if tile[0].startswith("ppm") and any(isinstance(option, int) and option > 255 for option in options):
            return True
    return False


def _unreadable(path: Path, error: Exception) -> NoReturn:
    if not path.exists():
        raise UnusableInput(f"{path} is missing: copy it from the archive again") from None
    why = " ".join(str(error).split())
    raise UnusableInput(f"{path} cannot be read as an image ({why}): replace or remove it") from None


def interleave(classes: Sequence[Sequence[Path]]) -> list[tuple[Path, int]]:
    """(file, label) of every class's first image, then of every class's second …: any beginning is balanced."""
    return [(path, label) for row in zip_longest(*classes) for label, path in enumerate(row) if path is not None]


def read_images(
    listed: Sequence[tuple[Path, int]],
    shape: tuple[int, int, int],
    limit: int | None,
    published: int,
    resize: bool = False,
) -> Images:
    """The first `limit` of the `listed` (file, label), decoded to `shape`; `available` is the number listed."""
    chosen = listed[:limit]
    x = np.empty((len(chosen), *shape), np.uint8)
    for i, (path, _) in enumerate(chosen):
        x[i] = decode(path, shape, resize)
    y = torch.tensor([label for _, label in chosen], dtype=torch.int64)
    return Images(torch.from_numpy(x), y, white=255, available=len(listed), published=published)

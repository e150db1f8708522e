"""Tiny-ImageNet (Stanford CS231n), in the layout of its archive."""

import re
from pathlib import Path

from bench.datasets.base import Dataset, Images, Split
from bench.datasets.download import archive_folder
from bench.datasets.images import interleave, read_images
from bench.errors import UnusableInput
from bench.registry import DATASETS
from bench.spec import ThreatModel

FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
PUBLISHED: dict[Split, int] = {"train": 100_000, "test": 10_000}


@DATASETS.register("tinyimagenet")
class TinyImageNet(Dataset):
    """100,000 training images, and the 10,000 validation images as the test set (the archive's own has no labels).

    64×64; the archive's grey images become RGB. Class k is line k of wnids.txt, which is not sorted: a model trained on
    sorted folder names has other outputs. The training images are interleaved, image 0 of every class before image 1 of
    any, so that a beginning is balanced; the test images are val_0, val_1, val_2 …, labelled by val_annotations.txt, or
    by their folders where `val/` was sorted into classes (val/<wnid>/*.JPEG or val/<wnid>/images/*.JPEG), as many
    training scripts want it: they are the same images in the same order.
    """

    name = "tinyimagenet"
    num_classes = 200
    input_shape = (3, 64, 64)
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    threat_model = ThreatModel(norm="Linf", eps=2 / 255)
    recipe = "cpu-tinyimagenet"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images, (n, 3, 64, 64), from `root`/tiny-imagenet-200; only these are decoded.

        The archive is downloaded where that folder is missing. UnusableInput if that fails, if a file or a class is
        missing, or if an image cannot be decoded or is not 64×64.
        """
        folder = archive_folder(root, FOLDER, URL, MD5)
        path = folder / "wnids.txt"
        wnids = _lines(path)
        if len(wnids) != self.num_classes or len(set(wnids)) != self.num_classes:
            raise UnusableInput(f"{path} does not name {self.num_classes} classes: unpack {URL} again")
        listed = _training_list(folder, wnids) if split == "train" else _test_list(folder, wnids)
        return read_images(listed, self.input_shape, limit, PUBLISHED[split])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UnusableInput(f"{path} is missing: unpack {URL} again, or pass --data-root DIR") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableInput(f"{path} cannot be read ({error}): unpack {URL} again") from None


def _numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """The images <prefix>_<number>.JPEG of a folder, by number."""
    named = {path: re.fullmatch(rf"{prefix}_([0-9]+)\.JPEG", path.name) for path in folder.glob("*.JPEG")}
    return {int(match[1]): path for path, match in named.items() if match}


def _training_list(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    classes = []
    for wnid in wnids:
        images = folder / "train" / wnid / "images"
        numbered = _numbered(images, wnid)
        if not numbered:
            raise UnusableInput(f"{images} holds no images: unpack {URL} again, or pass --data-root DIR")
        classes.append([numbered[number] for number in sorted(numbered)])
    return interleave(classes)


def _test_list(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    if not (folder / "val" / "images").is_dir() and any((folder / "val" / wnid).is_dir() for wnid in wnids):
        return _sorted_test_list(folder / "val", wnids)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    path = folder / "val" / "val_annotations.txt"
    numbered: dict[int, tuple[Path, int]] = {}
    for line in _lines(path):
        match = re.match(r"(val_([0-9]+)\.JPEG)\t(\w+)\t", line)  # four bounds of a box follow
        if not match or match[3] not in labels:
            raise UnusableInput(f"{path} has a line that names no image and class, {line!r}: unpack {URL} again")
        numbered[int(match[2])] = folder / "val" / "images" / match[1], labels[match[3]]
    return [numbered[number] for number in sorted(numbered)]


def _sorted_test_list(folder: Path, wnids: list[str]) -> list[tuple[Path, int]]:
    """Of a `val/` that was sorted into a folder for each class."""
    numbered: dict[int, tuple[Path, int]] = {}
    for label, wnid in enumerate(wnids):
        images = folder / wnid / "images" if (folder / wnid / "images").is_dir() else folder / wnid
        found = _numbered(images, "val")
        if not found:
            raise UnusableInput(f"{images} holds no images val_….JPEG: unpack {URL} again, or pass --data-root DIR")
        if twice := sorted(found.keys() & numbered):
            raise UnusableInput(f"{found[twice[0]]} is in another class as well: unpack {URL} again")
        numbered |= {number: (path, label) for number, path in found.items()}
    return [numbered[number] for number in sorted(numbered)]

"""A user's own images, in a folder for each class."""

import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NoReturn

from bench.datasets.base import Dataset, EvalSet, Images, Split
from bench.datasets.images import image_size, interleave, read_images
from bench.errors import UnusableInput
from bench.registry import DATASETS
from bench.spec import ThreatModel, dataset_name, folder_and_size

# torchvision's ImageFolder takes the same
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
LARGEST_OF_CIFAR = 48  # pixels of a side: what is larger is trained as small ViTs are on Tiny-ImageNet


@DATASETS.register("imagefolder:PATH")
class ImageFolder(Dataset):
    """PATH/train/<class>/** and PATH/val/<class>/** (PATH/test where there is no val), images of one size, as RGB.

    `PATH:size=N` reads images of any size: the shorter side is resized to N pixels and the middle is cropped, as
    torchvision's Resize(N) and CenterCrop(N) do. What is then attacked are these pixels.

    Classes are sorted by name, as torchvision's ImageFolder does; an image may lie in folders of its class, at any
    depth. Hidden files and folders (.DS_Store, .ipynb_checkpoints) are neither classes nor images. Within a split the
    images are interleaved, every class's first before any class's second, so that a beginning is balanced. PATH/train
    may be missing: what is there can still be evaluated. Nobody states the pixels' statistics, so mean and std are 0.5.

    name: with the absolute path, so that a folder has one name however it is written, and no other folder has it.
    input_shape: (3, H, W) of the first image; num_classes: the number of class folders.
    """

    kind: ClassVar[str] = "imagefolder"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    threat_model = ThreatModel(norm="Linf", eps=8 / 255)

    def __init__(self, path: str) -> None:
        """Looks at the folders and one image's header; UnusableInput if they are not laid out as above."""
        self.name = dataset_name(f"{self.kind}:{path}")
        argument, self.size = folder_and_size(self.name.partition(":")[2])
        folder = Path(argument)
        test = folder / "val" if (folder / "val").is_dir() else folder / "test"
        self._folders: dict[Split, Path] = {"train": folder / "train", "test": test}
        there = [split for split in self._folders.values() if split.is_dir()]
        if not there:
            where, setting, _ = argument.rpartition(":")
            if setting and Path(where).is_dir():
                raise UnusableInput(
                    f"'{Path(argument).name}' is no folder: what may stand behind one is :size=N, in pixels"
                )
            raise UnusableInput(f"{self.name} has no images: put them in {folder}/train/CLASS and {folder}/val/CLASS")
        self._classes = _classes(there[0])
        for other in there[1:]:
            if unlike := sorted(set(self._classes) ^ set(_classes(other))):
                raise UnusableInput(f"class '{unlike[0]}' is in only one of {there[0]} and {other}: both need the same")
        self.num_classes = len(self._classes)
        height, width = image_size(_images(there[0] / self._classes[0])[0])
        if self.size is not None:
            height = width = self.size
        self.input_shape = (len(self.mean), height, width)
        self.recipe = "cpu-cifar10" if max(height, width) <= LARGEST_OF_CIFAR else "cpu-vit-tinyimagenet"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images, (n, C, H, W); only these are decoded, and `root` is not looked at.

        UnusableInput if the split has no folder or a class has no image, or naming the first image that cannot be
        decoded or is of another size.
        """
        folder = self._folders[split]
        if not folder.is_dir():
            raise UnusableInput(f"{self.name} has no {split} images: put them in {folder}/CLASS")
        listed = interleave([_images(folder / name) for name in self._classes])
        return read_images(listed, self.input_shape, limit, published=0, resize=self.size is not None)

    def evaluation_set(self, root: Path, n_examples: int | None) -> EvalSet:
        found = super().evaluation_set(root, n_examples)
        if self.size is None:
            return found
        said = f"images resized and cropped to {self.size}×{self.size} pixels, which are what is attacked"
        return replace(found, note="; ".join(filter(None, (found.note, said))))


@DATASETS.register("imagefolder-grey:PATH")
class GreyImageFolder(ImageFolder):
    """The same of images without colours, which have one channel: input_shape is (1, H, W)."""

    kind = "imagefolder-grey"
    mean = (0.5,)
    std = (0.5,)


def _classes(folder: Path) -> list[str]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(visible):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            raise UnusableInput(f"{path} lies in no class: put it in a folder that is named for its class")
    names = sorted(path.name for path in visible if path.is_dir())
    if len(names) < 2:
        raise UnusableInput(f"{folder} needs a folder for each of two or more classes, and has {len(names)}")
    return names


def _images(folder: Path) -> list[Path]:
    """A class's images, in its folder and those below; links are followed, and no folder is read twice."""

    def fail(error: OSError) -> NoReturn:
        raise error

    paths: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            there = [Path(parent, name) for name in files if not name.startswith(".")]
            paths += [path for path in there if path.suffix.lower() in SUFFIXES]
        seen.add(real)
    if not paths:
        raise UnusableInput(f"{folder} holds no images: it takes {', '.join(sorted(SUFFIXES))}")
    return sorted(paths)

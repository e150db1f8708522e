"""A user's own images, in a folder for each class."""

from pathlib import Path

from bench.datasets.base import DATASETS, Dataset, Images, Split
from bench.datasets.images import image_size, interleave, read_images
from bench.errors import UnusableInput
from bench.spec import ThreatModel

# torchvision's ImageFolder takes the same
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
LARGEST_OF_CIFAR = 48  # pixels of a side: what is larger is trained as Tiny-ImageNet is


@DATASETS.register("imagefolder")
class ImageFolder(Dataset):
    """PATH/train/<class>/* and PATH/val/<class>/* (PATH/test where there is no val), images of one size, as RGB.

    Classes are sorted by name, as torchvision's ImageFolder does. Within a split the images are interleaved, every
    class's first before any class's second, so that a beginning is balanced. PATH/train may be missing: what is there
    can still be evaluated. Nobody states the pixels' statistics, so mean and std are 0.5.

    input_shape: (3, H, W) of the first image; num_classes: the number of class folders.
    """

    argument = "PATH"
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    threat_model = ThreatModel(norm="Linf", eps=8 / 255)

    def __init__(self, path: str) -> None:
        """Looks at the folders and one image's header; UnusableInput if they are not laid out as above."""
        self.name = f"imagefolder:{path}"
        folder = Path(path).expanduser()
        test = folder / "val" if (folder / "val").is_dir() else folder / "test"
        self._folders: dict[Split, Path] = {"train": folder / "train", "test": test}
        there = [split for split in self._folders.values() if split.is_dir()]
        if not there:
            raise UnusableInput(f"{self.name} has no images: put them in {folder}/train/CLASS and {folder}/val/CLASS")
        self._classes = _classes(there[0])
        for other in there[1:]:
            if unlike := sorted(set(self._classes) ^ set(_classes(other))):
                raise UnusableInput(f"class '{unlike[0]}' is in only one of {there[0]} and {other}: both need the same")
        self.num_classes = len(self._classes)
        height, width = image_size(_images(there[0] / self._classes[0])[0])
        self.input_shape = (3, height, width)
        self.recipe = "cpu-cifar10" if max(height, width) <= LARGEST_OF_CIFAR else "cpu-tinyimagenet"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images, (n, 3, H, W); only these are decoded, and `root` is not looked at.

        UnusableInput if the split has no folder or a class has no image, or naming the first image that cannot be
        decoded or is of another size.
        """
        folder = self._folders[split]
        if not folder.is_dir():
            raise UnusableInput(f"{self.name} has no {split} images: put them in {folder}/CLASS")
        listed = interleave([_images(folder / name) for name in self._classes])
        return read_images(listed, self.input_shape[1:], limit, published=0)


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        raise UnusableInput(f"{folder} needs a folder for each of two or more classes, and has {len(names)}")
    return names


def _images(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UnusableInput(f"{folder} holds no images: it takes {', '.join(sorted(SUFFIXES))}")
    return paths

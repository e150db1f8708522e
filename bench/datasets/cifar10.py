"""CIFAR-10 (Krizhevsky 2009), in the layout of its Python archive.

The archive is made of pickles, and a pickle runs what it names: they are read here without numpy or anything else of
Python's being reachable from them.
"""

import pickle
import pickletools
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.datasets.base import Dataset, Images, Split
from bench.datasets.download import archive_folder
from bench.errors import UnusableInput
from bench.registry import DATASETS
from bench.spec import ThreatModel

FOLDER = "cifar-10-batches-py"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
FILES: dict[Split, list[str]] = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
PUBLISHED: dict[Split, int] = {"train": 50_000, "test": 10_000}
PIXELS = 3 * 32 * 32


class _Dtype:
    """In place of a numpy.dtype: keeps the name that it was called with."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which mean nothing for uint8."""


class _Array:
    """In place of a numpy.ndarray: keeps its state. numpy's own __setstate__ trusts a dtype that the file describes."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.data = state


_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    # how Python 3 writes bytes in protocol 2
    ("_codecs", "encode"): lambda text, _encoding: text.encode("latin1"),
}


class _Unpickler(pickle.Unpickler):
    """Makes dicts, lists, numbers, text, bytes and the stand-ins above, and refuses whatever else a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which is refused")
        return _GLOBALS[module, name]


def read_batch(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """One batch file: pixels (n, 3072) uint8, read-only, and n labels; nothing of the file is ever executed.

    UnusableInput, naming the file, if it is damaged, asks for anything but an array, or holds anything but a batch.
    """
    try:
        content = path.read_bytes()
        # a memo number is a size to the unpickler: a single wrong byte makes it take gigabytes
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
                raise ValueError(f"it asks for {argument:,} memo entries")
        # Python 2 wrote the original archive: its strings, keys among them, are bytes
        return _checked(_Unpickler(BytesIO(content), encoding="bytes").load())
    except Exception as error:  # a damaged or hostile pickle raises whatever it leads to
        why = shorten(str(error), 200)  # it may quote the file
        raise UnusableInput(f"{path} is not a CIFAR-10 batch ({why}): replace it by the archive's, {URL}") from None


def _checked(batch: Any) -> tuple[NDArray[np.uint8], list[int]]:
    if not isinstance(batch, dict):
        raise ValueError("it holds no dict")
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    data, labels = batch.get("data"), batch.get("labels")
    if not (isinstance(data, _Array) and data.dtype.name == "u1" and data.shape[1:] == (PIXELS,)):
        raise ValueError(f"its data are not uint8 of shape (n, {PIXELS})")
    # a file that lies about the size fails in reshape
    x = np.frombuffer(data.data, np.uint8).reshape(data.shape, order="F" if data.is_fortran else "C")
    if not (isinstance(labels, list) and all(type(label) is int and 0 <= label < 10 for label in labels)):
        raise ValueError("its labels are not a list of numbers from 0 to 9")
    if len(labels) != len(x):
        raise ValueError(f"it has {len(x)} images and {len(labels)} labels")
    return x, labels


@DATASETS.register("cifar10")
class Cifar10(Dataset):
    """50,000 training images, data_batch_1 to 5 in order, and 10,000 test images, test_batch's; 32×32, RGB."""

    name = "cifar10"
    num_classes = 10
    input_shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    threat_model = ThreatModel(norm="Linf", eps=8 / 255)
    recipe = "cpu-cifar10"

    def read(self, split: Split, root: Path, limit: int | None = None) -> Images:
        """The split's first `limit` images, (n, 3, 32, 32), from `root`/cifar-10-batches-py.

        The archive is downloaded where that folder is missing. UnusableInput if that fails, if one of the split's files
        is missing, or if one is damaged.
        """
        folder = archive_folder(root, FOLDER, URL, MD5)
        paths = [folder / name for name in FILES[split]]
        for path in paths:
            if not path.is_file():
                raise UnusableInput(f"{path} is missing: unpack {URL} in {root}, or pass --data-root DIR")
        # all of them, whatever the limit: only a batch itself tells how many images it has
        batches = [read_batch(path) for path in paths]
        y = torch.tensor([label for _, labels in batches for label in labels])
        x = torch.from_numpy(np.concatenate([pixels for pixels, _ in batches])).view(-1, *self.input_shape)
        return Images(x[:limit], y[:limit], white=255, available=len(y), published=PUBLISHED[split])

"""What this machine has of what bench needs."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import bench
from bench.datasets.base import DATASETS, open_dataset
from bench.environment import versions
from bench.errors import UnusableInput
from bench.models.checkpoints import available


def examine(data_root: Path, checkpoints: Sequence[Path]) -> Iterator[tuple[str, str, bool]]:
    """(what, what was found, whether it is as it should be), one after the other."""
    yield "bench", bench.__version__, True
    for package, found in versions().items():
        yield package, found, found != "missing"
    yield "threads", str(torch.get_num_threads()), True
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "CUDA devices", ", ".join(cuda) or "none: models run on the CPU", True
    for module in ("autoattack", "robustbench"):
        try:
            importlib.import_module("bench.compat")
            importlib.import_module(module)
            yield f"import {module}", "works, mended by bench.compat", True
        except ImportError as error:
            yield f"import {module}", str(error), False
    for name, kind in DATASETS.items():
        if kind.argument:
            continue  # a user's own: it has no place to look in
        dataset = open_dataset(name)
        try:
            images = dataset.read("test", data_root, 1)
            partial = f" of {images.published:,}, a partial copy" if 0 < images.available < images.published else ""
            yield f"data: {name}", f"{images.available:,} test images{partial}", True
        except UnusableInput as error:
            yield f"data: {name}", str(error), True  # a data set that nobody uses need not be there
        norm = dataset.threat_model.norm
        yield f"models: {name}", ", ".join(available(name, norm, list(checkpoints))) or "none", True

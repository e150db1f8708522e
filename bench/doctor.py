"""What this machine has of what bench needs, and what a model shows of itself before it is scored."""

import importlib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate

import bench
from bench.console import duration
from bench.datasets.base import Dataset, open_dataset
from bench.environment import versions
from bench.errors import UnusableInput
from bench.evaluation.diagnosis import Diagnosis, diagnose
from bench.evaluation.plan import RunRequest, plan
from bench.models.checkpoints import available
from bench.registry import DATASETS
from bench.suites.base import DEFAULT_SUITES, Suite, open_suites

#: On so many test images a model is looked at, and timed in one batch.
LOOKED_AT = 128
#: The suites that are told of, where the data set's threat model has them.
SUITES = (*DEFAULT_SUITES, "components")


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
    for name in DATASETS:
        if DATASETS.argument(name):
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


def examine_model(
    model: str,
    dataset: str,
    data_root: Path,
    checkpoints: Sequence[Path],
    device: str = "cpu",
    gates: tuple[str, ...] = (),
) -> tuple[Diagnosis, int]:
    """What the model that `model` names shows on the data set, and how many test images there are.

    Raises:
        UnusableInput: the model or the data cannot be used; the message says why.
    """
    data = open_dataset(dataset)
    images = data.read("test", data_root, LOOKED_AT)
    suites = tuple(name for name, suite in open_suites(SUITES, {}).items() if _fits(name, suite, data))
    request = RunRequest(suites=suites, dataset=dataset, models=(model,), gates=gates, n_examples=len(images.y))
    return diagnose(plan(request, data_root, checkpoints), model, device), images.available


def _fits(name: str, suite: Suite, data: Dataset) -> bool:
    try:
        suite.check(name, data.name, data.threat_model)
    except UnusableInput:
        return False
    return True


def described(found: Diagnosis, images: int, width: int | None = None) -> str:
    """A line for each finding, of a problem what to do below it, and a table of the suites.

    images: how many the data set has, for which the times are told. width: of the terminal, if it is one.
    """
    indent = max(len(finding.what) for finding in found.findings) + 2
    lines: list[str] = []
    for finding in found.findings:
        for text in (finding.seen, f"→ {finding.remedy}" if finding.remedy else ""):
            room = (width or 10**6) - indent
            for number, line in enumerate(textwrap.wrap(text, room) if text else ()):
                head = finding.what if not number and text == finding.seen else ""
                lines.append(f"{head:<{indent}}{line}")
    rows = [
        [
            each.suite,
            each.why_not or "yes",
            *("–" if each.seconds is None else duration(count * each.seconds) for count in (100, images)),
        ]
        for each in found.suites
    ]
    heads = ["suite", "attacks it", "100 images", f"all {images:,}"]
    note = (
        f"About, in blocks of {LOOKED_AT} images that withstand everything: what is broken early costs less; a small"
        " block, or gates inside with many paths, several times as much, and both together up to twenty times. Before"
        f" it attacks, each suite looks at the model for about {duration(found.looked)}."
    )
    noted = textwrap.wrap(note, width or 10**6)
    return "\n".join([*lines, "", tabulate(rows, headers=heads, disable_numparse=True), "", *noted])

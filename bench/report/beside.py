"""What a report shows beside the results: the clean images, and how a model was trained. Loads torch for the images."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from bench.errors import UnusableInput
from bench.report.gallery import CleanImages, Image
from bench.results.store import Run


def clean_images(data_root: Path) -> CleanImages:
    """The images at `data_root` that a run was made on.

    UnusableInput where they are not there, or are others; each data set is read once.
    """

    @cache
    def read(dataset: str, n: int, fingerprint: str) -> Mapping[int, Image] | str:
        from bench.datasets.base import open_dataset  # loads torch, which only a report with pictures needs
        from bench.datasets.download import offline

        try:
            with offline():
                data = open_dataset(dataset).evaluation_set(data_root, n)
        except UnusableInput as error:
            return str(error)
        if data.fingerprint != fingerprint:
            return f"the images of {dataset} at '{data_root}' are not those of the run: pass its --data-root"
        return dict(zip(data.idx.tolist(), data.x.numpy(), strict=True))

    def of_run(run: Run) -> Mapping[int, Image]:
        found = read(run.result.spec.dataset, run.result.spec.n_examples, run.result.fingerprint)
        if isinstance(found, str):
            raise UnusableInput(found)
        return found

    return of_run


def histories(folders: Sequence[Path]) -> dict[str, pd.DataFrame]:
    """The epochs of each training whose CSV lies beside its checkpoint below `folders`, by the checkpoint's SHA-256."""
    found = {}
    for folder in folders:
        for table in sorted(folder.rglob("*.csv")):
            checkpoint = table.with_suffix(".safetensors")
            if checkpoint.is_file():
                try:
                    found[hashlib.sha256(checkpoint.read_bytes()).hexdigest()] = pd.read_csv(table)
                except (ValueError, OSError):  # of another kind, or being written
                    continue
    return found

"""Adversarial examples as small pictures: the clean image, the attacked one, and their difference. No torch.

Axes: C, H, W = channels, height, width. Pixels are in [0, 1].
"""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import UnusableInput
from bench.report.details import Model
from bench.results.metrics import broken
from bench.results.schema import suite_label
from bench.results.store import Run
from bench.results.table import Table
from bench.results.witnesses import FILE, Witnesses

Image = NDArray[np.float32]
#: The clean images (C, H, W) of a run by their idx; UnusableInput, with the reason, where they are not at hand.
CleanImages = Callable[[Run], Mapping[int, Image]]

SHOWN = 6  # pictures of a model
LARGEST = 128  # pixels of a side


@dataclass(frozen=True)
class Picture:
    """One adversarial example, and what F says of it."""

    run: Run
    idx: int
    attack: str
    label: int
    clean_pred: int
    adv_pred: int
    clean_expert: int  # -1: not visible
    adv_expert: int
    distance: float  # of the two images, in this norm: the run's where verdicts have it
    norm: str
    clean: str | None  # data URIs; None where the clean images are not at hand
    attacked: str
    difference: str | None

    @property
    def suite(self) -> str:
        """The suite with what is not its default."""
        return suite_label(self.run.result.spec)


@dataclass(frozen=True)
class Gallery:
    """Some of a model's adversarial examples; `missing` tells why the clean images are not shown."""

    pictures: tuple[Picture, ...]
    missing: str = ""


def gallery(model: Model, clean_images: CleanImages) -> Gallery:
    """Up to SHOWN adversarial examples that the model's runs kept, of as many attacks and classes as possible."""
    left = [found for run in model.row.runs for found in _kept(run, model.verdicts[run.path])]
    used: Counter[object] = Counter()
    pictures: list[Picture] = []
    missing = ""
    while left and len(pictures) < SHOWN:
        # the least shown image, then attack, then class; the first of equals
        chosen = min(left, key=lambda found: ([used[what] for what in found.shows], found.row["idx"]))
        left.remove(chosen)
        used.update(chosen.shows)
        clean: Image | None = None
        try:
            clean = clean_images(chosen.run)[chosen.row["idx"]]
        except UnusableInput as error:
            missing = str(error)
        pictures.append(_picture(chosen, clean))
    return Gallery(tuple(pictures), missing)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A verdict row of a broken example, and the image that broke it."""

    run: Run
    row: dict[str, Any]
    x_adv: Image

    @cached_property
    def shows(self) -> tuple[object, ...]:
        attack = (suite_label(self.run.result.spec), self.row["attack"])
        return ("image", self.row["idx"]), attack, ("class", self.row["label"])


def _kept(run: Run, verdicts: Table) -> list[_Kept]:
    try:
        kept = Witnesses.read(run.path / FILE)
    except (ValueError, OSError):  # none were kept, or not here
        return []
    images = dict(zip(zip(kept.idx.tolist(), kept.attack, strict=True), kept.x_adv, strict=True))
    rows = verdicts.where(broken(verdicts)).frame().drop_duplicates(["idx", "attack"]).to_dict("records")
    return [
        _Kept(run, {str(column): value for column, value in row.items()}, images[row["idx"], row["attack"]])
        for row in rows
        if (row["idx"], row["attack"]) in images
    ]


def _picture(kept: _Kept, clean: Image | None) -> Picture:
    columns = ("idx", "attack", "label", "clean_pred", "adv_pred", "clean_expert", "adv_expert")
    difference = None
    if clean is not None:
        change = kept.x_adv - clean
        difference = png(0.5 + 0.5 * change / (float(np.abs(change).max()) or 1.0))
    norm = "L2" if kept.run.result.spec.threat_model.norm == "L2" else "Linf"
    return Picture(
        run=kept.run,
        **{column: kept.row[column] for column in columns},
        distance=kept.row[norm.lower()],
        norm=norm,
        clean=None if clean is None else png(clean),
        attacked=png(kept.x_adv),
        difference=difference,
    )


def png(image: Image) -> str:
    """A data URI of a (C, H, W) image, large ones shrunk; unless it has three channels, the first in grey."""
    from PIL import Image as Pillow

    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    array = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    picture, buffer = Pillow.fromarray(array), io.BytesIO()
    picture.thumbnail((LARGEST, LARGEST), Pillow.Resampling.BOX)
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

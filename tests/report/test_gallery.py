"""Which adversarial examples are shown, and as what pictures."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.boards.leaderboard import Stored
from bench.errors import UnusableInput
from bench.report.details import Model, boards_with_models
from bench.report.gallery import SHOWN, gallery, png

CLEAN = {idx: np.full((1, 2, 2), 0.1 * idx + 0.05, dtype=np.float32) for idx in range(8)}


@pytest.fixture(scope="module")
def moe(results: Path) -> Model:
    ((_, models),) = [pair for pair in boards_with_models(Stored.read(results)) if pair[0].stem == "digits_Linf-0.2"]
    (model,) = (model for model in models if model.row.name == "moe")
    return model


def pixels(uri: str) -> list[list[int]]:
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data))).tolist()


def test_every_image_is_shown_before_one_is_shown_twice(moe: Model):
    found = gallery(moe, lambda run: CLEAN).pictures
    # kept are PGD's image 0 and the five that adaptive broke; AutoAttack's run has kept none
    assert {picture.idx for picture in found[:5]} == {0, 1, 2, 3, 4}
    assert [(picture.idx, picture.suite, picture.attack) for picture in found[5:]] == [(0, "pgd", "pgd")]
    assert len(found) == SHOWN


def test_a_picture_says_what_the_model_sees(moe: Model):
    (picture,) = (one for one in gallery(moe, lambda run: CLEAN).pictures if one.idx == 4)
    assert (picture.label, picture.clean_pred, picture.adv_pred) == (0, 0, 1)
    assert (picture.clean_expert, picture.adv_expert) == (0, 1)
    assert (picture.norm, picture.distance) == ("Linf", 0.1)
    assert picture.run.path.parts[-3:-1] == ("adaptive-v3", "moe")


def test_pixels_are_those_of_the_images_and_the_largest_change_is_black_or_white(moe: Model):
    (picture,) = (one for one in gallery(moe, lambda run: CLEAN).pictures if one.idx == 4)
    assert picture.clean is not None
    assert picture.difference is not None
    assert pixels(picture.clean) == [[115, 115]] * 2  # 0.45 · 255
    assert pixels(picture.attacked) == [[102, 102]] * 2
    assert pixels(picture.difference) == [[0, 0]] * 2
    assert np.array(pixels(png(np.zeros((3, 300, 200), dtype=np.float32)))).shape == (128, 85, 3)
    assert pixels(png(np.array([[[0.0, 1.0]], [[0.5, 0.0]], [[1.0, 2.0]]], dtype=np.float32))) == [
        [[0, 128, 255], [255, 0, 255]]
    ]


def test_without_the_data_set_the_attacked_images_are_shown_with_the_reason(moe: Model):
    def nowhere(run: Any) -> Any:
        raise UnusableInput("no images here")

    found = gallery(moe, nowhere)
    assert found.missing == "no images here"
    assert {(picture.clean, picture.difference) for picture in found.pictures} == {(None, None)}


def test_a_file_that_is_no_file_of_witnesses_shows_nothing(save_run: Any, tmp_path: Path):
    folder = save_run(tmp_path, "m", "pgd", {"pgd": {0: 1}}, witnesses=True)
    (folder / "witnesses.safetensors").write_bytes(b"nothing")
    ((_, (model,)),) = boards_with_models(Stored.read(tmp_path))
    assert gallery(model, lambda run: CLEAN).pictures == ()

"""Tiny-ImageNet: a tree of three classes, and the real one."""

import io
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput

TINY = open_dataset("tinyimagenet")
WNIDS = ["n30", "n10", "n20"]  # not sorted, as in the archive


def pixels(seed: int, size: int = 64) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write(path: Path, image: NDArray[np.uint8]) -> None:
    """Losslessly, whatever the suffix: the reader goes by content, and the pixels can be compared exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, "PNG")


def chw(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(pixels(seed)).permute(2, 0, 1) for seed in seeds])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes; image k of class c is pixels(100 c + k), class 2 has fewer; val_k is pixels(1000 + k)."""
    monkeypatch.setattr(type(TINY), "num_classes", 3)
    folder = tmp_path / "tiny-imagenet-200"
    for label, (wnid, numbers) in enumerate(zip(WNIDS, [(0, 2, 10), (0, 2, 10), (0, 2)], strict=True)):
        for number in numbers:
            write(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", pixels(100 * label + number))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("not an image\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = []
    for number, wnid in [(10, "n20"), (0, "n10"), (2, "n30"), (1, "n20")]:
        write(folder / "val" / "images" / f"val_{number}.JPEG", pixels(1000 + number))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_test_images_are_in_numeric_order(folder: Path) -> None:
    images = TINY.read("test", folder.parent)
    assert torch.equal(images.x, chw(1000, 1001, 1002, 1010))
    assert images.y.tolist() == [1, 2, 0, 2]  # n10, n20, n30, n20 as lines of wnids.txt
    assert (images.x.dtype, images.y.dtype, images.white) == (torch.uint8, torch.int64, 255)
    assert (images.available, images.published) == (4, 10_000)


def test_training_images_are_interleaved(folder: Path) -> None:
    images = TINY.read("train", folder.parent)
    assert torch.equal(images.x, chw(0, 100, 200, 2, 102, 202, 10, 110))
    assert images.y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (images.available, images.published) == (8, 100_000)


def test_only_the_beginning_is_decoded(folder: Path) -> None:
    (folder / "train" / "n10" / "images" / "n10_10.JPEG").write_bytes(b"damaged")
    images = TINY.read("train", folder.parent, 7)
    assert images.y.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert images.available == 8
    with pytest.raises(UnusableInput, match=r"n10_10\.JPEG cannot be read as an image"):
        TINY.read("train", folder.parent)


def test_evaluation_set(folder: Path) -> None:
    data = TINY.evaluation_set(folder.parent, 3)
    assert torch.equal(data.x, chw(1000, 1001, 1002).float() / 255)
    assert data.note == "partial copy: 4 of 10,000 test images"
    with pytest.raises(UnusableInput, match="--n-examples 5 is more than the 4 test images"):
        TINY.evaluation_set(folder.parent, 5)


def test_fingerprint(folder: Path) -> None:
    def fingerprint() -> str:
        return TINY.evaluation_set(folder.parent, None).fingerprint

    first = fingerprint()
    annotations = folder / "val" / "val_annotations.txt"
    before = annotations.read_text()
    annotations.write_text("".join(sorted(before.splitlines(keepends=True))))  # the order of lines is not the images'
    assert fingerprint() == first
    annotations.write_text(before.replace("val_0.JPEG\tn10", "val_0.JPEG\tn30"))
    relabelled = fingerprint()
    annotations.write_text(before)
    image = pixels(1002)
    image[63, 63, 2] ^= 1
    write(folder / "val" / "images" / "val_2.JPEG", image)
    assert len({first, relabelled, fingerprint()}) == 3


def test_grey_becomes_rgb(folder: Path) -> None:
    grey = pixels(5)[..., 0]
    write(folder / "val" / "images" / "val_0.JPEG", grey)
    x = TINY.read("test", folder.parent, 1).x[0]
    assert torch.equal(x, torch.from_numpy(grey).expand(3, 64, 64))


def test_a_jpeg(folder: Path) -> None:
    path = folder / "val" / "images" / "val_0.JPEG"
    for mode, colour in [("L", 128), ("RGB", (128, 128, 128))]:
        Image.new(mode, (64, 64), colour).save(path, "JPEG", quality=95)
        # mid-grey is the zero of every DCT coefficient, so that JPEG keeps it exactly
        assert TINY.read("test", folder.parent, 1).x.unique().tolist() == [128]


def corrupt() -> dict[str, bytes]:
    jpeg, large, deep = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels(0)).save(jpeg, "JPEG")
    Image.fromarray(pixels(0, 65)).save(large, "JPEG")
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(deep, "PNG")
    return {
        "cannot be read as an image .cannot identify": b"no image",
        "cannot be read as an image .cannot identify image file .*": b"",
        "cannot be read as an image .image file is truncated": jpeg.getvalue()[:-500],
        "is 65×65 pixels, not 64×64": large.getvalue(),
        "more than 8 bits a channel": deep.getvalue(),
    }


@pytest.mark.parametrize("why", list(corrupt()))
def test_a_corrupt_image_is_named(folder: Path, why: str) -> None:
    path = folder / "val" / "images" / "val_1.JPEG"
    path.write_bytes(corrupt()[why])
    with pytest.raises(UnusableInput, match=why) as error:
        TINY.evaluation_set(folder.parent, None)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_image_is_named(folder: Path) -> None:
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UnusableInput, match=r"val_1\.JPEG is missing"):
        TINY.evaluation_set(folder.parent, None)


@pytest.mark.slow
def test_a_bomb_is_not_decoded(folder: Path) -> None:
    """A header that claims a huge image is answered from the header."""
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    path = folder / "val" / "images" / "val_0.JPEG"
    path.write_bytes(content.getvalue())
    with pytest.raises(UnusableInput, match=r"val_0\.JPEG cannot be read as an image .*decompression bomb"):
        TINY.evaluation_set(folder.parent, 1)


@pytest.mark.parametrize("content", ["n30\nn10\n", "n30\nn10\nn10\n", "", "n30\nn10\nn20\nn40\n"])
def test_wrong_wnids(folder: Path, content: str) -> None:
    (folder / "wnids.txt").write_text(content)
    with pytest.raises(UnusableInput, match=r"wnids\.txt does not name 3 classes"):
        TINY.evaluation_set(folder.parent, 1)


@pytest.mark.parametrize(
    "line",
    ["val_0.JPEG", "val_0.JPEG\tn99\t0\t0\t1\t1", "../val_0.JPEG\tn10\t0\t0\t1\t1", "val_x.JPEG\tn10\t0\t0\t1\t1", ""],
)
def test_wrong_annotations(folder: Path, line: str) -> None:
    (folder / "val" / "val_annotations.txt").write_text(f"{line}\n")
    with pytest.raises(UnusableInput, match=r"val_annotations\.txt has a line that names no image and class"):
        TINY.evaluation_set(folder.parent, 1)


@pytest.mark.parametrize("name", ["wnids.txt", "val/val_annotations.txt"])
def test_a_missing_or_binary_list_is_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnusableInput, match="cannot be read") as error:
        TINY.evaluation_set(folder.parent, 1)
    assert str(folder / name) in str(error.value)
    (folder / name).unlink()
    with pytest.raises(UnusableInput, match=r"is missing: .* --data-root DIR") as error:
        TINY.evaluation_set(folder.parent, 1)
    assert str(folder / name) in str(error.value)


def test_a_missing_class_is_named(folder: Path) -> None:
    (folder / "train" / "n10").rename(folder / "elsewhere")
    with pytest.raises(UnusableInput, match=r"n10/images holds no images"):
        TINY.read("train", folder.parent, 1)


def test_a_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(url: str, folder: str, md5: str) -> None:
        asked.append((url, md5))
        raise HTTPError(url, 404, "Not Found", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    with pytest.raises(
        UnusableInput, match=r"tiny-imagenet-200 is missing, .* failed \(Not Found\): .*--data-root DIR"
    ):
        TINY.evaluation_set(tmp_path, 1)
    assert asked == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "images"])
def test_a_val_folder_sorted_into_classes_is_the_same_set(folder: Path, inside: str) -> None:
    before = TINY.evaluation_set(folder.parent, None)
    for number, wnid in [(10, "n20"), (0, "n10"), (2, "n30"), (1, "n20")]:
        (folder / "val" / wnid / inside).mkdir(parents=True, exist_ok=True)
        name = f"val_{number}.JPEG"
        (folder / "val" / "images" / name).rename(folder / "val" / wnid / inside / name)
    (folder / "val" / "images").rmdir()
    (folder / "val" / "val_annotations.txt").unlink()
    (folder / "val" / "n20" / inside / "val_note.JPEG").touch()
    after = TINY.evaluation_set(folder.parent, None)
    assert (after.fingerprint, after.note) == (before.fingerprint, before.note)
    (folder / "val" / "n10" / inside / "val_2.JPEG").touch()
    with pytest.raises(UnusableInput, match=r"val_2\.JPEG is in another class as well"):
        TINY.evaluation_set(folder.parent, 1)
    for path in (folder / "val" / "n10" / inside).iterdir():
        path.unlink()
    with pytest.raises(UnusableInput, match=r"val/n10.* holds no images"):
        TINY.evaluation_set(folder.parent, 1)


@pytest.fixture
def real_root(data_root: Path) -> Path:
    if not (data_root / "tiny-imagenet-200").is_dir():
        pytest.skip(f"no Tiny-ImageNet in {data_root}")
    return data_root


def test_real_test_images(real_root: Path) -> None:
    folder = real_root / "tiny-imagenet-200"
    images = TINY.read("test", real_root, 100)
    wnids = (folder / "wnids.txt").read_text().split()
    annotated = dict(line.split("\t")[:2] for line in (folder / "val/val_annotations.txt").read_text().splitlines())
    assert [wnids[label] for label in images.y] == [annotated[f"val_{number}.JPEG"] for number in range(100)]
    for number in (0, 9, 99):
        with Image.open(folder / f"val/images/val_{number}.JPEG") as image:
            assert np.array_equal(images.x[number].permute(1, 2, 0), np.asarray(image.convert("RGB")))
    note = TINY.evaluation_set(real_root, 1).note
    assert note == ("" if images.available == 10_000 else f"partial copy: {images.available:,} of 10,000 test images")


def test_real_training_images(real_root: Path) -> None:
    images = TINY.read("train", real_root, 400)
    assert images.y.tolist() == [*range(200), *range(200)]
    assert images.available % 200 == 0

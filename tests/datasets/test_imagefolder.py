"""A user's own folder of images."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bench import load_model
from bench.datasets.base import Dataset, open_dataset
from bench.errors import UnusableInput
from bench.spec import dataset_folder

NONE = Path("nowhere")  # it needs no root
H, W = 6, 10


def pixels(seed: int, size: tuple[int, int] = (H, W)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def chw(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(pixels(seed)).permute(2, 0, 1) for seed in seeds])


def opened(folder: Path) -> Dataset:
    return open_dataset(f"imagefolder:{folder}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 'B' before 'a' as torchvision sorts; training images pixels(0 …), test images pixels(10 …)."""
    for name, seed in [("B/x.png", 0), ("B/y.PNG", 1), ("B/z.bmp", 2), ("a/x.png", 3)]:
        write(tmp_path / "train" / name, pixels(seed))
    for name, seed in [("a/1.png", 10), ("B/1.png", 11), ("B/0.png", 12)]:
        write(tmp_path / "val" / name, pixels(seed))
    (tmp_path / "train" / "B" / ".DS_Store").write_bytes(b"no image")
    (tmp_path / "train" / "README.txt").write_text("no class")
    return tmp_path


def test_reads_what_lies_there(folder: Path) -> None:
    dataset = opened(folder)
    assert (dataset.name, dataset.num_classes, dataset.input_shape) == (f"imagefolder:{folder}", 2, (3, H, W))
    train, test = dataset.read("train", NONE), dataset.read("test", NONE)
    assert torch.equal(train.x, chw(0, 3, 1, 2))
    assert train.y.tolist() == [0, 1, 0, 0]
    assert torch.equal(test.x, chw(12, 10, 11))
    assert test.y.tolist() == [0, 1, 0]
    assert (train.available, train.published, train.white) == (4, 0, 255)


def test_classes_are_torchvisions(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    reference = ImageFolder(str(folder / "train"))
    images = opened(folder).read("train", NONE)
    labels = {np.asarray(image).tobytes(): label for image, label in reference}
    assert [labels[x.permute(1, 2, 0).contiguous().numpy().tobytes()] for x in images.x] == images.y.tolist()


def test_evaluation_set(folder: Path) -> None:
    data = opened(folder).evaluation_set(NONE, 2)
    assert torch.equal(data.x, chw(12, 10).float() / 255)
    assert data.note == ""
    with pytest.raises(UnusableInput, match="--n-examples 4 is more than the 3 test images of imagefolder:"):
        opened(folder).evaluation_set(NONE, 4)


def test_fingerprint(folder: Path) -> None:
    first = opened(folder).evaluation_set(NONE, None).fingerprint
    (folder / "val" / "B" / "1.png").rename(folder / "val" / "B" / "2.png")  # a name that keeps the order
    assert opened(folder).evaluation_set(NONE, None).fingerprint == first
    image = pixels(11)
    image[0, 0, 0] ^= 1
    write(folder / "val" / "B" / "2.png", image)
    assert opened(folder).evaluation_set(NONE, None).fingerprint != first


def test_val_alone_can_be_evaluated(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    dataset = opened(folder)
    assert (dataset.num_classes, len(dataset.evaluation_set(NONE, None))) == (2, 3)
    with pytest.raises(UnusableInput, match=r"has no train images: put them in .*/train/CLASS"):
        dataset.read("train", NONE)


def test_test_stands_in_for_val(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert torch.equal(opened(folder).read("test", NONE).x, chw(12, 10, 11))
    write(folder / "val" / "a" / "0.png", pixels(20))
    write(folder / "val" / "B" / "0.png", pixels(21))
    assert torch.equal(opened(folder).read("test", NONE).x, chw(21, 20))  # val is what counts where there are both


def test_train_alone_cannot_be_evaluated(folder: Path) -> None:
    (folder / "val").rename(folder / "elsewhere")
    with pytest.raises(UnusableInput, match=r"has no test images: put them in .*/test/CLASS"):
        opened(folder).evaluation_set(NONE, None)


@pytest.mark.parametrize(("side", "recipe"), [(48, "cpu-cifar10"), (49, "cpu-vit-tinyimagenet")])
def test_recipe_goes_by_the_larger_side(tmp_path: Path, side: int, recipe: str) -> None:
    for name in "ab":
        write(tmp_path / "val" / name / "0.png", pixels(0, (8, side)))
    dataset = opened(tmp_path)
    assert (dataset.recipe, str(dataset.threat_model)) == (recipe, "Linf 8/255")


def test_grey_palette_and_transparent_images_become_rgb(folder: Path) -> None:
    grey = pixels(5)[..., 0]
    write(folder / "val" / "a" / "1.png", grey)
    assert torch.equal(opened(folder).read("test", NONE).x[1], torch.from_numpy(grey).expand(3, H, W))
    rgba = np.dstack([pixels(6), np.zeros((H, W), np.uint8)])
    write(folder / "val" / "a" / "1.png", rgba)
    assert torch.equal(opened(folder).read("test", NONE).x[1], chw(6)[0])
    palette = Image.fromarray(grey // 128 * 255).convert("P")
    palette.save(folder / "val" / "a" / "1.png")
    assert opened(folder).read("test", NONE).x[1].tolist() == np.tile(grey // 128 * 255, (3, 1, 1)).tolist()


def test_the_first_image_of_another_size_is_named(folder: Path) -> None:
    write(folder / "val" / "B" / "1.png", pixels(0, (W, H)))
    with pytest.raises(
        UnusableInput, match=r"B/1\.png is 10×6 pixels, not 6×10: .* ε is in pixels of the native image"
    ):
        opened(folder).evaluation_set(NONE, None)
    assert len(opened(folder).evaluation_set(NONE, 2)) == 2  # not read


def test_a_corrupt_image_is_named(folder: Path) -> None:
    (folder / "val" / "a" / "1.png").write_bytes((folder / "val" / "a" / "1.png").read_bytes()[:-30])
    with pytest.raises(UnusableInput, match=r"a/1\.png cannot be read as an image"):
        opened(folder).evaluation_set(NONE, None)
    (folder / "train" / "B" / "x.png").write_bytes(b"")  # the one whose size is looked at
    with pytest.raises(UnusableInput, match=r"B/x\.png cannot be read as an image"):
        opened(folder)


def test_classes_that_differ(folder: Path) -> None:
    write(folder / "val" / "c" / "0.png", pixels(0))
    with pytest.raises(UnusableInput, match=r"class 'c' is in only one of .*train and .*val"):
        opened(folder)


def test_one_class_is_none(folder: Path) -> None:
    (folder / "train" / "a").rename(folder / "elsewhere")
    with pytest.raises(UnusableInput, match="train needs a folder for each of two or more classes, and has 1"):
        opened(folder)


def test_a_class_without_images(folder: Path) -> None:
    (folder / "val" / "a" / "1.png").rename(folder / "val" / "a" / "1.txt")
    with pytest.raises(UnusableInput, match=r"val/a holds no images: it takes \.bmp"):
        opened(folder).evaluation_set(NONE, None)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"imagefolder:.*gone has no images: put them in .*gone/train/CLASS"):
        opened(tmp_path / "gone")


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ behind a colon as it is."""
    monkeypatch.setenv("HOME", str(folder.parent))
    dataset = open_dataset(f"imagefolder:~/{folder.name}")
    assert dataset.name == f"imagefolder:{folder}"
    assert len(dataset.evaluation_set(NONE, None)) == 3


def test_a_folder_has_one_name_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    words = [folder.name, f"{folder.name}/", f"./{folder.name}", f"../{folder.parent.name}/{folder.name}", "link"]
    assert {opened(Path(word)).name for word in words} | {open_dataset(f"imagefolder:{words[1]}").name} == {
        f"imagefolder:{folder}"
    }
    assert open_dataset(f"imagefolder:{folder}").name == f"imagefolder:{folder}"  # as replay opens it


def test_a_home_of_nobodys(folder: Path) -> None:
    with pytest.raises(UnusableInput, match=r"^data set 'imagefolder:~nobody-of-this-name/x': "):
        open_dataset("imagefolder:~nobody-of-this-name/x")


def test_images_in_folders_of_a_class_are_read(folder: Path) -> None:
    write(folder / "val" / "a" / "images" / "deep" / "0.png", pixels(20))
    write(folder / "val" / "B" / "2" / "0.png", pixels(21))
    (folder / "val" / "B" / "again").symlink_to(folder / "val" / "B")  # and no folder twice
    images = opened(folder).read("test", NONE)
    # B: 0.png, 1.png, 2/0.png; a: 1.png, images/deep/0.png
    assert torch.equal(images.x, chw(12, 10, 11, 20, 21))
    assert images.y.tolist() == [0, 1, 0, 1, 0]


def test_links_to_images_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "0.png", pixels(20))
    (folder / "val" / "a" / "more").symlink_to(elsewhere)
    assert torch.equal(opened(folder).read("test", NONE).x, chw(12, 10, 11, 20))


def test_what_is_hidden_is_no_class_and_no_image(folder: Path) -> None:
    before = opened(folder)
    for split in ("train", "val"):
        write(folder / split / ".ipynb_checkpoints" / "1-checkpoint.png", pixels(30))
        write(folder / split / "a" / ".ipynb_checkpoints" / "1-checkpoint.png", pixels(30))
        (folder / split / "a" / "._1.png").write_bytes(b"of a Mac")
    after = opened(folder)
    assert after.num_classes == 2
    assert torch.equal(after.read("train", NONE).x, before.read("train", NONE).x)
    assert torch.equal(after.read("test", NONE).x, chw(12, 10, 11))


def test_an_image_of_no_class_is_refused(folder: Path) -> None:
    write(folder / "val" / "1.png", pixels(0))
    with pytest.raises(UnusableInput, match=r"val/1\.png lies in no class: put it in a folder"):
        opened(folder)


def test_grey_images_may_have_one_channel(tmp_path: Path) -> None:
    for name, seed in [("a", 0), ("b", 1)]:
        write(tmp_path / "val" / name / "0.png", pixels(seed)[..., 0])
    write(tmp_path / "val" / "a" / "1.png", np.dstack([pixels(2)[..., 0]] * 3))  # grey, stored as RGB
    dataset = open_dataset(f"imagefolder-grey:{tmp_path}")
    assert (dataset.name, dataset.input_shape) == (f"imagefolder-grey:{tmp_path}", (1, H, W))
    assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))
    assert torch.equal(dataset.read("test", NONE).x, chw(0, 1, 2)[:, :1])
    assert opened(tmp_path).read("test", NONE).x.shape == (3, 3, H, W)  # as before
    write(tmp_path / "val" / "b" / "1.png", pixels(3))
    with pytest.raises(UnusableInput, match=r"b/1\.png has colours: read the folder as imagefolder:PATH"):
        dataset.read("test", NONE)


def test_what_was_trained_and_run_on_a_folder_is_found_however_it_is_written(tmp_path: Path, bench: Any) -> None:
    for split, count in (("train", 12), ("val", 3)):
        for seed, name in enumerate(["a", "b"] * count):
            write(tmp_path / "own/set" / split / name / f"{seed}.png", pixels(seed, (8, 8)))
            write(tmp_path / "own_set" / split / name / f"{seed}.png", pixels(100 + seed, (8, 8)))
    tiny = ["--recipe", "digits", "--set", "epochs=1", "--set", "width=2", "--set", "n_val=4"]
    for path in ("own/set/", "own_set"):  # which had one checkpoint between them
        assert bench("train", "dense-standard", "--dataset", f"imagefolder:{path}", *tiny)[0] == 0
    assert len(list((tmp_path / "checkpoints").rglob("dense-standard.safetensors"))) == 2
    names = set()
    for path in ("own/set", "./own/set/", tmp_path / "own" / "set", "own_set"):
        status, out, _ = bench("run", "--dataset", f"imagefolder:{path}", "--suite", "clean", "--json")
        (result,) = json.loads(out)
        names.add((status, result["spec"]["dataset"], result["run"]))
    assert {name[:2] for name in names} == {
        (0, f"imagefolder:{tmp_path}/own/set"),
        (0, f"imagefolder:{tmp_path}/own_set"),
    }
    assert len(names) == 2
    assert len(list((tmp_path / "results").rglob("result.json"))) == 2
    model = load_model("dense-standard", dataset="imagefolder:own/../own/set")
    assert torch.equal(model.normalize.mean.flatten(), torch.full((3,), 0.5))


def test_images_of_any_size_are_resized_and_cropped_as_torchvision_does(folder: Path) -> None:
    from torchvision import datasets, transforms

    write(folder / "val" / "B" / "1.png", pixels(0, (31, 20)))
    dataset = open_dataset(f"imagefolder:{folder}:size=8")
    assert (dataset.name, dataset.input_shape) == (f"imagefolder:{folder}:size=8", (3, 8, 8))
    change = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.PILToTensor()])
    theirs = datasets.ImageFolder(str(folder / "val"), change)
    ours = dataset.read("test", NONE)
    order = [("B/0.png", 0), ("a/1.png", 1), ("B/1.png", 0)]
    of_file = {Path(path).relative_to(folder / "val").as_posix(): at for at, (path, _) in enumerate(theirs.samples)}
    for image, label, (name, wanted) in zip(ours.x, ours.y, order, strict=True):
        assert torch.equal(image, theirs[of_file[name]][0])
        assert label == wanted == theirs[of_file[name]][1]
    found = dataset.evaluation_set(NONE, 2)
    assert found.note == "images resized and cropped to 8×8 pixels, which are what is attacked"
    assert dataset_folder(dataset.name) != dataset_folder(opened(folder).name)


@pytest.mark.parametrize("word", ["photos:siz=8", "photos:size=0", "photos:size=8x8", "photos:size="])
def test_a_size_that_is_none_is_part_of_the_path(word: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="has no images"):
        open_dataset(f"imagefolder:{tmp_path / word}")
    (tmp_path / "photos").mkdir()
    with pytest.raises(UnusableInput, match=f"'{word}' is no folder: what may stand behind one is :size=N"):
        open_dataset(f"imagefolder:{tmp_path / word}")


@pytest.mark.slow
def test_the_command_that_is_suggested_trains_and_runs(folder: Path, bench: Any) -> None:
    for seed in range(20, 40):
        write(folder / "train" / "Ba"[seed % 2] / f"{seed}.png", pixels(seed))
    asked = ["--dataset", f"imagefolder:{folder}:size=8", "--checkpoints", "my models", "--device", "cpu"]
    run = ["run", *asked, "--suite", "clean", "--model", "moe-at"]
    status, _, err = bench(*run[:-2])
    assert status == 2
    command = re.search(r"train one with `bench (.*)` \(under 90 minutes on two cores\)$", err.strip())
    assert command, err
    words = shlex.split(command[1])
    assert words[words.index("--set") + 1 :: 2][:2] == ["n_train=20", "n_val=4"]
    tiny = [word for setting in ("epochs=1", "width=4", "batch_size=8") for word in ("--set", setting)]
    assert bench(*words, *tiny, "--set", "inner_steps=1", "--device", "cpu")[0] == 0
    status, out, _ = bench(*run)
    assert status == 0
    assert "images resized and cropped to 8×8 pixels" in out

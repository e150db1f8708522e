"""CIFAR-10: archives of a few images, written in every dialect; damaged and hostile ones; the real one."""

import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.datasets.base import EvalSet, open_dataset
from bench.datasets.cifar10 import read_batch
from bench.errors import UnusableInput

CIFAR10 = open_dataset("cifar10")
BATCHES = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]


def pixels(seed: int, n: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def python2(data: NDArray[np.uint8], labels: list[int]) -> bytes:
    """{'labels': …, 'data': …} opcode by opcode as Python 2, which made the public archive, wrote it."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    numbers = b"".join(b"K" + bytes([value]) for value in labels)
    shape = b"".join(b"M" + struct.pack("<H", value) for value in data.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    raw = data.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    return b"\x80\x02}(" + text(b"labels") + b"](" + numbers + b"e" + text(b"data") + array + b"u."


def python3(data: Any, labels: Any, protocol: int = 4) -> bytes:
    return pickle.dumps({"batch_label": "testing batch 1 of 1", "labels": labels, "data": data}, protocol)


def numpy1(data: NDArray[np.uint8], labels: list[int]) -> bytes:
    """As numpy 1 wrote it, whose modules were called otherwise."""
    return python3(data, labels, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def fortran(data: NDArray[np.uint8], labels: list[int]) -> bytes:
    return python3(np.asfortranarray(data), labels)


def write(root: Path, name: str, content: bytes) -> Path:
    path = root / "cifar-10-batches-py" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def evaluate(root: Path, n: int | None = None) -> EvalSet:
    return CIFAR10.evaluation_set(root, n)


@pytest.mark.parametrize(
    "dialect", [python2, python3, lambda x, y: python3(x, y, 2), numpy1, fortran], ids=["py2", "4", "2", "np1", "F"]
)
def test_round_trip(tmp_path: Path, dialect: Any) -> None:
    data = pixels(0, n=3)
    write(tmp_path, "test_batch", dialect(data, [9, 0, 5]))
    images = CIFAR10.read("test", tmp_path)
    assert images.x.dtype == torch.uint8
    assert images.x.numpy().tolist() == data.reshape(3, 3, 32, 32).tolist()  # red plane, green, blue; rows
    assert images.y.tolist() == [9, 0, 5]
    assert (images.y.dtype, images.white, images.available, images.published) == (torch.int64, 255, 3, 10_000)


def test_the_py2_dialect_is_a_pickle() -> None:
    data = pixels(0)
    batch = pickle.loads(python2(data, [1, 2]), encoding="bytes")
    assert np.array_equal(batch[b"data"], data)
    assert batch[b"labels"] == [1, 2]


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 7])
def test_training_images_are_in_the_batches_order(tmp_path: Path, limit: int | None) -> None:
    for seed, name in enumerate(BATCHES):
        write(tmp_path, name, python3(pixels(seed), [seed, seed + 1]))
    images = CIFAR10.read("train", tmp_path, limit)
    expected = np.concatenate([pixels(seed) for seed in range(5)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(images.x.numpy(), expected[:limit])
    assert images.y.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5][:limit]
    assert (images.available, images.published) == (10, 50_000)


def test_floats_and_note(tmp_path: Path) -> None:
    data = pixels(0, n=3)
    data[0, :2] = 0, 255
    write(tmp_path, "test_batch", python3(data, [0, 1, 2]))
    found = evaluate(tmp_path, 2)
    assert found.x[0, 0, 0, :2].tolist() == [0, 1]
    assert (len(found), found.idx.tolist()) == (2, [0, 1])
    assert found.note == "partial copy: 3 of 10,000 test images"
    with pytest.raises(UnusableInput, match="--n-examples 4 is more than the 3 test images"):
        evaluate(tmp_path, 4)


def test_fingerprint(tmp_path: Path) -> None:
    data, labels = pixels(0), [1, 2]

    def fingerprint(content: bytes) -> str:
        write(tmp_path, "test_batch", content)
        return evaluate(tmp_path).fingerprint

    first = fingerprint(python2(data, labels))
    assert first == fingerprint(python3(data, labels))  # the same images, in another file
    other = data.copy()
    other[1, 3071] ^= 1
    assert len({first, fingerprint(python3(other, labels)), fingerprint(python3(data, [1, 3]))}) == 3


class Runs:
    """A pickle that calls `function(*arguments)` as it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "data", "labels"])
def test_a_malicious_batch_is_refused_and_not_run(tmp_path: Path, protocol: int, place: str) -> None:
    marker = tmp_path / "marker"
    attack = Runs(os.system, f"touch {marker}")
    batch = {"data": pixels(0), "labels": [1, 2]} | {place: attack}
    path = write(tmp_path, "test_batch", pickle.dumps(attack if place == "whole" else batch, protocol))
    with pytest.raises(UnusableInput, match=r"asks for '(posix|nt).system', which is refused") as error:
        evaluate(tmp_path)
    assert not marker.exists()
    assert str(path) in str(error.value)
    pickle.loads(path.read_bytes())  # it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Runs(eval, "1/0"),
        Runs(getattr, "", "join"),
        Runs(__import__, "os"),
        Runs(np.load, "x"),
        np.float64(1),
        np.random.default_rng(0),
    ],
    ids=["eval", "getattr", "import", "np.load", "scalar", "rng"],
)
def test_any_other_global_is_refused(tmp_path: Path, call: Any) -> None:
    path = write(tmp_path, "test_batch", python3(pixels(0), [1, call]))
    with pytest.raises(UnusableInput, match=r"asks for '[\w.]+', which is refused") as error:
        evaluate(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("data", "labels", "why"),
    [
        (pixels(0).astype(np.float32), [1, 2], "not uint8 of shape"),
        (pixels(0).astype(np.int8), [1, 2], "not uint8 of shape"),
        (pixels(0)[:, :3071], [1, 2], "not uint8 of shape"),
        (pixels(0).reshape(2, 3, 1024), [1, 2], "not uint8 of shape"),
        (pixels(0)[0], [1, 2], "not uint8 of shape"),
        (np.array([None, None]), [1, 2], "not uint8 of shape"),
        ([[0] * 3072] * 2, [1, 2], "not uint8 of shape"),
        (None, [1, 2], "not uint8 of shape"),
        (pixels(0), [1, 10], "numbers from 0 to 9"),
        (pixels(0), [1, -1], "numbers from 0 to 9"),
        (pixels(0), [1, 2.0], "numbers from 0 to 9"),
        (pixels(0), [1, True], "numbers from 0 to 9"),
        (pixels(0), None, "numbers from 0 to 9"),
        (pixels(0), [1], "2 images and 1 labels"),
        (pixels(0), [1, 2, 3], "2 images and 3 labels"),
    ],
)
def test_wrong_content(tmp_path: Path, data: Any, labels: Any, why: str) -> None:
    path = write(tmp_path, "test_batch", python3(data, labels))
    with pytest.raises(UnusableInput, match=why) as error:
        evaluate(tmp_path)
    assert str(path) in str(error.value)


def test_a_batch_that_lies_about_its_size(tmp_path: Path) -> None:
    content = python2(pixels(0), [1, 2]).replace(b"M\x02\x00M\x00\x0c\x86", b"M\x03\x00M\x00\x0c\x86")
    write(tmp_path, "test_batch", content)
    with pytest.raises(UnusableInput, match="cannot reshape"):
        evaluate(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"not a pickle", pickle.dumps([1]), b"\x80\x02cos\nsystem\n"])
def test_foreign_content(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "test_batch", content)
    with pytest.raises(UnusableInput, match="is not a CIFAR-10 batch") as error:
        evaluate(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.slow
def test_truncated_anywhere(tmp_path: Path) -> None:
    for content in (python2(pixels(0), [1, 2]), python3(pixels(0), [1, 2])):
        for length in [*range(200), *range(200, len(content), 97), len(content) - 1]:
            path = write(tmp_path, "test_batch", content[:length])
            with pytest.raises(UnusableInput, match="is not a CIFAR-10 batch") as error:
                evaluate(tmp_path)
            assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\x00\x00\x00\x01.",  # LONG_BINPUT 2²⁴: the unpickler would make a table of that size
        b"\x80\x02}p16777216\n.",
        b"\x80\x05\x96\x00\x00\x00\x10\x00\x00\x00\x00x.",  # BYTEARRAY8 of 2²⁸ bytes
        b"\x80\x04\x8e\x00\x00\x00\x10\x00\x00\x00\x00x.",  # BINBYTES8
    ],
)
def test_a_claim_of_much_memory_takes_none(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "test_batch", content)
    tracemalloc.start()
    try:
        with pytest.raises(UnusableInput, match="is not a CIFAR-10 batch"):
            read_batch(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_an_error_quotes_is_short(tmp_path: Path) -> None:
    write(tmp_path, "test_batch", b"c" + b"x" * 10_000 + b"\nsystem\n.")
    with pytest.raises(UnusableInput, match="is not a CIFAR-10 batch") as error:
        evaluate(tmp_path)
    assert len(str(error.value)) < 600


@pytest.mark.slow
def test_damaged_anywhere(tmp_path: Path) -> None:
    """Whatever single byte of the structure is wrong, the answer is a value or UnusableInput, never a traceback."""
    content = python2(pixels(0, n=1), [1])
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        at = int(rng.integers(len(content) - 3072 - 10))
        write(tmp_path, "test_batch", content[:at] + rng.bytes(1) + content[at + 1 :])
        try:
            outcomes.add(len(evaluate(tmp_path)))
        except UnusableInput as error:
            outcomes.add("\n" in str(error))
    assert outcomes == {1, False}


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (url, md5) that torchvision's downloader was asked for; it leaves half a file and fails."""
    asked = []

    def fail(url: str, folder: str, md5: str) -> None:
        asked.append((url, md5))
        print("torchvision's chatter")
        (Path(folder) / "half.tar.gz").write_bytes(b"half")
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)
    return asked


def test_a_missing_root_is_not_downloaded_into(tmp_path: Path, downloads: list[tuple[str, str]]) -> None:
    with pytest.raises(UnusableInput, match=r"data root .*gone is not a folder: create it .* --data-root DIR"):
        evaluate(tmp_path / "gone")
    assert not downloads
    assert not (tmp_path / "gone").exists()


@pytest.mark.usefixtures("downloads")
def test_a_failed_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnusableInput) as error:
        evaluate(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    assert str(error.value) == (
        f"{folder} is missing, and downloading https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz failed "
        f"(Name or service not known): unpack it in {tmp_path}, or pass --data-root DIR"
    )
    assert list(tmp_path.iterdir()) == []  # nothing half-made stays
    out, err = capsys.readouterr()
    assert not out  # a command's --json goes there
    assert "torchvision's chatter" in err


def test_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pixels(0)

    def succeed(url: str, folder: str, md5: str) -> None:
        write(Path(folder), "test_batch", python2(data, [1, 2]))

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", succeed)
    assert np.array_equal(CIFAR10.read("test", tmp_path).x.numpy().reshape(2, 3072), data)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def test_what_is_downloaded_is_what_torchvision_knows(tmp_path: Path, downloads: list[tuple[str, str]]) -> None:
    from torchvision.datasets import CIFAR10 as REFERENCE

    with pytest.raises(UnusableInput):
        evaluate(tmp_path)
    assert downloads == [(REFERENCE.url, REFERENCE.tgz_md5)]


def test_a_part_of_the_archive_is_not_downloaded_into(tmp_path: Path, downloads: list[tuple[str, str]]) -> None:
    write(tmp_path, "test_batch", python3(pixels(0), [1, 2]))
    for name in BATCHES[:3]:
        write(tmp_path, name, python3(pixels(0), [1, 2]))
    assert len(evaluate(tmp_path)) == 2
    with pytest.raises(UnusableInput, match=r"data_batch_4 is missing: .* --data-root DIR"):
        CIFAR10.read("train", tmp_path, 1)
    assert not downloads


@pytest.fixture
def real_root(data_root: Path) -> Path:
    if not (data_root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {data_root}")
    return data_root


def test_real_test_images(real_root: Path) -> None:
    data = evaluate(real_root, 1000)
    assert data.x.shape == (1000, 3, 32, 32)
    assert data.y[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, plane, frog
    available = CIFAR10.read("test", real_root, 1).available
    assert data.note == ("" if available == 10_000 else f"partial copy: {available:,} of 10,000 test images")


def test_real_training_images(real_root: Path) -> None:
    images = CIFAR10.read("train", real_root)
    assert images.x.shape == (50_000, 3, 32, 32)
    assert images.available == images.published == 50_000
    assert images.y.bincount().tolist() == [5000] * 10
    x = images.floats(slice(0, 50_000, 10)).transpose(0, 1).flatten(1)
    assert x.mean(1).tolist() == pytest.approx(CIFAR10.mean, abs=0.005)
    assert x.std(1).tolist() == pytest.approx(CIFAR10.std, abs=0.005)

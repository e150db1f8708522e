"""The file of adversarial examples: what is written comes back, and what is not whole is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save, save_file

from bench.results.schema import VERDICT_COLUMNS
from bench.results.store import RunFolder
from bench.results.witnesses import FILE, Witnesses

NUMBERS = {"attacks": '["pgd", "fab-t"]'}


def some(*idx: int, attack: str = "pgd") -> Witnesses:
    """One witness of 1×1×2 pixels for each index, whose first pixel is index/10."""
    x_adv = np.array([[[[i / 10, 0.5]]] for i in idx], dtype=np.float32).reshape(-1, 1, 1, 2)
    return Witnesses(np.array(idx, dtype=np.int64), (attack,) * len(idx), x_adv)


def assert_same(found: Witnesses, expected: Witnesses) -> None:
    np.testing.assert_array_equal(found.idx, expected.idx)
    np.testing.assert_array_equal(found.x_adv, expected.x_adv)  # NaN is NaN here
    assert found.attack == expected.attack
    assert (found.idx.dtype, found.x_adv.dtype) == (np.int64, np.float32)


@settings(max_examples=40)
@given(st.data())
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    shape = data.draw(st.tuples(st.integers(0, 5), *[st.integers(1, 3)] * 3))
    idx = data.draw(arrays(np.int64, shape[0]))
    names = data.draw(st.lists(st.text(), min_size=shape[0], max_size=shape[0]))
    x_adv = data.draw(arrays(np.float32, shape, elements=st.floats(width=32)))
    if data.draw(st.booleans()):
        x_adv = np.asfortranarray(x_adv)
    path = tmp_path_factory.mktemp("written") / FILE
    path.write_bytes(Witnesses(idx, tuple(names), x_adv).to_bytes())
    assert_same(Witnesses.read(path), Witnesses(idx, tuple(names), x_adv))


def test_joined_keeps_the_order_and_the_doubles():
    assert Witnesses.joined([]) is None
    joined = Witnesses.joined([some(3, 1), some(1, attack="fab-t"), some()])
    assert joined is not None
    assert (joined.idx.tolist(), joined.attack) == ([3, 1, 1], ("pgd", "pgd", "fab-t"))
    assert joined.x_adv[:, 0, 0, 0].tolist() == pytest.approx([0.3, 0.1, 0.1])


def test_of_chooses_all_three_together():
    both = Witnesses.joined([some(3, 1), some(2, attack="fab-t")])
    assert both is not None
    assert_same(both.of(np.array([False, True, True])), Witnesses.joined([some(1), some(2, attack="fab-t")]) or some())
    assert len(both.of(np.zeros(3, dtype=bool))) == 0


def rewritten(change: Callable[[dict[str, Any]], object], metadata: dict[str, str] | None = NUMBERS) -> Any:
    """A whole safetensors file whose tensors, those of two witnesses, were changed."""

    def write(path: Path) -> None:
        tensors = {**load_file(path)}
        change(tensors)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)

    return write


def bfloat16(path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(path)
    save_torch({**tensors, "x_adv": tensors["x_adv"].to(torch.bfloat16)}, path, NUMBERS)


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "last byte lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no safetensors": lambda path: path.write_bytes(b"\x93NUMPY" * 20),
    "foreign": lambda path: path.write_bytes(save({"weight": np.zeros(2)})),
    "no metadata": rewritten(lambda tensors: None, None),
    "other metadata": rewritten(lambda tensors: None, {"format": "pt"}),
    "names are no JSON": rewritten(lambda tensors: None, {"attacks": "pgd"}),
    "names are no list": rewritten(lambda tensors: None, {"attacks": '"pgd"'}),
    "a number without a name": rewritten(lambda tensors: tensors["attack"].put(0, 2)),
    "a number below 0": rewritten(lambda tensors: tensors["attack"].put(0, -1)),
    "numbers are floats": rewritten(lambda tensors: tensors.update(attack=np.zeros(2))),
    "no images": rewritten(lambda tensors: tensors.pop("x_adv")),
    "an image less": rewritten(lambda tensors: tensors.update(x_adv=tensors["x_adv"][:1])),
    "an index more": rewritten(lambda tensors: tensors.update(idx=np.arange(3))),
    "flat images": rewritten(lambda tensors: tensors.update(x_adv=tensors["x_adv"].reshape(2, 2))),
    "indices are floats": rewritten(lambda tensors: tensors.update(idx=np.array([0.5, 1.0]))),
    "two rows of indices": rewritten(lambda tensors: tensors.update(idx=np.zeros((2, 1), dtype=np.int64))),
    "double images": rewritten(lambda tensors: tensors.update(x_adv=tensors["x_adv"].astype(np.float64))),
    "images of a type that numpy has not": bfloat16,
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_not_ours_is_refused_by_name(spoil: Callable[[Path], object], tmp_path: Path):
    path = tmp_path / FILE
    path.write_bytes(some(0, 1).to_bytes())
    assert_same(Witnesses.read(path), some(0, 1))
    spoil(path)
    with pytest.raises(ValueError, match="is no whole file of witnesses") as refused:
        Witnesses.read(path)
    assert str(path) in str(refused.value)


def test_unknown_examples_and_other_shapes_are_refused(tmp_path: Path):
    path = tmp_path / FILE
    path.write_bytes(some(0, 4).to_bytes())
    assert_same(Witnesses.read_for(path, np.arange(5), (1, 1, 2)), some(0, 4))
    for idx, shape in ((np.arange(4), (1, 1, 2)), (np.arange(5), (1, 2, 1))):
        with pytest.raises(ValueError, match="is about other images"):
            Witnesses.read_for(path, idx, shape)


def test_nothing_is_unpickled(malicious: Callable[[Path], object], tmp_path: Path):
    import pickle

    for content in (pickle.dumps(malicious(tmp_path / "ran")), save({"idx": np.zeros(1)}, {"attacks": "cos\nsystem"})):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match="is no whole file"):
            Witnesses.read(tmp_path / FILE)
    assert not (tmp_path / "ran").exists()


# --- blocks ----------------------------------------------------------------------------------------------------------

ROW = (0, "0" * 16, 0, "clean", "F", 0, 0, True, True, 0.0, 0.0, -1, -1, "ok")
ROWS = pd.DataFrame([ROW], columns=list(VERDICT_COLUMNS)).astype(VERDICT_COLUMNS)


def test_a_blocks_witnesses_come_back_with_it(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_block(0, ROWS, {"flags": ["f"]}, some(3, 1))
    folder.write_block(1, ROWS, {"flags": []})
    first, second = folder.read_blocks()
    assert first.witnesses is not None
    assert_same(first.witnesses, some(3, 1))
    assert (first.side, second.side, second.witnesses) == ({"flags": ["f"]}, {"flags": []}, None)


def test_witnesses_are_written_before_the_rows_and_neither_where_the_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    monkeypatch.setattr("bench.results.store.write_atomically", lambda path, data: written.append(path.name))
    RunFolder(tmp_path).write_block(7, ROWS, {}, some(1))
    assert written == ["block-00007.safetensors", "block-00007.parquet"]
    with pytest.raises(ValueError, match="status"):
        RunFolder(tmp_path).write_block(7, ROWS.assign(status="?").astype(VERDICT_COLUMNS), {}, some(1))
    assert len(written) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(some(3).to_bytes()),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "one less", "gone"],
)
def test_a_block_with_damaged_witnesses_is_not_written(spoil: Callable[[Path], object], tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_block(0, ROWS, {}, some(3, 1))
    spoil(tmp_path / "blocks" / "block-00000.safetensors")
    assert folder.read_blocks() == []


def test_a_block_written_again_keeps_nothing_of_what_it_had(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.write_block(0, ROWS, {}, some(3, 1))
    folder.write_block(0, ROWS, {})
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-00000.parquet"]

"""Rows by column: the same as a frame says, and nothing made up of a damaged file."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verdict_rows import ROWS

from bench.results.table import Table, Text, firsts, numbered

randomly = settings(deadline=None, max_examples=50)
WORDS = st.lists(st.sampled_from(["clean", "pgd", "", "ε|"]), min_size=1, max_size=9)


def text(words: list[str]) -> Text:
    return Table.of(pd.DataFrame({"word": pd.Series(words, dtype="str")})).texts["word"]


def test_a_table_is_what_its_frame_is():
    table = Table.of(ROWS)
    assert (len(table), table.gaps) == (len(ROWS), [])
    pd.testing.assert_frame_equal(table.frame(), ROWS)
    assert [table.row(number) for number in range(len(ROWS))] == ROWS.to_dict("records")
    own = table.frame()
    own.loc[:, "idx"] = 7  # the caller's own
    pd.testing.assert_frame_equal(table.frame(), ROWS)


def test_rows_of_a_part_and_of_several_tables():
    table, chosen = Table.of(ROWS), (ROWS["attack"] == "pgd").to_numpy()
    pd.testing.assert_frame_equal(table.where(chosen).frame(), ROWS[chosen].reset_index(drop=True))
    pd.testing.assert_frame_equal(table.where(np.array([3, 0])).frame(), ROWS.iloc[[3, 0]].reset_index(drop=True))
    other = ROWS.assign(attack="square", idx=ROWS["idx"] + 2)
    columns = ["attack", "idx", "robust"]
    joined = Table.joined([table, Table.of(other)], columns).frame()
    pd.testing.assert_frame_equal(joined, pd.concat([ROWS, other], ignore_index=True)[columns])


@randomly
@given(WORDS, WORDS)
def test_texts_are_compared_by_their_codes_as_by_themselves(words: list[str], more: list[str]):
    found = text(words)
    assert found[:].tolist() == words
    assert found.are(["pgd", ""]).tolist() == [word in ("pgd", "") for word in words]
    assert found.distinct() == list(dict.fromkeys(words))
    assert found.counts() == {word: words.count(word) for word in words}
    assert Text.joined([found, text(more)])[:].tolist() == words + more
    # a text that two codes stand for, as no file of ours has it
    twice = Text(np.append(found.values, found.values), found.codes + len(found.values) * (found.codes % 2))
    assert twice.distinct() == found.distinct()
    assert twice.are(["pgd"]).tolist() == found.are(["pgd"]).tolist()


def test_two_names_that_become_one():
    found = text(["a", "b", "c"]).renamed(lambda name: "x" if name in "ab" else name)
    assert found.are(["x"]).tolist() == [True, True, False]
    assert found.distinct() == ["x", "c"]
    assert found.counts() == {"x": 2, "c": 1}


@randomly
@given(st.lists(st.integers(-3, 10**6) | st.integers(0, 5), max_size=9))
def test_examples_are_numbered_by_their_idx(idx: list[int]):
    number, examples = numbered(np.array(idx, dtype=np.int64))
    assert examples.tolist() == sorted(set(idx))
    assert examples[number].tolist() == idx


@randomly
@given(st.lists(st.integers(0, 4), max_size=9))
def test_the_first_rows_of_each_key(keys: list[int]):
    expected = [at for at, key in enumerate(keys) if key not in keys[:at]]
    assert firsts(np.array(keys, dtype=np.int64)).tolist() == expected


def test_each_example_has_one_hash():
    table = Table.of(pd.DataFrame({"idx": [7, 2, 7], "input_hash": ["b", "a", "b"]}))
    assert table.hashes.tolist() == ["a", "b"]  # in the order of idx
    with pytest.raises(ValueError, match="one input hash"):
        _ = Table.of(pd.DataFrame({"idx": [7, 2, 7], "input_hash": ["b", "a", "c"]})).hashes


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        (pa.array([1, 2], pa.int32()), "int32", None),
        (pa.array([1, None], pa.int64()), "int64", None),
        (pa.array([True, None]), "bool", None),
        (pa.array(["a", None]), "str", None),
        (pa.array(["a", None]).dictionary_encode(), "str", None),
        (pa.array([1, 1]).dictionary_encode(), "dictionary<values=int64, indices=int32, ordered=0>", None),
        (pa.array([1.5, None]), "float64", [1.5, np.nan]),
        (pa.array([None, None], pa.float64()), "float64", [np.nan, np.nan]),
        (pa.array([3, 4, 5], pa.int64())[1:], "int64", [4, 5]),
        (pa.array([True, False, False, True])[1:3], "bool", [False, False]),
        (pa.array([0.5, None, 2.0])[1:], "float64", [np.nan, 2.0]),
        (pa.chunked_array([["a"], ["b", "a"]]), "str", ["a", "b", "a"]),
        (
            pa.chunked_array([pa.array(["a"]).dictionary_encode(), pa.array(["b"]).dictionary_encode()]),
            "str",
            ["a", "b"],
        ),
    ],
)
def test_columns_as_files_have_them(column: Any, kind: str, values: list[Any] | None):
    table = Table.of_arrow(pa.table({"x": column}))
    assert table.types == {"x": kind}
    assert table.gaps == ([] if values else ["x"])
    if values:
        found = table.texts["x"][:] if kind == "str" else table["x"]
        np.testing.assert_array_equal(found, np.array(values, dtype=found.dtype))


@pytest.mark.parametrize("rows", [ROWS.iloc[:0], ROWS.iloc[[0]]])
def test_a_table_may_have_no_rows(rows: pd.DataFrame):
    for chunks in (pa.Table.from_pandas(rows, preserve_index=False), pa.Table.from_pandas(rows).schema.empty_table()):
        table = Table.of_arrow(chunks.select(list(rows)))
        assert len(table) == len(chunks)
        pd.testing.assert_frame_equal(table.frame(), rows.iloc[: len(chunks)])
        assert table.where(np.zeros(len(table), dtype=bool)).texts["attack"].distinct() == []


def test_codes_beyond_the_texts_are_damage():
    buffers = [None, pa.array([0, 5], pa.int32()).buffers()[1]]
    codes = pa.Array.from_buffers(pa.int32(), 2, buffers)
    broken = pa.DictionaryArray.from_arrays(codes, pa.array(["a"]), safe=False)
    with pytest.raises(ValueError, match="out of bounds"):
        Table.of_arrow(pa.table({"x": broken}))

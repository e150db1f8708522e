"""Rows by column, as numpy arrays; of texts the distinct values, and which of them each row has. No torch.

A board is made of millions of rows. So a text is compared once for each distinct value, and a frame, for which pandas
has to be imported, is made for those who ask for one.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

#: The types of columns by arrow's names, as pandas calls them.
_TYPES = {"int64": "int64", "double": "float64", "bool": "bool"}
_TEXT, _ARROW_TEXTS = "str", ("string", "large_string")
#: An array over all of a data set's positions is made where they are at most so many times the rows.
_DENSE = 8


@dataclass(frozen=True, eq=False)
class Text:
    """A column of texts (m,): that of row i is `values[codes[i]]`."""

    values: NDArray[np.object_]
    codes: NDArray[np.int64]
    _asked: dict[tuple[str, ...], NDArray[np.bool_]] = field(default_factory=dict, repr=False)

    def __getitem__(self, rows: Any) -> NDArray[np.object_]:
        """The texts of some rows."""
        found: NDArray[np.object_] = self.values[self.codes[rows]]
        return found

    def are(self, words: Sequence[str]) -> NDArray[np.bool_]:
        """Of each row whether its text is one of these; read-only, since what was asked once is kept."""
        if (found := self._asked.get(key := tuple(words))) is None:
            self._asked[key] = found = np.array([value in words for value in self.values], dtype=bool)[self.codes]
            found.flags.writeable = False
        return found

    def distinct(self) -> list[str]:
        """The texts that rows have, each once, in the order of their first rows."""
        first = np.full(len(self.values), len(self.codes))
        first[self.codes[::-1]] = np.arange(len(self.codes))[::-1]  # of equal codes the last one written is kept
        order = np.argsort(first, kind="stable")
        return list(dict.fromkeys(self.values[code] for code in order if first[code] < len(self.codes)))

    def counts(self) -> dict[str, int]:
        """How many rows have each text that there is."""
        found: Counter[str] = Counter()
        for value, count in zip(self.values, np.bincount(self.codes, minlength=len(self.values)), strict=True):
            found[value] += int(count)
        return dict(+found)  # of those that have any

    def renamed(self, name: Callable[[str], str]) -> Self:
        """With other texts in place of these."""
        return type(self)(_objects([name(value) for value in self.values]), self.codes)

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """The rows of all, one after the other."""
        at = {value: number for number, value in enumerate(dict.fromkeys(v for text in several for v in text.values))}
        codes = [np.array([at[value] for value in text.values], dtype=np.int64)[text.codes] for text in several]
        return cls(_objects(list(at)), np.concatenate(codes))


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    found: NDArray[np.object_] = np.empty(len(values), dtype=object)
    found[:] = values
    return found


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a run. types: of every column, in order, as pandas calls them.

    Only columns of known types, with a value in every row, have their values here.
    """

    types: Mapping[str, str]
    numbers: Mapping[str, NDArray[Any]]
    texts: Mapping[str, Text]

    @classmethod
    def of_arrow(cls, rows: pa.Table) -> Self:
        """Of what a Parquet file holds; ValueError for damage. A float that is missing is no number (NaN)."""
        types, numbers, texts = dict[str, str](), dict[str, NDArray[Any]](), dict[str, Text]()
        for name, chunks in zip(rows.column_names, rows.columns, strict=True):
            column = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
            column.validate(full=True)  # of codes as well
            if str(column.type) in _ARROW_TEXTS:
                column = column.dictionary_encode()
            types[name] = _type(column.type)
            if types[name] == _TEXT and not column.null_count:
                texts[name] = Text(_objects(column.dictionary.to_pylist()), _values(column.indices))
            elif types[name] in _TYPES.values() and (types[name] == "float64" or not column.null_count):
                numbers[name] = _values(column)
        return cls(types, numbers, texts)

    @classmethod
    def of(cls, frame: "pd.DataFrame") -> Self:
        """Of a frame."""
        types = {str(column): str(dtype) for column, dtype in frame.dtypes.items()}
        known = [column for column, dtype in types.items() if dtype in (*_TYPES.values(), _TEXT)]
        made = cls.of_arrow(pa.Table.from_pandas(frame[known], preserve_index=False))
        return cls(types, made.numbers, made.texts)

    def frame(self) -> "pd.DataFrame":
        """As a frame of pandas, which is the caller's own."""
        import pandas as pd

        return pd.DataFrame({
            name: pd.Series(self.texts[name][:], dtype="str") if name in self.texts else self.numbers[name]
            for name in self.types
        })  # fmt: skip

    def __len__(self) -> int:
        columns = [*self.numbers.values()] or [text.codes for text in self.texts.values()]
        return len(columns[0]) if columns else 0

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column of numbers or truth values (m,)."""
        return self.numbers[column]

    @property
    def gaps(self) -> list[str]:
        """The columns without values: one is missing in a row, or they are of another type."""
        return [name for name in self.types if name not in self.numbers and name not in self.texts]

    def are(self, column: str, *words: str) -> NDArray[np.bool_]:
        """Of each row whether its text in this column is one of these."""
        return self.texts[column].are(words)

    def row(self, number: int) -> dict[str, Any]:
        """One row, of Python's own types."""
        return {
            name: self.texts[name][number] if name in self.texts else self.numbers[name][number].item()
            for name in self.types
        }

    def where(self, rows: NDArray[Any]) -> Self:
        """These rows: a truth value for each, or their numbers."""
        if rows.dtype == bool and rows.all():
            return self
        texts = {name: Text(text.values, text.codes[rows]) for name, text in self.texts.items()}
        return type(self)(self.types, {name: column[rows] for name, column in self.numbers.items()}, texts)

    def renamed(self, column: str, name: Callable[[str], str]) -> Self:
        """With other texts in a column."""
        return type(self)(self.types, self.numbers, {**self.texts, column: self.texts[column].renamed(name)})

    @classmethod
    def joined(cls, several: Sequence[Self], columns: Sequence[str]) -> Self:
        """These columns of all rows, one after the other."""
        types = {name: several[0].types[name] for name in columns}
        numbers = {name: np.concatenate([rows[name] for rows in several]) for name in columns if types[name] != _TEXT}
        texts = {name: Text.joined([rows.texts[name] for rows in several]) for name in columns if types[name] == _TEXT}
        return cls(types, numbers, texts)

    @cached_property
    def examples(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row the number of its example (m,), and the examples' sorted idx (n,)."""
        return numbered(self["idx"])

    @cached_property
    def hashes(self) -> NDArray[np.object_]:
        """The input hash of each example (n,); ValueError where one has several."""
        (number, idx), text = self.examples, self.texts["input_hash"]
        codes = np.zeros(len(idx), dtype=np.int64)
        codes[number] = text.codes
        if (codes[number] != text.codes).any():
            raise ValueError("an example does not have exactly one input hash")
        found: NDArray[np.object_] = text.values[codes]
        return found


def _values(column: pa.Array) -> NDArray[Any]:
    """As a numpy array; by its buffers, since pyarrow's own conversion imports pandas."""
    if not len(column):
        return np.empty(0, column.type.to_pandas_dtype())
    valid, data = column.buffers()
    if pa.types.is_boolean(column.type):
        return _bits(data, column)
    values = np.frombuffer(data, column.type.to_pandas_dtype(), len(column), column.offset * column.type.byte_width)
    return np.where(_bits(valid, column), values, np.nan) if column.null_count else values


def _bits(data: pa.Buffer, column: pa.Array) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


def _type(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind) and str(kind.value_type) in _ARROW_TEXTS:
        return _TEXT
    return _TYPES.get(str(kind), str(kind))


def numbered(idx: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row the number of its example, and the examples' sorted idx."""
    if not len(idx) or idx.min() < 0 or idx.max() >= _DENSE * len(idx):
        examples, number = np.unique(idx, return_inverse=True)
        return number, examples
    there = np.zeros(int(idx.max()) + 1, dtype=bool)  # positions in a data set: an array is faster than to sort
    there[idx] = True
    return (np.cumsum(there) - 1)[idx], np.flatnonzero(there)


def firsts(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose keys (m,) no row before them has, in their order."""
    order = np.argsort(keys, kind="stable")
    new = np.ones(len(keys), dtype=bool)
    new[1:] = keys[order[1:]] != keys[order[:-1]]
    return np.sort(order[new])

"""The results folder: `<dataset>/<norm>-<eps>/<suite>-v<N>/<model>/<run>/{result.json, verdicts.parquet}`,
and `witnesses.safetensors` where the run broke an example.

Paths are an index; `result.json` is the truth. A run's folder is written once: blocks of rows while it is under way,
`verdicts.parquet` and last of all `result.json` when it is finished. Never imports torch.
"""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from bench.errors import UnusableInput
from bench.files import write_atomically
from bench.results.schema import VERDICT_COLUMNS, Result, check_fit, check_verdicts, suite_label
from bench.results.table import Table
from bench.results.witnesses import FILE, Witnesses
from bench.spec import RunSpec, Spec, dataset_folder, path_safe

if TYPE_CHECKING:
    import pandas as pd

#: The rows of a certificate (`bench.results.certificates`), whose folders lie among those of the runs.
CERTIFICATES = "certificates.parquet"
#: Where a block's side data lies in its file's schema metadata: one file, so that rows and side data come together.
_SIDE = b"bench.side"
#: In a block's side data: how many witnesses it has, in a file beside its own.
_KEPT = "bench.results.witnesses"


#: So many runs' rows are kept in memory, of runs on at most so many examples: of large ones, with megabytes each, they
#: are read again, which takes less than to keep them.
_KEPT_RUNS, _KEPT_EXAMPLES = 512, 1000
#: So many runs are named where a folder holds some and is none.
_NAMED = 3

RowCheck = Callable[[Table], None]
R = TypeVar("R", bound=Spec)


def ensure_writable(root: Path) -> None:
    """Makes the folder, and UnusableInput where nothing can be written into it: to be called before the work."""
    probe = root / f".probe-{uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UnusableInput(f"folder '{root}' cannot be written ({error.strerror}): name another one") from None


def _to_parquet(rows: "pd.DataFrame", side: Mapping[str, Any], check: RowCheck) -> bytes:
    table = pa.Table.from_pandas(rows, preserve_index=False)
    check(Table.of_arrow(table))
    table = table.replace_schema_metadata({**table.schema.metadata, _SIDE: json.dumps(side)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _from_parquet(path: Path, columns: Mapping[str, str], check: RowCheck) -> tuple[Table, dict[str, Any]]:
    """Rows and side data; ValueError, or an OSError, for a file that is not a whole one with these columns."""
    texts = [column for column, dtype in columns.items() if dtype == "str"]
    try:
        data = pa.BufferReader(path.read_bytes())  # given a path, pyarrow expands `~` and wants UTF-8
        table = pq.ParquetFile(data, read_dictionary=texts).read(use_threads=False)
        side = json.loads((table.schema.metadata or {}).get(_SIDE, b"{}"))
        rows = Table.of_arrow(table)
    except (pa.ArrowException, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a whole file of rows ({error})") from None
    check(rows)
    return rows, side


@dataclass(frozen=True)
class BlockRows:
    """The rows of one block, and what else is to be known of it: anything that JSON can hold."""

    index: int
    rows: "pd.DataFrame"
    side: dict[str, Any]
    witnesses: Witnesses | None = None


def run_folder(root: Path, spec: RunSpec, run_key: str) -> Path:
    """Where a run's files lie below the results folder; α is not in the path, the run key tells such runs apart."""
    suite = path_safe(f"{spec.suite}-v{spec.suite_version}")
    return root / dataset_folder(spec.dataset) / spec.threat_model.folder / suite / path_safe(spec.model) / run_key


class Folder(ABC, Generic[R]):
    """The folder of one run, as the loop that makes it fills it. Without `result.json` the run is unfinished.

    Several processes may write blocks at a time; every file appears whole or not at all. A subclass says which
    `file` holds the rows, of which `columns`, and what rows (`check`) and results go together (`fit`; both raise
    ValueError).
    """

    file: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blocks = path / "blocks"

    @staticmethod
    @abstractmethod
    def check(rows: Table, /) -> None:
        """ValueError, saying which rule, for rows that no run can have."""

    @staticmethod
    @abstractmethod
    def fit(result: R, rows: Table) -> None:
        """ValueError, naming the first that differs, where the result says what does not follow from the rows."""

    @abstractmethod
    def read(self) -> R:
        """The result, checked; UnusableInput, naming the file, if it or its rows cannot be relied on."""

    def finished(self) -> R | None:
        """The result of a finished run, or None; UnusableInput where its files do not fit together.

        Its blocks, which a command that was killed at its very end has left, are removed.
        """
        if not (self.path / "result.json").exists():
            return None
        result = self.read()
        self._drop_blocks()
        return result

    def rows(self, result: R) -> Table:
        """The rows, as the file has them now; UnusableInput if they are not those that the result was made from."""
        path = self.path / self.file
        try:
            rows, _ = _from_parquet(path, self.columns, self.check)
            self.fit(result, rows)
        except (ValueError, OSError) as error:
            raise _unusable(path, error) from None
        return rows

    def write_block(
        self, index: int, rows: "pd.DataFrame", side: Mapping[str, Any], witnesses: Witnesses | None = None
    ) -> None:
        """Stores a block's rows, side data and adversarial examples; ValueError for rows that no run can have.

        Of a run that another process finishes meanwhile, which takes the blocks away, nothing is stored.
        """
        result = self.path / "result.json"
        try:
            self._write_block(index, rows, side, witnesses)
        except FileNotFoundError:
            if not result.exists():
                raise
        if result.exists():  # asked after the block is written: the other takes away what came before its result
            self._drop_blocks()

    def _write_block(
        self, index: int, rows: "pd.DataFrame", side: Mapping[str, Any], witnesses: Witnesses | None
    ) -> None:
        path = self._blocks / f"block-{index:05d}.parquet"
        if witnesses is None:
            whole = _to_parquet(rows, side, self.check)
            path.with_suffix(".safetensors").unlink(missing_ok=True)
        else:  # before the rows, which say how many there are: a block that is done has its witnesses
            whole = _to_parquet(rows, {**side, _KEPT: len(witnesses)}, self.check)
            write_atomically(path.with_suffix(".safetensors"), witnesses.to_bytes())
        write_atomically(path, whole)

    def read_blocks(self, known: Container[int] = ()) -> list[BlockRows]:
        """The blocks written so far but for the `known`, in order; a file that cannot be read counts as not written."""
        found = []
        for path in sorted(self._blocks.glob("block-*.parquet")):
            try:
                index = int(path.stem.removeprefix("block-"))
                if index in known:
                    continue
                rows, side = _from_parquet(path, self.columns, self.check)
                witnesses = Witnesses.read(path.with_suffix(".safetensors")) if _KEPT in side else None
                if witnesses is not None and side.pop(_KEPT) != len(witnesses):
                    continue
                found.append(BlockRows(index, rows.frame(), side, witnesses))
            except (ValueError, OSError):
                continue  # what killed the writer also loses its block: it is attacked again
        return found

    def finish(self, result: R, rows: "pd.DataFrame", witnesses: Witnesses | None = None) -> None:
        """Writes the witnesses, the rows, then the result, and drops the blocks; ValueError if they do not fit."""
        self.fit(result, Table.of(rows))
        if witnesses is not None:
            write_atomically(self.path / FILE, witnesses.to_bytes())
        write_atomically(self.path / self.file, _to_parquet(rows, {}, self.check))
        write_atomically(self.path / "result.json", (result.model_dump_json(indent=1) + "\n").encode())
        self._drop_blocks()

    def _drop_blocks(self) -> None:
        """Removes the blocks, of which a finished run needs none."""
        shutil.rmtree(self._blocks, ignore_errors=True)


class RunFolder(Folder[Result]):
    """The folder of one run of a suite."""

    file, columns = "verdicts.parquet", VERDICT_COLUMNS
    check = staticmethod(check_verdicts)

    @staticmethod
    def fit(result: Result, rows: Table) -> None:
        check_fit(result, rows)

    def read(self) -> Result:
        return read_run(self.path).result


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run in its folder."""

    result: Result
    path: Path

    def rows(self) -> Table:
        """The rows; UnusableInput if they are not those that the result was made from.

        They are read and checked once, and of small runs kept while few others are asked for.
        """
        return _kept(self) if self.result.spec.n_examples <= _KEPT_EXAMPLES else _rows(self)

    def verdicts(self) -> "pd.DataFrame":
        """The rows as a frame, which is the caller's own."""
        return self.rows().frame()

    def __str__(self) -> str:
        spec = self.result.spec
        alpha = "" if spec.alpha is None else f" (α {spec.alpha:g})"
        return f"{suite_label(spec)} on {spec.model}{alpha}, {spec.dataset} {spec.threat_model} (run {self.result.run})"


def _rows(run: Run) -> Table:
    return RunFolder(run.path).rows(run.result)


_kept = lru_cache(maxsize=_KEPT_RUNS)(_rows)


def read_run(path: Path) -> Run:
    """The finished run in the folder `path`, checked; UnusableInput, naming the file, if it cannot be relied on."""
    run = Run(read_result(path, Result), path)
    run.rows()
    return run


def read_result(path: Path, kind: type[R]) -> R:
    """The `result.json` in the folder `path`; UnusableInput, naming the file, if it is none of this kind."""
    file = path / "result.json"
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _unusable(file, f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()) from None
    except FileNotFoundError:
        raise UnusableInput(f"'{path}' is no finished run: {_runs_below(path)}") from None
    except OSError as error:
        raise _unusable(file, error) from None


def _runs_below(path: Path) -> str:
    """Which folders below `path` are runs, in words."""
    found = [folder for folder in finished_folders(path) if not (folder / CERTIFICATES).exists()]
    if not found:
        return "it has no result.json, and no folder below it has; make a run with: bench run"
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"name one of the runs below it, such as {', '.join(map(str, found[:_NAMED]))}{more}"


def read_runs(root: Path) -> list[Run]:
    """Every finished run below `root`, sorted by path; UnusableInput for no such folder and for files that do not fit.

    What is under way has no `result.json` and is passed over; so are certificates, which are no runs of a suite. Rows
    are read, and checked, when they are asked for: of many large runs they do not fit into memory together.
    """
    if root.exists() and not root.is_dir():
        raise UnusableInput(f"'{root}' is a file: name a folder of results")
    if not root.is_dir():
        raise UnusableInput(f"there is no results folder '{root}': make it with: bench run --results {root}")
    folders = finished_folders(root)
    return [Run(read_result(path, Result), path) for path in folders if not (path / CERTIFICATES).exists()]


def finished_folders(root: Path) -> list[Path]:
    """Every folder below `root` that has a `result.json`, sorted; links are followed, and no folder comes twice."""
    found, seen = [], set[tuple[int, int]]()
    for name, folders, files in os.walk(root, followlinks=True):
        try:
            own = os.stat(name)
        except OSError:  # removed by now, such as the blocks of a run that another command has finished
            continue
        if (own.st_dev, own.st_ino) in seen:
            folders.clear()
            continue
        seen.add((own.st_dev, own.st_ino))
        folders.sort()  # which of several links to one folder comes first
        if "result.json" in files:
            found.append(Path(name))
    return sorted(found)


def _unusable(file: Path, reason: object) -> UnusableInput:
    return UnusableInput(f"{file} cannot be used ({reason}): remove the folder {file.parent} and run again")

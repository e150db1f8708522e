"""Boards: one CSV and one markdown file for each data set and threat model, computed from the verdict rows alone.

The same runs give the same bytes. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.boards import views
from bench.boards.rows import Board, board_rows, finished_runs, grouped, tables
from bench.files import write_if_changed
from bench.results.certificates import Certificates, read_certificates
from bench.results.store import Run, ensure_writable
from bench.spec import dataset_folder

#: How a board is written by file ending; the CSV keeps every column, whichever are asked for.
FILES: Mapping[str, Callable[[Board, Sequence[str]], str]] = {
    "csv": lambda board, _: views.csv(board),
    "md": views.markdown,
    "tex": views.latex,
    "html": views.html,
}


@dataclass(frozen=True)
class Stored:
    """All finished runs and certificates below a results folder."""

    root: Path
    runs: list[Run]
    certificates: list[Certificates]

    @classmethod
    def read(cls, root: Path) -> Self:
        """What lies below `root`; UnusableInput if that is no run, or one that cannot be used."""
        return cls(root, finished_runs(root), read_certificates(root))


def boards(results_root: Path) -> list[Board]:
    """The boards of all finished runs below `results_root`; UnusableInput if there is none or one cannot be used."""
    return boards_of(Stored.read(results_root))


def boards_of(stored: Stored) -> list[Board]:
    """The boards of what is stored; UnusableInput if a run cannot be used."""
    found = []
    for stem, runs in sorted(grouped(stored.runs, _stem).items()):
        titles = sorted({f"{run.result.spec.dataset}, {run.result.spec.threat_model}" for run in runs})
        failed = tuple(run for run in runs if run.result.errors)
        for run in failed:
            run.rows()  # which checks them
        made = tuple(map(tuple, tables(board_rows(runs), stored.certificates)))
        found.append(Board(stem, "; ".join(titles), made, failed, stored.root))
    return found


def write_boards(
    made: Sequence[Board], out_dir: Path, columns: Sequence[str] = (), kinds: Sequence[str] = ("csv", "md")
) -> list[Path]:
    """Writes `<dataset>_<norm>-<eps>.<kind>` for every board and kind, and returns their paths.

    A file that would not change is left untouched. UnusableInput for an unknown column, and for a folder that cannot be
    written.
    """
    texts = {f"{board.stem}.{kind}": FILES[kind](board, columns) for board in made for kind in kinds}
    ensure_writable(out_dir)
    for name, text in texts.items():
        write_if_changed(out_dir / name, text.encode())
    return [out_dir / name for name in texts]


def _stem(run: Run) -> str:
    return f"{dataset_folder(run.result.spec.dataset)}_{run.result.spec.threat_model.folder}"

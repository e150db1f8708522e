"""One figure for a paper, as SVG or PDF: the report's own. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from bench.boards.leaderboard import Stored
from bench.boards.rows import Board
from bench.drawing import Drawing, pdf, svg
from bench.errors import UnusableInput, did_you_mean
from bench.files import write_atomically
from bench.report.details import Model, boards_with_models
from bench.report.figures import KINDS

WRITERS: Mapping[str, Callable[[Drawing], bytes]] = {
    ".svg": lambda drawing: svg(drawing.figure).encode(),
    ".pdf": lambda drawing: pdf(drawing.figure),
}


def plot(
    word: str,
    results: Path,
    out: Path,
    board: str | None = None,
    model: str | None = None,
    histories: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Writes the figure called `word` of what lies below `results`; UnusableInput as for boards and `drawn`."""
    if out.suffix.lower() not in WRITERS:
        raise UnusableInput(f"--out {out}: a figure is written as {' or '.join(WRITERS)}, by the ending of its name")
    found = [] if word not in KINDS else boards_with_models(Stored.read(results), histories)
    drawing = drawn(word, found, board, model)
    write_atomically(out, WRITERS[out.suffix.lower()](drawing))


def drawn(word: str, found: Sequence[tuple[Board, list[Model]]], board: str | None, model: str | None) -> Drawing:
    """The figure called `word`. `board` is a board's file name without its ending, `model` a row's name.

    UnusableInput for unknown ones, where none of those that are meant has such a figure, and where several have.
    """
    if word not in KINDS:
        raise UnusableInput(f"unknown figure '{word}': {did_you_mean(word, KINDS)}")
    candidates = _candidates(KINDS[word].of, found, board, model)
    made = {name: drawing for name, models in candidates.items() if (drawing := KINDS[word].draw(models)) is not None}
    if not made:
        raise UnusableInput(f"no figure '{word}' ({KINDS[word].shows}) can be drawn of these results")
    if len(made) > 1:
        boards = list(dict.fromkeys(stem for stem, _ in made))
        option, names = ("--board", boards) if len(boards) > 1 else ("--model", [name for _, name in made])
        raise UnusableInput(f"several have a figure '{word}': name one by {option}: {', '.join(names)}")
    return next(iter(made.values()))


def _candidates(
    of: str, found: Sequence[tuple[Board, list[Model]]], board: str | None, model: str | None
) -> dict[tuple[str, str], list[Model]]:
    """What a figure can be drawn of, by board and model; of several evaluation sets the largest."""
    stems = [made.stem for made, _ in found]
    if board is not None and board not in stems:
        raise UnusableInput(f"--board {board}: {did_you_mean(board, stems)}")
    own = [(made, models) for made, models in found if board in (None, made.stem)]
    if of == "board":
        if model is not None:
            raise UnusableInput(f"--model {model}: this figure shows all models of a board; name a --board")
        return {(made.stem, ""): [one for one in models if one.row in made.tables[0]] for made, models in own}
    names = list(dict.fromkeys(name for _, models in own for one in models for name in _names(one)))
    if model is not None and model not in names:
        raise UnusableInput(f"--model {model}: {did_you_mean(model, names)}")
    chosen: dict[tuple[str, str], list[Model]] = {}
    for made, models in own:
        for one in models:
            if model is None or model in _names(one):
                chosen.setdefault(("" if of == "balls" else made.stem, one.row.name), [one])
    return chosen


def _names(model: Model) -> tuple[str, str]:
    return model.row.name, model.row.spec.model

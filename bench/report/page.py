"""The report: one static HTML page that needs no server, no network and no other file. No torch.

The same results give the same bytes. What a user named is escaped by jinja2, and in figures by matplotlib.
"""

import gc
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import pandas as pd
from markupsafe import Markup

from bench.boards.columns import MAIN, Column, chosen, columns, percent
from bench.boards.leaderboard import Stored
from bench.boards.rows import Board, Row
from bench.boards.views import NEAR, cells, constants, heading, headline, lacking, left_out
from bench.drawing import Drawing, inline
from bench.registry import command_words
from bench.report.details import Model, boards_with_models, chain
from bench.report.figures import KINDS, bounds
from bench.report.gallery import CleanImages, Gallery, gallery
from bench.results.certificates import OTHERS, Certification
from bench.results.schema import Result, suite_label

#: What is written below the numbers of a model.
_CHAIN = {
    "certified": "certified",
    "RA-worst": "RA-worst: all attacks",
    "AutoAttack": "AutoAttack alone",
    "PGD": "PGD alone",
    "SA": "SA: no attack",
}
_WIDE = 24  # characters of a cell; longer ones are wrapped


@dataclass(frozen=True)
class Cell:
    """A cell of the board: what it shows, and what it is sorted by."""

    text: str
    interval: str
    best: bool
    sort: str


@dataclass(frozen=True)
class Source:
    """A run or certification behind the numbers, and the command that makes it."""

    what: str
    finding: str
    result: Result | Certification
    command: str


def page(stored: Stored, histories: Mapping[str, pd.DataFrame], clean_images: CleanImages) -> str:
    """The report on what is stored; UnusableInput as for boards."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bench.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn = _Drawn()
    found = boards_with_models(stored, histories)
    found.sort(key=lambda pair: not any(row.ranked for row in pair[0].rows))
    with _garbage_rarely_looked_for():
        boards = [_board(board, models, clean_images, drawn) for board, models in found]
    runs = {run.path: run.result for board, _ in found for run in board.left_out}
    runs |= {run.path: run.result for _, models in found for model in models for run in model.row.runs}
    finished = sorted(result.finished[:10] for result in runs.values())
    return environment.get_template("page.html").render(
        boards=boards,
        styles=drawn.classes,
        results=str(stored.root),
        models=len({model.row.info.checkpoint_sha256 + model.row.name for _, models in found for model in models}),
        runs=len(runs),
        since=finished[0],
        until=finished[-1],
    )


@contextmanager
def _garbage_rarely_looked_for() -> Iterator[None]:
    """A figure is thousands of objects: to look for garbage at Python's own pace takes a fifth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _board(board: Board, models: Sequence[Model], clean_images: CleanImages, drawn: "_Drawn") -> dict[str, Any]:
    shown = columns(board.rows)
    tables = []
    for table in board.tables:
        own = [model for model in models if any(model.row is row for row in table)]
        tables.append({
            "heading": heading(table),
            "columns": shown,
            "wide": {column.key for column in shown if any(len(column.text(row)) > _WIDE for row in table)},
            "main": {column.key for column in constants(table, chosen(shown, MAIN))[1]},
            "rows": [
                {"id": _id(board, model, models), "model": model, "cells": _cells(table, shown, model.row)}
                for model in own
            ],
            "figures": drawn.figures(own, "board"),
            "lacking": lacking(table, board.results),
        })  # fmt: skip
    return {
        "id": board.stem,
        "title": board.title,
        "headline": headline(board),
        "tables": tables,
        "left_out": [left_out(run) for run in board.left_out],
        "models": [_model(board, model, models, clean_images, drawn) for model in models],
    }


def _model(
    board: Board, model: Model, models: Sequence[Model], clean_images: CleanImages, drawn: "_Drawn"
) -> dict[str, Any]:
    row = model.row
    bar = bounds([row], names=False)
    elsewhere = ranked_elsewhere(model, models)
    shown = gallery(model, clean_images) if elsewhere is None else Gallery(())
    return {
        "id": _id(board, model, models),
        "name": model.row.name,
        "rank": row.rank,
        "several_sets": len(board.tables) > 1,
        "n": row.n,
        "verdict": verdict(row),
        "chain": [(label, percent(share), _CHAIN[label]) for label, share in chain(row).items()],
        "bar": bar and drawn.picture(bar),
        "flags": row.flags,
        "info": row.info,
        "row": row,
        "figures": drawn.figures([model], "model", "balls") if elsewhere is None else [],
        "elsewhere": elsewhere and {"id": _id(board, elsewhere, models), "n": elsewhere.row.n},
        "gallery": shown,
        "replays": [
            shlex.join([*command_words(), "replay", path])
            for path in dict.fromkeys(str(picture.run.path) for picture in shown.pictures)
        ],
        "sources": _sources(board, model),
    }


def ranked_elsewhere(model: Model, models: Sequence[Model]) -> Model | None:
    """The same model's ranked row on other images of the board, for one without a rank: it has the figures of both."""
    if model.row.ranked:
        return None
    same = (one for one in models if one.row.ranked and one.key == model.key)
    return next(same, None)


class _Drawn:
    """Draws what a page needs: each picture has ids of its own, and what is of a model in all its balls comes once."""

    def __init__(self) -> None:
        self._number = count()
        self.classes: dict[str, str] = {}  # of all figures' elements, by style
        self._known: set[tuple[str, str]] = set()

    def figures(self, models: Sequence[Model], *of: str) -> list[tuple[str, str, Markup]]:
        """Of each kind that applies its name, title and picture."""
        found = []
        for word, kind in KINDS.items():
            key = (word, str(models[0].in_balls[0].runs[0].path))
            if kind.of in of and not (kind.of == "balls" and key in self._known):
                self._known.add(key)
                if (drawing := kind.draw(models)) is not None:
                    found.append((word, drawing.title, self.picture(drawing)))
        return found

    def picture(self, drawing: Drawing) -> Markup:
        """The drawing as a part of the page; an XML library wrote it, which escapes all texts."""
        return Markup(inline(drawing, f"f{next(self._number)}", self.classes))


def _id(board: Board, model: Model, models: Sequence[Model]) -> str:
    at = next(number for number, other in enumerate(models, start=1) if other is model)
    return f"{board.stem}-{at}"


def _cells(table: Sequence[Row], shown: Sequence[Column], row: Row) -> list[Cell]:
    numbers = {column.key: column.number(row) for column in shown}
    written = cells(table, shown, row, lambda text, interval, best: (text, interval, best))
    return [
        Cell(text, interval, best, text if numbers[column.key] is None else repr(numbers[column.key]))
        for column, (text, interval, best) in zip(shown, written, strict=True)
    ]


def verdict(row: Row) -> str:
    """What is known of a model's robustness, in one sentence."""
    if row.worst is None:
        return "Nothing attacked it, so there is no robust accuracy."
    text = (
        f"{percent(row.worst.value)} % of {row.n} images withstand every attack that ran"
        f" (95 % interval {percent(row.worst.low)} to {percent(row.worst.high)})"
    )
    if row.scores.ra is not None:
        gap = row.scores.ra.value - row.worst.value
        text += (
            f", {percent(row.scores.ra.value)} % AutoAttack alone" if gap > NEAR else ", as many as AutoAttack alone"
        )
        if row.worst.value and row.scores.ra.value >= 2 * row.worst.value:
            text += f" ({row.scores.ra.value / row.worst.value:.1f} times as many)"
    if row.certified.accuracy is not None:
        text += f"; {percent(row.certified.accuracy)} % are proven"
    if row.lacks:
        text += f"; it has no rank: {'; '.join(lack.why for lack in row.lacks)}"
    return f"{text}."


def _sources(board: Board, model: Model) -> list[Source]:
    """The runs and certifications behind a model's numbers."""
    found = []
    word = model.row.info.word or None
    for run in model.row.runs:
        result = run.result
        robust = f"SA {percent(result.clean_accuracy.value)}"
        if result.attacked:
            robust += f", RA {percent(result.robust_accuracy.value)}"
        found.append(Source(_what(result), robust, result, result.spec.command(board.results, word)))
    for one in model.certificates:
        known = {method: share for method, share in one.result.certified.items() if method not in OTHERS}
        shares = ", ".join(f"{method} {percent(share.value)}" for method, share in known.items())
        what = f"{_what(one.result)}, {one.result.spec.threat_model}"
        found.append(Source(what, shares or "not applicable", one.result, one.result.spec.command(board.results, word)))
    return found


def _what(result: Result | Certification) -> str:
    return f"{suite_label(result.spec)} v{result.spec.suite_version}"

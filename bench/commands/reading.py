"""Commands that read: what there is, what has been measured, and what this machine can do."""

import json
import sys
import textwrap
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.commands.options import (
    FAILED,
    UNUSABLE,
    CheckpointsOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    GatesOption,
    JsonOption,
    ModelOption,
    ResultsOption,
    fitted,
    split,
    terminal_width,
)
from bench.console import say
from bench.errors import UnusableInput

if TYPE_CHECKING:
    from bench.boards.leaderboard import Stored


class Listing(StrEnum):
    """What `bench list` lists."""

    variants = "variants"
    suites = "suites"
    datasets = "datasets"
    objectives = "objectives"
    recipes = "recipes"


class Shown(StrEnum):
    """What `bench show` shows."""

    suite = "suite"
    objective = "objective"
    recipe = "recipe"


class BoardFormat(StrEnum):
    """How `bench leaderboard` shows the boards."""

    text = "text"
    md = "md"
    csv = "csv"
    latex = "latex"
    html = "html"
    robustbench = "robustbench"


class CheckFormat(StrEnum):
    """How `bench check` reports."""

    text = "text"
    json = "json"
    junit = "junit"
    markdown = "markdown"
    github = "github"


def list_(
    what: Listing,
    as_json: JsonOption = False,
    long: Annotated[bool, typer.Option("--long", help="what each is, in a sentence")] = False,
) -> None:
    """List what there is, by name."""
    with redirect_stdout(sys.stderr):
        from bench.catalogue import names, sentence

        found = names(what)
        sentences = [sentence(what, name) for name in found] if long else []
    if as_json:
        print(json.dumps(dict(zip(found, sentences, strict=True)) if long else found, ensure_ascii=False))
    elif long:
        print(fitted(list(zip(found, sentences, strict=True)), (), "plain", terminal_width()))
    else:
        print("\n".join(found))


def show(
    what: Shown,
    name: Annotated[str, typer.Argument(help="such as adaptive; `bench list suites` shows all")],
    as_json: JsonOption = False,
) -> None:
    """Show what a suite, an objective or a recipe is, and its parameters: type, default or value, and meaning."""
    with redirect_stdout(sys.stderr):
        from bench.catalogue import details

        found = details(what, name)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    parameters, width = found.pop("parameters"), terminal_width()
    for key, value in found.items():
        text = f"{key}: {', '.join(value) if isinstance(value, list) else value}"
        print(textwrap.fill(text, width, subsequent_indent="  ") if width else text)
    if not parameters:
        print("\nno parameters")
        return
    rows = [["none" if value is None else str(value) for value in parameter.values()] for parameter in parameters]
    print("\n" + fitted(rows, list(parameters[0]), "simple", width))


def leaderboard(
    results: ResultsOption = Path("results"),
    out: Annotated[Path, typer.Option("--out", help="folder of the boards")] = Path("leaderboards"),
    board_format: Annotated[
        BoardFormat,
        typer.Option("--format", help="what is printed; latex and html are written as well, robustbench only written"),
    ] = BoardFormat.text,
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="those shown, by their names in the CSV, which has all")
    ] = None,
) -> None:
    """Write a CSV and a markdown board per data set and threat model, and print them; or RobustBench's JSON files.

    Exit status 1, and no board, where a certificate and an adversarial example contradict each other.
    """
    from bench.boards.leaderboard import FILES, boards_of, write_boards
    from bench.boards.views import terminal

    stored = _without_conflicts(results)
    if board_format is BoardFormat.robustbench:
        from bench.boards.robustbench import write_model_info

        written = write_model_info(stored.runs, out)
        for path in written.paths:
            say(f"{path}")
        if written.left_out:
            say(f"left out: {'; '.join(written.left_out)}")
        return
    made, shown = boards_of(stored), split(columns)
    ending = {"latex": "tex"}.get(board_format, board_format.value)
    kinds = list(dict.fromkeys(("csv", "md", *([ending] if ending in FILES else []))))
    for path in write_boards(made, out, shown, kinds):
        say(f"{path}")
    for board in made:
        print(FILES[ending](board, shown) if ending in FILES else terminal(board, shown, terminal_width()))


def _without_conflicts(results: Path) -> "Stored":
    """All runs and certificates; prints where two of them contradict each other, and exits with status 1."""
    from bench.boards.leaderboard import Stored
    from bench.results.certificates import conflicts

    stored = Stored.read(results)
    if found := conflicts(stored.runs, stored.certificates):
        print("\n\n".join(map(str, found)))
        say(
            f"error: {len(found)} predictions are not what is certified for their images: one of each two rows is wrong"
        )
        raise typer.Exit(FAILED)
    return stored


def report(
    results: ResultsOption = Path("results"),
    out: Annotated[Path, typer.Option("--out", help="the page")] = Path("report.html"),
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
) -> None:
    """Write all boards, figures and sources of the numbers as one HTML page, which needs no network and no other file.

    Clean images are shown where they lie at DATA_ROOT, training curves of the models in CHECKPOINTS. Exit status 1, and
    no page, where a certificate and an adversarial example contradict each other.
    """
    from bench.files import write_if_changed
    from bench.report.beside import clean_images, histories
    from bench.report.page import page

    if out.suffix != ".html":
        raise UnusableInput(f"--out {out}: the report is a .html file")
    stored = _without_conflicts(results)
    with redirect_stdout(sys.stderr):
        write_if_changed(out, page(stored, histories([checkpoints]), clean_images(data_root)).encode())
    print(out)


def plot(
    figure: Annotated[str | None, typer.Argument(help="which; without one, all are listed")] = None,
    results: ResultsOption = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", help="a .svg or .pdf file; FIGURE.svg if not given")] = None,
    board: Annotated[
        str | None, typer.Option("--board", help="such as digits_Linf-0.2, where there are several")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="a row of the board, where there are several")] = None,
    checkpoints: CheckpointsOption = Path("checkpoints"),
) -> None:
    """Write one figure of the report as SVG or PDF, for a paper."""
    from bench.report.beside import histories
    from bench.report.figures import KINDS
    from bench.report.plot import plot as write_plot

    if figure is None:
        width = max(map(len, KINDS))
        print("\n".join(f"{name:<{width}}  {kind.shows}" for name, kind in KINDS.items()))
        return
    path = out or Path(f"{figure}.svg")
    trained = histories([checkpoints]) if figure == "training" else {}
    write_plot(figure, results, path, board, model, trained)
    print(path)


def check(
    baseline: Annotated[Path, typer.Option("--baseline", help="folder of the results to hold up to")],
    results: ResultsOption = Path("results"),
    max_drop: Annotated[float, typer.Option("--max-drop", help="tolerated drop, as a fraction")] = 0.01,
    alpha: Annotated[float, typer.Option("--alpha", help="significance level")] = 0.05,
    strict: Annotated[
        bool, typer.Option("--strict", help="a drop fails without significance, and so does a gain beyond chance")
    ] = False,
    report_format: Annotated[
        CheckFormat, typer.Option("--format", help="how the report is printed")
    ] = CheckFormat.text,
) -> None:
    """Compare results with a baseline, example by example; exit status 1 on a regression."""
    from bench.boards.check import check as compare
    from bench.boards.check_formats import FORMATS, text

    report = compare(baseline, results, max_drop, alpha, strict)
    in_text = report_format is CheckFormat.text
    print(text(report, terminal_width()) if in_text else FORMATS[report_format](report))
    if report.failed:
        raise typer.Exit(FAILED)


def doctor(
    model: ModelOption = None,
    gates: GatesOption = None,
    dataset: DatasetOption = "digits",
    device: DeviceOption = "auto",
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
) -> None:
    """Tell what this machine has of what bench needs; or with --model, what a model shows and how long suites take.

    Exit status 1 where a package is missing, 2 where a model has a problem; each is told with what to do.
    """
    with redirect_stdout(sys.stderr):
        from bench.doctor import described, examine, examine_model
        from bench.environment import torch_device
        from bench.models.checkpoints import ZOO

        folders, where = [checkpoints, ZOO], torch_device(device)
    if model:
        problems = 0
        for word in split(model):
            with redirect_stdout(sys.stderr):
                diagnosis, images = examine_model(word, dataset, data_root, folders, where, split(gates))
            print(described(diagnosis, images, terminal_width()))
            problems += len(diagnosis.problems)
        if problems:
            raise typer.Exit(UNUSABLE)
        return
    with redirect_stdout(sys.stderr):
        findings = list(examine(data_root, folders))
    width = max(len(what) for what, _, _ in findings)
    for what, found, fine in findings:
        line, screen = f"{what:<{width}}  {found}{'' if fine else '  ← missing'}", terminal_width()
        print(textwrap.fill(line, screen, subsequent_indent=" " * (width + 2)) if screen else line)
    if not all(fine for *_, fine in findings):
        raise typer.Exit(FAILED)

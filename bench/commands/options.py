"""What the commands' options are called, and how their values are read."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import console
from bench.errors import UnusableInput

DONE, FAILED, UNUSABLE = 0, 1, 2  # exit status

DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="digits, cifar10, tinyimagenet, imagefolder:PATH or imagefolder-grey:PATH; behind it :size=N resizes",
    ),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="a preset; the data set's own if not given")]
SettingsOption = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="a parameter; may be repeated")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="of all random numbers")]


def variants(incomplete: str) -> list[str]:
    """For the shell: the variants whose names begin so."""
    from bench.models.variants import VARIANTS

    return [name for name in VARIANTS if name.startswith(incomplete)]


VariantArgument = Annotated[
    str, typer.Argument(autocompletion=variants, help="such as moe-rt_er; `bench list variants` shows all")
]
VariantsArgument = Annotated[
    list[str],
    typer.Argument(autocompletion=variants, help="such as moe-rt_er, or several; `bench list variants` shows all"),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        autocompletion=variants,
        help="a variant, a .safetensors file, robustbench:NAME, package.module:callable, or MODEL@baseline",
    ),
]
GatesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gates",
        metavar="GLOB",
        help="modules of a model of your own whose output scores experts, such as 'blocks.*.gate' or gate:k=2; `none`:"
        " it makes no (other) choices",
    ),
]
AlphaOption = Annotated[list[str] | None, typer.Option("--alpha", help="a dual's α; several make a sweep")]
ExamplesOption = Annotated[int | None, typer.Option("--n-examples", help="the first N test images; all if not given")]
NormOption = Annotated[str | None, typer.Option("--norm", help="Linf, L2 or L1; the data set's own if not given")]
EpsOption = Annotated[str | None, typer.Option("--eps", help="radius in pixels of [0, 1], such as 8/255")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:0 …")]
DataRootOption = Annotated[Path, typer.Option("--data-root", envvar="BENCH_DATA_ROOT", help="folder of the data sets")]
CheckpointsOption = Annotated[Path, typer.Option("--checkpoints", help="folder of trained models")]
ResultsOption = Annotated[Path, typer.Option("--results", help="folder of results")]
OnOption = Annotated[
    str | None, typer.Option("--on", metavar="ray[=ADDRESS]", help="spread the work over a Ray cluster")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else, on standard output")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", callback=lambda quiet: console.set_up(quiet), help="no bar, no lines about progress")
]


def split(values: Sequence[str] | None) -> tuple[str, ...]:
    """Repeated options, each of which may hold several values separated by commas; each value once."""
    parts = tuple(dict.fromkeys(part.strip() for value in values or () for part in value.split(",")))
    if "" in parts:
        raise UnusableInput(f"'{','.join(values or ())}' holds an empty value: name one, or leave the option out")
    return parts


def terminal_width() -> int | None:
    """The columns of the terminal on standard output; None where that is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(
    rows: Sequence[Sequence[object]],
    headers: Sequence[str],
    style: str,
    width: int | None,
    at: int = -1,
    least: int = 20,
) -> str:
    """A table whose column `at` is wrapped so that no line is longer than `width`, where it is given.

    least: characters that are left of that column, however narrow the terminal is.
    """
    from tabulate import MIN_PADDING, tabulate

    columns = zip(*([[header + " " * MIN_PADDING for header in headers]] if headers else []), *rows, strict=True)
    needs = [max(len(str(cell)) for cell in column) + 2 for column in columns]
    most: list[int | None] = [None] * len(needs)
    if width is not None:
        most[at] = max(least, width - sum(needs) + needs[at])
    text = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, maxcolwidths=most)
    return "\n".join(line.rstrip() for line in text.splitlines())


def seeds_of(words: Sequence[str] | None) -> tuple[int, ...]:
    """The values of `--seed` where it takes several; 0 if there is none."""
    seeds = split(words) or ("0",)
    for word in seeds:
        if not (word.isascii() and word.isdigit() and int(word) < 2**32):
            raise UnusableInput(f"--seed {word} must be a whole number from 0 to {2**32 - 1}")
    return tuple(dict.fromkeys(map(int, seeds)))


def alphas_of(words: Sequence[str] | None) -> tuple[float, ...]:
    from bench.settings import parse_number

    return tuple(parse_number(value, "--alpha") for value in split(words))


def whole(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UnusableInput(f"{option}: Input should be auto or a whole number (got '{word}')") from None


def settings_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    from bench.settings import parse_settings

    return parse_settings(pairs or ())

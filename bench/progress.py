"""What a person sees while a command works: bars on standard error, one line for what is done."""

import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import console
from bench.environment import World
from bench.results.schema import Result
from bench.spec import RunSpec, TrainSpec

if TYPE_CHECKING:  # torch's compiler comes with it, which attacks do without
    from bench.training.loop import Epoch


class _Bar:
    """A bar where a person is looking, and lines that stay; a file gets the lines alone."""

    def __init__(self) -> None:
        # no markup, no emoji: a model called `zoo:ok` must not come out as a picture
        screen = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=screen, transient=True,
            disable=not screen.is_terminal or World.here().rank > 0 or console.is_quiet(),
            speed_estimate_period=math.inf,  # a block takes longer than the half minute that it is by default
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._above = console.above(self._progress.console.print)
        self._above.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._above.__exit__(kind, error, trace)
        self._progress.stop()


class TrainingProgress(_Bar):
    """A bar over the steps with the loss, and one line per epoch with SA and RA on the held-out images."""

    def __init__(self, spec: TrainSpec) -> None:
        super().__init__()
        self._spec = spec
        self._task = self._progress.add_task(f"{spec.variant} on {spec.dataset}", total=None)
        self._scores = ""

    def on_step(self, epoch: int, done: int, steps: int, loss: float) -> None:
        self._progress.start()  # at the first step: an error before it leaves no empty bar behind
        epochs = self._spec.recipe.epochs
        description = f"{self._spec.variant} epoch {epoch + 1}/{epochs} loss {loss:.3f}{self._scores}"
        self._progress.update(self._task, completed=epoch * steps + done, total=epochs * steps, description=description)

    def on_epoch(self, epoch: "Epoch") -> None:
        self._scores = f" SA {epoch.sa:.1%} RA {epoch.ra:.1%}"
        line = f"epoch {epoch.epoch}/{self._spec.recipe.epochs} loss {epoch.loss:.3f}{self._scores}"
        console.note(f"{line} {epoch.images_per_second:.0f} images/s")


class RunProgress(_Bar):
    """A bar over the blocks of each run, and a line a finished run. `counted`: what the bar counts in its blocks."""

    def __init__(self, counted: str = "not yet broken") -> None:
        super().__init__()
        self._runs, self._number, self._counted = 0, 0, counted

    def expect(self, runs: int) -> None:
        """So many runs are still to come, as far as is known."""
        self._runs = self._number + runs

    def start(self, spec: RunSpec) -> None:
        self._progress.start()
        self._number += 1
        self._label = f"[{self._number}/{max(self._runs, self._number)}] {spec.suite} on {spec.model}"
        if spec.alpha is not None:
            self._label += f" (α {spec.alpha:g})"
        for finished in self._progress.task_ids:  # a task cannot go back to an unknown total
            self._progress.remove_task(finished)
        self._task = self._progress.add_task(self._label, total=None)

    def on_block(self, done: int, blocks: int, count: int) -> None:
        description = f"{self._label}: {count} {self._counted}" if done else self._label
        self._progress.update(self._task, description=description, completed=done, total=blocks)

    def finish(self, result: Result, reused: bool = False) -> None:
        """Tell of a finished run; `reused`: it was finished before, and nothing was computed."""
        accuracy = f"SA {result.clean_accuracy.value:.2%}"
        accuracy += f" RA {result.robust_accuracy.value:.2%}" if result.attacked else ""
        forwards = sum(counts["forwards"] for counts in result.passes.values())
        cost = f" and {forwards:,} forward passes" if forwards else ""
        if reused:
            self.say(f"already finished on {result.finished[:10]}, read and not repeated: {accuracy}")
        else:
            self.say(f"{accuracy} in {result.seconds:.1f} s{cost}")

    def say(self, line: str) -> None:
        """A line that stays, about the run that was started last."""
        console.note(f"{self._label}: {line}")

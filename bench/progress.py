"""What a person sees while a command works: bars on standard error, one line for what is done."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bench import console
from bench.environment import World
from bench.results.schema import Result
from bench.spec import RunSpec, TrainSpec

if TYPE_CHECKING:  # torch's compiler comes with it, which attacks do without
    from bench.training.loop import Epoch


class _Lines(Progress):
    """A bar, and below it a line that is made anew whenever the bar is drawn."""

    below: Callable[[], str] = staticmethod(lambda: "")

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if text := self.below():
            yield Text(text, no_wrap=True, overflow="ellipsis")


class _Bar:
    """A bar where a person is looking, and lines that stay; a file gets the lines alone."""

    def __init__(self, *columns: ProgressColumn) -> None:
        # no markup, no emoji: a model called `zoo:ok` must not come out as a picture
        screen = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._progress = _Lines(
            TextColumn("{task.description}", markup=False), BarColumn(), *columns,
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
        super().__init__(MofNCompleteColumn(), TimeRemainingColumn())
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
        number = f"{self._spec.checkpoint_name} epoch {epoch.epoch}/{self._spec.recipe.epochs}"
        console.note(f"{number} loss {epoch.loss:.3f}{self._scores} {epoch.images_per_second:.0f} images/s")


def _clock(seconds: float) -> str:
    """Such as 0:42 or 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class RunProgress(_Bar):
    """A bar over the blocks of each run with the attack that is under way, and a line a finished run.

    `counted`: what `on_block` counts in the finished blocks.
    """

    def __init__(self, counted: str = "not yet broken") -> None:
        super().__init__(TextColumn("{task.fields[blocks]}", markup=False))
        self._runs, self._number, self._counted = 0, 0, counted
        self._attack = self._found = ""
        self._taken: dict[str, list[float]] = {}  # by suite, seconds of each run that was computed
        self._coming: list[str] = []  # the suites of the runs after this one, as far as is known
        self._progress.below = self._below

    def expect(self, suites: Sequence[str]) -> None:
        """Runs of these suites are still to come, as far as is known."""
        self._coming, self._runs = list(suites), self._number + len(suites)

    def start(self, spec: RunSpec) -> None:
        self._progress.start()
        self._number += 1
        self._suite, self._coming = spec.suite, self._coming[1:]
        self._label = f"[{self._number}/{max(self._runs, self._number)}] {spec.suite} on {spec.model}"
        if spec.alpha is not None:
            self._label += f" (α {spec.alpha:g})"
        for finished in self._progress.task_ids:  # a task cannot go back to an unknown total
            self._progress.remove_task(finished)
        self._attack = self._found = ""
        self._first: tuple[int, float] | None = None  # blocks that were done as the run began, and when
        self._ends: float | None = None  # when it will be done, at the pace of its blocks so far
        self._task = self._progress.add_task(self._label, total=None, blocks="")

    def on_block(self, done: int, blocks: int, count: int) -> None:
        self._attack = ""
        self._found = f"{count} {self._counted}" if done else ""
        now = self._progress.get_time()
        before, began = self._first = self._first or (done, now)
        if done > before:
            self._ends = now + (now - began) / (done - before) * (blocks - done)
        text = f"block {min(done + 1, blocks)} of {blocks}"
        self._progress.update(self._task, completed=done, total=blocks, blocks=text)

    def on_attack(self, attack: str, attacked: int, unbroken: int) -> None:
        """An attack of the block under way was given so many examples, so many of which are not broken yet."""
        broken = f", {unbroken} not yet broken" if unbroken < attacked else ""
        self._attack = f"{attack}: {attacked} examples{broken}"

    def _below(self) -> str:
        """The attack under way, what the finished blocks have left, and how long it takes."""
        tasks = self._progress.tasks
        if not tasks:
            return ""
        (task,) = tasks
        return "  " + "; ".join(filter(None, (self._attack or self._found, self._times(task))))

    def _times(self, task: Task) -> str:
        elapsed = task.elapsed or 0.0
        words = [_clock(elapsed)]
        if self._ends is not None:
            left = max(0.0, self._ends - self._progress.get_time())
            words.append(f"{_clock(left)} left")
            known = {**self._taken, self._suite: [*self._taken.get(self._suite, ()), elapsed + left]}
            if self._coming and all(suite in known for suite in self._coming):  # one may take a thousand times another
                others = sum(sum(known[suite]) / len(known[suite]) for suite in self._coming)
                words.append(f"{_clock(left + others)} left of all runs")
        return ", ".join(words)

    def finish(self, result: Result, reused: bool = False) -> None:
        """Tell of a finished run; `reused`: it was finished before, and nothing was computed."""
        if not reused:
            self._taken.setdefault(self._suite, []).append(result.seconds)
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

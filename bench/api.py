"""The same from Python: score a model in one call, read a results folder as data frames.

What computes is that of the command line, so a run gives the same verdicts both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from bench import console
from bench.errors import UnusableInput, users_code
from bench.results.metrics import robust_by_example
from bench.results.schema import Accuracy, Result, suite_label
from bench.results.store import Run, ensure_writable, read_runs, run_folder
from bench.results.table import Table
from bench.settings import parse_value

if TYPE_CHECKING:
    from torch import nn

    from bench.datasets.base import Dataset


@dataclass(frozen=True)
class Benchmark:
    """A model's results. results: by suite. examples: a row per example and attack, with the column `suite`."""

    results: dict[str, Result]
    examples: pd.DataFrame

    @property
    def clean_accuracy(self) -> Accuracy:
        """SA: the fraction of images that are classified correctly without an attack."""
        return next(iter(self.results.values())).clean_accuracy

    @property
    def robust_accuracy(self) -> Accuracy | None:
        """RA-worst: the fraction that withstands all attacks of all suites, example by example; None without any."""
        attacked = any(result.attacked for result in self.results.values())
        return Accuracy.of(robust_by_example(Table.of(self.examples))) if attacked else None

    @property
    def suites(self) -> list[str]:
        """The suites that ran, each with the settings that are not its defaults."""
        return list(self.results)

    @property
    def flags(self) -> list[str]:
        """Everything that is unusual: of the model, then of the suites, each flag once."""
        of_model = [flag for result in self.results.values() for flag in result.model_flags]
        of_suites = [f"{suite}: {flag}" for suite, result in self.results.items() for flag in result.suite_flags]
        return list(dict.fromkeys([*of_model, *of_suites]))

    def to_frame(self) -> pd.DataFrame:
        """A row per suite; accuracies are fractions in [0, 1], `low` and `high` the 95 % interval of the robust one."""
        return runs_frame(self.results.values())

    def __repr__(self) -> str:
        """SA, RA-worst, suites and flags in a few lines, as a notebook shows them."""
        shares = [("SA", self.clean_accuracy), ("RA-worst", self.robust_accuracy)]
        said = [f"{name} {share.value:.2%} [{share.low:.2%}, {share.high:.2%}]" for name, share in shares if share]
        lines = [", ".join([*said, f"n = {self.clean_accuracy.n}", f"suites: {', '.join(self.suites)}"]), *self.flags]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)


def benchmark(
    model: str | nn.Module,
    dataset: str = "digits",
    threat_model: str | None = None,
    eps: float | str | None = None,
    n_examples: int | None = None,
    suites: Sequence[str] = (),
    gates: Sequence[str] = (),
    *,
    x: Any = None,
    y: Any = None,
    settings: dict[str, Any] | None = None,
    model_name: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
    data_root: str | Path = "data",
    model_dir: str | Path = "checkpoints",
    results: str | Path | None = None,
    to_disk: bool = False,
    progress: bool = True,
) -> Benchmark:
    """Attack a model by several suites, and judge every answer again.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits (B, classes); or a word as `bench run --model` takes it. A module
            is on its device and in its mode again afterwards.
        dataset: as `bench run --dataset` takes it; not looked at where `x` is given.
        threat_model: Linf, L2 or L1; the data set's own if not given.
        eps: the radius in pixels of [0, 1], such as "8/255"; the data set's own if not given.
        n_examples: the first so many test images; all if not given.
        suites: as `bench run --suite` takes them; clean, pgd, autoattack and adaptive, as far as they fit, if none.
        gates: as `bench run --gates` takes them.
        x: images (n, C, H, W) of your own instead of the data set's, numbers in [0, 1] of any kind that float32 holds.
        y: their classes (n,), whole numbers.
        settings: parameters of the suites, as `--set` takes them.
        model_name: what a module is called in the results; its class if not given.
        batch_size: images of an attack block, on which verdicts depend.
        seed: of the attacks.
        device: auto, cpu, cuda or cuda:0 …
        data_root: the folder of the data sets.
        model_dir: the folder of trained models.
        results: a folder in which runs are kept, and found again; without it nothing is kept.
        to_disk: keep runs in `results`, or in the folder `results` where none is named, as `bench run` does.
        progress: whether bars and lines are shown, on standard error.

    Raises:
        UnusableInput: a ValueError whose message names what cannot be used, and the next step.

    Examples:
        >>> from bench import benchmark, load_model
        >>> model = load_model("moe-at", dataset="digits")
        >>> scored = benchmark(model, "digits", n_examples=50, suites=["clean", "pgd"], progress=False)
        >>> scored.robust_accuracy.value <= scored.clean_accuracy.value
        True
    """
    from torch import nn

    from bench.datasets.base import open_dataset
    from bench.environment import torch_device
    from bench.evaluation.evaluate import score
    from bench.evaluation.plan import RunRequest, plan_on
    from bench.evaluation.subjects import foreign_subject
    from bench.models.checkpoints import ZOO
    from bench.progress import RunProgress
    from bench.spec import build
    from bench.suites.base import DEFAULT_SUITES, open_suites

    if not isinstance(model, str | nn.Module):
        raise UnusableInput(
            f"model is a {type(model).__name__}: give the torch.nn.Module that it makes, such as build()"
        )
    if (x is None) != (y is None):
        raise UnusableInput("x and y are given together: the images, and the class of each")
    opened = open_dataset(dataset) if x is None else _own(x, y, model)
    values: dict[str, Any] = {
        "suites": _words(suites) or DEFAULT_SUITES,
        "named": bool(suites),
        "dataset": opened.name,
        "models": (model,) if isinstance(model, str) else (model_name or type(model).__name__,),
        "norm": threat_model,
        "eps": None if eps is None else str(eps),
        "n_examples": n_examples,
        "seed": seed,
        "batch_size": batch_size,
        "settings": {key: parse_value(value, key) for key, value in (settings or {}).items()},
        "gates": _words(gates),
    }
    request = build(RunRequest, "benchmark()", values)
    where = torch_device(device)
    with ExitStack() as stack:
        if to_disk and results is None:
            results = "results"
        folder = Path(results or stack.enter_context(TemporaryDirectory(prefix="bench-")))
        ensure_writable(folder)
        stack.enter_context(console.hushed(not progress))
        checkpoints = [Path(model_dir), ZOO]
        opened_suites = open_suites(request.suites, request.settings)
        asked = plan_on(opened, opened_suites, request, Path(data_root), checkpoints, folder)
        if isinstance(model, str):
            jobs = asked.jobs(model)
        else:
            stack.enter_context(_borrowed(model))
            jobs = asked.jobs_of(foreign_subject(model, request.models[0]))
        found: dict[str, Result] = {}
        frames: list[pd.DataFrame] = []
        bars = stack.enter_context(RunProgress())
        bars.expect([job.spec.suite for job in jobs])
        for job in jobs:
            bars.start(job.spec)
            result, reused = score(job, folder, where, bars.on_block, bars.on_attack)
            if result is None:
                raise UnusableInput("benchmark() is one process's work: start `bench run` with torchrun instead")
            bars.finish(result, reused)
            suite = suite_label(job.spec)
            found[suite] = result
            frames.append(Run(result, run_folder(folder, result.spec, result.run)).verdicts().assign(suite=suite))
    return Benchmark(found, pd.concat(frames, ignore_index=True))


@contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """A module in eval mode inside, and on its device and in its modes as before afterwards."""
    from itertools import chain

    from bench.models.deployed import eval_frozen

    first = next(chain(model.parameters(), model.buffers()), None)
    with eval_frozen(model):
        try:
            yield
        finally:
            if first is not None:
                model.to(first.device)


def _own(x: Any, y: Any, model: str | nn.Module) -> Dataset:
    """Images and labels of the user's own as a data set called `tensors`.

    Raises:
        UnusableInput: images that are not floats in [0, 1] of shape (n, C, H, W), or that float32 cannot hold; labels
            that are not whole numbers, one for each image.
    """
    import torch

    from bench.datasets.base import Dataset, EvalSet
    from bench.models.choices import plain
    from bench.models.foreign import Guarded
    from bench.spec import ThreatModel

    given, labels = torch.as_tensor(x).detach().cpu(), torch.as_tensor(y).detach().cpu()
    if given.is_complex():
        raise UnusableInput(f"x is {given.dtype}: pixels are real numbers in [0, 1]")
    pixels = given.float()
    if given.ndim != 4 or not len(given):
        raise UnusableInput(f"x has shape {tuple(given.shape)}: images are (n, channels, height, width)")
    if not bool((pixels.to(given.dtype) == given).all()):
        raise UnusableInput(f"x is {given.dtype}, and float32 does not hold its numbers: give x.float()")
    if not given.is_floating_point() and bool((pixels > 1).any()):
        raise UnusableInput(f"x is {given.dtype} and reaches to {pixels.max():g}: pixels lie in [0, 1]; give x / 255")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise UnusableInput(f"x reaches from {pixels.min():g} to {pixels.max():g}: pixels lie in [0, 1]")
    if labels.shape != (len(given),) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UnusableInput(f"y is {labels.dtype} of shape {tuple(labels.shape)}: give a class number for each image")
    if isinstance(model, str):
        raise UnusableInput(f"x and y are for a model of your own, and '{model}' is a word: give the module")
    with torch.no_grad(), _borrowed(model), users_code(f"the model fails on images of shape {tuple(given.shape[1:])}"):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        logits = Guarded(plain(model))(pixels[:2].to(device))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UnusableInput("the model gives no logits (n, classes) for these images")
    if not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        raise UnusableInput(f"y reaches from {labels.min()} to {labels.max()}: the model has {logits.shape[1]} classes")

    class Tensors(Dataset):
        name, recipe, mean, std = "tensors", "", (), ()
        num_classes = int(logits.shape[1])
        input_shape = (int(pixels.shape[1]), int(pixels.shape[2]), int(pixels.shape[3]))
        threat_model = ThreatModel(norm="Linf", eps=8 / 255)

        def read(self, split: Any, root: Path, limit: int | None = None) -> Any:
            raise UnusableInput("images of your own are scored, not trained on")

        def evaluation_set(self, root: Path, n_examples: int | None) -> EvalSet:
            count = len(pixels) if n_examples is None else n_examples
            if not 1 <= count <= len(pixels):
                raise UnusableInput(f"n_examples {count} must be in 1 … {len(pixels)}, the number of images")
            images, classes = pixels[:count], labels[:count].long()
            return EvalSet.of(images, classes)

    return Tensors()


class Results(NamedTuple):
    """runs: a row per run. verdicts: a row per example and attack of each run, with the run's key in `run`."""

    runs: pd.DataFrame
    verdicts: pd.DataFrame


def load_results(folder: str | Path = "results") -> Results:
    """All finished runs below a results folder.

    Raises:
        UnusableInput: there is no such folder or no finished run in it, or files that do not fit together.

    Examples:
        >>> from bench import benchmark, load_results
        >>> _ = benchmark("moe-at", "digits", n_examples=20, suites=["clean"], to_disk=True, progress=False)
        >>> runs, verdicts = load_results("results")
        >>> runs["model"].tolist(), len(verdicts)
        (['moe-at'], 20)
    """
    runs = read_runs(Path(folder))
    if not runs:
        raise UnusableInput(f"there is no finished run below '{folder}': run one with: bench run --results {folder}")
    verdicts = [run.verdicts().assign(run=run.result.run) for run in runs]
    return Results(runs_frame([run.result for run in runs]), pd.concat(verdicts, ignore_index=True))


def runs_frame(results: Iterable[Result]) -> pd.DataFrame:
    """A row per run; accuracies are fractions in [0, 1], `low` and `high` the 95 % interval of the robust one."""
    return pd.DataFrame([
        {
            "run": result.run,
            "model": result.spec.model,
            "alpha": result.spec.alpha,
            "dataset": result.spec.dataset,
            "norm": result.spec.threat_model.norm,
            "eps": result.spec.threat_model.eps,
            "suite": suite_label(result.spec),
            "suite_version": result.spec.suite_version,
            "n": result.spec.n_examples,
            "seed": result.spec.seed,
            "clean_accuracy": result.clean_accuracy.value,
            "robust_accuracy": result.robust_accuracy.value if result.attacked else None,
            "low": result.robust_accuracy.low if result.attacked else None,
            "high": result.robust_accuracy.high if result.attacked else None,
            "errors": result.errors,
            "flags": "; ".join([*result.model_flags, *result.flags]),
            "forwards": sum(counts["forwards"] for counts in result.passes.values()),
            "seconds": result.seconds,
            "finished": result.finished,
        }
        for result in results
    ])  # fmt: skip


def _words(given: Sequence[str]) -> tuple[str, ...]:
    """Several words, or one by itself, which is a sequence of letters to Python."""
    return (given,) if isinstance(given, str) else tuple(given)

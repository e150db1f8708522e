"""Hyper-parameters by trials: every method gets the same number of them, over values of its own.

A trial trains one setting and scores the held-out training images, never the test images, under an attack that knows
the routes. The first trial is the recipe's own setting; the others are drawn from the grid without replacement.
"""

import csv
import io
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.datasets.base import Dataset, EvalSet, fingerprint
from bench.environment import torch_device
from bench.errors import UnusableInput
from bench.evaluation.evaluate import score
from bench.evaluation.plan import Plan, RunRequest
from bench.files import write_atomically
from bench.models.checkpoints import Header, checkpoint_path, read_header
from bench.models.variants import get_variant
from bench.spec import ThreatModel, TrainSpec, dataset_folder
from bench.suites.base import open_suites
from bench.training.data import read_training_data
from bench.training.loop import train
from bench.training.recipes import objective_class, train_spec
from bench.training.routing_metrics import dead_experts
from bench.training.state import StateFiles


@dataclass(frozen=True)
class Trial:
    """settings: the searched values; sa, ra: fractions of the held-out images; seconds: of training and of scoring.

    dead_experts: how many get less than 1 % of the held-out images, in the epoch that is kept. images: how many of them
    the trial was scored on.
    """

    settings: dict[str, Any]
    sa: float
    ra: float
    seconds: float
    dead_experts: int = 0
    images: int = 0


@dataclass(frozen=True)
class Search:
    """What is tuned: a spec of the recipe's own setting, the settings that all trials share, and the grid."""

    spec: TrainSpec
    dataset: Dataset
    fixed: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]


def open_search(
    variant: str,
    dataset: Dataset,
    threat_model: ThreatModel,
    recipe: str | None,
    fixed: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    seed: int,
) -> Search:
    """The trials' common part; `grid` replaces the values of the variant's own grid, key by key.

    Raises:
        UnusableInput: a variant that is not trained, a key that it does not have, a key that is fixed and searched.
    """
    if get_variant(variant).parts is not None:
        raise UnusableInput(
            f"'{variant}' is put together from {' and '.join(get_variant(variant).parts or ())}, not trained: tune"
            " those; α is swept by `bench run --alpha`"
        )
    spec = train_spec(variant, dataset, threat_model, recipe, fixed, seed)
    for key, values in grid.items():
        if key in fixed:
            raise UnusableInput(f"--grid {key}: it is fixed by --set {key}: drop one of them")
        for value in values:
            try:
                train_spec(variant, dataset, threat_model, recipe, {**fixed, key: value}, seed)
            except UnusableInput as error:
                raise UnusableInput(str(error).replace(f"--set {key}", f"--grid {key}")) from None
    searched = {key: values for key, values in own_grid(spec).items() if key not in fixed} | dict(grid)
    return Search(spec, dataset, fixed, searched)


def own_grid(spec: TrainSpec) -> dict[str, tuple[Any, ...]]:
    """The values tried where the user names none: those of the objective, the balance weight and the learning rate."""
    objective, variant = objective_class(get_variant(spec.variant)), get_variant(spec.variant)
    grid = dict(objective.grid)
    if variant.gate == "softmax" and spec.objective_params.get("balance"):
        grid["balance"] = (0.25, 0.5, 1.0)
    if variant.kind == "dual":
        grid["alpha"] = (0.5, 0.7, 0.9)
    return grid | {"lr": tuple(spec.recipe.lr * factor for factor in (0.5, 1.0, 2.0))}


def draw(search: Search, trials: int) -> list[dict[str, Any]]:
    """The settings of so many trials: the recipe's own first, then different points of the grid in random order.

    The draw is the training seed's. UnusableInput where the grid has fewer.
    """
    spec = search.spec
    known = spec.recipe.model_dump(mode="json") | spec.objective_params
    own = {key: known[key] for key in search.grid}
    points = [dict(zip(search.grid, values, strict=True)) for values in itertools.product(*search.grid.values())]
    others = [point for point in points if point != own]
    if not 1 <= trials <= len(others) + 1:
        raise UnusableInput(
            f"--trials {trials}: the grid of '{spec.variant}' has {len(others) + 1} points"
            f" ({', '.join(search.grid)}): ask for 1 … {len(others) + 1}, or widen it with --grid key=value,value"
        )
    in_order = random.Random(spec.seed).sample(others, len(others))  # of all, so that more trials add to fewer
    return [own, *in_order[: trials - 1]]


def tune(
    search: Search,
    trials: int,
    n_examples: int,
    data_root: Path,
    checkpoints: Path,
    device: str = "auto",
    on_trial: Callable[[int, Trial], None] = lambda *_: None,
) -> list[Trial]:
    """All trials, in the order in which they were drawn; what earlier commands finished of them is read.

    Models, runs and the table lie below `checkpoints/tuning`. RA is that under suite `adaptive`, budget `small`, of a
    model that routes, and under `autoattack` of one that does not, on the first `n_examples` held-out images.

    Raises:
        UnusableInput: as training and scoring do; more images asked for than are held out; a table of other trials.
        TrainingFailed: a trial's loss is not finite.
    """
    points, path = draw(search, trials), table_path(checkpoints, search.spec)
    _refuse_another(path, [{**search.fixed, **point, "images": n_examples} for point in points])
    data = read_training_data(search.spec, search.dataset, data_root)
    if n_examples > len(data.held_out):
        raise UnusableInput(
            f"--n-examples {n_examples} is more than the {len(data.held_out)} held-out images: raise --set n_val=…"
        )
    rows = data.held_out[:n_examples]
    x, y = data.images.floats(rows), data.images.y[rows]
    held_out = EvalSet(x, y, rows, fingerprint(x, y), "held-out training images")
    done: list[Trial] = []
    for point in points:
        spec = train_spec(
            search.spec.variant, search.dataset, search.spec.threat_model, search.spec.recipe_name,
            {**search.fixed, **point}, search.spec.seed,
        )  # fmt: skip
        trial = _trial(spec, point, search.dataset, held_out, data_root, checkpoints, device)
        done.append(trial)
        on_trial(len(done), trial)
        write_atomically(path, _table(search.fixed, done))
    return done


def best(trials: Sequence[Trial]) -> Trial:
    """Of highest RA, and among equals of highest SA; the earliest where that is equal, too.

    One that has starved an expert comes after all that have not: it wins by being a smaller model than was asked for.
    """
    return max(trials, key=lambda trial: (not trial.dead_experts, trial.ra, trial.sa))


def table_path(checkpoints: Path, spec: TrainSpec) -> Path:
    """The CSV that keeps all trials of a variant."""
    name = f"{dataset_folder(spec.dataset)}-{spec.threat_model.folder}-{spec.checkpoint_name}.csv"
    return checkpoints / "tuning" / name


def _trial(
    spec: TrainSpec,
    point: dict[str, Any],
    dataset: Dataset,
    held_out: EvalSet,
    data_root: Path,
    checkpoints: Path,
    device: str,
) -> Trial:
    folder = checkpoints / "tuning" / spec.key
    path = checkpoint_path(folder, spec.dataset, spec.threat_model.norm, spec.checkpoint_name)
    train(spec, data_root, folder, device, resume=StateFiles(path).exist(), starts_in=checkpoints)
    routed = get_variant(spec.variant).kind != "dense"
    methods = open_suites(("adaptive",), {"budget": "small"}) if routed else open_suites(("autoattack",), {})
    request = RunRequest(suites=tuple(methods), dataset=dataset.name, seed=spec.seed)
    plan = Plan(request, dataset, spec.threat_model, methods, held_out, (str(path),), [folder], None)
    (job,) = plan.jobs(str(path))
    result, _ = score(job, folder / "results", torch_device(device))
    if result is None or result.errors:
        reasons = "; ".join(result.error_messages) if result else "one process tunes: start it without torchrun"
        raise UnusableInput(f"trial {point}: it could not be scored: {reasons}")
    header = read_header(path)
    seconds, dead = header.seconds + result.seconds, _dead_experts(path, header)
    sa, ra = result.clean_accuracy.value, result.robust_accuracy.value
    return Trial(point, sa, ra, seconds, dead, len(held_out))


def _dead_experts(path: Path, header: Header) -> int:
    """How many experts of the epoch that a checkpoint keeps have next to no load, by the table beside it."""
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as lines:
        epochs = {int(row["epoch"]): row for row in csv.DictReader(lines)}
    assert header.validation is not None
    kept = epochs[int(header.validation["epoch"])]
    return len(dead_experts({name: float(value) for name, value in kept.items() if value}))


#: What a table says of a trial beside its settings, and the number of images it was scored on.
MEASURED = ("sa", "ra", "dead_experts", "seconds")


def _refuse_another(path: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """UnusableInput if the table at `path` has a trial that is not one of these: it would be lost."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as lines:
        made = [{key: value for key, value in row.items() if key not in MEASURED} for row in csv.DictReader(lines)]
    wanted = [{key: "" if value is None else str(value) for key, value in each.items()} for each in settings]
    if any(row not in wanted for row in made):
        raise UnusableInput(f"{path} has trials of other settings: move it, or pass --checkpoints DIR")


def _table(fixed: Mapping[str, Any], trials: Sequence[Trial]) -> bytes:
    table = io.StringIO()
    rows = [
        {
            **fixed, **trial.settings, "sa": trial.sa, "ra": trial.ra, "images": trial.images,
            "dead_experts": trial.dead_experts, "seconds": round(trial.seconds, 1),
        }
        for trial in trials
    ]  # fmt: skip
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()

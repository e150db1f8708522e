"""Commands that train: one variant or several, and the choice of hyper-parameters."""

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from bench import registry
from bench.commands.options import (
    DONE,
    FAILED,
    UNUSABLE,
    CheckpointsOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    EpsOption,
    NormOption,
    OnOption,
    QuietOption,
    RecipeOption,
    SeedOption,
    SettingsOption,
    VariantArgument,
    VariantsArgument,
    seeds_of,
    settings_of,
    split,
)
from bench.console import note, say
from bench.errors import TrainingFailed, UnusableInput


def train(
    variant: VariantsArgument,
    dataset: DatasetOption = "digits",
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    seed: Annotated[
        list[str] | None, typer.Option("--seed", help="of all random numbers; several train each variant with each")
    ] = None,
    norm: NormOption = None,
    eps: EpsOption = None,
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="continue a training that was stopped")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="remove what a stopped training left, start again")
    ] = False,
    on: OnOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train variants; their checkpoints go to CHECKPOINTS/<dataset>/<norm>/, with -s<seed> behind a name if not 0.

    A training that fails is told of, and the next one follows.
    """
    with redirect_stdout(sys.stderr):
        from bench.datasets.base import open_dataset
        from bench.environment import World
        from bench.evaluation.plan import threat_model
        from bench.models.checkpoints import checkpoint_path
        from bench.progress import TrainingProgress
        from bench.results.store import ensure_writable
        from bench.training.loop import train as run_training
        from bench.training.recipes import train_specs

        data = open_dataset(dataset)
        threat, seeds = threat_model(data, norm, eps), seeds_of(seed)
        specs = train_specs(split(variant), data, threat, recipe, settings_of(settings), seeds)
        made_for = (recipe or "").rpartition("-")[2]
        if made_for in registry.DATASETS and made_for != data.name:
            note(
                f"recipe {recipe} was made for {made_for}, and this trains on {data.name}: name the data with --dataset"
            )
        ensure_writable(checkpoints)
        spread: dict[int, Exception | None] = {}
        if on is not None:
            from bench.cluster import Trainings, on_ray

            spread = on_ray(on, Trainings(specs, data_root, checkpoints, resume, restart), device, note)
    status = DONE
    for number, spec in enumerate(specs):
        try:
            if (error := spread.get(number)) is not None:
                raise error
            if number in spread:
                path = checkpoint_path(checkpoints, spec.dataset, spec.threat_model.norm, spec.checkpoint_name)
            else:
                with redirect_stdout(sys.stderr), TrainingProgress(spec) as progress:
                    path = run_training(
                        spec, data_root, checkpoints, device, resume, restart, progress.on_step, progress.on_epoch
                    )
            if World.here().rank == 0:
                print(_trained(path))
        except (UnusableInput, TrainingFailed) as reason:
            say(f"error: {reason}")
            status = UNUSABLE if isinstance(reason, UnusableInput) else max(status, FAILED)
    if status:
        raise typer.Exit(status)


def _trained(path: Path) -> str:
    """A line about a checkpoint that was just made."""
    from bench.models.checkpoints import read_header

    header = read_header(path)
    held_out = header.validation
    if not held_out:
        return f"{path}: put together from {' and '.join(part.file for part in header.parts.values())}"
    scores = f"SA {held_out['sa']:.2%}, RA {held_out['ra']:.2%} on {held_out['images']:.0f} held-out images"
    return f"{path}: {scores} (epoch {held_out['epoch']:.0f} of {header.epochs})"


def tune(
    variant: VariantArgument,
    trials: Annotated[int, typer.Option("--trials", min=1, help="how many settings are tried")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="K=V,V…", help="values to try of a parameter, instead of its own"),
    ] = None,
    n_examples: Annotated[
        int, typer.Option("--n-examples", min=1, help="held-out training images that a trial is scored on")
    ] = 150,
    dataset: DatasetOption = "digits",
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    seed: SeedOption = 0,
    norm: NormOption = None,
    eps: EpsOption = None,
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Choose a variant's hyper-parameters by trials, each scored on held-out training images under attack.

    The same command goes on after a stop. --set fixes a parameter for all trials.
    """
    with redirect_stdout(sys.stderr):
        from bench.datasets.base import open_dataset
        from bench.evaluation.plan import threat_model
        from bench.models.checkpoints import ZOO, checkpoint_path
        from bench.results.store import ensure_writable
        from bench.settings import parse_grid, setting
        from bench.training.initial_weights import start_file
        from bench.tune import Trial, best, open_search, table_path
        from bench.tune import tune as run_trials

        data, fixed = open_dataset(dataset), settings_of(settings)
        threat = threat_model(data, norm, eps)
        search = open_search(variant, data, threat, recipe, fixed, parse_grid(grid or ()), seed)
        ensure_writable(checkpoints)

        def words(trial: Trial) -> str:
            return " ".join(setting(*item) for item in trial.settings.items())

        def tell(number: int, trial: Trial) -> None:
            scores = f"SA {trial.sa:.2%} RA {trial.ra:.2%} {trial.seconds:.0f} s"
            dead = f", dead experts: {trial.dead_experts}" if trial.dead_experts else ""
            note(f"trial {number}/{trials}: {words(trial)}: {scores}{dead}")

        chosen = best(run_trials(search, trials, n_examples, data_root, checkpoints, device, tell))
    print(f"{table_path(checkpoints, search.spec)}: {trials} trials on {n_examples} held-out images")
    command = [*registry.command_words(), "train", variant, "--dataset", dataset, "--seed", str(seed)]
    chosen_by_user = {"--recipe": recipe, "--norm": norm, "--eps": eps, "--data-root": data_root}
    command += [word for name, value in chosen_by_user.items() if value for word in (name, str(value))]
    made_by, folder = {**fixed, **chosen.settings}, checkpoints
    if checkpoint_path(checkpoints, data.name, threat.norm, search.spec.checkpoint_name).is_file():
        folder = checkpoints / "tuned"  # what is there is another training's
        for key, name in search.spec.recipe.starts.items():  # which would be looked for in that folder
            made_by[key] = str(start_file(name, search.spec, (checkpoints, ZOO)))
    command += [word for item in made_by.items() for word in ("--set", setting(*item))]
    command += ["--checkpoints", str(folder)]
    by_sa = "" if chosen.ra else " (no trial is robust: chosen by SA)"
    print(f"best: SA {chosen.sa:.2%} RA {chosen.ra:.2%}{by_sa}; this trains it:\n{shlex.join(command)}")

"""The commands: parse into specs, call, print. What is heavy is imported inside the command that needs it."""

import errno
import json
import math
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bench import console, registry
from bench.console import note, say
from bench.errors import TrainingFailed, UnusableInput

if TYPE_CHECKING:
    from bench.certify.base import Certifier
    from bench.evaluation.plan import Plan
    from bench.job import Job
    from bench.progress import RunProgress
    from bench.results.certificates import Certificates, Certification
    from bench.results.schema import Result
    from bench.results.store import Run
    from bench.suites.base import Suite

DONE, FAILED, UNUSABLE = 0, 1, 2
INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="bench",
    help="Tells whether a Mixture-of-Experts image classifier is really robust.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

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


def _variants(incomplete: str) -> list[str]:
    """For the shell: the variants whose names begin so."""
    from bench.models.variants import VARIANTS

    return [name for name in VARIANTS if name.startswith(incomplete)]


VariantArgument = Annotated[
    str, typer.Argument(autocompletion=_variants, help="such as moe-rt_er; `bench list variants` shows all")
]
VariantsArgument = Annotated[
    list[str],
    typer.Argument(autocompletion=_variants, help="such as moe-rt_er, or several; `bench list variants` shows all"),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        autocompletion=_variants,
        help="a variant, a .safetensors file, robustbench:NAME, package.module:callable, or MODEL@baseline",
    ),
]
GatesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gates",
        metavar="GLOB",
        help="modules of a model of your own whose output scores experts, such as 'blocks.*.gate' or gate:k=2; `none`:"
        " it makes no choices",
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
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON list, and nothing else, on standard output")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", callback=lambda quiet: console.set_up(quiet), help="no bar, no lines about progress")
]


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


class CertifyMethod(StrEnum):
    """How `bench certify` certifies."""

    routes = "routes"
    bounds = "bounds"
    smoothing = "smoothing"


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


def split(values: Sequence[str] | None) -> tuple[str, ...]:
    """Repeated options, each of which may hold several values separated by commas; each value once."""
    parts = tuple(dict.fromkeys(part.strip() for value in values or () for part in value.split(",")))
    if "" in parts:
        raise UnusableInput(f"'{','.join(values or ())}' holds an empty value: name one, or leave the option out")
    return parts


def _width() -> int | None:
    """The columns of the terminal on standard output; None where that is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print_version(asked: bool) -> None:
    if asked:
        from bench import __version__

        print(f"bench {__version__}")
        raise typer.Exit


@app.callback()
def load_plugins(
    plugins: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="a module that registers suites, data sets …; may be repeated"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Tells whether a Mixture-of-Experts image classifier is really robust."""
    registry.named_plugins.clear()
    for module in plugins or ():
        registry.load_plugin(module)
        registry.named_plugins.append(module)


@app.command("list")
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
        width = max(map(len, found), default=0)
        print("\n".join(f"{name:<{width}}  {text}" for name, text in zip(found, sentences, strict=True)))
    else:
        print("\n".join(found))


@app.command()
def show(
    what: Shown,
    name: Annotated[str, typer.Argument(help="such as adaptive; `bench list suites` shows all")],
    as_json: JsonOption = False,
) -> None:
    """Show what a suite or an objective is, and its parameters: type, default and meaning."""
    with redirect_stdout(sys.stderr):
        from tabulate import tabulate

        from bench.catalogue import details

        found = details(what, name)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    parameters = found.pop("parameters")
    for key, value in found.items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    print(
        "\n" + tabulate(parameters, headers="keys", disable_numparse=True, missingval="none")
        if parameters
        else "\nno parameters"
    )


@app.command()
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
        threat, seeds = threat_model(data, norm, eps), _seeds(seed)
        specs = train_specs(split(variant), data, threat, recipe, _settings(settings), seeds)
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


def _seeds(words: Sequence[str] | None) -> tuple[int, ...]:
    """The values of `--seed` where it takes several; 0 if there is none."""
    seeds = split(words) or ("0",)
    for word in seeds:
        if not (word.isascii() and word.isdigit() and int(word) < 2**32):
            raise UnusableInput(f"--seed {word} must be a whole number from 0 to {2**32 - 1}")
    return tuple(dict.fromkeys(map(int, seeds)))


def _trained(path: Path) -> str:
    """A line about a checkpoint that was just made."""
    from bench.models.checkpoints import read_header

    header = read_header(path)
    held_out = header.validation
    if not held_out:
        return f"{path}: put together from {' and '.join(part.file for part in header.parts.values())}"
    scores = f"SA {held_out['sa']:.2%}, RA {held_out['ra']:.2%} on {held_out['images']:.0f} held-out images"
    return f"{path}: {scores} (epoch {held_out['epoch']:.0f} of {header.epochs})"


@app.command()
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
        from bench.results.store import ensure_writable
        from bench.settings import parse_grid, setting
        from bench.tune import Trial, best, open_search, table_path
        from bench.tune import tune as run_trials

        data, fixed = open_dataset(dataset), _settings(settings)
        threat = threat_model(data, norm, eps)
        search = open_search(variant, data, threat, recipe, fixed, parse_grid(grid or ()), seed)
        ensure_writable(checkpoints)

        def words(trial: Trial) -> str:
            return " ".join(setting(*item) for item in trial.settings.items())

        def tell(number: int, trial: Trial) -> None:
            note(f"trial {number}/{trials}: {words(trial)}: SA {trial.sa:.2%} RA {trial.ra:.2%} {trial.seconds:.0f} s")

        chosen = best(run_trials(search, trials, n_examples, data_root, checkpoints, device, tell))
    print(f"{table_path(checkpoints, search.spec)}: {trials} trials on {n_examples} held-out images")
    command = [*registry.command_words(), "train", variant, "--dataset", dataset, "--seed", str(seed)]
    chosen_by_user = {"--recipe": recipe, "--norm": norm, "--eps": eps, "--data-root": data_root}
    command += [word for name, value in chosen_by_user.items() if value for word in (name, str(value))]
    command += [word for item in {**fixed, **chosen.settings}.items() for word in ("--set", setting(*item))]
    print(f"best: SA {chosen.sa:.2%} RA {chosen.ra:.2%}: {shlex.join(command)}")


#: Why a suite had nothing to attack on a model that gets images right, and what to do.
_IDLE = "it shows no router with experts, and no gates are named (docs/your-own-model.md); show them, or run autoattack"


@app.command()
def run(
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="clean,pgd,autoattack if not given, and adaptive on models with routes"),
    ] = None,
    dataset: DatasetOption = "digits",
    model: ModelOption = None,
    gates: GatesOption = None,
    alpha: AlphaOption = None,
    n_examples: ExamplesOption = None,
    norm: NormOption = None,
    eps: EpsOption = None,
    seed: SeedOption = 0,
    batch_size: Annotated[
        str,
        typer.Option("--batch-size", help="images of an attack block; auto: 128, in parts where memory is short"),
    ] = "128",
    settings: SettingsOption = None,
    device: DeviceOption = "auto",
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    results: ResultsOption = Path("results"),
    warm_start: Annotated[
        bool,
        typer.Option("--warm-start", help="try the adversarial examples of earlier runs of the same subject first"),
    ] = False,
    on: OnOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Attack models and store the verdicts; a run that is already finished is reported, not repeated."""
    with redirect_stdout(sys.stderr):
        from bench.environment import World, torch_device
        from bench.evaluation.evaluate import evaluate, run_of
        from bench.evaluation.evaluate import score as score_job
        from bench.evaluation.plan import RunRequest, plan
        from bench.models.checkpoints import ZOO
        from bench.results.store import ensure_writable, run_folder
        from bench.suites.base import DEFAULT_SUITES

        request = RunRequest(
            suites=split(suite) or DEFAULT_SUITES,
            named=bool(suite),
            dataset=dataset,
            models=split(model),
            alphas=_alphas(alpha),
            norm=norm,
            eps=eps,
            n_examples=n_examples,
            seed=seed,
            batch_size=128 if batch_size == "auto" else _whole(batch_size, "--batch-size"),
            fit=batch_size == "auto",
            settings=_settings(settings),
            warm_start=warm_start,
            gates=split(gates),
        )
        where = torch_device(device)
        ensure_writable(results)

        def score(job: "Job[Suite]", progress: "RunProgress") -> "Result | None":
            result, reused = score_job(job, results, where, progress.on_block, progress.on_attack)
            if result is not None:
                progress.finish(result, reused)
            return result

        asked = plan(request, data_root, [checkpoints, ZOO], results)
        if on is not None:
            from bench.cluster import Blocks, on_ray

            if warm_start:
                raise UnusableInput("--warm-start starts a run from those before it: run it without --on ray")
            on_ray(on, Blocks(asked, results, run_of, evaluate), device, note)
        queue = _work_off(asked, score, "not yet broken")
    if World.here().rank > 0:
        raise typer.Exit(queue.status)
    _print(queue.done, _table, as_json)
    failed = [result for result in queue.done if result.errors]
    for result in failed:
        reasons = "; ".join(result.error_messages)
        folder = run_folder(results, result.spec, result.run)
        what = f"{result.spec.suite} on {result.spec.model}: {result.errors} rows are errors ({reasons})"
        say(f"error: {what}; remove {folder} to run it again")
    attackable = [r for r in queue.done if r.clean_accuracy.value > 0 and r.spec.suite != "clean" and not r.errors]
    idle = [result for result in attackable if not result.attacked]
    for result in idle if request.models else ():  # of all that are there, some have no routes
        say(f"error: {result.spec.suite} on {result.spec.model} attacked nothing: {_IDLE}")
    if failed and not queue.status:
        raise typer.Exit(FAILED)
    if queue.status or (idle and request.models):
        raise typer.Exit(UNUSABLE)


def _alphas(words: Sequence[str] | None) -> tuple[float, ...]:
    from bench.settings import parse_number

    return tuple(parse_number(value, "--alpha") for value in split(words))


def _whole(word: str, option: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UnusableInput(f"{option}: Input should be auto or a whole number (got '{word}')") from None


def _settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    from bench.settings import parse_settings

    return parse_settings(pairs or ())


class _Queue(NamedTuple):
    """What became of a plan: the results of what could be scored, and the exit status of what could not."""

    done: list[Any]
    status: int


def _work_off(plan: "Plan[Any]", score: Callable[[Any, "RunProgress"], Any], counted: str) -> _Queue:
    """Score the models one after the other, one in memory at a time.

    One that cannot be scored is reported, and the next follows. `counted`: what a bar counts in the finished blocks.
    """
    from bench.progress import RunProgress

    done: list[Any] = []
    status = DONE

    def of_model(model: str, still: int) -> None:  # a function, at whose end the model is forgotten
        jobs = plan.jobs(model)
        if plan.data.note and not done:
            note(f"{plan.dataset.name}: {plan.data.note}")
        progress.expect(len(jobs) + plan.expected(still))
        for job in jobs:
            progress.start(job.spec)
            result = score(job, progress)
            if result is not None:
                done.append(result)

    with RunProgress(counted) as progress:
        for number, model in enumerate(plan.models, start=1):
            try:
                of_model(model, len(plan.models) - number)
            except UnusableInput as error:
                say(f"error: {error}")
                status = UNUSABLE
    return _Queue(done, status)


def _print(results: "Sequence[Any]", table: "Callable[[Any], str]", as_json: bool) -> None:
    """The results, if there are any, on standard output."""
    if as_json and results:
        print(json.dumps([result.model_dump(mode="json") for result in results], indent=1))
    elif results:
        print(table(results))


def _table(results: "Sequence[Result]") -> str:
    from tabulate import tabulate

    rows = []
    for result in results:
        spec, robust = result.spec, result.robust_accuracy
        accuracy = f"{100 * robust.value:.2f} [{100 * robust.low:.1f}, {100 * robust.high:.1f}]"
        rows.append({
            "model": spec.model,
            "α": "" if spec.alpha is None else f"{spec.alpha:g}",
            "suite": spec.suite,
            "threat": str(spec.threat_model),
            "n": spec.n_examples,
            "SA %": f"{result.clean_accuracy.value:.2%}".rstrip("%"),
            "RA % [95 %]": accuracy if result.attacked else "–",
        })  # fmt: skip
    tables = [tabulate(rows, headers="keys", disable_numparse=True)]
    flags = dict.fromkeys(f"{r.spec.model}: {flag}" for r in results for flag in r.model_flags)
    flags |= dict.fromkeys(f"{r.spec.suite} on {r.spec.model}: {flag}" for r in results for flag in r.flags)
    tables += ["\n".join(flags)] * bool(flags)
    for result in results:
        if result.components:
            lines = [
                [name, f"{100 * rate.value:.2f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"]
                for name, rate in result.components.items()
            ]
            for name, use in result.gates.items():
                load = "/".join(f"{100 * share:.0f}" for share in use.load)
                lines.append([f"{name} load", f"{load} (entropy {use.entropy:.2f} of {math.log(len(use.load)):.2f})"])
                lines.append([f"{name} route-flip rate", f"{100 * use.flipped:.2f}"])
            headers = [f"{result.spec.model}: {result.spec.suite}", "% [95 %]"]
            tables.append(tabulate(lines, headers=headers, disable_numparse=True))
    return "\n\n".join(tables)


@app.command()
def certify(
    method: Annotated[CertifyMethod, typer.Option("--method", help="what to certify, and how")],
    dataset: DatasetOption = "digits",
    model: ModelOption = None,
    gates: GatesOption = None,
    alpha: AlphaOption = None,
    n_examples: ExamplesOption = None,
    norm: NormOption = None,
    eps: EpsOption = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="images of a block, which is what is resumed")] = 32,
    settings: SettingsOption = None,
    device: DeviceOption = "auto",
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    results: ResultsOption = Path("results"),
    on: OnOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Certify routes, the class by sound bounds, or the smoothed model's class, and store the certificates."""
    with redirect_stdout(sys.stderr):
        from bench.certify.base import CERTIFIERS
        from bench.certify.run import certification_of
        from bench.certify.run import certify as run_certifier
        from bench.datasets.base import open_dataset
        from bench.environment import torch_device
        from bench.evaluation.plan import RunRequest, plan_on
        from bench.models.checkpoints import ZOO
        from bench.results.store import ensure_writable, run_folder
        from bench.spec import build

        certifier = build(CERTIFIERS[method], f"--method {method}", _settings(settings))
        own = certifier.own_threat
        request = RunRequest(
            suites=(),
            dataset=dataset,
            models=split(model),
            alphas=_alphas(alpha),
            norm=own.norm if own and norm is None else norm,
            eps=own.eps_text if own and norm is None and eps is None else eps,
            n_examples=n_examples,
            seed=seed,
            batch_size=batch_size,
            gates=split(gates),
        )
        where = torch_device(device)
        ensure_writable(results)

        def score(job: "Job[Certifier]", progress: "RunProgress") -> "Certification | None":
            result = run_certifier(job, results, where, progress.on_block)
            assert result is not None  # all blocks were asked for
            progress.say(f"{result.clean_accuracy.value:.2%} right, {result.seconds:.1f} s")
            return result

        methods = {f"certify-{method}": certifier}
        asked = plan_on(open_dataset(dataset), methods, request, data_root, [checkpoints, ZOO], results)
        if on is not None:
            from bench.cluster import Blocks, on_ray

            on_ray(on, Blocks(asked, results, certification_of, run_certifier), device, note)
        queue = _work_off(asked, score, "certified")

    def tables(certified: "Sequence[Certification]") -> str:
        folders = [run_folder(results, result.spec, result.run) for result in certified]
        return "\n".join(
            f"{(folder / 'table.md').read_text(encoding='utf-8')}\nfigure: {folder / 'curve.svg'}\n"
            for folder in folders
        )

    _print(queue.done, tables, as_json)
    if queue.status:
        raise typer.Exit(queue.status)


@app.command()
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

    runs, certificates = _without_conflicts(results)
    if board_format is BoardFormat.robustbench:
        from bench.boards.robustbench import write_model_info

        written = write_model_info(runs, out)
        for path in written.paths:
            say(f"{path}")
        if written.left_out:
            say(f"left out: {'; '.join(written.left_out)}")
        return
    made, shown = boards_of(runs, certificates, results), split(columns)
    ending = {"latex": "tex"}.get(board_format, board_format.value)
    kinds = list(dict.fromkeys(("csv", "md", *([ending] if ending in FILES else []))))
    for path in write_boards(made, out, shown, kinds):
        say(f"{path}")
    for board in made:
        print(FILES[ending](board, shown) if ending in FILES else terminal(board, shown, _width()))


def _without_conflicts(results: Path) -> "tuple[list[Run], list[Certificates]]":
    """All runs and certificates; prints where two of them contradict each other, and exits with status 1."""
    from bench.boards.rows import finished_runs
    from bench.results.certificates import conflicts, read_certificates

    runs, certificates = finished_runs(results), read_certificates(results)
    if found := conflicts(runs, certificates):
        print("\n\n".join(map(str, found)))
        say(
            f"error: {len(found)} predictions are not what is certified for their images: one of each two rows is wrong"
        )
        raise typer.Exit(FAILED)
    return runs, certificates


@app.command()
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

    _without_conflicts(results)
    with redirect_stdout(sys.stderr):
        write_if_changed(out, page(results, histories([checkpoints]), clean_images(data_root)).encode())
    print(out)


@app.command()
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


@app.command()
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
    from bench.boards.check_formats import FORMATS

    report = compare(baseline, results, max_drop, alpha, strict)
    print(FORMATS[report_format](report))
    if report.failed:
        raise typer.Exit(FAILED)


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="the folder of a finished run, with its result.json")],
    model: Annotated[
        str | None, typer.Option("--model", help="its model, if the run's own name does not find it")
    ] = None,
    device: DeviceOption = "auto",
    data_root: DataRootOption = Path("data"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
) -> None:
    """Re-verify the adversarial examples that a run kept, on a freshly loaded model; exit status 1 if one fails."""
    with redirect_stdout(sys.stderr):
        from bench.environment import torch_device
        from bench.evaluation.replay import replay as verify
        from bench.models.checkpoints import ZOO

        report = verify(run_dir, data_root, [checkpoints, ZOO], torch_device(device), model)
    for idx, attack, why in report.failures:
        print(f"example {idx}, {attack}: {why}")
    verified = report.witnesses - len(report.failures)
    print(f"{report.run}: {verified} of {report.witnesses} adversarial examples verified")
    if report.failures:
        raise typer.Exit(FAILED)


@app.command()
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
            print(described(diagnosis, images, _width()))
            problems += len(diagnosis.problems)
        if problems:
            raise typer.Exit(UNUSABLE)
        return
    with redirect_stdout(sys.stderr):
        findings = list(examine(data_root, folders))
    width = max(len(what) for what, _, _ in findings)
    for what, found, fine in findings:
        print(f"{what:<{width}}  {found}{'' if fine else '  ← missing'}")
    if not all(fine for *_, fine in findings):
        raise typer.Exit(FAILED)


for _command in app.registered_commands:  # whole in the list of commands, where a longer text would be cut
    _command.short_help = " ".join((_command.callback.__doc__ or "").split("\n\n")[0].split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 a regression or a failure, 2 unusable input, told in one line."""
    from typer.exceptions import TyperException

    # Libraries announce their own future here; nothing in it that a user of bench could mend.
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    console.set_up()
    sys.exit(_dispatch(app, arguments, TyperException))


def _again(words: Sequence[str]) -> str:
    """The command that goes on where the one with these words was stopped."""
    more = ["--resume"] if "train" in words and "--resume" not in words else []
    kept = [word for word in words if word != "--restart"]
    return shlex.join(["bench", *kept, *more])


def _parser_message(error: Any) -> str:
    """The parser's own message, and the value that it does not name where a number is none."""
    message: str = error.format_message().rstrip(".").replace("Value error, ", "")
    named = [f"'{wrong['input']}'" for wrong in getattr(error.__cause__, "errors", list)()]
    message += "".join(f" (got {value})" for value in named if value not in message)
    return message if message.endswith("?") else f"{message}."


def _dispatch(application: typer.Typer, arguments: Sequence[str] | None, parser_error: type[Exception]) -> Any:
    try:
        status = application(arguments, prog_name="bench", standalone_mode=False) or DONE
        if status == INTERRUPTED:
            say(f"stopped; this goes on: {_again(sys.argv[1:] if arguments is None else arguments)}")
        return status
    except UnusableInput as error:
        say(f"error: {error}")
        return UNUSABLE
    except parser_error as error:
        say(f"error: {_parser_message(error)} See `bench --help`.")
        return UNUSABLE
    except OSError as error:  # a folder where a file should be, a full disk: nothing that a traceback would explain
        again = "; make room, and start the same command again: it goes on from what is done"
        what = f"'{error.filename}': {error.strerror}" if error.filename else f"{error}"
        say(f"error: {what}{again if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ''}")
        return UNUSABLE
    except TrainingFailed as error:
        say(f"error: {error}")
        return FAILED

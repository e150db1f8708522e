"""Commands that score models: attack them, certify them, and verify what attacks have found."""

import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bench.commands.options import (
    DONE,
    FAILED,
    UNUSABLE,
    AlphaOption,
    CheckpointsOption,
    DataRootOption,
    DatasetOption,
    DeviceOption,
    EpsOption,
    ExamplesOption,
    GatesOption,
    JsonOption,
    ModelOption,
    NormOption,
    OnOption,
    QuietOption,
    ResultsOption,
    SeedOption,
    SettingsOption,
    alphas_of,
    fitted,
    settings_of,
    split,
    terminal_width,
    whole,
)
from bench.console import note, say
from bench.errors import UnusableInput

if TYPE_CHECKING:
    from bench.certify.base import Certifier
    from bench.evaluation.plan import Plan
    from bench.job import Job
    from bench.progress import RunProgress
    from bench.results.certificates import Certification
    from bench.results.schema import Result
    from bench.suites.base import Suite


#: Why a suite had nothing to attack on a model that gets images right, and what to do.
_UNFORCED = (
    "its gates are not read as it shows them: name them, such as --gates 'blocks.*.gate' (docs/your-own-model.md)"
)
_IDLE = "it shows no router with experts, and no gates are named (docs/your-own-model.md); show them, or run autoattack"


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
        from bench.spec import NOT_FORCED
        from bench.suites.base import DEFAULT_SUITES

        request = RunRequest(
            suites=split(suite) or DEFAULT_SUITES,
            named=bool(suite),
            dataset=dataset,
            models=split(model),
            alphas=alphas_of(alpha),
            norm=norm,
            eps=eps,
            n_examples=n_examples,
            seed=seed,
            batch_size=128 if batch_size == "auto" else whole(batch_size, "--batch-size"),
            fit=batch_size == "auto",
            settings=settings_of(settings),
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
        why = _UNFORCED if any(NOT_FORCED in flag for flag in result.suite_flags) else _IDLE
        say(f"error: {result.spec.suite} on {result.spec.model} attacked nothing: {why}")
    if failed and not queue.status:
        raise typer.Exit(FAILED)
    if queue.status or (idle and request.models):
        raise typer.Exit(UNUSABLE)


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
        left_out = [name for name in plan.methods if name not in {job.spec.suite for job in jobs}]
        if plan.request.named and left_out:
            note(f"{model} has no routes: {', '.join(left_out)} is left out")
        progress.expect([*(job.spec.suite for job in jobs), *still * list(plan.methods)])
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

    from bench.results.schema import suite_label

    rows = []
    for result in results:
        spec, robust, clean = result.spec, result.robust_accuracy, result.clean_accuracy.value
        accuracy = f"{100 * robust.value:.2f} [{100 * robust.low:.1f}, {100 * robust.high:.1f}]"
        rows.append({
            "model": spec.model,
            "α": "" if spec.alpha is None else f"{spec.alpha:g}",
            "suite": suite_label(spec),
            "threat": str(spec.threat_model),
            "n": spec.n_examples,
            "SA %": f"{clean:.2%}".rstrip("%"),
            "RA % [95 %]": accuracy if result.attacked or (spec.suite != "clean" and not clean) else "–",
        })  # fmt: skip
    width = terminal_width()
    cells = [[str(cell) for cell in row.values()] for row in rows]
    tables = [fitted(cells, list(rows[0]), "simple", width, at=0, least=12)]
    flags = dict.fromkeys(f"{r.spec.model}: {flag}" for r in results for flag in r.model_flags)
    flags |= dict.fromkeys(f"{r.spec.suite} on {r.spec.model}: {flag}" for r in results for flag in r.suite_flags)
    lines = [textwrap.fill(flag, width, subsequent_indent="  ") if width else flag for flag in flags]
    tables += ["\n".join(lines)] * bool(flags)
    for result in results:
        if result.components:
            parts = [
                [name, f"{100 * rate.value:.2f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"]
                for name, rate in result.components.items()
            ]
            for name, use in result.gates.items():
                load = "/".join(f"{100 * share:.0f}" for share in use.load)
                parts.append([f"{name} load", f"{load} (entropy {use.entropy:.2f} of {math.log(len(use.load)):.2f})"])
                parts.append([f"{name} route-flip rate", f"{100 * use.flipped:.2f}"])
            headers = [f"{result.spec.model}: {result.spec.suite}", "% [95 %]"]
            tables.append(tabulate(parts, headers=headers, disable_numparse=True))
    return "\n\n".join(tables)


def certify(
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="bounds, routes or smoothing")],
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
        from bench.certify.report import terminal
        from bench.certify.run import certification_of
        from bench.certify.run import certify as run_certifier
        from bench.datasets.base import open_dataset
        from bench.environment import torch_device
        from bench.evaluation.plan import RunRequest, plan_on
        from bench.models.checkpoints import ZOO
        from bench.registry import CERTIFIERS
        from bench.results.certificates import CertificateFolder
        from bench.results.store import ensure_writable, run_folder
        from bench.spec import build

        certifier = build(CERTIFIERS[method], f"--method {method}", settings_of(settings))
        own = certifier.own_threat
        request = RunRequest(
            suites=(),
            dataset=dataset,
            models=split(model),
            alphas=alphas_of(alpha),
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
            progress.say(f"SA {result.clean_accuracy.value:.2%}, {result.seconds:.1f} s")
            return result

        methods = {f"certify-{method}": certifier}
        asked = plan_on(open_dataset(dataset), methods, request, data_root, [checkpoints, ZOO], results)
        if on is not None:
            from bench.cluster import Blocks, on_ray

            on_ray(on, Blocks(asked, results, certification_of, run_certifier), device, note)
        queue = _work_off(asked, score, "certified")

    def tables(certified: "Sequence[Certification]") -> str:
        shown = []
        for result in certified:
            folder = CertificateFolder(run_folder(results, result.spec, result.run))
            rows = folder.rows(result).frame()
            drawn = f"\nfigure: {folder.path / 'curve.svg'}\n" if (rows["radius"] > 0).any() else "\n"
            shown.append(f"{terminal(result, rows, terminal_width())}{drawn}")
        return "\n".join(shown)

    _print(queue.done, tables, as_json)
    if queue.status:
        raise typer.Exit(queue.status)


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

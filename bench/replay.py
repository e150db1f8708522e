"""Re-verifies the adversarial examples that a run kept, on a freshly loaded model."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.datasets.base import open_dataset
from bench.evaluate import full_float32, set_alpha
from bench.inner import attacking
from bench.plan import named_subject
from bench.registry import UnusableInput
from bench.spec import RunSpec
from bench.store import Run, read_run
from bench.verdicts import judge
from bench.witnesses import FILE, Witnesses


@dataclass(frozen=True)
class Replay:
    """How many witnesses there were, and those that do not break the model: (example, attack, why)."""

    run: Run
    witnesses: int
    failures: tuple[tuple[int, str, str], ...]


def replay(
    folder: Path, data_root: Path, checkpoints: Sequence[Path], device: str = "cpu", model: str | None = None
) -> Replay:
    """Judge every witness of the run in `folder` again, as the run did: ball, box, and F's prediction.

    `model` is the word that names the model, where it is not found by the run's own name for it. A witness that fails
    in its batch is judged alone as well, since the last bit of a sum depends on the batch.

    Raises:
        UnusableInput: no finished run there, no witnesses (with the command that makes them), or the model or the data
            are not those of the run.
    """
    run = read_run(folder)
    spec, result = run.result.spec, run.result
    witnesses = _read(run)
    dataset = open_dataset(spec.dataset)
    subject = named_subject(model or spec.model, dataset, spec.threat_model, checkpoints)
    found, asked = subject.info.checkpoint_sha256, result.model_info.checkpoint_sha256
    if found != asked:
        raise UnusableInput(
            f"'{model or spec.model}' is not the model of {run}: its SHA-256 is {found[:12]}, not {asked[:12]}; name"
            " the file with --model"
        )
    data = dataset.evaluation_set(data_root, spec.n_examples)
    if data.fingerprint != result.fingerprint:
        where = f"the images of {spec.dataset} at '{data_root}'"
        raise UnusableInput(f"{where} are not those of {run}: pass its --data-root")
    if spec.alpha is not None:
        set_alpha(subject.model, spec.alpha)
    position = {int(idx): row for row, idx in enumerate(data.idx)}
    rows = torch.tensor([position[int(idx)] for idx in witnesses.idx])
    x_adv, network = torch.from_numpy(witnesses.x_adv), subject.model.to(device)

    def failed(chosen: torch.Tensor) -> torch.Tensor:
        x, y = data.x[rows[chosen]].to(device), data.y[rows[chosen]].to(device)
        verdict = judge(network, x, y, x_adv[chosen].to(device), spec.threat_model, True, None, False)
        return chosen[~verdict.broken]

    failures = []
    with attacking(network), full_float32():
        for chosen in torch.split(torch.arange(len(rows)), spec.batch_size):
            for one in failed(chosen).tolist():
                if len(failed(torch.tensor([one]))):
                    why = "outside the ball or the box, or classified correctly"
                    failures.append((int(witnesses.idx[one]), witnesses.attack[one], why))
    return Replay(run, len(rows), tuple(failures))


def _read(run: Run) -> Witnesses:
    path = run.path / FILE
    if not path.is_file():
        if run.result.robust_accuracy.value == run.result.clean_accuracy.value:
            raise UnusableInput(f"{run} broke no example: there is nothing to replay")
        raise UnusableInput(f"there is no '{path}': remove the folder, and run `{command(run.result.spec, run.path)}`")
    try:
        return Witnesses.read(path)
    except ValueError as error:
        raise UnusableInput(f"{error}: remove the folder, and run `{command(run.result.spec, run.path)}`") from None


def command(spec: RunSpec, folder: Path) -> str:
    """The `bench run` that makes the run in `folder`, below its results folder, again."""
    results = folder.parents[4] if len(folder.parents) > 4 else Path("results")
    words = ["bench", "run", "--suite", spec.suite, "--dataset", spec.dataset, "--model", spec.model]
    words += [] if spec.alpha is None else ["--alpha", f"{spec.alpha:g}"]
    words += ["--n-examples", str(spec.n_examples), "--norm", spec.threat_model.norm]
    words += ["--eps", spec.threat_model.eps_text, "--seed", str(spec.seed), "--batch-size", str(spec.batch_size)]
    settings = {key: value for key, value in spec.suite_params.items() if key != "warm_start"}
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words += ["--warm-start"] if "warm_start" in spec.suite_params else []
    return shlex.join([*words, "--results", str(results)])

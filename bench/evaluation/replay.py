"""Re-verifies the adversarial examples that a run kept, on a freshly loaded model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.evaluation.examine import guarded
from bench.evaluation.identity import identified
from bench.evaluation.plan import named_subject
from bench.evaluation.subjects import with_gates
from bench.evaluation.verdicts import Judgement, judge
from bench.job import IDENTITY_FILE
from bench.models.deployed import eval_frozen, full_float32
from bench.models.foreign import DRAWS, Guarded
from bench.models.gates import LOOKED_AT
from bench.models.parts import set_alpha
from bench.results.flags import BY_CHANCE
from bench.results.store import CERTIFICATES, Run, read_run
from bench.results.witnesses import FILE, Witnesses


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
    in its batch is judged alone as well, since the last bit of a sum depends on the batch. What the run's rows call
    broken and has no witness has failed, too.

    Raises:
        UnusableInput: no finished run there, no witnesses (with the command that makes them), or the model or the data
            are not those of the run.
    """
    if folder.is_file():  # its result.json
        folder = folder.parent
    if (folder / CERTIFICATES).is_file():
        raise UnusableInput(f"'{folder}' is a certification, which has no adversarial examples to replay")
    run = read_run(folder)
    spec, result = run.result.spec, run.result
    again = spec.command(_results_of(folder), model, data_root, checkpoints[0])
    remake = f"remove the folder {folder}, and run `{again}`"
    path, broken = folder / FILE, _broken(run)
    if not path.is_file():
        if not broken:
            raise UnusableInput(f"{run} broke no example: there is nothing to replay")
        raise UnusableInput(f"there is no '{path}': {remake}")
    dataset = open_dataset(spec.dataset)
    subject = named_subject(model or spec.model, dataset, spec.threat_model, checkpoints)
    data = dataset.evaluation_set(data_root, spec.n_examples)
    if data.fingerprint != result.fingerprint:
        where = f"the images of {spec.dataset} at '{data_root}'"
        raise UnusableInput(f"{where} are not those of {run}: pass its --data-root")
    subject = identified(subject, data, dataset.num_classes, [folder / IDENTITY_FILE])
    found, asked = subject.info.checkpoint_sha256, result.model_info.checkpoint_sha256
    _, at, part = spec.model.partition("@")  # a baseline is made of the same file
    if found != asked or subject.info.name.partition("@")[2] != part:
        what = "identity" if subject.foreign else "SHA-256"
        named = "what makes it with --model" if subject.foreign else f"its file with --model FILE{at}{part}"
        raise UnusableInput(
            f"'{model or spec.model}' ({what} {found[:12]}) is not the model of {run} ({what} {asked[:12]}): name"
            f" {named}"
        )
    if spec.alpha is not None:
        set_alpha(with_gates(subject, (), data.x[:LOOKED_AT]).routed, spec.alpha)
    try:
        witnesses = Witnesses.read_for(path, data.idx.numpy(), tuple(data.x.shape[1:]))
    except ValueError as error:
        raise UnusableInput(f"{error}: {remake}") from None
    position = {int(idx): row for row, idx in enumerate(data.idx)}
    rows = torch.tensor([position[int(idx)] for idx in witnesses.idx], dtype=torch.int64)
    x_adv, network = torch.from_numpy(witnesses.x_adv), guarded(subject).to(device)
    if isinstance(network, Guarded) and BY_CHANCE in result.model_flags:
        network.draws = DRAWS

    def judged(chosen: torch.Tensor) -> Judgement:
        x, y = data.x[rows[chosen]].to(device), data.y[rows[chosen]].to(device)
        return judge(network, x, y, x_adv[chosen].to(device), spec.threat_model, True, None, False)

    failures = []
    with eval_frozen(network), full_float32():
        for chosen in torch.split(torch.arange(len(rows)), spec.batch_size):
            for one in chosen[~judged(chosen).broken].tolist():
                alone = judged(torch.tensor([one]))
                if not alone.broken:
                    why = "not finite, or outside the ball or the box" if alone.error else "classified correctly"
                    failures.append((int(witnesses.idx[one]), witnesses.attack[one], why))
    missing = sorted(broken - set(zip(witnesses.idx.tolist(), witnesses.attack, strict=True)))
    failures += [(idx, attack, f"broken according to the run, but not in {FILE}") for idx, attack in missing]
    return Replay(run, len(rows) + len(missing), tuple(failures))


def _broken(run: Run) -> set[tuple[int, str]]:
    """The examples that the run broke, each with the attack that did; those wrong without an attack are none."""
    rows = run.verdicts()
    attacked = rows[(rows["target"] == "F") & (rows["attack"] != "clean") & (rows["status"] == "ok")]
    found = attacked[attacked["clean_correct"] & ~attacked["robust"]]
    return set(zip(found["idx"].tolist(), found["attack"].tolist(), strict=True))


def _results_of(folder: Path) -> Path:
    """The results folder that a run's `folder` lies in, five levels up."""
    deep = folder if len(folder.parents) > 4 else folder.resolve()
    return deep.parents[4] if len(deep.parents) > 4 else Path("results")

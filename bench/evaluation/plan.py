"""From the words of `bench run` to the runs that they ask for, all checked before the first one starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from bench.datasets.base import Dataset, open_dataset
from bench.errors import UnusableInput
from bench.evaluation.baselines import baseline
from bench.evaluation.subjects import find_models, load_subject
from bench.job import Job, M, Subject
from bench.spec import RunSpec, Spec, ThreatModel
from bench.suites.base import Suite, open_suites


class RunRequest(Spec):
    """What `bench run` was asked for. No `models`: every variant with a checkpoint; no `alphas`: each dual's own."""

    suites: tuple[str, ...]
    dataset: str
    models: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    norm: str | None = None
    eps: str | None = None
    n_examples: int | None = None
    seed: int = 0
    batch_size: int = 128
    settings: dict[str, Any] = Field(default_factory=dict)
    warm_start: bool = False


def threat_model(dataset: Dataset, norm: str | None, eps: str | None) -> ThreatModel:
    """The data set's own threat model where nothing else is said; another norm needs an ε of its own."""
    own = dataset.threat_model
    chosen = ThreatModel.parse(norm or own.norm, own.eps if eps is None else eps)
    if eps is None and chosen.norm != own.norm:
        raise UnusableInput(f"--norm {norm} needs an --eps: {dataset.name}'s own ε {own.eps_text} is for {own.norm}")
    pixels = math.prod(dataset.input_shape)
    widest = {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}[chosen.norm]
    if chosen.eps >= widest:
        raise UnusableInput(
            f"--eps {eps}: this {chosen.norm} ball holds every image of {dataset.name}, whose pixels lie in [0, 1]:"
            f" it must be below {widest:.4g}"
        )
    return chosen


def named_subject(word: str, dataset: Dataset, threat: ThreatModel, checkpoints: Sequence[Path]) -> Subject:
    """The model that `word` names, or what `<model>@<baseline>` is compared with it."""
    whole, at, name = word.rpartition("@")
    if not at or name.endswith(".safetensors"):
        return load_subject(word, dataset, threat, checkpoints)
    return baseline(load_subject(whole, dataset, threat, checkpoints), name)


def plan(request: RunRequest, data_root: Path, checkpoints: Sequence[Path]) -> list[Job[Suite]]:
    """The runs that the request asks for; UnusableInput for the first thing in it that cannot be used."""
    return plan_methods(open_suites(request.suites, request.settings), request, data_root, checkpoints)


def plan_methods(
    methods: Mapping[str, M], request: RunRequest, data_root: Path, checkpoints: Sequence[Path]
) -> list[Job[M]]:
    """The runs of these methods, whatever suites the request names; raises as `plan` does."""
    dataset = open_dataset(request.dataset)
    threat = threat_model(dataset, request.norm, request.eps)
    for name, method in methods.items():
        method.check(name, dataset.name, threat)
    for option, given, least in (("--batch-size", request.batch_size, 1), ("--seed", request.seed, 0)):
        if given < least:
            raise UnusableInput(f"{option} {given} must be at least {least}")
    for value in request.alphas:
        if not 0 <= value <= 1:
            raise UnusableInput(f"--alpha {value:g} must be in [0, 1]")
    data = dataset.evaluation_set(data_root, request.n_examples)
    words = request.models or find_models(dataset, threat, checkpoints)
    subjects = [named_subject(word, dataset, threat, checkpoints) for word in words]
    if request.alphas and all(subject.info.alpha is None for subject in subjects):
        raise UnusableInput(f"--alpha sets a dual's α, and {', '.join(words)} is none: name one with --model dual")
    jobs = []
    for subject in subjects:
        own = subject.info.alpha
        alphas: Sequence[float | None] = request.alphas if own is not None and request.alphas else (own,)
        for alpha in alphas:
            chosen = replace(subject, info=subject.info.model_copy(update={"alpha": alpha}))
            for name, method in methods.items():
                spec = RunSpec(
                    model=chosen.info.name,
                    alpha=alpha,
                    combine=chosen.info.combine,
                    dataset=dataset.name,
                    threat_model=threat,
                    suite=name,
                    suite_version=method.version,
                    suite_params=method.params,
                    n_examples=len(data),
                    seed=request.seed,
                    batch_size=request.batch_size,
                    warm_start=request.warm_start,
                )
                jobs.append(Job(spec, chosen, method, data, dataset.num_classes))
    return jobs

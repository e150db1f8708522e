"""From the words of `bench run` to the runs that they ask for, checked before the first starts but for the models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

from pydantic import Field

from bench.datasets.base import Dataset, EvalSet, open_dataset
from bench.errors import UnusableInput
from bench.evaluation.baselines import baseline
from bench.evaluation.examine import guarded
from bench.evaluation.identity import identified, identity_files
from bench.evaluation.subjects import find_models, load_subject, with_gates
from bench.job import Job, M, Subject
from bench.models.gates import LOOKED_AT
from bench.models.parts import parts
from bench.models.sites import sites
from bench.spec import RunSpec, Spec, ThreatModel
from bench.suites.base import Suite, open_suites


class RunRequest(Spec):
    """What `bench run` was asked for, in its words. No `models`: every variant with a checkpoint; no `alphas`: each
    dual's own."""

    suites: tuple[str, ...]
    named: bool = Field(default=True, description="whether the user named the suites; else those that fit are run")
    dataset: str
    models: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    norm: str | None = None
    eps: str | None = None
    n_examples: int | None = None
    seed: int = 0
    batch_size: int = 128
    fit: bool = Field(default=False, description="whether forward passes are split by what fits into memory")
    settings: dict[str, Any] = Field(default_factory=dict)
    warm_start: bool = False
    gates: tuple[str, ...] = ()


def threat_model(dataset: Dataset, norm: str | None, eps: str | None) -> ThreatModel:
    """The data set's own threat model by default; another norm needs an ε of its own."""
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
        subject = load_subject(word, dataset, threat, checkpoints)
    else:
        subject = baseline(load_subject(whole, dataset, threat, checkpoints), name)
    if word == subject.info.name:
        return subject
    return replace(subject, info=subject.info.model_copy(update={"word": word}))


@dataclass(frozen=True)
class Plan(Generic[M]):
    """The runs that a request asks for, model by model: one is loaded when its turn comes.

    models: the words that name them, as `--model` takes them.
    """

    request: RunRequest
    dataset: Dataset
    threat_model: ThreatModel
    methods: Mapping[str, M]
    data: EvalSet
    models: tuple[str, ...]
    checkpoints: Sequence[Path]
    results: Path | None

    def jobs(self, model: str) -> list[Job[M]]:
        """The runs of one model, which lives as long as they do; UnusableInput if it cannot be had or scored."""
        return self.jobs_of(named_subject(model, self.dataset, self.threat_model, self.checkpoints))

    def jobs_of(self, subject: Subject) -> list[Job[M]]:
        """The runs of a model that is there already; raises as `jobs` does."""
        files = identity_files(self.results, self.dataset.name, subject.info.name) if self.results else ()
        subject = identified(subject, self.data, self.dataset.num_classes, files)
        subject = with_gates(subject, self.request.gates, self.data.x[:LOOKED_AT])
        own, asked = subject.info.alpha, self.request.alphas
        alphas: Sequence[float | None] = asked if own is not None and asked else (own,)
        fitting = {name: method for name, method in self.methods.items() if self._fits(method, subject)}
        return [self._job(subject, alpha, *method) for alpha in alphas for method in fitting.items()]

    def _fits(self, method: M, subject: Subject) -> bool:
        """Whether the method is run on a model.

        What needs routes is left out where there are none, unless the user named it for a model of their own or alone.
        """
        wants_routes = isinstance(method, Suite) and "routes" in method.needs
        if not wants_routes or parts(guard := guarded(subject)) or sites(guard):
            return True
        return self.request.named and (subject.foreign or len(self.methods) == 1)

    def has_dual(self) -> bool:
        """Whether any of the models has an α; one that cannot be loaded may have one."""
        for model in self.models:
            try:
                subject = named_subject(model, self.dataset, self.threat_model, self.checkpoints)
                if with_gates(subject, (), self.data.x[:LOOKED_AT]).info.alpha is not None:
                    return True
            except UnusableInput:
                return True
        return False

    def _job(self, subject: Subject, alpha: float | None, name: str, method: M) -> Job[M]:
        chosen = replace(subject, info=subject.info.model_copy(update={"alpha": alpha}))
        spec = RunSpec(
            model=chosen.info.name,
            alpha=alpha,
            combine=chosen.info.combine,
            dataset=self.dataset.name,
            threat_model=self.threat_model,
            suite=name,
            suite_version=method.version,
            suite_params=method.params,
            n_examples=len(self.data),
            seed=self.request.seed,
            batch_size=self.request.batch_size,
            warm_start=self.request.warm_start,
            gates=chosen.gates,
        )
        return Job(spec, chosen, method, self.data, self.dataset.num_classes, self.request.fit)


def plan(request: RunRequest, data_root: Path, checkpoints: Sequence[Path], results: Path | None = None) -> Plan[Suite]:
    """The runs that the request asks for; UnusableInput for the first thing in it, but for models, that is unusable."""
    suites = open_suites(request.suites, request.settings)
    return plan_on(open_dataset(request.dataset), suites, request, data_root, checkpoints, results)


def plan_on(
    dataset: Dataset,
    methods: Mapping[str, M],
    request: RunRequest,
    data_root: Path,
    checkpoints: Sequence[Path],
    results: Path | None = None,
) -> Plan[M]:
    """The runs of these methods on this data set, whatever suites and data the request names; raises as `plan` does.

    `results`: the folder of earlier runs, by which a model without a checkpoint of ours is recognised.
    """
    threat = threat_model(dataset, request.norm, request.eps)
    if not request.named:
        methods = {name: method for name, method in methods.items() if threat.norm in method.norms}
    for name, method in methods.items():
        method.check(name, dataset.name, threat)
    for option, given, least in (("--batch-size", request.batch_size, 1), ("--seed", request.seed, 0)):
        if given < least:
            raise UnusableInput(f"{option} {given} must be at least {least}")
    for value in request.alphas:
        if not 0 <= value <= 1:
            raise UnusableInput(f"--alpha {value:g} must be in [0, 1]")
    data = dataset.evaluation_set(data_root, request.n_examples)
    models = request.models or tuple(find_models(dataset, threat, checkpoints, data_root))
    made = Plan(request, dataset, threat, methods, data, models, checkpoints, results)
    if request.alphas and not made.has_dual():
        raise UnusableInput(f"--alpha sets a dual's α, and {', '.join(models)} is none: name one with --model dual")
    return made

"""From the words of `bench run` to runs: what is asked for is what is planned, and what cannot be is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.evaluation.plan import RunRequest, plan, threat_model
from bench.evaluation.subjects import foreign_subject
from bench.job import Job
from bench.models.dual import DualModel
from bench.spec import ThreatModel
from bench.suites.base import DEFAULT_SUITES, Suite


@pytest.fixture
def planned(tmp_path: Path, shelve: Any) -> Callable[..., list[Job[Suite]]]:
    """planned(suites=…, …): the jobs with a dense model, an MoE and a dual on the shelf."""
    shelve(tmp_path, "dense-at", "moe-at", "dual-jtdmoe")

    def make(suites: tuple[str, ...] = ("clean",), **fields: Any) -> list[Job[Suite]]:
        made = plan(RunRequest(suites=suites, **{"dataset": "digits", "n_examples": 3, **fields}), tmp_path, [tmp_path])
        return [job for model in made.models for job in made.jobs(model)]

    return make


def test_every_model_on_the_shelf_meets_every_suite(planned: Any):
    made = planned(("clean", "pgd"), seed=4, batch_size=7)
    specs = [job.spec for job in made]
    assert [(spec.model, spec.suite) for spec in specs] == [
        (model, suite) for model in ("dense-at", "moe-at", "dual-jtdmoe") for suite in ("clean", "pgd")
    ]
    assert {(spec.n_examples, spec.seed, spec.batch_size, spec.dataset) for spec in specs} == {(3, 4, 7, "digits")}
    assert {spec.threat_model for spec in specs} == {ThreatModel(norm="Linf", eps=0.2)}
    assert [(spec.alpha, spec.combine) for spec in specs[::2]] == [(None, None), (None, "logits"), (0.7, "probs")]
    assert (len(made[0].data), made[0].num_classes) == (3, 10)


def test_all_examples_in_the_archives_order_unless_said_otherwise(planned: Any):
    whole = planned(n_examples=None)
    assert {job.spec.n_examples for job in whole} == {500}
    assert whole[0].data.idx.tolist() == list(range(500))
    part = planned(n_examples=5)[0].data
    assert (part.idx.tolist(), part.y.tolist()) == (list(range(5)), whole[0].data.y[:5].tolist())


def test_suites_that_nobody_named_are_those_that_fit(planned: Any):
    """`adaptive` needs routes, and neither it nor `pgd` knows L1."""
    fitting = planned(DEFAULT_SUITES, named=False)
    routed = [(model, "adaptive") for model in ("moe-at", "dual-jtdmoe")]
    assert [(j.spec.model, j.spec.suite) for j in fitting if j.spec.suite == "adaptive"] == routed
    in_l1 = planned(DEFAULT_SUITES, named=False, norm="L1", eps="1")
    assert {j.spec.suite for j in in_l1} == {"clean", "autoattack"}
    assert {j.spec.model for j in planned(("adaptive",))} == {"dense-at", "moe-at", "dual-jtdmoe"}
    with pytest.raises(UnusableInput, match="suite 'adaptive' has no L1 attack"):
        planned(("adaptive",), norm="L1", eps="1")


class Gated(nn.Module):
    """One of three linear networks, by a gate that no attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.nets = nn.Linear(64, 3), nn.Linear(64, 30)

    def forward(self, x: Tensor) -> Tensor:
        weights = nn.functional.one_hot(self.score(x.flatten(1)).argmax(1), 3).to(x)
        return (weights[..., None] * self.nets(x.flatten(1)).view(-1, 3, 10)).sum(1)


class Shifted(nn.Module):
    """A dual of two dense networks behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        branches = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
        self.net = DualModel(*branches, alpha=0.7)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 0.3) / 0.4)


@pytest.fixture
def planned_of(tmp_path: Path) -> Callable[..., list[Job[Suite]]]:
    """planned_of(model, …): the jobs of a user's own model."""

    def make(model: nn.Module, suites: tuple[str, ...] = DEFAULT_SUITES, **fields: Any) -> list[Job[Suite]]:
        request = RunRequest(suites=suites, dataset="digits", n_examples=8, models=("mine",), **fields)
        return plan(request, tmp_path, [tmp_path]).jobs_of(foreign_subject(model, "mine"))

    return make


def test_gates_that_the_user_names_are_routes(planned_of: Any):
    assert [job.spec.suite for job in planned_of(Gated(), named=False)] == ["clean", "pgd", "autoattack"]
    routed = planned_of(Gated(), named=False, gates=("score:k=1",))
    assert [job.spec.suite for job in routed] == list(DEFAULT_SUITES)


def test_a_dual_behind_a_normalisation_is_planned_as_the_dual(planned_of: Any):
    for model in (Shifted(), Shifted().net):
        jobs = planned_of(model, named=False)
        assert [(job.spec.suite, job.spec.alpha) for job in jobs] == [(name, 0.7) for name in DEFAULT_SUITES]
        assert jobs[0].subject.info.routing_visible
        swept = planned_of(model, ("clean",), alphas=(0.5, 1.0))
        assert [job.spec.alpha for job in swept] == [0.5, 1.0]


def test_alpha_is_refused_where_no_model_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.evaluation.plan.named_subject", lambda word, *_: foreign_subject(MODELS[word](), word))
    MODELS = {"gated": Gated, "shifted": Shifted}
    request = RunRequest(suites=("clean",), dataset="digits", n_examples=8, alphas=(0.5,))
    with pytest.raises(UnusableInput, match="--alpha sets a dual's α, and gated is none"):
        plan(request.model_copy(update={"models": ("gated",)}), tmp_path, [tmp_path])
    plan(request.model_copy(update={"models": ("gated", "shifted")}), tmp_path, [tmp_path])


def test_alphas_sweep_the_duals_alone(planned: Any):
    made = planned(alphas=(0.5, 1.0), models=("moe-at", "dual-jtdmoe"))
    assert [(job.spec.model, job.spec.alpha, job.subject.info.alpha) for job in made] == [
        ("moe-at", None, None),
        ("dual-jtdmoe", 0.5, 0.5),
        ("dual-jtdmoe", 1.0, 1.0),
    ]
    keys = {job.spec.run_key(job.subject.info.checkpoint_sha256, "f") for job in made}
    assert len(keys) == 3


def test_settings_go_to_the_suites_that_have_them(planned: Any):
    made = planned(("clean", "pgd", "torchattacks:PGD"), models=("moe-at",), settings={"steps": 3, "step_size": 0.1})
    assert {job.spec.suite: job.spec.suite_params for job in made} == {
        "clean": {},
        "pgd": {"steps": 3, "step_size": 0.1},
        "torchattacks:PGD": {"steps": 3},
    }
    assert {job.spec.suite_version for job in made} == {1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alphas": (0.5,), "models": ("moe-at", "dense-at")}, "--alpha sets a dual's α, and moe-at, dense-at is none"),
        ({"alphas": (0.5, 1.5)}, r"--alpha 1.5 must be in \[0, 1\]"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"n_examples": 0}, "--n-examples 0 must be at least 1"),
        ({"n_examples": 501}, "--n-examples 501 is more than the 500 test images of digits"),
        ({"norm": "L2"}, "--norm L2 needs an --eps: digits's own ε 0.2 is for Linf"),
        ({"norm": "L3"}, "unknown norm 'L3'"),
        ({"eps": "0"}, "ε '0' must be above 0"),
        ({"eps": "8"}, "ε '8' holds every image, since pixels lie in .* is 8/255"),
        (
            {"norm": "L2", "eps": "8", "models": ("moe-at",)},
            "--eps 8: this L2 ball holds every image .* must be below 8",
        ),
        ({"norm": "L1", "eps": "64"}, "this L1 ball holds every image of digits, .* must be below 64"),
        ({"suites": ("pgd",), "settings": {"steps": True}}, "steps: Input should not be yes or no"),
        ({"norm": "L1", "eps": "3", "suites": ("clean", "pgd")}, "suite 'pgd' has no L1 attack: it has Linf, L2"),
        ({"dataset": "digit"}, "unknown data set 'digit': did you mean 'digits'"),
        ({"models": ("moe-att",)}, "unknown variant 'moe-att': did you mean 'moe-at'"),
        ({"norm": "L2", "eps": "1", "models": ("moe-trades",)}, "no L2 checkpoint of 'moe-trades'"),
        ({"settings": {"steps": 3}}, "--set steps: clean has no such parameter"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(fields: dict[str, Any], message: str, planned: Any):
    with pytest.raises(UnusableInput, match=message):
        planned(**fields)


def test_threat_is_the_data_sets_own_unless_said_otherwise():
    digits, cifar = open_dataset("digits"), open_dataset("cifar10")
    assert threat_model(digits, None, None) == ThreatModel(norm="Linf", eps=0.2)
    assert threat_model(cifar, None, None) == ThreatModel(norm="Linf", eps=8 / 255)
    assert threat_model(cifar, None, "4/255") == ThreatModel(norm="Linf", eps=4 / 255)
    assert threat_model(cifar, "linf", None) == ThreatModel(norm="Linf", eps=8 / 255)
    assert threat_model(cifar, "L2", "0.5") == ThreatModel(norm="L2", eps=0.5)

"""What a model shows before it is scored: planted faults are seen, each with what to do; costs are a run's."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bench.console import duration
from bench.doctor import described, examine_model
from bench.evaluation.diagnosis import Diagnosis
from bench.models.checkpoints import ZOO
from bench.registry import SUITES
from bench.suites.base import open_suites

MODELS = """
    import torch
    from bench import load_model
    from torch import nn

    base = load_model("dense-at")

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = load_model("dense-at")

        def forward(self, x):
            return self.net(x)

    class Normalised(Own):
        def forward(self, x):
            return self.net(x * 0.5 + 0.5)  # images in [-1, 1]

    class Probable(Own):
        def forward(self, x):
            return self.net(x).softmax(1)

    class Noisy(Own):
        def forward(self, x):
            return self.net(x + 0.05 * torch.randn_like(x))

    class OfBatch(Own):
        def forward(self, x):
            logits = self.net(x)
            return logits - logits.mean(0)

    class Counts(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    class Asks(Own):
        def forward(self, x):
            return self.net(x) + torch.is_grad_enabled() * torch.arange(10)

    class Flat(Own):
        def forward(self, x):
            return self.net(x.detach())

    class InPlace(Own):
        def forward(self, x):
            mean = x.mean((1, 2, 3), keepdim=True)
            scaled = x * mean.exp_()
            mean += 1
            return self.net(scaled)

    class Hidden(Own):
        def forward(self, x):
            logits = self.net(x)
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.3, logits, 2 * logits)

    class Inside(Own):
        def __init__(self):
            super().__init__()
            self.choose = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

        def forward(self, x):
            return self.net(x) * (1 + self.choose(x).argmax(1)[:, None])

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            self.experts = nn.ModuleList(load_model("dense-at") for _ in range(3))

        def forward(self, x):
            every = torch.stack([expert(x) for expert in self.experts], 1)
            return every[torch.arange(len(x)), self.router(x).argmax(1)]

    class Mixed(Routed):
        num_selected_experts = 3

        def forward(self, x):
            weights = self.router(x).softmax(1)
            return (weights[:, :, None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Diagnosis]]:
    """seen("Own"): what is found of that model; its gates may be named."""
    name = "planted_doctor_models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.doctor.LOOKED_AT", 64)
    monkeypatch.setattr("bench.evaluation.diagnosis._TIMED", 0.0)
    (tmp_path / f"{name}.py").write_text(dedent(MODELS))
    importlib.invalidate_caches()
    yield lambda kind, *gates: examine_model(f"{name}:{kind}", "digits", tmp_path, [ZOO], gates=gates)[0]
    sys.modules.pop(name, None)


def test_a_sound_model_has_no_problem_and_earns_its_rank_by_autoattack(seen: Callable[..., Diagnosis]):
    found = seen("Own")
    assert found.problems == []
    by_name = {finding.what: finding.seen for finding in found.findings}
    assert by_name["input"].startswith("1×8×8 images of digits, pixels in [0, 1]")
    assert by_name["output"].startswith("logits of 10 classes, float32")
    assert by_name["routes"].startswith("none")
    assert by_name["rank"] == "after suite autoattack with its default settings"
    suites = {each.suite: each for each in found.suites}
    assert suites["adaptive"].why_not == ""  # it may hold more than it shows
    assert suites["pgd"].seconds
    assert suites["autoattack"].seconds
    assert suites["autoattack"].seconds > suites["pgd"].seconds


@pytest.mark.parametrize(
    ("kind", "what", "words", "remedy"),
    [
        ("Normalised", "normalisation", "no normalisation inside", "pixels in [0, 1] in"),
        ("Probable", "output", "these are probabilities", "return the logits"),
        ("Noisy", "chance", "outputs depend on chance", "draw nothing"),
        ("OfBatch", "batch", "outputs depend on the batch", "running statistics"),
        ("Counts", "state", "change the model's state", "change no buffer"),
        ("Asks", "under no_grad", "whether gradients are taken", "not ask"),
        ("Flat", "gradients", "none reaches the pixels", "differentiable"),
        ("InPlace", "gradients", "a backward pass fails (RuntimeError", "without changing in place"),
        ("Hidden", "routes", "choices that depend on the image", "docs/your-own-model.md"),
    ],
)
def test_each_planted_fault_is_told_with_its_remedy(
    kind: str, what: str, words: str, remedy: str, seen: Callable[..., Diagnosis]
):
    found = seen(kind)
    (problem,) = [problem for problem in found.problems if problem.what == what]
    assert words in problem.seen
    assert remedy in problem.remedy
    rank = next(finding for finding in found.findings if finding.what == "rank")
    assert rank.seen.startswith("none") == (what in ("chance", "batch", "state", "under no_grad", "routes"))


@pytest.mark.parametrize(("kind", "words"), [("Routed", "top-1 of 3"), ("Mixed", "soft, of 3")])
def test_routes_that_are_shown_are_counted_and_attacked(kind: str, words: str, seen: Callable[..., Diagnosis]):
    found = seen(kind)
    assert found.problems == []
    by_name = {finding.what: finding.seen for finding in found.findings}
    assert by_name["routes"] == f"router ({words}): 3 paths"
    assert by_name["rank"] == "after suites autoattack and adaptive with their default settings"
    assert {each.suite for each in found.suites if each.seconds} == {*SUITES} - {"robustbench", "torchattacks"}


def test_gates_that_are_named_or_declared_away_count(seen: Callable[..., Diagnosis]):
    named = {finding.what: finding.seen for finding in seen("Inside", "choose").findings}
    assert named["routes"] == "choose (top-1 of 2): 2 paths"
    assert named["rank"] == "after suites autoattack and adaptive with their default settings"
    assert [problem.what for problem in seen("Inside").problems] == ["routes", "rank"]
    declared = seen("Inside", "none")
    assert declared.problems == []
    of = {finding.what: finding.seen for finding in declared.findings}
    assert of["routes"].startswith("none, as --gates none declares, though it chooses by the image (")
    assert of["rank"] == "after suites autoattack and adaptive with their default settings"


def test_the_time_that_every_suite_looks_at_the_model_is_told(seen: Callable[..., Diagnosis]):
    found = seen("Own")
    assert found.looked > 0
    told = f"Before it attacks, each suite looks at the model for about {duration(found.looked)}."
    assert described(found, 500).endswith(told)


def test_no_line_is_longer_than_the_terminal(seen: Callable[..., Diagnosis]):
    text = described(seen("Hidden"), 500, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "→ " in text


@pytest.mark.parametrize(
    ("suite", "settings"),
    [("pgd", {}), pytest.param("adaptive", {"budget": "small"}, marks=pytest.mark.slow), ("components", {})],
)
def test_what_a_suite_is_said_to_cost_is_what_it_costs(
    suite: str, settings: dict[str, Any], score: Callable[..., Any], planted: Any
):
    data = planted.data(6)
    result, _ = score(planted.robust(), suite, data, settings=settings)
    attacked = 6 if suite == "components" else 5  # one has a wrong label
    spent = [sum(counts[way] for counts in result.passes.values()) / attacked for way in ("forwards", "backwards")]
    cost = open_suites([suite], settings)[suite].cost(10, planted.robust())
    assert cost is not None
    for stated, found in zip(cost, spent, strict=True):
        assert 0.75 * found <= stated <= 1.34 * found


def test_autoattack_costs_its_steps_targets_and_queries():
    (suite,) = open_suites(["autoattack"], {}).values()
    assert suite.cost(10) == (100 + 9 * 100 + 9 * 200 + 5000, 100 + 9 * 100 + 9 * 100)
    assert suite.cost(3) == (100 + 2 * 200 + 5000, 100 + 2 * 100)  # below four classes there is no APGD-T

"""Named gates from the command line to a ranked row."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.attacks.adaptive import BUDGETS, Budget
from bench.results.certificates import read_certificates
from bench.results.store import read_runs

DOCS = Path(__file__).parents[2] / "docs" / "your-own-model.md"
TINY = Budget(4, 2, 3, 1, 3, (), 1, 2, 1, 10)


@pytest.fixture
def vmoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The documents' own V-MoE as a module in the current folder, with a second factory that names its gates itself."""
    for name in BUDGETS:
        monkeypatch.setitem(BUDGETS, name, TINY)
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert "class VMoE" in code
    named = "\n\ndef named():\n    model = build()\n    model.gates = ['blocks.*.gate']\n    return model\n"
    (tmp_path / "documented_vmoe.py").write_text(code + named)
    importlib.invalidate_caches()
    yield "documented_vmoe"
    sys.modules.pop("documented_vmoe", None)


@pytest.mark.slow
def test_a_users_own_vmoe_comes_from_nothing_to_a_ranked_row(
    bench: Any, vmoe: str, cut_autoattack: Any, unprobed: None
):
    cut_autoattack(2, 2, 10)
    words = ["run", "--model", f"{vmoe}:build", "--gates", "blocks.*.gate", "--suite", "autoattack,adaptive"]
    status, out, err = bench(*words, "--n-examples", "30")
    assert status == 0, err
    assert "routes inside: blocks.0.gate (top-2 of 4), blocks.1.gate (top-2 of 4)" in out
    for run in read_runs(Path("results")):
        assert run.result.spec.gates == ("blocks.0.gate", "blocks.1.gate")
        assert "--gates blocks.0.gate --gates blocks.1.gate" in run.result.spec.command()
    status, out, err = bench("leaderboard")
    assert status == 0, err
    row = next(line for line in out.splitlines() if "documented_vmoe" in line)
    assert row.split()[0] == "1", out


@pytest.mark.slow
def test_gates_named_by_glob_and_by_the_model_give_the_same_rows(bench: Any, vmoe: str, unprobed: None):
    words = ["--suite", "adaptive", "--n-examples", "30", "--json"]
    status, out, err = bench("run", "--model", f"{vmoe}:build", "--gates", "blocks.*.gate", *words)
    assert status == 0, err
    status, other, err = bench("run", "--model", f"{vmoe}:named", *words)
    assert status == 0, err
    (one,), (same,) = json.loads(out), json.loads(other)
    assert one["spec"]["gates"] == same["spec"]["gates"] == ["blocks.0.gate", "blocks.1.gate"]
    rows = {run.result.spec.model[-5:]: run.verdicts() for run in read_runs(Path("results"))}
    assert rows["build"].equals(rows["named"])
    assert one["passes"] == same["passes"]


def test_a_model_that_is_declared_to_have_no_routes_says_so(bench: Any, vmoe: str, unprobed: None):
    words = ["--suite", "clean", "--n-examples", "8"]
    status, out, err = bench("run", "--model", f"{vmoe}:named", "--gates", "none", *words)
    assert status == 0, err
    assert "declared by the user to have no routes, though it chooses by the image (topk in blocks.*)" in out
    assert "routes not named" not in out
    _, out, _ = bench("run", "--model", f"{vmoe}:build", *words)
    assert "routes not named" in out


OUTSIDE = """
import torch
from torch import nn

class Looped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.which = nn.Linear(64, 10), nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, x):
        parts = (self.first, self.second)
        return torch.stack([parts[int(self.which(one).argmax())](one) for one in x.flatten(1)])
"""


def test_what_python_chooses_has_no_rank_whatever_is_declared(bench: Any, tmp_path: Path, unprobed: None):
    (tmp_path / "looped.py").write_text(OUTSIDE)
    words = ["--model", "looped:Looped", "--gates", "none", "--suite", "pgd", "--n-examples", "8", "--set", "steps=1"]
    status, out, err = bench("run", *words)
    assert status == 0, err
    assert "choices outside torch: argmax in Looped" in out
    _, out, _ = bench("leaderboard")
    assert "it chooses outside torch, where no attack follows" in out
    _, out, _ = bench("doctor", *words[:4])
    assert "choices outside torch" in out


def test_gates_that_are_named_count_where_a_pass_cannot_be_watched_whatever_is_declared(
    bench: Any, vmoe: str, unprobed: None, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr("bench.evaluation.examine.find_choices", fail)
    words = ["--model", f"{vmoe}:build", "--gates", "blocks.*.gate,none", "--suite", "clean", "--n-examples", "8"]
    status, out, err = bench("run", *words)
    assert status == 0, err
    assert "declared by the user to have no other routes" in out
    assert "choices outside torch: the forward pass cannot be watched (RuntimeError)" in out  # so that it has none
    assert "routes inside: blocks.0.gate" in out


BUCKETS = """
import torch
from torch import nn

class Buckets(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(64, 1), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.table[torch.bucketize(self.linear(x.flatten(1))[:, 0].contiguous(), torch.tensor([-0.1, 0.1]))]

class Shown(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Buckets()
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))

    def forward(self, x):
        chosen = self.router(x).argmax(1)
        return torch.stack([expert(x) for expert in self.experts], 1)[torch.arange(len(x)), chosen]
"""


@pytest.mark.parametrize(
    ("gates", "advice"),
    [
        ([], "name its gates with --gates 'router'"),
        (["--gates", "router"], "let 'router' give the scores that it chooses by"),
        (["--gates", "none"], "let 'router' give the scores that it chooses by"),
    ],
)
def test_a_choice_inside_a_shown_router_is_not_declared_away(
    gates: list[str], advice: str, bench: Any, tmp_path: Path, unprobed: None
):
    (tmp_path / "buckets.py").write_text(BUCKETS)
    words = ["--model", "buckets:Shown", "--suite", "clean", "--n-examples", "8"]
    status, out, err = bench("run", *words, *gates)
    assert status == 0, err
    assert f"routes not named: choices that depend on the image (bucketize in router): {advice}\n" in out


OTHERS = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x, weights):
        return x + (weights[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)

class ByTask(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.layers, self.head = nn.Linear(64, 2), nn.ModuleList([Layer(), Layer()]), nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        scores = self.gate(x)
        weights = torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
        for layer in self.layers:
            x = layer(x, weights)
        return self.head(x)
"""


def test_what_remains_beside_named_gates_is_declared_by_none(bench: Any, tmp_path: Path, unprobed: None):
    """One gate at the root, whose choice all layers take: only the names of their experts are left."""
    (tmp_path / "bytask.py").write_text(OTHERS)
    words = ["--model", "bytask:ByTask", "--suite", "clean", "--n-examples", "8"]
    _, out, _ = bench("run", *words, "--gates", "gate")
    assert "names that speak of routes (layers.*.experts): name these gates as well" in out
    assert ", or add none" in out
    status, out, err = bench("run", *words, "--gates", "gate,none")
    assert status == 0, err
    assert "declared by the user to have no other routes\n" in out
    assert "routes inside: gate (top-1 of 2)" in out
    assert "routes not named" not in out


@pytest.mark.parametrize(
    ("model", "gate", "why"),
    [
        ("build", "blocks.*.gat", "did you mean 'blocks.1.gate'?"),
        ("build", "embed", "name a module whose output is the scores"),
        ("moe-at", "router", "--gates names gates of a model of your own, and moe-at is none"),
    ],
)
def test_gates_that_cannot_be_used_are_one_line(model: str, gate: str, why: str, bench: Any, vmoe: str, unprobed: None):
    word = model if "-" in model else f"{vmoe}:{model}"
    status, out, err = bench("run", "--model", word, "--gates", gate, "--suite", "clean", "--n-examples", "8")
    assert (status, out) == (2, "")
    assert why in err.splitlines()[-1]


@pytest.mark.slow
def test_a_gated_model_is_certified_and_replayed_as_it_was_attacked(bench: Any, vmoe: str, unprobed: None):
    named = ["--model", f"{vmoe}:build", "--gates", "blocks.*.gate", "--n-examples", "12"]
    status, _, err = bench("run", "--suite", "adaptive", *named, "--eps", "0.9")
    assert status == 0, err
    (run,) = read_runs(Path("results"))
    status, _, err = bench("replay", str(run.path))
    assert status == 0, err

    status, _, err = bench("certify", "--method", "bounds", *named)
    assert status == 0, err
    smoothed = ["certify", "--method", "smoothing", *named, "--set", "n0=10", "--set", "n=100", "--norm", "L2"]
    status, _, err = bench(*smoothed, "--eps", "0.01")
    assert status == 0, err
    found = {one.result.spec.suite: one for one in read_certificates(Path("results"))}
    assert {one.result.spec.gates for one in found.values()} == {("blocks.0.gate", "blocks.1.gate")}
    rows = found["certify-bounds"].rows.frame()
    assert set(rows["status"]) == {"not_supported"}
    assert set(rows["reason"]) == {"VMoE, with the gates blocks.0.gate, blocks.1.gate"}
    assert "certified" in set(found["certify-smoothing"].rows.texts["status"].distinct())

"""Batches that do not fit into memory: passed in parts, with the same answers, gradients and verdicts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bench.attacks import adaptive
from bench.errors import UnusableInput
from bench.evaluation import evaluate
from bench.models.base import Classifier
from bench.models.fit import fit, in_parts
from bench.models.foreign import Guarded
from bench.models.moe import MoE
from bench.models.sites import forced_inside
from bench.results.store import read_runs


class Small(nn.Module):
    """A backbone that has memory for so many images."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.linear, self.memory, self.asked = nn.Linear(4, 3), memory, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.memory:
            raise torch.OutOfMemoryError
        self.asked.append(len(x))
        return self.linear(x.flatten(1)).sin()


def test_parts_have_the_answers_and_gradients_of_the_whole():
    network, x = Small(10**6), torch.rand(7, 1, 2, 2, requires_grad=True)
    whole = network(x)
    (slope,) = torch.autograd.grad(whole.square().sum(), x)
    network.asked.clear()
    parts = in_parts(network, x, 3)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], slope)
    assert sorted(network.asked) == [1, 1, 3, 3, 3, 3]  # each part again for its gradient
    network.asked.clear()
    with torch.no_grad():
        in_parts(network, x, 3)
    assert network.asked == [3, 3, 1]


@pytest.mark.parametrize(
    ("memory", "largest"),
    [(4, 1), (7, 3), (12, 6), (30, 12), (95, 24), (96, None)],  # 3, 6, 12, 24, 48 and 96 images were found to fit
)
def test_a_network_takes_half_of_what_fits(memory: int, largest: int | None):
    model = Classifier(Small(memory), (0.5,), (0.5,))
    assert fit(model, torch.rand(12, 1, 2, 2)) == largest
    assert model.largest == largest
    assert model(torch.rand(40 if largest else 96, 1, 2, 2)).shape[1] == 3


def test_what_cannot_be_split_is_told():
    model = Classifier(Small(7), (0.5,), (0.5,))
    with pytest.raises(UnusableInput, match=r"12 images do not fit .* pass --batch-size 3$"):
        fit(model, torch.rand(12, 1, 2, 2), whole=True)
    assert fit(model, torch.rand(7, 1, 2, 2), whole=True) is None
    with pytest.raises(UnusableInput, match="does not hold one image's pass"):
        fit(Classifier(Small(0), (0.5,), (0.5,)), torch.rand(12, 1, 2, 2))


@pytest.mark.slow
def test_verdicts_are_those_of_the_block(
    bench: Callable[..., Any], shelve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = replace(adaptive.BUDGETS["small"], path_restarts=2, path_steps=10, steps=10, queries=40)
    monkeypatch.setitem(adaptive.BUDGETS, "small", few)
    shelve(Path("checkpoints"), "moe-at")
    words = ("run", "--suite", "pgd,adaptive", "--set", "budget=small", "--set", "steps=3", "--n-examples", "16")
    words += ("--model", "moe-at", "--device", "cpu", "--eps", "0.01")
    assert bench(*words, "--results", "whole")[0] == 0
    logits, asked = Classifier._logits, list[int]()

    def short_of_memory(self: Classifier, x: Tensor) -> Tensor:
        asked.append(len(x))
        if len(x) > 11:
            raise torch.OutOfMemoryError
        return logits(self, x)

    assert bench(*words, "--results", "auto", "--batch-size", "auto")[0] == 0  # no limit is known on a CPU
    monkeypatch.setattr(Classifier, "_logits", short_of_memory)
    monkeypatch.setattr(evaluate, "limited", lambda device: True)
    status, _, err = bench(*words, "--results", "parts", "--batch-size", "auto")
    assert status == 0, err
    assert max(asked[20:]) <= 11 < max(asked[:20])
    whole, auto, parts = (read_runs(tmp_path / folder) for folder in ("whole", "auto", "parts"))
    assert [run.result.run for run in whole] == [run.result.run for run in auto] == [run.result.run for run in parts]
    assert whole[0].result.robust_accuracy.value > 0
    for one, same, other in zip(whole, auto, parts, strict=True):
        pd.testing.assert_frame_equal(one.verdicts(), same.verdicts(), check_exact=True)
        pd.testing.assert_frame_equal(one.verdicts(), other.verdicts(), rtol=1e-3)


def test_a_model_of_ones_own_is_split_unless_its_routes_are_forced():
    guard = Guarded(Small(7))
    assert fit(guard, torch.rand(12, 1, 2, 2), forced_inside(guard)) == 3
    assert guard(torch.rand(12, 1, 2, 2)).shape == (12, 3)
    routed = Guarded(MoE([Small(7), Small(7)], nn.Sequential(nn.Flatten(), nn.Linear(4, 2))))
    assert forced_inside(routed)
    assert not forced_inside(routed.model)

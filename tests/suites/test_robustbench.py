"""robustbench: RobustBench's own benchmark, on our images and with our seed, finds what `autoattack` finds."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import bench.compat
from bench.datasets.base import EvalSet, fingerprint, open_dataset
from bench.models.architecture import Routed
from bench.results.witnesses import Witnesses
from bench.spec import ROBUSTBENCH_DATASETS, ROBUSTBENCH_NORMS, Norm

#: Some examples fall to the attacks and some withstand them, with the smallest of budgets.
BUDGET, EPS = (1, 1, 20), {"Linf": 0.02, "L2": 0.1}
DISAGREES = "robustbench: the suite's own accuracies are not the re-check's"


def routed(gate: str, size: int = 8) -> nn.Module:
    """An untrained MoE for images of that size, whose router sends them to different experts."""
    arch = Routed(
        expert="small_cnn",
        expert_params={"width": 4},
        input_shape=(3, size, size),
        num_classes=10,
        mean=(0.3,) * 3,
        std=(0.4,) * 3,
        num_experts=3,
        gate=gate,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = arch.build()
    model.router.linear.weight.data *= 10
    return model.eval().requires_grad_(False)


def labelled(model: nn.Module, x: Tensor) -> EvalSet:
    """The images with the model's own classes as labels, but for two of them."""
    y = model(x).argmax(1)
    y[[3, 7]] = (y[[3, 7]] + 1) % 10
    return EvalSet(x, y, torch.arange(len(x)), fingerprint(x, y), "")


def by_example(rows: Any) -> dict[int, bool]:
    return rows.groupby("idx")["robust"].all().to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "gate", "dataset"),
    [("Linf", "argmax", "cifar10"), ("L2", "softmax", "imagenet")],
)
def test_examples_fall_as_under_autoattack(
    norm: Norm, gate: str, dataset: str, planted: Any, score: Any, cut_autoattack: Any
):
    cut_autoattack(*BUDGET)
    model = routed(gate)
    data = labelled(model, planted.data().x)
    fields = {"dataset": dataset, "norm": norm, "eps": EPS[norm], "seed": 3}
    ours, our_rows = score(model, "autoattack", data, settings={"engine": "reference"}, **fields)
    theirs, rows = score(model, "robustbench", data, **fields)
    assert (theirs.clean_accuracy, theirs.robust_accuracy) == (ours.clean_accuracy, ours.robust_accuracy)
    assert by_example(rows) == by_example(our_rows)
    assert 0 < theirs.robust_accuracy.value < theirs.clean_accuracy.value == 22 / 24
    assert (theirs.errors, theirs.flags, list(theirs.accuracy_after)) == (0, (), ["clean", "robustbench"])
    last = our_rows[~our_rows["robust"] & (our_rows["attack"] != "clean")].set_index("idx")
    found = rows[~rows["robust"] & (rows["attack"] != "clean")].set_index("idx")
    for column in ("adv_pred", "linf", "l2", "adv_expert"):  # the very same adversarial examples
        assert found[column].sort_index().to_dict() == last[column].sort_index().to_dict(), column


@pytest.mark.slow
def test_blocks_have_their_own_images_and_seeds(planted: Any, score: Any, cut_autoattack: Any):
    cut_autoattack(*BUDGET)
    model = routed("softmax")
    data = labelled(model, planted.data().x)
    fields = {"dataset": "cifar10", "eps": EPS["Linf"], "batch_size": 10}  # blocks of 10, 10 and 4
    _, our_rows = score(model, "autoattack", data, settings={"engine": "reference"}, **fields)
    result, rows = score(model, "robustbench", data, **fields)
    assert by_example(rows) == by_example(our_rows)
    assert result.flags == ()


@pytest.mark.slow
def test_cifar10_itself(data_root: Path, score: Any, cut_autoattack: Any):
    cut_autoattack(*BUDGET)
    model = routed("softmax", size=32)
    data = labelled(model, open_dataset("cifar10").evaluation_set(data_root, 16).x)
    fields = {"dataset": "cifar10", "eps": 0.0005}
    ours, our_rows = score(model, "autoattack", data, settings={"engine": "reference"}, **fields)
    theirs, rows = score(model, "robustbench", data, **fields)
    assert by_example(rows) == by_example(our_rows)
    assert 0 < theirs.robust_accuracy.value == ours.robust_accuracy.value < theirs.clean_accuracy.value == 14 / 16


def test_what_it_knows_is_what_robustbench_knows():
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    assert [dataset.value for dataset in BenchmarkDataset] == list(ROBUSTBENCH_DATASETS)
    assert [threat.value for threat in ThreatModel if "corruptions" not in threat.value] == list(ROBUSTBENCH_NORMS)


@pytest.mark.parametrize("wrong", ["clean", "robust"])
def test_accuracies_that_are_not_the_rows_are_flagged(
    wrong: str, planted: Any, score: Any, cut_autoattack: Any, monkeypatch: pytest.MonkeyPatch
):
    import robustbench.eval

    cut_autoattack(5, 2, 50)
    told = iter([22 / 24, 0.0] if wrong == "clean" else [23 / 24, 1 / 24])  # 23 are right, and none is robust
    monkeypatch.setattr(robustbench.eval, "clean_accuracy", lambda *_, **__: next(told))
    result, _ = score(planted.broken(), "robustbench", dataset="cifar10")
    assert result.flags == (DISAGREES,)
    assert (result.clean_accuracy.value, result.robust_accuracy.value) == (23 / 24, 0)


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.1 * torch.randn(len(x), 10)


def test_warnings_become_flags_and_what_is_printed_goes_to_standard_error(
    planted: Any, score: Any, cut_autoattack: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    cut_autoattack(1, 1, 1)
    before = sys.gettrace()
    result, _ = score(Noisy(planted.robust()).eval(), "robustbench", dataset="cifar10")
    assert "AutoAttack: the outputs are random" in result.flags
    assert sys.gettrace() is before
    out, err = capfd.readouterr()
    assert (caplog.records, out) == ([], "")
    assert err.startswith("Clean accuracy: 95.83%")


class FailsLate(Noisy):
    """Raises when it is called for the 20th time."""

    left = 20

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of memory")
        return self.model(x)


def test_a_failure_is_an_error_and_leaves_robustbench_as_it_was(
    planted: Any, score: Any, cut_autoattack: Any, unprobed: None
):
    import robustbench.data
    import robustbench.eval

    cut_autoattack(5, 2, 50)
    loaders = dict(robustbench.data._clean_dataset_loaders)
    result, _ = score(FailsLate(planted.broken()), "robustbench", dataset="cifar10")
    assert result.errors == 23
    assert result.error_messages == ("robustbench: RuntimeError: out of memory",)
    assert robustbench.data._clean_dataset_loaders == loaders
    assert robustbench.eval.AutoAttack is bench.compat.AutoAttack


def test_no_example_stands_and_nothing_is_attacked(planted: Any, score: Any):
    data = planted.data()
    wrong = EvalSet(data.x, (data.y + 5) % 10, data.idx, "wrong", "")
    result, rows = score(planted.robust(), "robustbench", wrong, dataset="cifar10")
    assert (result.robust_accuracy.value, result.errors, set(rows["attack"])) == (0, 0, {"clean"})


def test_what_a_warm_start_broke_is_no_disagreement(planted: Any, score: Any, monkeypatch: pytest.MonkeyPatch):
    version = AutoAttack._set_version

    def idle(self: Any, *arguments: Any) -> None:
        version(self, *arguments)
        self.attacks_to_run = []

    monkeypatch.setattr(AutoAttack, "_set_version", idle)
    model, data = planted.broken(), planted.data()
    x = data.x[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[range(2), data.y[:2]].sum(), x)
    known = Witnesses(np.arange(2), ("a", "a"), (x - 0.1 * gradient.sign()).detach().numpy())
    cold, _ = score(model, "robustbench", data, dataset="cifar10")
    warm, rows = score(model, "robustbench", data, dataset="cifar10", known=known, seed=1)
    assert (cold.robust_accuracy.value, warm.robust_accuracy.value) == (23 / 24, 21 / 24)
    assert cold.flags == warm.flags == ()
    assert rows.groupby("idx")["clean_correct"].nunique().max() == 1  # what was broken was right all the same

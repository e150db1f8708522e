"""What each fault of the paper's released code does to a training: the same recipe with and without it.

OMP_NUM_THREADS=1 python benchmarks/released_faults.py [--dataset digits] [--data-root DIR] [--set epochs=20 …]

The faults are put into this package's own trainer, one at a time: what is measured is the fault, not the rest of that
code. Each model is scored on held-out training images: SA, RA under PGD and under attacks that know the routes.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

import bench.pgd
import bench.training.objectives.base
from bench import benchmark
from bench.datasets.base import open_dataset
from bench.models.checkpoints import checkpoint_path, load_checkpoint
from bench.settings import parse_settings
from bench.spec import ThreatModel
from bench.training.data import read_training_data
from bench.training.loop import Trainer, train
from bench.training.objectives.jtdmoe import JTDMoE
from bench.training.recipes import train_spec
from bench.training.state import StateFiles


@contextmanager
def none() -> Iterator[None]:
    """As this package trains."""
    yield


@contextmanager
def eval_mode() -> Iterator[None]:
    """The attack leaves the network in eval mode: all but the first step of an epoch trains on running statistics."""
    step = Trainer.step

    def faulty(self: Trainer, *given: Any) -> dict[str, float]:
        values = step(self, *given)
        self.model.eval()
        return values

    with patch.object(Trainer, "step", faulty):
        yield


@contextmanager
def start_minus_mean(mean: tuple[float, ...]) -> Iterator[None]:
    """The random start subtracts the data set's mean: nearly every pixel begins at −ε."""

    def faulty(x: Tensor, threat_model: ThreatModel, noise: Tensor) -> Tensor:
        shift = x.new_tensor(mean).view(1, -1, 1, 1)
        return bench.pgd.project(x + threat_model.eps * noise - shift, x, threat_model)

    with patch.object(bench.training.objectives.base, "random_start", faulty):
        yield


@contextmanager
def batches_of_one() -> Iterator[None]:
    """Experts see one image at a time in training, so BatchNorm's statistics are those of a single image."""
    forward = nn.BatchNorm2d.forward

    def faulty(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if not self.training or x.shape[2:].numel() < 2:
            return forward(self, x)
        return F.instance_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum or 0)

    with patch.object(nn.BatchNorm2d, "forward", faulty):
        yield


@contextmanager
def gradients_not_cleared() -> Iterator[None]:
    """JTDMoE's S step leaves its gradient of R behind, which the next R step adds to its own."""
    step = Trainer.step

    def faulty(self: Trainer, *given: Any) -> dict[str, float]:
        clear, calls = type(self.model).zero_grad, 0

        def sometimes(*_: Any, **options: Any) -> None:
            nonlocal calls
            calls += 1  # the loop clears before and after each of the two steps: before R's and after S's it must not
            if calls not in (1, 4):
                clear(self.model, **options)

        with patch.object(self.model, "zero_grad", sometimes):
            return step(self, *given)

    def coupled(self: Any, dual: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        standard, trace = dual.standard.trace(x)  # R is not held fixed: its gradient exists, as in that code
        loss = F.cross_entropy(dual.mix(standard, dual.robust(x)), y)
        balance = self.balance_term(dual.standard, trace.gate_logits)
        return {f"standard_{name}": term for name, term in {"ce": loss, **balance}.items()}

    with patch.object(Trainer, "step", faulty), patch.object(JTDMoE, "standard_loss", coupled):
        yield


@dataclass(frozen=True)
class Case:
    title: str
    variant: str
    fault: Callable[[], Any] = none


def cases(mean: tuple[float, ...]) -> list[Case]:
    """Each fault beside its variant without one."""
    return [
        Case("RT-ER", "moe-rt_er"),
        Case("router without gradient", "moe-rt_er-argmax"),
        Case("eval mode after the first attack", "moe-rt_er", eval_mode),
        Case("random start less the mean", "moe-rt_er", lambda: start_minus_mean(mean)),
        Case("batches of one", "moe-rt_er", batches_of_one),
        Case("JTDMoE", "dual-jtdmoe"),
        Case("gradients not cleared after the S step", "dual-jtdmoe", gradients_not_cleared),
    ]


def main() -> None:
    """Train and score every case, and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="K=V")
    parser.add_argument("--n-examples", type=int, default=150, help="held-out training images to score on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints/released-faults"))
    parser.add_argument("--case", type=int, action="append", help="only these trainings, counted from 0")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    dataset = open_dataset(given.dataset)
    print("| training | SA | PGD | AutoAttack | RA-worst | seconds |\n|---|---:|---:|---:|---:|---:|")
    for number, case in enumerate(cases(dataset.mean)):
        if given.case and number not in given.case:
            continue
        settings = parse_settings(given.settings)
        spec = train_spec(case.variant, dataset, dataset.threat_model, None, settings, given.seed)
        folder = given.checkpoints / f"{number}-{case.title.replace(' ', '-')}"
        with case.fault():
            path = checkpoint_path(folder, spec.dataset, spec.threat_model.norm, spec.checkpoint_name)
            train(spec, given.data_root, folder, given.device, resume=StateFiles(path).exist())
        model, header, _ = load_checkpoint(path)
        data = read_training_data(spec, dataset, given.data_root)
        rows = data.held_out[: given.n_examples]
        scored = benchmark(
            model, given.dataset, x=data.images.floats(rows), y=data.images.y[rows],
            threat_model=spec.threat_model.norm, eps=spec.threat_model.eps, suites=["pgd", "autoattack", "adaptive"],
            settings={"budget": "small"}, progress=False, device=given.device,
        )  # fmt: skip
        assert scored.robust_accuracy is not None
        shares = [
            scored.clean_accuracy,
            *(result.robust_accuracy for result in list(scored.results.values())[:2]),
            scored.robust_accuracy,
        ]
        cells = " | ".join(f"{100 * share.value:.1f}" for share in shares)
        print(f"| {case.title} | {cells} | {header.seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()

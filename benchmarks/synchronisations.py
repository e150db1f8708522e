"""How often the host waits for the device: counted on a pretend one, or on a GPU by torch itself.

python benchmarks/synchronisations.py [cuda]

By suite, for each forward pass of the attacked model, and by objective, for each training step: every operation whose
result the host needs (`item`, `tolist`, `nonzero`, boolean indices) and every copy between the two.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import device_checks  # noqa: E402
import torch  # noqa: E402
from pretend_device import pretend_device, synchronisations  # noqa: E402

from bench.attacks.block import Block, PassCounter  # noqa: E402
from bench.models.deployed import eval_frozen  # noqa: E402
from bench.spec import ThreatModel  # noqa: E402
from bench.suites.base import open_suites  # noqa: E402
from bench.training.loop import Trainer  # noqa: E402
from bench.training.recipes import train_spec  # noqa: E402


def row(name: str, unit: str, times: int, counts: Counter[str]) -> dict[str, Any]:
    each = {operation: count / times for operation, count in counts.most_common() if count}
    words = ", ".join(f"{operation} {count:.2f}" for operation, count in each.items() if count >= 0.005)
    return {"what": name, "per": unit, "of": times, "synchronisations": f"{sum(each.values()):.2f}", "which": words}


@contextmanager
def counted_by_torch() -> Iterator[torch.device]:
    """The GPU; what torch warns of as a wait for it is counted, all under one name."""

    def count(message: object, *_: object, **__: object) -> None:
        synchronisations["wait"] += "synchronizing CUDA operation" in str(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield torch.device("cuda:0")
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Calls(PassCounter):
    """Counts passes of a batch as well."""

    calls = 0

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        super()._end(module, inputs, output)
        self.calls += not self._depth


def of_suite(name: str, architecture: str, device: str) -> dict[str, Any]:
    """Over the attacks on one block of 16 images, without probes and re-checks."""
    method = open_suites([name], {"budget": "small"} if name == "adaptive" else {})[name]
    model = device_checks.model_of(architecture).to(device)
    x = device_checks.DIGITS.evaluation_set(ROOT, 16).x.to(device)
    with eval_frozen(model), Calls(model) as counter:
        y = model(x).argmax(1)
        correct = torch.ones(16, dtype=torch.bool, device=device)
        threat = ThreatModel(norm="Linf", eps=0.002)
        block = Block(model, x, y, correct, 10, "digits", threat, 0, counter)
        counter.calls = 0
        synchronisations.clear()
        for _ in method.attack(block):
            pass
    return row(f"{name} on {architecture}", "pass", counter.calls, Counter(synchronisations))


def of_training(variant: str, device: str) -> dict[str, Any]:
    """Over the steps of one epoch, its validation left out."""
    counts: Counter[str] = Counter()

    class Counted(Trainer):
        def step(self, *args: Any) -> dict[str, float]:
            before = Counter(synchronisations)
            values = super().step(*args)
            counts.update(synchronisations - before)
            counts["steps"] += 1
            return values

    tiny = {"n_train": 200, "n_val": 20, "epochs": 1, "val_steps": 1, "width": 4, "batch_size": 20}
    spec = train_spec(variant, device_checks.DIGITS, device_checks.DIGITS.threat_model, settings=tiny)
    device_checks.on_device(device)
    own, device_checks.loop.Trainer = device_checks.loop.Trainer, Counted
    try:
        with TemporaryDirectory() as folder:
            device_checks.loop.train(spec, Path(folder), Path(folder))
    finally:
        device_checks.loop.Trainer = own
    return row(f"train {variant}", "step", counts.pop("steps"), counts)


if __name__ == "__main__":
    with counted_by_torch() if sys.argv[1:] == ["cuda"] else pretend_device() as device:
        torch.manual_seed(0)
        suites = [
            ("pgd", "moe"),
            ("autoattack", "dense"),
            ("autoattack", "moe"),
            ("adaptive", "moe"),
            ("components", "moe"),
        ]
        rows = [of_suite(*names, str(device)) for names in suites]
        variants = ("dense-at", "moe-at", "moe-trades", "moe-advmoe", "moe-rt_er", "dual-jtdmoe", "moe-at-paths")
        rows += [of_training(variant, str(device)) for variant in variants]
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))

"""What runs on a device: prints, as JSON, each check's error or null. tests/test_devices.py reads it.

python tests/device_checks.py [--device pretend|cuda] [WORD …]

With words, only the checks whose names have one of them.
"""

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators.cpu import CPUAccelerator
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from pretend_device import DeviceTensor, pretend_device
from pyautoattack import AutoAttack
from torch import nn

from bench.attacks import restarts
from bench.attacks.adaptive import BUDGETS
from bench.certify import layers
from bench.certify.run import certify
from bench.datasets.base import EvalSet, fingerprint, open_dataset
from bench.evaluation import probes
from bench.evaluation.evaluate import score
from bench.evaluation.plan import RunRequest, plan
from bench.evaluation.subjects import routing_visible
from bench.job import Job, Subject
from bench.models import dependence
from bench.models.architecture import Dense, Dual, Inside, Routed
from bench.models.checkpoints import Header, checkpoint_path, load_checkpoint, save_checkpoint
from bench.models.variants import VARIANTS
from bench.registry import CERTIFIERS
from bench.results.store import Run, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel, build
from bench.suites.base import Suite, open_suites
from bench.training import loop
from bench.training.recipes import objective_class, train_spec

DIGITS = open_dataset("digits")
SHAPE: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10, "mean": (0.3,), "std": (0.4,)}
NETWORK: dict[str, Any] = {"expert": "small_cnn", "expert_params": {"width": 3}, **SHAPE}
ROUTED = Routed(**NETWORK, num_experts=3)
VIT = {"width": 12, "image_size": 8, "patch_size": 4}
ARCHITECTURES: dict[str, Any] = {
    "dense": Dense(**NETWORK),
    "moe": ROUTED,
    "top2": Routed(**NETWORK, num_experts=3, num_selected_experts=2, gate="argmax", router="conv"),
    "dual": Dual(standard=ROUTED, robust=ROUTED),
    "blockmoe": Inside(**SHAPE, expert="blockmoe", expert_params={"width": 4}, num_experts=2),
    "vmoe": Inside(**SHAPE, expert="vmoe", expert_params=VIT, num_experts=2),
    "softmoe": Inside(**SHAPE, expert="softmoe", expert_params=VIT, num_experts=2, num_selected_experts=2),
}
SUITES: dict[str, dict[str, Any]] = {
    "clean": {},
    "pgd": {"steps": 3},
    "autoattack": {},
    "adaptive": {"budget": "small"},
    "components": {"steps": 2},
    "torchattacks:CW": {"steps": 2},
    "torchattacks:Square": {"n_queries": 20},
    "torchattacks:SparseFool": {"steps": 2},
}
IMAGES = 3
NORM = {"torchattacks:CW": ("L2", 1.0), "torchattacks:SparseFool": ("L1", 4.0)}


def model_of(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[architecture].build().eval()


def images(architecture: str) -> EvalSet:
    """The first test images, each with the class that the CPU's model gives it, so that all can be attacked."""
    data = DIGITS.evaluation_set(Path(), IMAGES)
    y = model_of(architecture)(data.x).argmax(1)
    return replace(data, y=y, fingerprint=fingerprint(data.x, y))


def job(architecture: str, name: str, method: Any, norm: str = "Linf", eps: float = 0.1, **subject: Any) -> Job[Any]:
    model, data = model_of(architecture), images(architecture)
    info = ModelInfo(
        name="m",
        architecture=architecture,
        checkpoint_sha256=architecture,
        routing_visible=routing_visible(model),
        alpha=0.7 if architecture == "dual" else None,
    )
    spec = RunSpec(
        model="m", alpha=info.alpha, dataset="digits", threat_model=ThreatModel(norm=norm, eps=eps), suite=name,
        suite_version=method.version, suite_params=method.params, n_examples=len(data),
        batch_size=2 if name == "pgd" else IMAGES,
    )  # fmt: skip
    return Job(spec, Subject(model, info, **subject), method, data, 10)


def verdicts(asked: Job[Suite], device: str, folder: Path) -> pd.DataFrame:
    result, _ = score(asked, folder, device)
    assert result is not None
    assert not result.errors, result.error_messages
    return Run(result, run_folder(folder, result.spec, result.run)).verdicts()


def suite(name: str, architecture: str, device: str, folder: Path, **subject: Any) -> None:
    """The CPU's verdicts; of a GPU, which draws other random numbers, those on clean images."""
    method = open_suites([name], SUITES[name])[name]
    asked = [job(architecture, name, method, *NORM.get(name, ()), **subject) for _ in range(2)]
    on_cpu, there = verdicts(asked[0], "cpu", folder / "cpu"), verdicts(asked[1], device, folder / "there")
    if device.startswith("cuda"):
        clean = ["idx", "input_hash", "label", "clean_pred", "clean_correct", "clean_expert"]
        assert set(there.attack) == set(on_cpu.attack)
        on_cpu, there = (frame[clean].drop_duplicates(ignore_index=True) for frame in (on_cpu, there))
    pd.testing.assert_frame_equal(on_cpu, there)


def certifier(name: str, architecture: str, device: str, folder: Path) -> None:
    settings = {"n": 200, "n0": 20} if name == "smoothing" else {}
    method = build(CERTIFIERS[name], name, settings)
    norm = ("L2", 0.5) if name == "smoothing" else ("Linf", 0.01)
    frames = []
    for where in ("cpu", device):
        result = certify(job(architecture, f"certify-{name}", method, *norm), folder / where.partition(":")[0], where)
        path = run_folder(folder / where.partition(":")[0], result.spec, result.run)
        frames.append(pd.read_parquet(path / "certificates.parquet"))
    pd.testing.assert_frame_equal(*frames, rtol=1e-4 if device.startswith("cuda") else 1e-5)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass  # the CPU's own refuses all others


def on_device(device: str) -> None:
    """Training runs on this device from here on, whatever is asked for."""
    if device.startswith("cuda"):
        loop._fabric = lambda *_, **__: Fabric(accelerator="cuda", devices=1, precision="32")
        return
    strategy = SingleDeviceStrategy(device=torch.device(device), accelerator=_Accelerator())
    loop._fabric = lambda *_, **__: Fabric(strategy=strategy, precision="32")


def training(variant: str, device: str, folder: Path, **settings: Any) -> None:
    """One epoch of two steps ends with the CPU's weights."""
    tiny = {"n_train": 40, "n_val": 20, "epochs": 1, "val_steps": 1, "width": 4, "batch_size": 20, **settings}
    if objective_class(VARIANTS[variant]).adversarial:
        tiny["inner_steps"] = 2
    if VARIANTS[variant].network in ("vmoe", "softmoe"):
        tiny["width"] = 6
    spec = train_spec(variant, DIGITS, DIGITS.threat_model, settings=tiny)
    weights = []
    for where in ("cpu", device):
        on_device(where)
        path = loop.train(spec, folder, folder / where.partition(":")[0])
        weights.append(load_checkpoint(path)[0].state_dict())
    for name, value in weights[0].items():
        # Convolutions on a GPU add in another order, and training has TensorFloat32 there.
        loose = {"rtol": 0.05, "atol": 0.01} if device.startswith("cuda") else {}
        torch.testing.assert_close(value, weights[1][name], **loose)


def witnesses(device: str, folder: Path) -> None:
    """What was found on the device is kept, and judged again there and as a start of the next run."""
    from bench.evaluation.replay import replay

    path = checkpoint_path(folder, "digits", "Linf", "moe-at")
    save_checkpoint(
        path,
        model_of("moe").to(device),
        Header(variant="moe-at", architecture=ROUTED, dataset="digits", threat_model=DIGITS.threat_model),
    )
    request = RunRequest(suites=("pgd",), dataset="digits", models=("moe-at",), n_examples=60, settings={"steps": 2})
    for warm in (False, True):
        asked = plan(request.model_copy(update={"warm_start": warm}), folder, [folder], folder / "results")
        (one,) = asked.jobs("moe-at")
        result, _ = score(one, folder / "results", device)
        assert result is not None
        assert result.robust_accuracy.value < result.clean_accuracy.value
    report = replay(run_folder(folder / "results", result.spec, result.run), folder, [folder], device)
    assert report.witnesses
    assert not report.failures


def checks() -> dict[str, Callable[[str, Path], None]]:
    """By name; each takes the device and an empty folder."""
    suites = {
        "clean": ["dense"], "pgd": ["vmoe"],"autoattack": ["moe"], "components": ["moe"],
        "adaptive": ["top2", "dual", "blockmoe"],
        **{name: ["moe"] for name in SUITES if name.startswith("torchattacks:")},
    }  # fmt: skip
    certifiers = {"routes": ["moe"], "bounds": ["dense", "moe"], "smoothing": ["dual"]}
    trainings: dict[str, dict[str, Any]] = {
        "dense-standard": {"ema_decay": 0.9, "cutout": 2, "translate": 1},
        **{f"moe-{objective}": {} for objective in ("at", "trades", "advmoe", "rt_er", "at-paths")},
        "dual-jtdmoe": {},
        "vmoe-at": {},
    }
    return {
        **{f"{name} on {a}": partial(suite, name, a) for name, own in suites.items() for a in own},
        "pgd on a foreign moe": partial(suite, "pgd", "moe", foreign=True),
        **{f"{name} of {a}": partial(certifier, name, a) for name, own in certifiers.items() for a in own},
        **{f"train {name}": partial(training, name, **settings) for name, settings in trainings.items()},
        "train moe-rt_er in one dispatch": partial(training, "moe-rt_er", one_dispatch=True),
        "witnesses": witnesses,
    }


def refusals(device: torch.device) -> None:
    """That the device itself is a device: what a GPU refuses is refused, what it computes is right."""
    x = torch.rand(4, 3).to(device).requires_grad_()
    assert x.device == device
    (x * 2).relu().sum().backward()
    assert x.grad is not None
    assert x.grad.cpu().tolist() == [[2.0] * 3] * 4
    attempts: list[Callable[[], object]] = [
        lambda: x + torch.rand(4, 3),
        lambda: x.detach().numpy(),
        lambda: torch.rand(9)[torch.arange(3).to(device)],
        lambda: torch.rand(3, device=device, generator=torch.Generator()),
    ]
    for number, attempt in enumerate(attempts):
        try:
            attempt()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError(f"attempt {number} to mix devices was not refused")
    assert x[torch.arange(2)].shape == (2, 3)  # indices may be the CPU's
    assert (x + torch.tensor(1.0)).device == device  # and so may scalars


def cut_budgets() -> None:
    """A few steps of each attack and probe: this is about devices, not about strength."""
    probes.STEPS, restarts.CORNERS, dependence.BATCH_SIZES = 2, restarts.FEW_CORNERS, (1, 8)
    small = BUDGETS["small"]
    BUDGETS["small"] = replace(small, paths=3, path_restarts=1, path_steps=2, steps=2, weights=(0.5,), queries=4)
    standard = AutoAttack._set_version

    def set_version(self: Any, version: str = "standard") -> None:
        standard(self, version)
        for part in (self.apgd, self.apgd_targeted):
            part.n_iter = part.n_iter_orig = 3
        self.fab.n_iter, self.square.n_queries = 2, 10
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 2

    AutoAttack._set_version = set_version


def know_device_tensors() -> None:
    """Certificates refuse weights of a class that they do not know; the device's are plain tensors on a real one."""
    known = layers._double
    layers._double = lambda value: known(value.cpu() if isinstance(value, DeviceTensor) else value)


def main(kind: str, chosen: list[str]) -> None:
    cut_budgets()
    know_device_tensors()
    outcomes: dict[str, str | None] = {}
    with pretend_device() if kind == "pretend" else contextlib.nullcontext(torch.device("cuda:0")) as device:
        refusals(device)
        for name, run in checks().items():
            if chosen and not any(word in name for word in chosen):
                continue
            with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                try:
                    run(str(device), Path(folder))
                    outcomes[name] = None
                except Exception:
                    outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("pretend", "cuda"), default="pretend")
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    main(arguments.device, arguments.words)

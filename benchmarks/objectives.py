"""What the objectives cost: whole optimiser steps, inner attack included, on CIFAR-10's shape.

python benchmarks/objectives.py          # every ratio at batches of 128 and 512, and images a second
python benchmarks/objectives.py one-step  # the one-step attacks alone, at a batch of 128
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from side_by_side import machine, medians
from tabulate import tabulate

from bench.datasets.base import open_dataset
from bench.registry import OBJECTIVES
from bench.training.objectives.base import Batch
from bench.training.recipes import architecture, train_spec

CIFAR10 = open_dataset("cifar10")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(variant: str, batch: int, precision: str = "32", **settings: Any) -> Callable[[], object]:
    """All optimiser steps of one batch, as the training loop takes them."""
    own = {"inner_steps": 5} if variant != "moe-standard" else {}
    spec = train_spec(variant, CIFAR10, CIFAR10.threat_model, "cpu-cifar10", {**own, **settings})
    torch.manual_seed(0)
    memory = torch.channels_last if spec.recipe.channels_last else torch.contiguous_format
    model = architecture(spec, CIFAR10).build().to(DEVICE, memory_format=memory).train()
    x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=memory)
    noise = torch.rand(batch, 3, 32, 32, device=DEVICE) * 2 - 1
    data = Batch(x, torch.randint(10, (batch,), device=DEVICE), CIFAR10.threat_model, lambda _: noise)
    objective = OBJECTIVES[str(spec.variant.partition("-")[2].removesuffix("-argmax"))](**spec.objective_params)
    fabric = Fabric(accelerator=DEVICE, devices=1, precision=precision)
    optimizers = {name: torch.optim.SGD(part.parameters(), 1e-3) for name, part in objective.parts(model).items()}

    def run() -> object:
        generator = objective.steps(model, data)
        while True:
            with fabric.autocast():
                step = next(generator, None)
                terms = step.loss(model) if step else {}
            if step is None:
                return None
            torch.stack(list(terms.values())).sum().backward()
            optimizers[step.part].step()
            model.zero_grad(set_to_none=True)

    return run


def ratios() -> str:
    rows = []
    for batch in (128, 512):
        cases = {
            "at": steps("moe-at", batch),
            "rt_er": steps("moe-rt_er", batch, one_dispatch=False),
            "rt_er, one dispatch": steps("moe-rt_er", batch, one_dispatch=True),
            "jtdmoe": steps("dual-jtdmoe", batch, expert_term="second", one_dispatch=False),
            "jtdmoe, all experts": steps("dual-jtdmoe", batch, expert_term="all", one_dispatch=False),
            "rt_er, bf16": steps("moe-rt_er", batch, "bf16-mixed", one_dispatch=False),
            "at, bf16": steps("moe-at", batch, "bf16-mixed"),
            "rt_er, float32, not channels-last": steps("moe-rt_er", batch, one_dispatch=False, channels_last=False),
        }
        seconds = medians(cases, rounds=5)
        for name, base in (
            ("rt_er", "at"), ("rt_er, one dispatch", "at"), ("jtdmoe", "rt_er"), ("jtdmoe, all experts", "rt_er"),
            ("rt_er, bf16", "rt_er"), ("at, bf16", "at"), ("rt_er, float32, not channels-last", "rt_er"),
        ):  # fmt: skip
            rows.append({"batch": batch, "step": name, "over": base, "ratio": seconds[name] / seconds[base]})
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")


def one_step() -> str:
    """Training steps with one inner step, over `at` with five on the same model."""
    cases = {
        "dense-at": steps("dense-at", 128),
        "dense-at, 3 inner steps": steps("dense-at", 128, inner_steps=3),
        "dense-at, 1 inner step": steps("dense-at", 128, inner_steps=1, start_radius=2),
        "moe-at": steps("moe-at", 128),
        "moe-at, 1 inner step": steps("moe-at", 128, inner_steps=1, start_radius=2),
        "moe-at-paths, 1 inner step": steps("moe-at-paths", 128, inner_steps=1, start_radius=2),
    }
    seconds = medians(cases, rounds=5)
    rows = [
        {"step": name, "over": base, "ratio": seconds[name] / seconds[base]}
        for name in cases
        for base in [name.partition("-")[0] + "-at"]
        if name != base
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f")


def throughput() -> str:
    rows = []
    for batch in (32, 64, 128, 256, 512):
        variants = ("moe-standard", "moe-at", "moe-rt_er")
        seconds = medians({variant: steps(variant, batch) for variant in variants}, rounds=3)
        rows.append({"batch": batch, **{name: f"{batch / value:,.0f}" for name, value in seconds.items()}})
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    print(machine())
    if sys.argv[1:] == ["one-step"]:
        print(f"\nA training step over one with 5 inner steps (resnet10-w16, batch 128)\n\n{one_step()}")
        sys.exit()
    print(f"\nA training step over another (4 × resnet10-w16, top-1, 5 inner steps, channels-last)\n\n{ratios()}")
    print(f"\nTraining images a second, float32\n\n{throughput()}")

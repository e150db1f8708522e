"""What each suite costs: passes for an example, their price over the bare model's, memory, and what they grow with.

    OMP_NUM_THREADS=1 python benchmarks/passes.py [NETWORK …]

Networks with random weights, whose own answers are the labels: inside a tiny ball no example is broken, inside a huge
one nearly every example is. Passes are examples sent forwards and gradients taken. The price is the process time of the
attacks, without probes and re-checks, over that of as many bare passes in batches of the block's size. Memory is the
peak of a process of its own above that of one which has run the bare passes alone.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.models.architecture import Dense, Inside, Routed
from bench.models.deployed import eval_frozen, full_float32
from bench.spec import ThreatModel
from bench.suites.base import open_suites

DIGIT: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10, "mean": (0.3,), "std": (0.4,)}
COLOUR: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
SMALL: dict[str, Any] = {"expert": "small_cnn", **DIGIT}
#: By name the network, and of how many examples a block is.
NETWORKS: dict[str, tuple[Any, int]] = {
    "digits": (Routed(**SMALL), 32),
    "digits-dense": (Dense(**SMALL), 32),
    "resnet10-w16": (Routed(expert="resnet10", expert_params={"width": 16}, **COLOUR), 4),
    "resnet18": (Routed(expert="resnet18", **COLOUR), 2),
    **{f"digits-E{e}": (Routed(**SMALL, num_experts=e), 32) for e in (2, 8, 16)},
    "digits-K2": (Routed(**SMALL, num_selected_experts=2), 32),
    **{f"digits-n{n}": (Routed(**SMALL), n) for n in (128, 512)},
    "digits-1-gate": (Inside(expert="blockmoe", expert_params={"width": 8}, num_experts=4, **DIGIT), 16),
}
SUITES = ("pgd", "autoattack", "adaptive")
#: Radii (L∞) inside which nothing is broken, and nearly everything.
RADII = {"robust": 1e-6, "broken": 0.5}


def block_of(network: str, eps: float) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    architecture, n = NETWORKS[network]
    torch.manual_seed(0)
    model = architecture.build().eval()
    x = torch.rand(n, *architecture.input_shape)
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y, ThreatModel(norm="Linf", eps=eps)


def bare(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Process seconds of a forward pass of one example, and of one with the gradient of its image."""
    times = []
    for gradient in (False, True):
        rounds, started = 0, 0.0
        while rounds < 3 or time.process_time() - started < 1.0:
            if rounds == 1:
                started = time.process_time()
            given = x.clone().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                loss = nn.functional.cross_entropy(model(given), y)
            if gradient:
                torch.autograd.grad(loss, given)
            rounds += 1
        times.append((time.process_time() - started) / (rounds - 1) / len(x))
    return times[0], times[1]


def attacked(model: nn.Module, suite: str, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[int, int, int]:
    """Forwards, backwards, and how many examples were broken."""
    forwards = backwards = 0
    unbroken = torch.ones(len(x), dtype=torch.bool)
    with PassCounter(model) as passes:
        block = Block(model, x, y, unbroken.clone(), 10, "", threat, 0, passes)
        for attempt in open_suites([suite], {})[suite].attack(block):
            forwards, backwards = forwards + attempt.forwards, backwards + attempt.backwards
            with torch.no_grad():
                unbroken[attempt.rows] &= model(attempt.x_adv).argmax(1) == y[attempt.rows]
            passes.lap()
    return forwards, backwards, int((~unbroken).sum())


def measure(network: str, suite: str, kind: str) -> dict[str, float]:
    """One case, in this process."""
    model, x, y, threat = block_of(network, RADII[kind])
    with eval_frozen(model), full_float32():
        forward, both = bare(model, x, y)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attacked(model, "pgd", x[:1], y[:1], threat)  # which imports what attacks need
        started = time.process_time()
        forwards, backwards, broken = attacked(model, suite, x, y, threat)
        seconds = time.process_time() - started
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = (forwards - backwards) * forward + backwards * both
    return {
        "broken": broken / len(x), "forwards": forwards / len(x), "backwards": backwards / len(x), "seconds": seconds,
        "per 1,000": 1000 * seconds / max(1, forwards), "bare": 1000 * expected / max(1, forwards),
        "memory": (after - before) / 1024,
    }  # fmt: skip


def row(network: str, suite: str) -> list[str]:
    found = {}
    for kind in RADII:
        words = [sys.executable, __file__, "--one", network, suite, kind]
        found[kind] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    robust, broken = found["robust"], found["broken"]
    return [
        network, suite, f"{robust['forwards']:,.0f} / {robust['backwards']:,.0f}",
        f"{broken['forwards']:,.0f} / {broken['backwards']:,.0f} ({broken['broken']:.0%})",
        f"{robust['per 1,000']:.2f}", f"{robust['bare']:.2f}", f"{robust['per 1,000'] / robust['bare']:.2f}",
        f"{robust['memory']:.0f}",
    ]  # fmt: skip


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(measure(*sys.argv[2:5])))
        return
    names = sys.argv[1:] or list(NETWORKS)
    print("| network | suite | robust: forwards / backwards | broken | s per 1,000 forwards | bare | ratio | MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for network in names:
        for suite in SUITES:
            print("| " + " | ".join(row(network, suite)) + " |", flush=True)


if __name__ == "__main__":
    main()

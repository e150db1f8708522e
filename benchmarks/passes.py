"""What each suite costs: passes for an example, their price over the bare model's, memory, and what they grow with.

    OMP_NUM_THREADS=1 python benchmarks/passes.py [NETWORK[@IMAGES][/SUITE] …]

`resnet10-w16@32/adaptive-small`: one block of 32 images, suite `adaptive` with budget small. Without a suite all three
are run.

Networks with random weights, whose own answers are the labels: inside a tiny ball no example is broken, inside a huge
one nearly every example is. Passes are examples sent forwards and gradients taken. The price is the process time of the
attacks, without probes and re-checks, over that of as many bare passes in batches of the same sizes, each timed by
itself. "Beside" is the share of that time which is spent outside of the attacked model and of `torch.autograd`. Memory
is the peak of a process of its own above that of one which has run the bare passes alone.
"""

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.models.architecture import Dense, Inside, Routed
from bench.models.deployed import eval_frozen, full_float32
from bench.models.experts import vit
from bench.models.layers import SparseMoE
from bench.spec import ThreatModel
from bench.suites.base import open_suites

DIGIT: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10, "mean": (0.3,), "std": (0.4,)}
COLOUR: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
SMALL: dict[str, Any] = {"expert": "small_cnn", **DIGIT}


@dataclass
class Sites:
    """A ViT of four blocks for digits, the first `count` of which have a sparse MoE (E = 4, K = 1)."""

    count: int
    input_shape: tuple[int, int, int] = (1, 8, 8)

    def build(self) -> nn.Module:
        from timm.layers import Mlp

        network: Any = vit(self.input_shape, 10, 4, 3, 8, 4, 24)
        for block in network.blocks[: self.count]:
            block.mlp = SparseMoE(nn.Linear(24, 4, bias=False), [Mlp(24, 96) for _ in range(4)], 1)
        return network


#: By name the network, and of how many examples a block is.
NETWORKS: dict[str, tuple[Any, int]] = {
    "digits": (Routed(**SMALL), 32),
    "digits-dense": (Dense(**SMALL), 32),
    "resnet10-w16": (Routed(expert="resnet10", expert_params={"width": 16}, **COLOUR), 16),
    "resnet18": (Routed(expert="resnet18", **COLOUR), 2),
    "resnet18-w16": (Routed(expert="resnet18", expert_params={"width": 16}, **COLOUR), 2),
    **{f"digits-E{e}": (Routed(**SMALL, num_experts=e), 32) for e in (2, 8, 16)},
    "digits-K2": (Routed(**SMALL, num_selected_experts=2), 32),
    "digits-blockmoe": (Inside(expert="blockmoe", expert_params={"width": 8}, num_experts=4, **DIGIT), 16),
    **{f"digits-{count}-sites": (Sites(count), 16) for count in (1, 2, 4)},
}
SUITES = ("pgd", "autoattack", "adaptive")
#: Radii (L∞) inside which nothing is broken, and nearly everything.
RADII = {"robust": 1e-6, "broken": 0.5}


def block_of(network: str, eps: float) -> tuple[nn.Module, Tensor, Tensor, ThreatModel]:
    name, _, images = network.partition("@")
    architecture, n = NETWORKS[name]
    torch.manual_seed(0)
    model = architecture.build().eval()
    x = torch.rand(int(images or n), *architecture.input_shape)
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y, ThreatModel(norm="Linf", eps=eps)


class Watch(PassCounter):
    """Counts the batches of each size as well, and the process seconds inside the model and torch.autograd."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sizes, self.slopes, self.inside = Counter[int](), Counter[int](), 0.0
        self._since = 0.0
        self._grad, self._back = torch.autograd.grad, torch.autograd.backward

    def _begin(self, *given: Any) -> None:
        if not self._depth:
            self._since = time.process_time()
        super()._begin(*given)

    def _end(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> None:
        super()._end(module, inputs, output)
        if not self._depth and output is not None:
            self.inside += time.process_time() - self._since
            self.sizes[len(output)] += 1

    def _backward(self, gradient: Tensor) -> None:
        super()._backward(gradient)
        self.slopes[len(gradient)] += 1

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            since = time.process_time()
            found = call(*given, **more)
            self.inside += time.process_time() - since
            return found

        return timed

    def __enter__(self) -> "Watch":
        torch.autograd.grad, torch.autograd.backward = self._timed(self._grad), self._timed(self._back)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.autograd.grad, torch.autograd.backward = self._grad, self._back


def bare(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Process seconds of a forward pass of a batch, and of one with the gradient of its images."""
    times = []
    for gradient in (False, True):
        rounds, started = 0, 0.0
        while rounds < 3 or time.process_time() - started < 0.5:
            if rounds == 1:
                started = time.process_time()
            given = x.clone().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                loss = nn.functional.cross_entropy(model(given), y)
            if gradient:
                torch.autograd.grad(loss, given)
            rounds += 1
        times.append((time.process_time() - started) / (rounds - 1))
    return times[0], times[1]


def as_many(model: nn.Module, x: Tensor, y: Tensor, passes: Watch) -> float:
    """Process seconds of as many bare passes, in batches of the same sizes."""
    total = 0.0
    for size in passes.sizes | passes.slopes:
        times = -(-size // len(x))  # some attacks send several points of each image at once
        forward, both = bare(model, x.repeat(times, 1, 1, 1)[:size], y.repeat(times)[:size])
        total += passes.sizes[size] * forward + passes.slopes[size] * (both - forward)
    return total


def attacked(model: nn.Module, suite: str, x: Tensor, y: Tensor, threat: ThreatModel) -> tuple[Watch, int, int, int]:
    """What was seen; forwards, backwards, and how many examples were broken."""
    forwards = backwards = 0
    unbroken = torch.ones(len(x), dtype=torch.bool)
    name, _, budget = suite.partition("-")
    with Watch(model) as passes:
        block = Block(model, x, y, unbroken.clone(), 10, "", threat, 0, passes)
        for attempt in open_suites([name], {"budget": budget} if budget else {})[name].attack(block):
            forwards, backwards = forwards + attempt.forwards, backwards + attempt.backwards
            with torch.no_grad():
                unbroken[attempt.rows] &= model(attempt.x_adv).argmax(1) == y[attempt.rows]
            passes.lap()
    return passes, forwards, backwards, int((~unbroken).sum())


def measure(network: str, suite: str, kind: str) -> dict[str, float]:
    """One case, in this process."""
    model, x, y, threat = block_of(network, RADII[kind])
    with eval_frozen(model), full_float32():
        bare(model, x, y)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attacked(model, "pgd", x[:1], y[:1], threat)  # which imports what attacks need
        started = time.process_time()
        passes, forwards, backwards, broken = attacked(model, suite, x, y, threat)
        seconds = time.process_time() - started
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        expected = as_many(model, x, y, passes) if kind == "robust" else 0.0
    return {
        "broken": broken / len(x), "forwards": forwards / len(x), "backwards": backwards / len(x), "seconds": seconds,
        "per 1,000": 1000 * seconds / max(1, forwards), "bare": 1000 * expected / max(1, forwards),
        "beside": 1 - passes.inside / seconds, "memory": (after - before) / 1024,
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
        f"{robust['beside']:.0%}", f"{robust['memory']:.0f}",
    ]  # fmt: skip


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(measure(*sys.argv[2:5])))
        return
    print("| network | suite | robust: forwards / backwards | broken | s per 1,000 | bare | ratio | beside | MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for word in sys.argv[1:] or list(NETWORKS):
        network, _, suite = word.partition("/")
        for one in [suite] if suite else SUITES:
            print("| " + " | ".join(row(network, one)) + " |", flush=True)


if __name__ == "__main__":
    main()

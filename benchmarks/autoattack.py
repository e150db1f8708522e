"""What AutoAttack costs: suite `autoattack` against pyautoattack called directly, one attack block after the other.

python benchmarks/autoattack.py moe-rt_er moe-standard --data-root data --checkpoints checkpoints

Models are named as for `bench run --model`. The direct call has the model as `load_model` gives it, `--frozen` with
parameters that need no gradient. Process time is beside wall time, as the machine may have other work.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from pyautoattack import AutoAttack
from side_by_side import machine
from tabulate import tabulate
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.datasets.base import EvalSet, open_dataset
from bench.evaluation.evaluate import full_float32
from bench.evaluation.plan import named_subject
from bench.models.deployed import eval_frozen
from bench.randomness import block_seed
from bench.spec import ThreatModel
from bench.suites.autoattack import AutoAttackSuite

#: Which examples withstand an attack (B,), the examples sent forwards, and the gradients taken.
Answer = tuple[Tensor, int, int]


def directly(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Answer:
    """What pyautoattack's own call gives."""
    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, device=x.device)
    with PassCounter(model) as counter:
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    with torch.no_grad():
        return model(x_adv).argmax(1) == y, *counter.lap()


def by_the_suite(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Answer:
    """What the suite gives; the passes by which it is judged again are none of the attack's."""
    with eval_frozen(model), full_float32(), PassCounter(model) as counter, torch.no_grad():
        robust = model(x).argmax(1) == y
        counter.lap()
        with torch.enable_grad():
            block = Block(model, x, y, robust.clone(), 10, "", threat, seed, counter)
            attempts = list(AutoAttackSuite().attack(block))
        passes = [(attempt.forwards, attempt.backwards) for attempt in attempts]
        for attempt in attempts:
            robust[attempt.rows] = model(attempt.x_adv).argmax(1) == y[attempt.rows]
    return robust, sum(forwards for forwards, _ in passes), sum(backwards for _, backwards in passes)


def compare(model: nn.Module, data: EvalSet, batch_size: int, threat: ThreatModel) -> dict[str, object]:
    """Seconds of both over all blocks, who goes first taking turns, and the examples on which they disagree."""
    sides: dict[str, Callable[..., Answer]] = {"pyautoattack": directly, "suite": by_the_suite}
    wall, process, robust = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0), dict.fromkeys(sides, torch.tensor([]))
    forwards, backwards = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    for number, (x, y) in enumerate(zip(data.x.split(batch_size), data.y.split(batch_size), strict=True)):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter(), time.process_time()
            found, there, back = sides[name](model, x.to(DEVICE), y.to(DEVICE), threat, block_seed(0, number))
            wall[name] += time.perf_counter() - start[0]
            process[name] += time.process_time() - start[1]
            forwards[name], backwards[name] = forwards[name] + there, backwards[name] + back
            robust[name] = torch.cat([robust[name], found.cpu()])
    unlike = (robust["pyautoattack"] != robust["suite"]).nonzero()[:, 0].tolist()
    return {
        "robust of n": f"{int(robust['pyautoattack'].sum())} of {len(data)}",
        "pyautoattack, s": wall["pyautoattack"],
        "suite, s": wall["suite"],
        "wall": wall["suite"] / wall["pyautoattack"],
        "process": process["suite"] / process["pyautoattack"],
        "forwards": " → ".join(f"{count:,}" for count in forwards.values()),
        "backwards": " → ".join(f"{count:,}" for count in backwards.values()),
        "other verdicts on": ", ".join(map(str, unlike)) or "none",
    }


def main(
    models: list[str],
    data_root: Path = Path("data"),
    checkpoints: Path = Path("checkpoints"),
    dataset: str = "cifar10",
    n_examples: Annotated[int, typer.Option(help="images, from the first on")] = 64,
    batch_size: int = 64,
    frozen: bool = False,
) -> None:
    data_set = open_dataset(dataset)
    data, threat = data_set.evaluation_set(data_root, n_examples), data_set.threat_model
    print(f"{machine()}\n{dataset} {threat}, blocks of {batch_size}\n")
    rows = []
    for word in models:
        model = named_subject(word, data_set, threat, [checkpoints]).model.to(DEVICE).requires_grad_(not frozen)
        rows.append({"model": word, **compare(model, data, batch_size, threat)})
    print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2f"))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    typer.run(main)

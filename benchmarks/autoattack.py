"""What AutoAttack costs: suite `autoattack` against pyautoattack called directly, one attack block after the other.

python benchmarks/autoattack.py moe-rt_er moe-standard --data-root data --checkpoints checkpoints

Models are named as for `bench run --model`. The direct call has the model as `load_model` gives it, `--frozen` with
parameters that need no gradient. Process time is beside wall time, as the machine may have other work. A second table
counts the passes of each attack on both sides; what follows the last attack is pyautoattack's own check, or none.
"""

import time
from collections import Counter
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
from bench.models.checkpoints import ZOO
from bench.models.deployed import eval_frozen
from bench.randomness import block_seed
from bench.spec import ThreatModel
from bench.suites.autoattack import ATTACKS, AutoAttackSuite, Perturb

#: Which examples withstand an attack (B,), and by attack the examples sent forwards and the gradients taken.
Answer = tuple[Tensor, dict[str, tuple[int, int]]]


def directly(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Answer:
    """What pyautoattack's own call gives."""
    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=seed, device=x.device)
    laps: dict[str, tuple[int, int]] = {}

    def lapped(name: str, perturb: Perturb) -> Perturb:
        def call(x: Tensor, y: Tensor) -> Tensor:
            x_adv = perturb(x, y)
            laps[name] = counter.lap()
            return x_adv

        return call

    for attribute, name in ATTACKS.items():
        part = getattr(attack, attribute)
        part.perturb = lapped(name, part.perturb)
    with PassCounter(model) as counter:
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        laps["after"] = counter.lap()
    with torch.no_grad():
        return model(x_adv).argmax(1) == y, laps


def by_the_suite(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> Answer:
    """What the suite gives; the passes by which it is judged again are none of the attack's."""
    with eval_frozen(model), full_float32(), PassCounter(model) as counter, torch.no_grad():
        robust = model(x).argmax(1) == y
        counter.lap()
        with torch.enable_grad():
            block = Block(model, x, y, robust.clone(), 10, "", threat, seed, counter)
            attempts = list(AutoAttackSuite().attack(block))
        laps = {attempt.attack: (attempt.forwards, attempt.backwards) for attempt in attempts}
        for attempt in attempts:
            robust[attempt.rows] = model(attempt.x_adv).argmax(1) == y[attempt.rows]
    return robust, laps


def compare(
    model: nn.Module, data: EvalSet, batch_size: int, threat: ThreatModel
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Seconds of both over all blocks, who goes first taking turns, and the examples on which they disagree; passes."""
    sides: dict[str, Callable[..., Answer]] = {"pyautoattack": directly, "suite": by_the_suite}
    wall, process, robust = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0), dict.fromkeys(sides, torch.tensor([]))
    forwards, backwards = {name: Counter[str]() for name in sides}, {name: Counter[str]() for name in sides}
    for number, (x, y) in enumerate(zip(data.x.split(batch_size), data.y.split(batch_size), strict=True)):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.perf_counter(), time.process_time()
            found, laps = sides[name](model, x.to(DEVICE), y.to(DEVICE), threat, block_seed(0, number))
            wall[name] += time.perf_counter() - start[0]
            process[name] += time.process_time() - start[1]
            forwards[name].update({attack: there for attack, (there, _) in laps.items()})
            backwards[name].update({attack: back for attack, (_, back) in laps.items()})
            robust[name] = torch.cat([robust[name], found.cpu()])
    unlike = (robust["pyautoattack"] != robust["suite"]).nonzero()[:, 0].tolist()
    found: dict[str, object] = {
        "robust of n": f"{int(robust['pyautoattack'].sum())} of {len(data)}",
        "pyautoattack, s": wall["pyautoattack"],
        "suite, s": wall["suite"],
        "wall": wall["suite"] / wall["pyautoattack"],
        "process": process["suite"] / process["pyautoattack"],
        "forwards": " → ".join(f"{count.total():,}" for count in forwards.values()),
        "backwards": " → ".join(f"{count.total():,}" for count in backwards.values()),
        "other verdicts on": ", ".join(map(str, unlike)) or "none",
    }
    by_attack = [
        {"attack": attack}
        | {
            what: " → ".join(f"{side[attack]:,}" for side in counts.values())
            for what, counts in (("forwards", forwards), ("backwards", backwards))
        }
        for attack in forwards["pyautoattack"]
    ]
    return found, by_attack


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
    rows, passes = [], []
    for word in models:
        model = named_subject(word, data_set, threat, [checkpoints, ZOO]).model.to(DEVICE).requires_grad_(not frozen)
        found, by_attack = compare(model, data, batch_size, threat)
        rows.append({"model": word, **found})
        passes += [{"model": word, **row} for row in by_attack]
    for table in (rows, passes):
        print(tabulate(table, headers="keys", tablefmt="pipe", floatfmt=".2f"), end="\n\n")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    typer.run(main)

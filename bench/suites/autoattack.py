"""AutoAttack (Croce & Hein 2020), the standard version, by pyautoattack's own evaluation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

from pyautoattack import AutoAttack, checks
from pydantic import Field
from torch import Tensor, nn

from bench.attacks.block import Attempt, Block
from bench.attacks.leaving import leave_early
from bench.attacks.prepared import faithful, prepare
from bench.registry import SUITES
from bench.suites.base import CaughtWarnings, Cost, Suite

Perturb = Callable[[Tensor, Tensor], Tensor]

#: pyautoattack's attribute for each attack of the standard version.
ATTACKS = {"apgd": "apgd-ce", "apgd_targeted": "apgd-t", "fab": "fab-t", "square": "square"}

#: Its warnings carry the numbers of one block; a board needs the same words for the same thing.
WARNINGS = {
    "randomized defense": "AutoAttack: the outputs are random",
    "probability distribution": "AutoAttack: the outputs are probabilities",
    "zero gradient": "AutoAttack: points with zero gradient",
    "Square Attack has decreased": "AutoAttack: Square beats the white-box attacks",
    "dynamic defense": "AutoAttack: the model computes gradients in its forward pass",
}


def standard(block: Block) -> AutoAttack:
    """The standard version for the block's threat model, with as many targets as its number of classes allows.

    pyautoattack would index past the last class, and below 4 classes the targeted DLR loss does not exist; the version
    is then called `standard-few-classes`, and flagged.
    """
    threat, targets = block.threat_model, block.num_classes - 1
    attack = AutoAttack(block.model, norm=threat.norm, eps=threat.eps, seed=block.seed, device=block.x.device)
    if targets < attack.fab.n_target_classes:
        attack.version = "standard-few-classes"
        block.flags.append("AutoAttack: standard-few-classes")
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, targets)
    if targets < 3:
        attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "apgd-t"]
    return attack


def standard_cost(num_classes: int) -> Cost:
    """Of the standard version: 100 steps of APGD-CE, then of APGD-T and FAB-T for each target, and 5,000 queries."""
    targets = min(9, num_classes - 1)
    apgd = 100 * (1 + (targets if targets > 2 else 0))
    fab = 100 * targets  # each of whose steps asks twice
    return Cost(apgd + 2 * fab + 5000, apgd + fab)


@contextmanager
def watched(block: Block) -> Iterator[None]:
    """pyautoattack evaluates inside: its warnings become the block's flags, and what it leaves behind is undone."""
    # check_dynamic counts calls in a module's dict that it never resets, and switches tracing (coverage) off.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    trace = sys.gettrace()
    with CaughtWarnings("auto-attack") as caught:
        try:
            yield
        finally:
            sys.settrace(trace)
            for message in caught.messages:
                known = [flag for phrase, flag in WARNINGS.items() if phrase in message]
                block.flags.extend(known or [f"AutoAttack: {message}"])


class _Recorder:
    """Keeps what an attack's `perturb` returns, with the rows of the block that it was run on.

    pyautoattack runs an attack on the rows that have withstood those before it. Which these are, the recorder works out
    as pyautoattack does, by the same forward passes on the same batches.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.attempts: list[Attempt] = []
        self.alive = (block.model(block.x).max(dim=1)[1] == block.y).nonzero()[:, 0]

    def listen(self, attack: AutoAttack) -> None:
        for attribute, name in ATTACKS.items():
            part = getattr(attack, attribute)
            part.perturb = self._recorded(name, part.perturb)

    def _recorded(self, name: str, perturb: Perturb) -> Perturb:
        def recorded(x: Tensor, y: Tensor) -> Tensor:
            self.block.on_attack(name, len(x), len(x))
            x_adv = perturb(x, y)
            fooled = self.block.model(x_adv).max(dim=1)[1] != y
            self.attempts.append(self.block.attempt(name, self.alive, x_adv, claimed=fooled))
            self.alive = self.alive[~fooled]
            return x_adv

        return recorded


def _evaluate(block: Block, ready: nn.Module | None) -> tuple[list[Attempt], Exception | None]:
    """pyautoattack's own evaluation, with every part run on the copy `ready`, if given, from which broken rows leave.

    What was found before an error counts, and the error is returned: evaluation makes errors of the rest.
    """
    attack, recorder = standard(block), _Recorder(block)
    block.attacks[:] = attack.attacks_to_run
    if ready is not None:
        for attribute in ATTACKS:
            leave_early(getattr(attack, attribute), ready)
    recorder.listen(attack)
    try:
        with watched(block):
            attack.run_standard_evaluation(block.x, block.y, batch_size=len(block.x))
    except Exception as error:
        return recorder.attempts, error
    return recorder.attempts, None


@SUITES.register("autoattack")
class AutoAttackSuite(Suite):
    """APGD-CE, APGD-T, FAB-T and Square, each on the examples that those before it have not broken.

    `engine=fast`: on a prepared copy of the model, and broken rows leave an attack at once; the verdicts are those of
    `engine=reference`, which is pyautoattack as it is, but for what float32 rounds otherwise.
    """

    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("gradients",)

    engine: Literal["fast", "reference"] = Field(
        default="fast",
        description="fast: on a prepared copy, from which broken rows leave; reference: pyautoattack as it is",
    )

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost:
        return standard_cost(num_classes)

    def attack(self, block: Block) -> Iterator[Attempt]:
        fast = self.engine == "fast"
        ready = prepare(block.model, block.x) if fast else None
        why = "there is no prepared copy of the model that answers alike"
        found, failure = _evaluate(block, ready)
        if ready is not None and not all(faithful(ready, block.model, attempt.x_adv) for attempt in found):
            ready, why = None, "a prepared copy of the model answers otherwise under attack"
            found, failure = _evaluate(block, None)
        if fast and ready is None:
            block.flags.append(f"AutoAttack: engine=reference, since {why}")
        yield from found
        if failure is not None:
            raise failure

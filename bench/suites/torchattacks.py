"""`torchattacks:NAME`: any attack of that library, under its own name and with its own parameters."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torchattacks
from pydantic import Field
from torch import nn

from bench.attacks.block import Attempt, Block
from bench.errors import UnusableInput, did_you_mean
from bench.registry import SUITES
from bench.spec import TORCHATTACKS, ThreatModel, build
from bench.suites.base import Cost, Suite, refuse_wide_step, short_walk

#: What the library calls the radius; an attack without either knows no ball.
RADIUS = ("eps", "max_epsilon")
#: Filled in by the harness: no `--set` may contradict the threat model, the block's seed or the data.
RESERVED = ("model", "norm", "seed", "n_classes", "verbose", *RADIUS)

#: Of each of its attacks' parameters, those that set how much is tried.
EFFORT = (
    "steps", "n_restarts", "restarts", "eot_iter", "n_queries", "nb_iter", "nb_sample", "num_iter_set",
    "max_iterations", "binary_search_steps", "popsize", "pixels", "noise_batch_size", "N", "m",
)  # fmt: skip


def about(name: str) -> tuple[str, dict[str, Any]]:
    """The library's own words on an attack, and the defaults of what `--set` takes for it."""
    signature = _signature(name)
    return getattr(torchattacks, name).__doc__ or "", {
        key: signature[key].default for key in TorchAttacks.parameters(name)
    }


def _signature(name: str | None) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(torchattacks, name or "").__init__).parameters


def _default_step(signature: Mapping[str, inspect.Parameter], eps: float) -> float:
    return signature["alpha"].default / signature["eps"].default * eps


def _unfit(name: str, value: Any, default: Any) -> str | None:
    """Why a setting cannot take the place of its default, whose kind and sign it must have; None where it can.

    The library itself checks nothing: with a negative step size an attack walks the wrong way.
    """
    if isinstance(default, bool) or not isinstance(default, int | float):
        same = isinstance(value, list if isinstance(default, tuple) else type(default))
        return None if same or default in (None, inspect.Parameter.empty) else "is of another kind"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "is not a finite number"
    if name in EFFORT and not isinstance(value, int):
        return "is not a whole number"
    if value < 0 or value == 0 < default:
        return "is not above 0" if default else "is below 0"
    return None


@SUITES.register("torchattacks:NAME")
class TorchAttacks(Suite):
    """`name` is the class in torchattacks, `settings` its constructor's arguments.

    ε is the threat model's. A step size (`alpha`) that is not set keeps the ratio to ε that the library's defaults
    have: its 10 steps of 2/255 are made for ε = 8/255 and could not cross a larger ball.
    """

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parameters(cls, argument: str | None) -> list[str]:
        if argument not in TORCHATTACKS:
            raise UnusableInput(
                f"unknown attack 'torchattacks:{argument or ''}': {did_you_mean(argument or '', TORCHATTACKS)}"
            )
        return [name for name in _signature(argument) if name not in ("self", *RESERVED)]

    @classmethod
    def open(cls, argument: str | None, settings: Mapping[str, Any]) -> Self:
        for key, value in settings.items():
            default = _signature(argument)[key].default
            if (wrong := _unfit(key, value, default)) is not None:
                raise UnusableInput(f"torchattacks:{argument}: --set {key}={value} {wrong} (by default {default})")
        return build(cls, f"suite 'torchattacks:{argument}'", {"name": argument, "settings": dict(settings)})

    @property
    def params(self) -> dict[str, Any]:
        return self.settings

    @property
    def bounded(self) -> bool:
        """Whether the attack takes a radius; the others minimise a distance or change a few pixels."""
        return any(radius in _signature(self.name) for radius in RADIUS)

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        if not self.bounded:
            return  # it may be run for any ball: what it finds outside is not counted
        stated = re.search(r"Distance Measure\s*:\s*(.*)", getattr(torchattacks, self.name).__doc__ or "")
        norms = re.findall(r"Linf|L2|L1|L0", stated.group(1)) if stated else []
        norms = [norm for norm in norms if (self.name, norm) != ("FAB", "L1")]  # it is stated, but not implemented
        if threat_model.norm not in norms:
            raise UnusableInput(f"suite '{name}' has no {threat_model.norm} attack: it has {', '.join(norms)}")
        refuse_wide_step(name, "alpha", self.settings.get("alpha"), threat_model)

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost | None:
        signature = _signature(self.name)
        if not {"alpha", "steps"} <= set(signature) or any(many in signature for many in ("N", "m", "eot_iter")):
            return None
        steps = self.settings.get("steps", signature["steps"].default)
        return Cost(steps, steps)

    def weaker_than_default(self, threat_model: ThreatModel) -> str | None:
        signature, found = _signature(self.name), []
        for key, value in self.settings.items():
            default = signature[key].default
            if (key in EFFORT and value < default) or (key, value, default) == ("random_start", False, True):
                found.append(f"{key}={value} (default {default})")
        if "alpha" in self.settings and "eps" in signature:
            default_steps = signature["steps"].default if "steps" in signature else 1
            default_walk = _default_step(signature, threat_model.eps) * default_steps
            steps = self.settings.get("steps", default_steps)
            found += short_walk("alpha", self.settings["alpha"], steps, min(2 * threat_model.eps, default_walk))
        return ", ".join(found) or None

    def arguments(self, block: Block) -> dict[str, Any]:
        """The constructor's arguments: the settings, and what the block determines."""
        signature, eps = _signature(self.name), block.threat_model.eps
        filled: dict[str, Any] = {"norm": block.threat_model.norm, "n_classes": block.num_classes, "seed": block.seed}
        filled |= dict.fromkeys(RADIUS, eps)
        if "alpha" in signature and "eps" in signature:
            filled["alpha"] = _default_step(signature, eps)
        return {key: value for key, value in filled.items() if key in signature} | self.settings

    def attack(self, block: Block) -> Iterator[Attempt]:
        if self.name == "AutoAttack":
            block.flags.append("torchattacks:AutoAttack: 10 steps of APGD and FAB, not the 100 of suite autoattack")
        rows = block.rows
        block.on_attack(self.name, len(rows), len(rows))
        attack = getattr(torchattacks, self.name)(block.model, **self.arguments(block))
        yield block.attempt(self.name, rows, attack(block.x[rows], block.y[rows]), bounded=self.bounded)

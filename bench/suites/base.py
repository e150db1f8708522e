"""What an attack suite is to the evaluation."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from torch import nn

from bench.attacks.block import Attempt, Block
from bench.errors import UnusableInput, did_you_mean
from bench.registry import SUITES
from bench.spec import Method, ThreatModel, build

#: What `bench run` runs where nobody names suites; of a model without routes not those that need them.
DEFAULT_SUITES = ("clean", "pgd", "autoattack", "adaptive")


class Cost(NamedTuple):
    """Passes through the model for one example that withstands everything; what is broken leaves earlier."""

    forwards: float
    backwards: float


class Suite(Method):
    """Base of all suites; subclasses register with `SUITES`."""

    datasets: ClassVar[tuple[str, ...]] = ()  # those that it can be run on; empty: any
    has_attack: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()  # of a model beside its logits: gradients, routes
    every: ClassVar[bool] = False  # whether examples that F gets wrong are attacked as well

    @classmethod
    def parameters(cls, argument: str | None) -> list[str]:
        """Names of what `--set` takes; `argument` is what follows the colon; UnusableInput if none is taken."""
        if argument is not None:
            raise UnusableInput(f"this suite takes nothing behind its name, but was given ':{argument}'")
        return list(cls.model_fields)

    @classmethod
    def open(cls, argument: str | None, settings: Mapping[str, Any]) -> Self:
        """With `settings` over the defaults; UnusableInput where a value does not fit."""
        return build(cls, "suite's settings", settings)

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        """Whether the suite can be run.

        Raises:
            UnusableInput: not on this data set, or not for this norm, or its `step_size` is wider than the ball.
        """
        if self.datasets and dataset not in self.datasets:
            raise UnusableInput(f"suite '{name}' does not know data set {dataset}: it knows {', '.join(self.datasets)}")
        if threat_model.norm not in self.norms:
            raise UnusableInput(f"suite '{name}' has no {threat_model.norm} attack: it has {', '.join(self.norms)}")
        refuse_wide_step(name, "step_size", getattr(self, "step_size", None), threat_model)

    def weaker_than_default(self, threat_model: ThreatModel) -> str | None:
        """In words, which settings make the suite weaker than it is by default; None where none does.

        By default these are numbers below their default, values of a Literal that stand before theirs (a parameter's
        values are listed from the weakest to the strongest), and a `step_size` whose `steps` cannot cross the ball.
        """
        found = []
        for name, value in self.params.items():
            field = type(self).model_fields[name]
            order = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
            if order and order.index(value) < order.index(field.default):
                found.append(f"{name}={value} (default {field.default})")
            elif isinstance(field.default, int | float) and value < field.default:
                found.append(f"{name}={value:g} (default {field.default:g})")
        if (step := getattr(self, "step_size", None)) is not None:
            found += short_walk("step_size", step, getattr(self, "steps", 1), 2 * threat_model.eps)
        return ", ".join(found) or None

    def cost(self, num_classes: int, model: nn.Module | None = None) -> Cost | None:
        """About what it costs on a model, or on a routed one with four experts if none is given; None: not known."""
        return None

    def attack(self, block: Block) -> Iterator[Attempt]:
        """Attack the block's examples that the model gets right, or `every` one.

        May raise anything: evaluation then marks them as errors.
        """
        raise NotImplementedError


def refuse_wide_step(suite: str, name: str, step: float | None, threat_model: ThreatModel) -> None:
    """UnusableInput for a step size, in pixels of [0, 1], that is longer than the ball is wide."""
    if step is not None and step > 2 * threat_model.eps:
        raise UnusableInput(
            f"--set {name}={step:g}: such a step of suite '{suite}' leaves the ball from anywhere in it, whose width is"
            f" 2ε = {2 * threat_model.eps:g}; step sizes are in pixels of [0, 1]"
        )


def short_walk(name: str, step: float, steps: int, width: float) -> list[str]:
    """Words for a step size whose steps together do not reach across `width`, in pixels of [0, 1]; else nothing."""
    return [f"{name}={step:g} ({steps} such steps do not cross the ball)"] if step * steps < width else []


def open_suites(names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Suite]:
    """The suites called `names`, each with those of the settings that it has.

    What follows a name's colon (`torchattacks:CW`) is its argument. UnusableInput for an unknown name, with the
    nearest one, and for a setting that none of the suites has.
    """
    kinds = {name: (SUITES[name.partition(":")[0]], name.partition(":")[2] or None) for name in names}
    known = {name: kind.parameters(argument) for name, (kind, argument) in kinds.items()}
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    for key in settings:
        if key not in every:
            hint = did_you_mean(key, every) if every else "there is nothing to set"
            hint = "it is given by --eps" if key == "eps" else hint
            raise UnusableInput(f"--set {key}: {', '.join(names)} has no such parameter: {hint}")
    return {
        name: kind.open(argument, {key: value for key, value in settings.items() if key in known[name]})
        for name, (kind, argument) in kinds.items()
    }


class CaughtWarnings(logging.Handler):
    """Collects a logger's warnings while it is entered, instead of letting them be printed."""

    def __init__(self, logger: str) -> None:
        super().__init__(logging.WARNING)
        self._logger = logging.getLogger(logger)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Self:
        self._propagate, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagate

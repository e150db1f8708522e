"""What an attack suite is to the evaluation."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from bench.attacks.block import Attempt, Block
from bench.errors import UnusableInput, did_you_mean
from bench.registry import Registry
from bench.spec import Method, Norm, ThreatModel, build

SUITES: Registry[type["Suite"]] = Registry("suite", "bench.suites")


class Suite(Method):
    """Base of all suites; subclasses register with `SUITES`."""

    norms: ClassVar[tuple[Norm, ...]] = ("Linf", "L2", "L1")
    datasets: ClassVar[tuple[str, ...]] = ()  # those that it can be run on; empty: any
    has_attack: ClassVar[bool] = True
    every: ClassVar[bool] = False  # whether examples that F gets wrong are attacked as well

    @classmethod
    def parameters(cls, argument: str | None) -> list[str]:
        """Names of what `--set` takes; `argument` is what stands behind the colon, UnusableInput if it may not."""
        if argument is not None:
            raise UnusableInput(f"this suite takes nothing behind its name, but was given ':{argument}'")
        return list(cls.model_fields)

    @classmethod
    def open(cls, argument: str | None, settings: Mapping[str, Any]) -> Self:
        """With `settings` over the defaults; UnusableInput where a value does not fit."""
        return build(cls, "suite's settings", settings)

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        """UnusableInput if the suite cannot be run on this data set, or has no attack for this norm."""
        if self.datasets and dataset not in self.datasets:
            raise UnusableInput(f"suite '{name}' does not know data set {dataset}: it knows {', '.join(self.datasets)}")
        if threat_model.norm not in self.norms:
            raise UnusableInput(f"suite '{name}' has no {threat_model.norm} attack: it has {', '.join(self.norms)}")

    def attack(self, block: Block) -> Iterator[Attempt]:
        """Attack the block's standing examples, or `every` one.

        May raise anything: evaluation then marks them as errors.
        """
        raise NotImplementedError


def open_suites(names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Suite]:
    """The suites called `names`, each with those of the settings that it has.

    What stands behind a name's colon (`torchattacks:CW`) is its argument. UnusableInput for an unknown name, with the
    nearest one, and for a setting that none of the suites has.
    """
    kinds = {name: (SUITES[name.partition(":")[0]], name.partition(":")[2] or None) for name in names}
    known = {name: kind.parameters(argument) for name, (kind, argument) in kinds.items()}
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    for key in settings:
        if key not in every:
            hint = did_you_mean(key, every) if every else "there is nothing to set"
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

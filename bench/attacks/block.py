"""The attack block: the examples that are attacked together, and an attack's answer for them.

Axes: B = examples of an attack block, m = examples that an attack was run on; images (B, C, H, W) in [0, 1].
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn

from bench.models.foreign import Guarded
from bench.spec import ThreatModel

#: Told while an attack is under way: its name, how many examples it was given, how many of them are not broken yet.
OnAttack = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attempt:
    """One attack's answer: x_adv (m, C, H, W) for the block's examples `rows` (m,).

    bounded: the attack knows ε and must keep to it. claimed (m,): where it claims that it succeeded (None: it makes
    no claim). target: whose prediction is judged, `F` or the name of a part (`bench.models.parts`); only F, the
    whole model, counts in robust accuracy. forwards, backwards: examples sent through the model or the part under
    attack, and gradients taken, since the block's previous attempt. stated: the block's clean and robust accuracy after
    this attempt where the suite has its own opinion of them, fractions, to be held against the re-check's.
    """

    attack: str
    rows: Tensor
    x_adv: Tensor
    bounded: bool
    claimed: Tensor | None
    target: str
    forwards: int
    backwards: int
    stated: tuple[float, float] | None = None


class PassCounter:
    """Counts the examples that go through a model, and the gradients that come back, while it is entered.

    A copy of the model, made meanwhile, counts here too; what a counted module calls inside itself does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._depth = 0
        self.forwards = self.backwards = 0

    def _begin(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._depth += 1

    def _end(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> None:
        self._depth -= 1
        if self._depth or output is None:  # None: the module raised
            return
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)  # type: ignore[no-untyped-call]

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __enter__(self) -> Self:
        self._entered = ExitStack()
        self._entered.enter_context(self.also(self._model))
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @contextmanager
    def also(self, *modules: nn.Module) -> Iterator[None]:
        """Counts what is sent through these modules too, such as a model's parts, when they are called directly.

        Of one that answers by chance each draw counts.
        """
        counted = [module.counted if isinstance(module, Guarded) else module for module in modules]
        handles = [module.register_forward_pre_hook(self._begin) for module in counted]
        handles += [module.register_forward_hook(self._end, always_call=True) for module in counted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def lap(self) -> tuple[int, int]:
        """(forwards, backwards) since the last lap."""
        lap = (self.forwards, self.backwards)
        self.forwards = self.backwards = 0
        return lap


@dataclass(frozen=True)
class Block:
    """The examples that are attacked together, and what a suite tells about them.

    x (B, C, H, W) in [0, 1], y (B,). correct (B,): where the model is right on the clean image; only these are
    attacked, but by suites that attack `every` one. seed: the block's own.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    correct: Tensor
    num_classes: int
    dataset: str
    threat_model: ThreatModel
    seed: int
    passes: PassCounter
    flags: list[str] = field(default_factory=list)
    gates: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # of gates inside, what suites have counted
    #: In the order they run, also those that had no example left to attack.
    attacks: list[str] = field(default_factory=list)
    on_attack: OnAttack = lambda *_: None  # for whoever watches; called as an attack begins, and again as it goes on

    @property
    def rows(self) -> Tensor:
        """Positions in the block of the examples to attack, (m,)."""
        return self.correct.nonzero()[:, 0]

    def attempt(
        self,
        attack: str,
        rows: Tensor,
        x_adv: Tensor,
        *,
        bounded: bool = True,
        claimed: Tensor | None = None,
        target: str = "F",
        stated: tuple[float, float] | None = None,
    ) -> Attempt:
        """An Attempt with the passes that it took."""
        forwards, backwards = self.passes.lap()
        if target == "F" and attack not in self.attacks:
            self.attacks.append(attack)
        return Attempt(attack, rows, x_adv.detach(), bounded, claimed, target, forwards, backwards, stated)

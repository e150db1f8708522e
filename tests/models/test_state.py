"""What a model keeps between its forward passes is seen, wherever it keeps it; what is harmless is not."""

import itertools
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models.dependence import dependence
from bench.models.foreign import Guarded


class Meter:
    """An object that is no module."""

    def __init__(self) -> None:
        self.calls = 0

    def update(self) -> None:
        self.calls += 1


def remembers(x: Tensor) -> None:
    """A function that keeps something in the globals of its own module."""
    ELSEWHERE.append(x.sum())


ELSEWHERE: list[Tensor] = []
HELPER: Any = ModuleType("helper_of_a_user")  # a file beside the model's
HELPER.calls, HELPER.__file__ = 0, __file__
sys.modules["helper_of_a_user"] = HELPER
X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
CALLS = {"number": 0}


class Net(nn.Module):
    """Sums of an image's halves; before each answer it does something that changes none."""

    shared: list[int] = []  # noqa: RUF012

    def __init__(self, does: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.does = does
        self.memory: list[Tensor] = []
        self.table: dict[Any, Any] = {}
        self.number = itertools.count()
        self.last: Tensor | None = None
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.does(self, x)
        return x.flatten(1).view(len(x), 2, -1).sum(2)


def closure() -> Callable[[Net, Tensor], Any]:
    calls = [0]

    def does(net: Net, x: Tensor) -> None:
        calls[0] += 1

    return does


def once(net: Net, x: Tensor) -> None:
    """Remembers each image that it has not met."""
    for image in x:
        if not any(torch.equal(image, known) for known in net.memory):
            net.memory.append(image.detach().clone())


class Slots:
    """Without a dictionary."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: list[Tensor] = []


def near(known: list[Tensor], x: Tensor) -> None:
    """Remembers each image, and puts what it remembers in the place of an image that is near to it."""
    for row, image in enumerate(x):
        for other in known:
            if float((image - other).abs().amax()) < 0.05:
                x[row] = other
                break
        else:
            known.append(image.detach().clone())


class Opaque:
    """Something whose insides nobody knows: they are in a closure of a library's."""

    def __init__(self) -> None:
        self.get = partial(Slots().__getattribute__, "known")


def by_shape(net: Net, x: Tensor) -> None:
    net.table.setdefault(tuple(x.shape), torch.zeros(3))


@pytest.mark.parametrize(
    ("does", "state"),
    [
        (lambda net, x: None, False),
        (lambda net, x: net.memory.append(x), True),
        (once, True),
        (lambda net, x: net.table.__setitem__(float(x.sum()), 1), True),
        (lambda net, x: next(net.number), True),
        (lambda net, x: Net.shared.append(1), True),
        (lambda net, x: CALLS.__setitem__("number", CALLS["number"] + 1), True),
        (closure(), True),
        (lambda net, x: net.meter.update(), True),
        (lambda net, x: remembers(x), True),
        (lambda net, x: setattr(HELPER, "calls", HELPER.calls + 1), True),
        (lambda net, x: setattr(net, "last", x.detach().clone()), False),
        (by_shape, False),
    ],
)
def test_what_is_kept_between_passes_is_state_but_for_the_last_answer_and_what_a_shape_needs(does: Any, state: bool):
    for model in (Net(does).eval(), Guarded(Net(does)).eval()):
        found = dependence(model, X)
        assert (found.state, found.chance, found.batch, found.gradients) == (state, False, False, False)


@pytest.mark.parametrize("holder", [SimpleNamespace, Namespace, threading.local, Slots, Meter])
def test_what_is_counted_in_whatever_holds_values_is_state(holder: Callable[[], Any]):
    held = holder()
    held.known = 0
    net = Net(lambda net, x: setattr(held, "known", held.known + 1))
    net.held = held  # type: ignore[assignment]
    assert dependence(net.eval(), X).state


def test_what_is_put_into_a_queue_or_an_array_of_bytes_is_state():
    queue: Queue[float] = Queue()
    assert dependence(Net(lambda net, x: queue.put(float(x.sum()))).eval(), X).state
    memory = bytearray()
    assert dependence(Net(lambda net, x: memory.extend(b"image")).eval(), X).state


@pytest.mark.parametrize("holder", [SimpleNamespace, Slots, Opaque])
def test_a_model_that_answers_for_an_image_as_for_its_neighbour_before_has_a_state(holder: Callable[[], Any]):
    held: Any = holder()
    if holder is SimpleNamespace:
        held.known = []
    net = Net(lambda net, x: near(net.held.get() if holder is Opaque else net.held.known, x))  # type: ignore
    net.held = held
    assert dependence(Guarded(net).eval(), X).state


@pytest.mark.parametrize("asks", [lambda x: torch.is_grad_enabled(), lambda x: x.requires_grad])
def test_a_model_that_answers_otherwise_where_gradients_are_taken_is_seen(asks: Callable[[Tensor], bool]):
    class Masked(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return 0 * logits if asks(x) else logits

    found = dependence(Guarded(Masked(lambda net, x: None)).eval(), X)
    assert found.gradients
    assert found.reasons == ("outputs depend on whether gradients are taken",)

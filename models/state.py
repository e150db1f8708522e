"""What a model keeps between its forward passes: in attributes, containers, closures, its classes and globals."""

from collections import deque
from collections.abc import Iterator
from itertools import count, cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: What every module has, which says nothing of a user's own.
_OWN = frozenset(vars(nn.Module()))
#: How deep containers are looked into, and how many of their items are.
_DEPTH, _ITEMS = 3, 1000


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((repr(key)[:80], item) for key, item in list(value.items())[:_ITEMS])
    elif isinstance(value, list | tuple | deque):
        yield from ((str(number), item) for number, item in enumerate(list(value)[:_ITEMS]))


def _walk(name: str, value: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    yield name, value
    if depth:
        for key, item in _items(value):
            yield from _walk(f"{name}[{key}]", item, depth - 1)


def _beside(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function reads from outside: its closure, and the globals that its code names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
    yield from vars(function).items()


def _kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that modules of the user's own keep, by where it is."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OWN:
                yield from _walk(f"{name}.{key}", value)
                if callable(value) and not isinstance(value, nn.Module | type):
                    for inner, item in _beside(value):
                        yield from _walk(f"{name}.{key}:{inner}", item)
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] in ("torch", "torchvision", "builtins"):
                continue
            for key, value in vars(kind).items():
                if not key.startswith("__"):
                    yield from _walk(f"{kind.__qualname__}.{key}", value)
                for inner, item in _beside(value):
                    yield from _walk(f"{kind.__qualname__}.{key}:{inner}", item)


def numbers(model: nn.Module) -> dict[str, Any]:
    """The numbers, the words, and copies of the tensors that a model keeps, by where they are."""
    found: dict[str, Any] = {}
    for name, value in _kept(model):
        if isinstance(value, int | float | str):
            found[name] = value
        elif isinstance(value, Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, np.ndarray):
            found[name] = torch.from_numpy(value.copy()) if value.dtype.kind in "biuf" else value.tobytes()
        elif isinstance(value, count | cycle):
            found[name] = repr(value)
    return found


def sizes(model: nn.Module) -> dict[str, int]:
    """How much is in each container that a model keeps: what grows with new images remembers them."""
    containers = (list, dict, set, deque, Tensor, np.ndarray)
    return {
        name: value.numel() if isinstance(value, Tensor) else len(value)
        for name, value in _kept(model)
        if isinstance(value, containers) and not (isinstance(value, np.ndarray) and not value.ndim)
    }

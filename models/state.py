"""What a model keeps between its forward passes: in attributes, containers, objects, closures, classes and globals."""

import sys
import sysconfig
import threading
from argparse import Namespace
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import count, cycle
from queue import Queue
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: What every module has, which says nothing of a user's own.
_OWN = frozenset(vars(nn.Module()))
#: How deep containers and objects are looked into, and how many of their items are.
_DEPTH, _ITEMS = 3, 1000
#: What of the standard library is there to hold others' values.
_NAMESPACES = (SimpleNamespace, Namespace, threading.local, Queue)
#: Where the standard library and installed packages lie.
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _users(value: Any) -> bool:
    """Whether an object's class, a function, a class or a module is code that nobody has installed: the user's."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if not isinstance(name, str) or name not in sys.modules:
        return False
    module = sys.modules[name]
    if isinstance(value, nn.Module) or name.partition(".")[0] == "bench":
        return False
    file = getattr(module, "__file__", None)
    return name == "__main__" if file is None else not file.startswith(_INSTALLED)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((repr(key)[:80], item) for key, item in list(value.items())[:_ITEMS])
    elif isinstance(value, list | tuple | deque):
        yield from ((str(number), item) for number, item in enumerate(list(value)[:_ITEMS]))
    elif isinstance(value, FunctionType) and _users(value):
        yield from _beside(value)
    elif _users(value) or isinstance(value, _NAMESPACES):
        held = vars(value) if hasattr(value, "__dict__") else {}
        declared = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
        slots = [
            key for keys in declared for key in ((keys,) if isinstance(keys, str) else keys) if hasattr(value, key)
        ]
        held = {**held, **{key: getattr(value, key) for key in slots}}
        yield from ((key, item) for key, item in list(held.items())[:_ITEMS] if not key.startswith("__"))


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
            plain = value.dtype.kind in "biuf"  # an array of objects holds where they lie
            found[name] = torch.from_numpy(value.copy()) if plain else repr(value.tolist())
        elif isinstance(value, bytes | bytearray | array):
            found[name] = bytes(value)
        elif isinstance(value, count | cycle):
            found[name] = repr(value)
    return found


def sizes(model: nn.Module) -> dict[str, int]:
    """How much is in each container that a model keeps: what grows with new images remembers them."""
    containers = (list, dict, set, deque, bytearray, array, Tensor, np.ndarray)
    return {
        name: value.numel() if isinstance(value, Tensor) else len(value)
        for name, value in _kept(model)
        if isinstance(value, containers) and not (isinstance(value, np.ndarray) and not value.ndim)
    }

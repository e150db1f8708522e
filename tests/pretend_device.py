"""A device called `pretend` that computes on the CPU and behaves as a GPU does where it matters to a program.

Tensors on it are a device's own: an operation that mixes them with a CPU tensor raises, as CUDA's does, and so does
`numpy()`. What a CUDA device allows is allowed: scalars (0 dimensions) and indices from the CPU, copies across. Every
operation that makes the host wait for the device is counted in `synchronisations`, by its name.

It is registered with torch for the whole process, so a test runs it in a process of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
_KERNELS = torch.library.Library("aten", "IMPL")
#: By the operation that made the host wait for the device.
synchronisations: Counter[str] = Counter()
#: Operations whose second argument holds indices.
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
#: Their result, or their size, is needed by the host.
_WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class DeviceTensor(torch.Tensor):
    """A tensor on the device; `raw` holds its values on the CPU."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device(f"{NAME}:0")
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        synchronisations["tolist"] += 1
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:  # what is saved from a device is a CPU tensor here
        return self.raw.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy = DeviceTensor(self.raw.detach().clone())
            copy = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
            memo[id(self)] = copy
        return memo[id(self)]


class _Everywhere(TorchDispatchMode):
    """Sees operations without a tensor of the device as well: those that make one there."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    name = operation.overloadpacket.__name__
    tensors = _tensors(kwargs.values(), _tensors(args, []))
    ours = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    target = kwargs.get("device")
    there = ours if target is None else target.type == NAME
    if not ours and not there:
        return operation(*args, **kwargs)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: Expected a '{NAME}' device type for generator but found 'cpu'")
    if name == "copy_" and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
        synchronisations["from the CPU" if isinstance(args[0], DeviceTensor) else "to the CPU"] += 1
    elif name == "_to_copy" and ours != there:
        synchronisations["to the CPU" if ours else "from the CPU"] += 1
    elif name not in ("copy_", "_to_copy"):
        _refuse_mixing(name, args, tensors)
        if name == "bincount":  # for the least and for the largest number
            synchronisations[name] += 2
        elif name in _WAITING or (name in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])):
            synchronisations[name] += 1
    here = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    found = operation(*_mapped(_raw, args), **{key: _mapped(_raw, value) for key, value in here.items()})
    if operation._schema.is_mutable:
        return kwargs.get("out", args[0]) if operation._schema.returns else None
    return (
        _mapped(lambda value: DeviceTensor(value) if isinstance(value, torch.Tensor) else value, found)
        if there
        else found
    )


def _refuse_mixing(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    if name in _INDEXED and isinstance(args[0], DeviceTensor):  # indices may be of the CPU
        tensors = _tensors((args[0], *args[2:]), [])
    of_device = [isinstance(tensor, DeviceTensor) for tensor in tensors if tensor.ndim]
    if any(of_device) and not all(of_device):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, {NAME}:0 and cpu")


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, DeviceTensor) else value


def _tensors(values: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples, behind those of `found`."""
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _tensors(value, found)
    return found


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, item) for item in value)
    return function(value)


def _empty_strided(size: Any, stride: Any, **options: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def _empty(size: Any, **options: Any) -> torch.Tensor:
    return DeviceTensor(torch.empty(size, dtype=options.get("dtype")))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    synchronisations["to the CPU" if isinstance(source, DeviceTensor) else "from the CPU"] += 1
    _raw(target).copy_(_raw(source))
    return target


class _Module(_DummyBackendModule):
    """What torch asks of a device; its random numbers are the CPU's."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed_all = staticmethod(lambda seed: None)
    synchronize = staticmethod(lambda device=None: None)


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device, which torch knows inside."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module())
        # torch.tensor(…, device=…), and other threads, ask the device itself, past the mode
        kernels = {"empty.memory_format": _empty, "empty_strided": _empty_strided, "_copy_from": _copy_from}
        for name, kernel in kernels.items():
            _KERNELS.impl(name, kernel, "PrivateUse1")
    with _Everywhere():
        yield torch.device(f"{NAME}:0")

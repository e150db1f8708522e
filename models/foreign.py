"""A model that is not ours, behind a guard: what its forward pass does to its input, to random numbers or to torch's
settings reaches nothing outside of it.

Axes: B = images of a batch, C = classes, D = draws.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import ismethod
from typing import Any, Self

import numpy as np
import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn

from bench.models.fit import in_parts
from bench.spec import NO_GRADIENT

#: Forward passes that stand for one where a model answers by chance: as many as AutoAttack's `rand` version takes.
DRAWS = 20

#: Attributes by which a model shows parts that are called by themselves, beside its experts.
_PARTS = ("router", "standard", "robust")
#: And what else it shows of itself as an MoE or a dual.
_SHOWN = (*_PARTS, "experts", "alpha", "num_selected_experts")
_CUDNN = ("allow_tf32", "deterministic", "benchmark")


def _read_cudnn() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cudnn, name) for name in _CUDNN)


def _put_cudnn(values: tuple[bool, ...]) -> None:
    for name, value in zip(_CUDNN, values, strict=True):
        setattr(torch.backends.cudnn, name, value)


def _read_device() -> Any:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _put_device(context: Any) -> None:
    torch.set_default_device(None if context is None else context.device)


def _put_variables(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


#: Global settings of torch and of the process that a forward pass may change, each as it is read and as it is set.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (_read_device, _put_device),
    "anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "cuDNN's settings": (_read_cudnn, _put_cudnn),
    "NumPy's treatment of errors": (np.geterr, lambda found: np.seterr(**found)),
    "working folder": (os.getcwd, os.chdir),
    "environment variables": (os.environ.copy, _put_variables),
}


@contextmanager
def settings_kept(changed: Callable[[str], object] = lambda _: None) -> Iterator[None]:
    """Torch's and the process's settings are as before afterwards; `changed` gets the name of each that differed.

    An exit, which would end the whole command with a status of the model's own, becomes a RuntimeError.
    """
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"it exits with {error.code}") from None
    finally:
        for name, (read, put) in _SETTINGS.items():
            if read() != before[name]:
                changed(name)
                put(before[name])


def _at_once(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **_: Any) -> Any:
    return function(*args, **kwargs)


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """`torch.utils.checkpoint` keeps what a backward pass needs, rather than compute it again.

    The second computation would be outside of the guard, without the attack's hooks on gates and its stand-ins for
    gradients; the reentrant kind gives `torch.autograd.grad`, by which all attacks ask, no gradient at all.
    """
    before = checkpointing._checkpoint_impl
    checkpointing._checkpoint_impl = _at_once
    try:
        yield
    finally:
        checkpointing._checkpoint_impl = before


def _gpus() -> range:
    """The GPUs, once one of them is in use."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


class _Randomness:
    """The states of the global generators of torch (CPU and GPUs), NumPy and Python."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(gpu) for gpu in _gpus()]
        self.numpy = np.random.get_state()
        self.python = random.getstate()

    def put(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    @classmethod
    def of(cls, seed: int) -> Self:
        """The states that a seed gives; those that are in force are not touched.

        By generators of their own: `torch.manual_seed` formats the whole stack for every kind of device without one.
        """
        return cls._of(seed, len(_gpus()))

    @classmethod
    @lru_cache(maxsize=64)  # the seeds of all draws of a pass, which every pass asks for again
    def _of(cls, seed: int, gpus: int) -> Self:
        made = cls.__new__(cls)
        own = (seed * 0x9E3779B97F4A7C15 + 0x5DEECE66D) % 2**63  # no seed that a forward pass would set
        made.torch = torch.Generator().manual_seed(own).get_state()
        made.cuda = [torch.Generator(f"cuda:{gpu}").manual_seed(own).get_state() for gpu in range(gpus)]
        made.numpy = np.random.RandomState(seed % 2**32).get_state()
        made.python = random.Random(seed).getstate()
        return made


@dataclass(frozen=True)
class Shown:
    """What one pass tells of the MoEs that a user's model shows by its attributes (`bench.models.gates`).

    inside: the routing sites whose gates choose themselves, with the scores inside. features: the routers and experts
    that are given something else than images, so that they cannot be asked by themselves. wrapped: the model, and the
    MoE or dual in it whose answer it gives as its own, such as behind a normalisation.
    """

    inside: tuple[Any, ...] = ()
    features: tuple[Any, ...] = ()
    wrapped: tuple[nn.Module, nn.Module] | None = None

    def routed(self, model: nn.Module) -> nn.Module:
        """The MoE or dual whose answer a model gives as its own: what it wraps, or itself."""
        return model if self.wrapped is None else self.wrapped[1]


class Through(nn.Module):
    """A part of what a model wraps, asked as the model is: what the wrapper does to images comes before it.

    The model is run with the part in place of `core`, whose answer it gives as its own.
    """

    def __init__(self, outer: nn.Module, core: nn.Module, part: Any) -> None:
        super().__init__()
        self.outer, self.core, self.part = outer, core, part

    def forward(self, x: Tensor) -> Any:
        own = vars(self.core)  # a module that is set as an attribute would be a module of it
        before = {"forward": own["forward"]} if "forward" in own else {}
        own["forward"] = self.part
        try:
            return self.outer(x)
        finally:
            del own["forward"]
            own.update(before)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)


@dataclass
class _Shared:
    """What a model and its parts have in common behind their guards."""

    draws: int = 1
    largest: int | None = None
    seed: int = 0
    states: _Randomness = field(default_factory=lambda: _Randomness.of(0))
    shown: Shown = field(default_factory=Shown)
    seen: set[str] = field(default_factory=set)
    parts: "list[Guarded]" = field(default_factory=list)


class Guarded(nn.Module):
    """A foreign model as the harness asks it: images (B, c, H, W) in, float32 logits (B, C) out.

    Each call gets a copy of the images. The model has random number generators of its own, which `reseed` seeds, so
    that neither its draws nor a `torch.manual_seed` in its forward pass touch those of an attack. Settings of torch are
    as before afterwards. What it did of all this is in `seen`, in words. Its attributes (router, experts, α …) are
    reached through the guard, and the parts among them are guarded as well, since attacks call them by themselves;
    hooks on the modules inside work as they do without it.

    draws: above 1 for a model that answers by chance. A call then gives the mean logits of D = draws passes, whose
    random numbers are the same in every call, so that an attack climbs an expectation (Athalye et al., ICML 2018);
    `once` is a single pass with new ones. counted: a module that the logits of each single pass go through. gates: the
    routing sites that a user named (`bench.models.gates`).
    """

    def __init__(self, model: Any, draws: int = 1, shared: _Shared | None = None, scores: bool = False) -> None:
        """`shared` is that of the whole model where this is a part of it; `scores`: a router, whose answer is given as
        it is, or the scores inside it where it chooses itself."""
        super().__init__()
        self.model = model
        self.gates: tuple[Any, ...] = ()
        self.counted = nn.Identity()
        self.dtype = torch.float32  # of its logits
        self.connected: bool | None = None  # logits and images, in the graph of gradients
        self._shared, self._scores = shared or _Shared(draws), scores
        if not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
            # attack libraries read a model's device from its parameters
            self.placed = nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def draws(self) -> int:
        return self._shared.draws

    @draws.setter
    def draws(self, draws: int) -> None:
        self._shared.draws = draws

    @property
    def largest(self) -> int | None:
        """So many images are passed through the model at a time (`bench.models.fit`); None: all."""
        return self._shared.largest

    @largest.setter
    def largest(self, largest: int | None) -> None:
        self._shared.largest = largest

    @property
    def shown(self) -> Shown:
        """What a pass has told of the MoEs inside; nothing before."""
        return self._shared.shown

    @shown.setter
    def shown(self, shown: Shown) -> None:
        self._shared.shown = shown

    @property
    def seen(self) -> set[str]:
        """What the model or a part of it did, in words."""
        return self._shared.seen

    def reseed(self, seed: int) -> None:
        """Seed the model's own random number generators."""
        self._shared.seed, self._shared.states = seed, _Randomness.of(seed)

    def forward(self, x: Tensor) -> Any:
        if self.draws == 1 or self._scores:
            return in_parts(self.once, x, self.largest)
        kept, passes = self._shared.states, []
        for draw in range(self.draws):
            self._shared.states = _Randomness.of(self._shared.seed + 1 + draw)
            passes.append(in_parts(self.once, x, self.largest))
        self._shared.states = kept
        return torch.stack(passes).mean(0)

    def once(self, x: Tensor) -> Any:
        """The logits (B, C) of one pass."""
        known = self.shown.inside if self._scores else ()
        inside = [partial(site.ask, self.model) for site in known if site.gate is bare(self)]
        answer = self._call(inside[0] if inside else self.model, x)
        answer = answer if self._scores else self._cast(answer, x)
        return self.counted(answer) if isinstance(answer, Tensor) else answer

    def part(self, inner: Any, scores: bool = False) -> "Guarded":
        """A part of the model behind the same guard: always the same one. `scores`: a router."""
        for known in self._shared.parts:
            if bare(known) is inner or (ismethod(inner) and bare(known) == inner):
                return known
        wrapped = self.shown.wrapped
        asked = inner if wrapped is None else Through(*wrapped, inner)
        self._shared.parts.append(Guarded(asked, shared=self._shared, scores=scores))
        return self._shared.parts[-1]

    def _call(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """What a function of the model's gives for images, behind the guard."""
        given, outside = x.clone(), _Randomness()
        version = given._version
        with _no_checkpoints(), settings_kept(lambda name: self.seen.add(f"the forward pass changes {name}")):
            self._shared.states.put()
            seed = torch.initial_seed()
            try:
                answer = function(given)
            finally:
                if torch.initial_seed() != seed:
                    self.seen.add("the forward pass seeds torch's random numbers")
                self._shared.states = _Randomness()
                outside.put()
        if given._version != version:
            self.seen.add("the forward pass writes into its input")
        return answer

    def _cast(self, logits: Any, x: Tensor) -> Any:
        """Logits in float32, with a gradient, though it be zero; anything but a tensor of numbers is given as it is."""
        logits, form = scored(logits)
        self.seen.update({form} - {""})
        if not isinstance(logits, Tensor) or logits.is_complex():
            return logits
        if logits.dtype != torch.float32:
            self.dtype = logits.dtype
            self.seen.add(f"logits are {str(logits.dtype).removeprefix('torch.')}, cast to float32")
            logits = logits.float()
        else:  # attacks write into what they are given, which may be a part of the model's own parameters
            logits = logits.clone()
        if x.requires_grad and torch.is_grad_enabled() and not self._reaches(logits, x):
            self.seen.add(NO_GRADIENT)
            logits = logits + 0 * x.flatten(1).sum(1).view(-1, *[1] * (logits.ndim - 1))
        return logits

    def _reaches(self, logits: Tensor, x: Tensor) -> bool:
        """Whether a gradient of the logits reaches the images; whether there is a path is looked up once."""
        if logits.requires_grad and self.connected is None:  # quantized layers have one to their own bias alone
            (gradient,) = torch.autograd.grad(logits.sum(), x, retain_graph=True, allow_unused=True)
            self.connected = gradient is not None
        return logits.requires_grad and bool(self.connected)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = self._of_model(name)
        if name == "trace":
            return self._trace
        if name == "experts" and isinstance(value, nn.ModuleList):
            return nn.ModuleList(self.part(expert) for expert in value)
        return self.part(value, scores=name == "router") if name in _PARTS and callable(value) else value

    def _of_model(self, name: str) -> Any:
        """An attribute of the model, or of what it wraps."""
        model = super().__getattr__("model")
        try:
            return getattr(model, name)
        except AttributeError:
            wrapped = self.__dict__["_shared"].shown.wrapped
            if wrapped is None or model is not wrapped[0] or name not in _SHOWN:
                raise
            return getattr(wrapped[1], name)

    def _trace(self, x: Tensor) -> Any:
        model: Any = self.model
        logits, trace = self._call(model.trace, x)
        return self._cast(logits, x), trace

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a module that knows none (torch.export) stays as it is."""
        self.training = mode
        switch_mode(self.model, mode)
        return self


def scored(output: Any) -> tuple[Any, str]:
    """What is scored of a model's output, its `logits` or a tuple's first entry, and in words where that is a part."""
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"], "outputs are a dict, whose `logits` are scored"
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return output.logits, "outputs are an object, whose `logits` are scored"
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        alike = sum(isinstance(entry, Tensor) and entry.shape == output[0].shape for entry in output)
        several = f"outputs are {alike} tensors of one shape, such as of several exits, of which the first is scored"
        return output[0], several if alike > 1 else "outputs are a tuple, whose first entry is scored"
    return output, ""


def bare(model: Any) -> Any:
    """The model or the part itself, whose modules are to be looked through, without its guard."""
    if not isinstance(model, Guarded):
        return model
    return model.model.part if isinstance(model.model, Through) else model.model


def behind(model: nn.Module, part: Any, scores: bool = False) -> Any:
    """A part of a model that is to be called by itself: behind the model's guard, if it has one."""
    return model.part(part, scores) if isinstance(model, Guarded) else part


def switch_mode(model: nn.Module, training: bool) -> None:
    """`model.train(training)`; a module that knows no modes (torch.export) stays as it is."""
    try:
        model.train(training)
    except NotImplementedError:
        model.training = training

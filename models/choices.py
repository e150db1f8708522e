"""Whether a model chooses by its input: signs of routes in a network that names none.

A network that sends images, tokens or channels down different paths is as robust as its worst path, and attacks that do
not know the paths overstate it. Two things give it away: names (gate, router, experts …), and the operations of one
forward pass whose result is a choice: an index, a comparison, a rounding that depends on the images and is then used.
A value that only passes on the best of several (max-pooling, the largest attention weight) chooses nothing: its index
is thrown away.

Axes: B = images, E = experts.
"""

import operator
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.models.foreign import scored
from bench.models.sites import Site, intercepted

#: What names a route wherever it stands; a `gate` may be a squeeze-and-excitation's sigmoid as well.
_ROUTES = re.compile(
    r"[Rr]outer|[Rr]outing|(^|_)routes?(_|$)|[Ee]xperts?(?![a-z])|[Mm]o[Ee](?![a-z])|MOE|EXPERT|ROUTER|[Gg]ater"
)
_GATE = re.compile(r"gate|gating", re.IGNORECASE)
#: A gate gives a score for each of at most so many experts; one that gives more is a layer's own activation.
_MOST_EXPERTS = 64

#: What gives numbers that have no gradient by what they are made of.
_ROUNDING = {
    "round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "heaviside", "copysign", "floor_divide", "fmod",
    "remainder", "nextafter", "histc", "histogram", "_histogramdd_from_bin_cts", "_histogramdd_bin_edges",
}  # fmt: skip
#: What weighs with a factor, and how near to one of two values all of such a factor's are where it decides.
_WEIGHS, _DECIDED = {"mul", "bmm", "lerp", "addcmul", "mm", "addmm", "linear"}, 1e-6
#: What passes on the largest of several, exactly or softly: of two tensors, or along an axis.
_BEST = {"amax", "max", "logsumexp", "maximum", "logaddexp"}
#: What gives an index along an axis; along one of length 1 all are 0, and nothing is chosen.
_BEST_OF = {"topk", "sort", "argsort", "max", "min", "argmax", "argmin", "kthvalue"}
#: So many values of an image at least show by chance hardly ever that all come from the same of several.
_WHOLE = 8
#: Channels of an image.
_COLOURS = 3
#: What no gradient and no stand-in for one follows, however it is declared.
_READ, _ELSEWHERE, _IN_A_THREAD = _OUTSIDE = (
    "values read by Python", "a computation outside torch", "a computation in another thread",
)  # fmt: skip
#: What hands a value to Python; and what a value, or a number of rows.
_TAKES = {"_local_scalar_dense", "is_nonzero", "item"}
_READS = {"nonzero", "masked_select", "equal", *_TAKES}
#: What moves an index or a mask and does not act on it.
_CARRIES = {"clone", "_to_copy", "detach", "contiguous", "copy", "cat", "stack", "lift_fresh", "alias"}
#: What acts on each element of a gate's output by itself, as a layer's activation does.
_EACH = {"sigmoid", "hardsigmoid", "tanh", "relu", "silu", "gelu", "clamp", "rsub", "_to_copy", "clone"}
#: Of these what brings each between two values, as where each head of attention has a gate of its own.
_BOUNDED = {"sigmoid", "hardsigmoid", "tanh"}
#: What gives the least or the largest of a tensor's values.
_EXTREMES = {"min", "max", "amin", "amax"}
#: Comparisons.
_COMPARES = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
#: What puts a number where there is none.
_REPLACES = {"where", "masked_fill"}
#: How `grid_sample` calls its mode that takes the nearest value.
_NEAREST = 1
#: Draws in name alone: attention without dropout, dropout that is off.
_NO_DRAW = re.compile(r"attention|dropout|rrelu")
#: What a layer with weights is made of.
_LAYERS = {
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "native_layer_norm", "native_group_norm",
    "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training",
}  # fmt: skip
#: Where operations come from that are what they are called; what one of a user's own does inside is not seen.
_KNOWN = {
    "aten", "prim", "prims", "quantized", "torchvision", "mkldnn", "mkl", "onednn", "xformers", "flash_attn",
}  # fmt: skip
#: What looks at a part of an image, and has no gradient by where that is.
_BOXES = re.compile(r"roi_(align|pool)$")
#: What takes a tensor's shape and device alone.
_MAKES = re.compile(r"^new_|_like$")


@dataclass(frozen=True)
class Choices:
    """Signs of routes. `names`: modules and attributes as globs over block numbers, such as `blocks.*.mlp.gate`;
    `operations`: what was chosen by, each with the module (as a glob) that did it, such as `topk in blocks.*.mlp`;
    `gates`: known ones that choose inside, by what their scores do not show; `read`: whether they are read inside;
    `outside`: those of the operations that Python acts on, or another library, or which are in a model that is scripted
    or quantized: no attack follows them.
    """

    names: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    read: bool = False
    outside: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.operations)

    @property
    def words(self) -> str:
        """What was seen, and what to type, in one line."""
        seen = []
        if self.operations:
            seen.append(f"choices that depend on the image ({few(self.operations)})")
        if self.names:
            seen.append(f"names that speak of routes ({few(self.names)})")
        if self.read:
            return f"{' and '.join(seen)}: beside the scores of '{self.gates[0]}', so that they cannot be forced alone"
        named = (name for name in self.names if _GATE.search(_last(name)) or "router" in _last(name))
        gate = next(iter((*self.gates, *named)), None)
        example = f"'{gate}'" if gate else "GLOB"
        name = f"name its gates with --gates {example}"
        inside = "choose by torch alone, which attacks can follow"
        if self.outside and self.gates:
            advice = inside
        elif any(operation.startswith(_OUTSIDE) for operation in self.outside):
            advice = f"{name}, and {inside}"
        else:
            advice = name if self.outside else f"{name}, or declare --gates none"
        return f"{' and '.join(seen)}: {advice}"


def find_choices(model: nn.Module, x: Tensor, known: Sequence[Site] = ()) -> Choices:
    """The signs of routes in a model in eval mode, from its code and from one forward pass on images x (B, c, H, W).

    What is chosen by the scores of the sites `known` alone is no sign, since those are attacked; nor is what decides
    nothing of the answer, nor a name beside one of their gates. A choice by anything else is one wherever it is made,
    inside an expert and inside a gate as well. The model must be able to take x; what it raises is raised. A compiled
    model is watched uncompiled. Draws random numbers where the model does.
    """
    model, watch = plain(model), _Watch(x)
    named = {module: name for name, module in reversed(list(model.named_modules()))}
    with ExitStack() as stack:
        for site in known:
            stack.enter_context(intercepted(site.plain, watch.known))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_inside(named, watch))
        stack.enter_context(_Reads(watch))
        stack.enter_context(watch)
        output = model(x)
    leaves = [leaf for leaf in tree_leaves(scored(output)[0]) if isinstance(leaf, Tensor)]
    if not any(map(watch.depends, leaves)):
        watch.report(_ELSEWHERE, "")
    found = watch.reaching(leaves) or watch.weighed
    words = {each: f"{each[0]} in {_glob(each[1]) or type(model).__name__}" for each in found}
    opaque = watch.quantized or any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    outside = [words[each] for each in found if opaque or each in watch.taken or each[0] in _OUTSIDE]
    gates = [site.name for site in known]
    inside = [site for site in known for _, where in found if _within(where, site.name)]
    return Choices(
        tuple(_names(model, watch.shapes, watch.elementwise - watch.scoring, gates)),
        tuple(dict.fromkeys(words.values())),
        tuple(dict.fromkeys(_glob(site.name) for site in inside)),
        bool(inside) and all(site.call is not None for site in inside),
        tuple(dict.fromkeys(outside)),
    )


def plain(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and the data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _holders(gate: str) -> Iterator[str]:
    """The module that a gate lies in; where that is named for a route as well, the one that it lies in, and so on."""
    outer = gate.rpartition(".")[0]
    yield outer
    while outer and (_GATE.search(_last(outer)) or _ROUTES.search(_last(outer))):
        outer = outer.rpartition(".")[0]
        yield outer


def _names(
    model: nn.Module, shapes: dict[str, list[tuple[int, ...]]], elementwise: set[str], gates: list[str]
) -> Iterator[str]:
    """Globs of what is named like a route: modules, else a module's attributes, else its class.

    shapes: as `_scores` takes them, by module; elementwise: what is called gate and scales each of a layer's features.

    What lies beside one of the gates is named for that; of what the model holds itself, all that is called experts or
    the like.
    """
    holders = {outer for gate in gates for outer in _holders(gate)}
    known = [*gates, *filter(None, holders)]
    if "" in holders:
        known += [name for name, _ in model.named_children() if _ROUTES.search(name) or _GATE.search(name)]
    modules = {name: m for name, m in model.named_modules() if not any(_within(name, outer) for outer in known)}
    if "" in holders:
        modules = {name: m for name, m in modules.items() if "." in name}
    found, others = list[str](), list[str]()  # chains called gate that score no experts: nor do their links
    for name, module in modules.items():
        last = _last(name)
        gate = bool(_GATE.search(last)) and not any(_within(name, outer) for outer in others)
        scores = gate and name not in elementwise and _scores(module, shapes.get(name, ()))
        others += [name] * (gate and not scores and isinstance(module, nn.Sequential))
        if (_ROUTES.search(last) or scores) and not any(_within(name, seen) for seen in found):
            found.append(name)
    for name, module in modules.items():
        if any(_within(other, name) or _within(name, other) for other in found):
            continue
        own = [*vars(module), *_keys(module.named_parameters), *_keys(module.named_buffers)]
        own = [attribute for attribute in own if not attribute.startswith("_") and _ROUTES.search(attribute)]
        found += [f"{name}.{attribute}".lstrip(".") for attribute in own]
        holds = any(_within(outer, name) for outer in known)  # the class is named for what is known
        if not own and not holds and _ROUTES.search(type(module).__name__):
            found.append(name)
    return iter(dict.fromkeys(_glob(name) or type(model).__name__ for name in found))


def _keys(named: Callable[..., Iterable[tuple[str, Tensor]]]) -> list[str]:
    return [name for name, _ in named(recurse=False)]


def _within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _scores(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a module called gate gives scores of experts: it has weights, and few values where its input has more.

    `shapes`: of its first input, then of its outputs, in one call; nothing where it was not called. Attention to
    channels gives one value for each, attention to places a map of its own, and a gated layer more than it is given.
    """
    if not any(True for _ in module.parameters()):
        return False
    if not shapes:
        return True
    given, *outputs = shapes
    for shape in outputs:
        maps = len(shape) == 4
        values = shape[1] if maps else shape[-1] if shape else 0
        features = given[1] if len(given) == 4 else given[-1] if given else 0
        each = values == features > _COLOURS if len(given) == 4 else values >= features
        if shape != given and 2 <= values <= _MOST_EXPERTS and not each:
            return True
    return False


def _last(name: str) -> str:
    """The last part of a dotted name that is no number."""
    return next((part for part in reversed(name.split(".")) if not (part.isdigit() or part == "*")), "")


def _glob(name: str) -> str:
    """The name with `*` for the numbers of blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def few(words: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    first, more = list(words)[:3], len(list(words)) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _inside(named: dict[nn.Module, str], watch: "_Watch") -> Iterator[None]:
    """The watch knows in which module it is, and what shapes modules called gate take and give."""
    handles, own = [], threading.current_thread()

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        watch.where.append(named[module])
        if threading.current_thread() is not own:  # of whose operations torch shows the watch none
            watch.report(_IN_A_THREAD)

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        watch.where.pop()
        if _GATE.search(named[module]):
            tensors = [leaf for leaf in tree_leaves((inputs[:1], output)) if isinstance(leaf, Tensor)]
            watch.shapes[named[module]] = [tuple(tensor.shape) for tensor in tensors]
            if isinstance(output, Tensor):
                watch.gated[_key(output)] = named[module]

    for module in named:
        try:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        except (RuntimeError, AttributeError):  # a scripted part takes no hooks: it goes by the name of its parent
            continue
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Follows what depends on the images through all operations, and which of it are choices.

    An integer or a truth value computed from images is a choice once another operation uses it, and what comes of that
    reaches the answer, or Python. Storages are followed, not tensors, so that views and what is written in place count
    too.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scores: set[object] = set()  # what is computed from the scores of known sites alone
        self.explained: set[object] = set()  # what comes of these and of others, without a layer in between
        self.data = {_key(x)}
        self.images: set[object] = {_key(x)}  # as they were given; none once they are written into
        self.extremes: set[object] = set()  # what their least or largest pixel is
        self.two_valued = _decides(x)  # black and white
        self.decided: dict[object, tuple[str, str]] = {}  # storage → the operation and the module that chose
        self.by: defaultdict[object, dict[tuple[str, str], None]] = defaultdict(dict)  # storage → choices it comes of
        self.signs: set[object] = set()  # masks of what is above or below 0
        self.finite: set[object] = set()  # masks of what is a number, and what is computed from such alone
        self.found: dict[tuple[str, str], None] = {}
        self.quantized = False  # whether a layer is, and has no gradient
        self.taken: dict[tuple[str, str], None] = {}  # of these what Python has read
        self.weighed: dict[tuple[str, str], None] = {}  # what acts like a choice, which may follow from a found one
        self.where: list[str] = [""]
        self.checking = False  # whether what is read now decides nothing
        self.shapes: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
        self.gated: dict[object, str] = {}  # storage → the module called gate of whose output each element is one
        self.bounded: set[object] = set()  # of such outputs those that are each between two values by themselves
        self.elementwise: set[str] = set()  # those whose output scales another, each value by itself
        self.scoring: set[str] = set()  # those of whose output something else is made as well

    def depends(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on the images."""
        return _key(tensor) in self.data or _key(tensor) in self.decided

    def reaching(self, answer: Iterable[Tensor]) -> dict[tuple[str, str], None]:
        """The choices that Python has read, and those of which an answer comes."""
        return self.found | {choice: None for tensor in answer for choice in self.by[_key(tensor)]}

    def report(self, operation: str, where: str | None = None) -> None:
        self.found[operation, self.where[-1] if where is None else where] = None

    def known(self, scores: Tensor) -> Tensor:
        """A copy of scores of a known site: what is chosen by it is no sign of other routes, what it comes of is."""
        self.found |= self.by[_key(scores)]
        scores = scores.clone()
        self.scores.add(_key(scores))
        return scores

    def read(self, tensor: Tensor) -> None:
        """Python has read values of the tensor."""
        if _key(tensor) in self.scores:
            return
        if (key := _key(tensor)) in self.decided:
            self.found[self.decided[key]] = self.taken[self.decided[key]] = None
        elif key in self.data:
            self.report(_READ)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__.removesuffix("_")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not func.is_view:
            self._follow(func, name, inputs, outputs, args, kwargs)
        return output

    def _follow(
        self,
        func: Any,
        name: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        keys = [_key(tensor) for tensor in inputs]
        pairs = list(zip(keys, inputs, strict=True))
        if name in _EXTREMES and len(keys) == 1 and keys[0] in self.images:
            self.extremes |= {_key(tensor) for tensor in outputs}
        elif keys and keys[0] in self.extremes and _checks_range(name, args):
            return
        self.images.difference_update(map(_key, outputs))
        depending = [key for key in keys if key in self.data or key in self.decided]
        self._scales(name, inputs, outputs, len(depending))
        # what gates that are attacked choose; a layer with weights ends it
        if depending and self.scores.issuperset(depending) and name not in _LAYERS:
            for tensor in outputs:
                self.scores.add(_key(tensor))
                self.data.add(_key(tensor))
            return
        if name == "_softmax" and inputs[0].dim() and inputs[0].shape[args[1]] == 1:
            return  # attention to a single token: 1, whatever the images
        if finite := self.finite.intersection(keys):
            others = [key for key in depending if key not in finite]
            if not others:  # still what is finite, and read by whoever looks out for errors
                self.finite |= {_key(tensor) for tensor in outputs}
                return
        chosen = [self.decided[key] for key in keys if key in self.decided]
        by = {choice: None for key in keys for choice in self.by[key]}
        of_data = any(key in self.data for key in keys)
        if (name in _COMPARES and len(keys) == 1 and args[1] == 0) or (name == "_to_copy" and keys[0] in self.signs):
            self.signs |= {_key(tensor) for tensor in outputs}
        value = _rectified(*inputs) if name == "mul" and len(keys) == 2 and self.signs.intersection(keys) else None
        if value is not None or (name == "where" and _is_activation(args)):
            self.data |= {_key(tensor) for tensor in outputs}
            self._comes(outputs, by if value is None else self.by[_key(value)])
            return
        self.quantized |= of_data and func.namespace == "quantized"
        if of_data and func.namespace not in _KNOWN:
            by[f"an operation of its own ({func.namespace}::{name})", self.where[-1]] = None
        draws = torch.Tag.nondeterministic_seeded in func.tags and not _NO_DRAW.search(name)
        if draws and of_data and not _MAKES.search(name):  # by odds that the images set
            self.report(f"random draw ({name})")
        if chosen and not (name in _CARRIES and not any(tensor.is_floating_point() for tensor in outputs)):
            by |= dict.fromkeys(chosen)
        reads = name in _READS and not self.checking
        if reads:
            self.found |= by
            self.taken |= by if name in _TAKES else {}
        if of_data and reads:
            self.report(_READ if name in _TAKES else name)
        if of_data and (name in _ROUNDING or (name == "div" and kwargs.get("rounding_mode"))):
            by["rounding" if name == "div" else name, self.where[-1]] = None
        if finite and not (name in _REPLACES and len(others) == 1):
            by[f"what is finite ({name})", self.where[-1]] = None
        if name in _WEIGHS and not self.two_valued:
            factors = {key: tensor for key, tensor in pairs if key in self.data}
            several = len(factors) > 1 or name in _LAYERS
            most = max((_bytes(tensor) for tensor in factors.values()), default=0)
            for key, factor in factors.items():
                alone = _bytes(factor) < most  # a feature map may be 0 before it is trained
                if not several or key in self.scores or key in self.explained:
                    continue
                if _decides(factor, alone=alone):
                    self.weighed[f"weights of two values ({name})", self.where[-1]] = None
                elif _leaves_out(factor, among_others=len(factors) > 1):
                    self.weighed[f"weights that are nearly 0 ({name})", self.where[-1]] = None
        if of_data and name in _BEST and self.scores.isdisjoint(depending) and _one_wins(args, kwargs):
            self.weighed[f"one of several wins as a whole ({name})", self.where[-1]] = None
        if of_data and name.startswith("grid_sampler") and keys[1:] and keys[1] in self.data and args[2] == _NEAREST:
            by["nearest sample", self.where[-1]] = None
        if _BOXES.search(name) and keys[1:] and keys[1] in self.data:
            by[f"where to look ({name})", self.where[-1]] = None
        if not (of_data or chosen) or _MAKES.search(name):
            return
        if _tests_finiteness(name, keys, args):
            self.finite |= {_key(tensor) for tensor in outputs}
            return
        if name not in _LAYERS and any(key in self.scores or key in self.explained for key in keys):
            self.explained |= {_key(tensor) for tensor in outputs}
        self._comes(outputs, by)
        origin = chosen[0] if chosen else ("rounding to integers" if name == "_to_copy" else name, self.where[-1])
        for tensor in outputs:
            if tensor.is_floating_point() or tensor.is_complex():
                self.data.add(_key(tensor))
            elif name not in _BEST_OF or tensor.numel() != inputs[0].numel() or tensor.any():
                self.decided[_key(tensor)] = origin

    def _scales(self, name: str, inputs: list[Tensor], outputs: list[Tensor], depending: int) -> None:
        """Follows what modules called gate have given: to where it scales another value, or is used otherwise.

        depending: how many of the inputs depend on the images.
        """
        known = [key for key in map(_key, inputs) if key in self.gated]
        gates = {self.gated[key] for key in known}
        bounded = self.bounded.issuperset(known)
        if gates and name in _EACH:
            self.gated |= {_key(tensor): gate for tensor in outputs for gate in gates}
            self.bounded |= {_key(tensor) for tensor in outputs} if bounded or name in _BOUNDED else set()
        elif gates and name == "mul" and depending == 2 and (bounded or _alike(*inputs)):
            self.elementwise |= gates
        else:
            self.scoring |= gates

    def _comes(self, outputs: Iterable[Tensor], by: dict[tuple[str, str], None]) -> None:
        """Outputs come of these choices; what scores were written into is no score of a known site any more."""
        for tensor in outputs:
            self.by[_key(tensor)] |= by
            self.scores.discard(_key(tensor))


class _Reads(TorchFunctionMode):
    """Sees what leaves torch without an operation: `numpy`, `tolist`."""

    _LEAVING: tuple[Callable[..., Any], ...] = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
    _CHECKING: tuple[Callable[..., Any], ...] = (F.one_hot,)  # it reads whether classes are in their range

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._LEAVING:
            self.watch.read(args[0])
        self.watch.checking = func in self._CHECKING
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.watch.checking = False


def _checks_range(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a pixel's comparison with a number turns out alike for all in [0, 1], as a check of inputs does."""
    limit = args[1] if len(args) > 1 else None
    if name not in _COMPARES or not isinstance(limit, int | float):
        return False
    return _COMPARES[name](0.0, limit) == _COMPARES[name](1.0, limit)


def _tests_finiteness(name: str, keys: list[object], args: tuple[Any, ...]) -> bool:
    """x == x and |x| ≠ ∞, which `isnan` and `isfinite` are made of: they tell nothing of an image."""
    if name in ("eq", "ne"):
        infinite = isinstance(args[1], int | float) and abs(args[1]) == float("inf")
        return (len(keys) == 2 and keys[0] == keys[1]) or infinite
    return name in ("isnan", "isinf", "isfinite", "isposinf", "isneginf")


def _is_activation(args: tuple[Any, ...]) -> bool:
    """Whether `where` is a ReLU or a leaky one: a value where it is above 0, and a multiple of it elsewhere.

    Of a mask that is the same everywhere nothing is known.
    """
    if len(args) != 3 or not all(isinstance(one, Tensor) and one.is_floating_point() for one in args[1:]):
        return False
    if bool(args[0].all()) or not bool(args[0].any()):
        return False
    one, other = (torch.where(side, *args[1:]) for side in (args[0] | True, args[0] & False))
    mask = args[0].expand_as(one)
    for kept, value, rest in ((mask, one, other), (~mask, other, one)):
        if torch.equal(kept, value > 0) or torch.equal(kept, value >= 0):
            ratio = (rest / value)[value != 0]
            return bool(ratio.numel()) and bool((ratio - ratio[0]).abs().amax() <= _DECIDED)
    return False


def _rectified(one: Tensor, other: Tensor) -> Tensor | None:
    """Of a value and the mask of where it is above 0, which is not everywhere alike, the value: both make a ReLU."""
    for value, mask in ((one, other), (other, one)):
        sides = (value > 0, value >= 0) if value.is_floating_point() else ()
        if bool(mask.any()) and not bool(mask.all()) and any(torch.equal(mask, side.to(mask)) for side in sides):
            return value
    return None


def _decides(factor: Tensor, *, alone: bool = False) -> bool:
    """Whether a factor that depends on the images has two values on several of them, such as 0 and 1; `alone`: or one
    of these on all.

    A softmax, a sigmoid or a clamp that is never between them weighs as a choice does, and hides it. Attention that is
    sure of each token (T × T) does not count.
    """
    if not _may_weigh(factor) or (factor.dim() == 3 and factor.shape[1] == factor.shape[2]):
        return False
    low, high = factor.amin(), factor.amax()
    near = _DECIDED * torch.maximum(low.abs(), high.abs())
    apart = high - low > 10 * near  # a sigmoid of nearly 0 is 0.5 but for rounding
    two = bool((torch.minimum(factor - low, high - factor) <= near).all() & apart)
    return two or (alone and any(bool((factor - value).abs().amax() <= _DECIDED) for value in (0, 1)))


def _leaves_out(factor: Tensor, *, among_others: bool) -> bool:
    """Whether weights are nearly 0 for some expert on all images, and not for the others, as a softmax's are.

    They are (B, E), or have axes of length 1 as well. A ReLU's or a clamp's are exactly 0, which channels may be, too.
    `among_others`: another factor depends on the images as well; else the rows have to sum to 1, as a layer's
    activations do not.
    """
    if not _may_weigh(factor):
        return False
    weights = factor.reshape(len(factor), -1)
    if weights.shape[1] not in factor.shape[1:] or not 2 <= weights.shape[1] <= _MOST_EXPERTS:
        return False
    shares = bool(((weights.sum(1) - 1).abs() < 1e-3).all())
    if not bool((weights >= 0).all()) or not (shares or (among_others and bool((weights > 0).all()))):
        return False
    return bool((weights.amax(0) <= _DECIDED * weights.amax()).any())


def _one_wins(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all that is passed on of each image comes from the same of several, as an expert's whole output does.

    Pooling takes each value from where it is largest.
    """
    tensors = [one for one in args if isinstance(one, Tensor)]
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        values, dim = torch.stack(tensors, 1), 1
    else:
        values, axis = tensors[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        axes = axis if isinstance(axis, list | tuple) else [axis]
        if len(axes) != 1 or not isinstance(axes[0], int):
            return False
        dim = axes[0] % max(values.dim(), 1)
    if not _may_weigh(values) or values.dim() < 3 or not dim or not 2 <= values.shape[dim] <= _MOST_EXPERTS:
        return False
    best, where = values.movedim(dim, 1).flatten(2).topk(2, dim=1)
    clear = best.shape[2] >= _WHOLE and bool((best[:, 0] > best[:, 1]).all())
    return clear and bool((where[:, 0] == where[:, 0, :1]).all())


def _may_weigh(factor: Tensor) -> bool:
    """Whether it holds numbers of several images."""
    plain = factor.is_floating_point() and not factor.is_sparse and not factor.is_mkldnn
    return plain and factor.dim() >= 2 and len(factor) >= 2


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same shape, and neither had to be expanded to it."""
    return one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> int:
    """The size of its storage: of what was expanded that from before."""
    return 0 if tensor.is_sparse or tensor.is_mkldnn else tensor.untyped_storage().nbytes()


def _key(tensor: Tensor) -> object:
    """What all tensors of one storage share; alive as long as it is kept, so that no later storage gets its address."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # sparse tensors and those of oneDNN have none
        return tensor

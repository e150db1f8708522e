"""What a forward pass does with whatever depends on its images: which of torch's operations choose by it.

Axes: B = images, E = experts, T = tokens.
"""

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: A gate gives a score for each of at most so many experts; one that gives more is a layer's own activation.
MOST_EXPERTS = 64
#: What no gradient and no stand-in for one follows, however it is declared.
READ, ELSEWHERE, IN_A_THREAD = OUTSIDE = (
    "values read by Python", "a computation outside torch", "a computation in another thread",
)  # fmt: skip

#: What gives numbers that have no gradient by what they are made of.
_ROUNDING = {
    "round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "heaviside", "copysign", "floor_divide", "fmod",
    "remainder", "nextafter", "histc", "histogram", "_histogramdd_from_bin_cts", "_histogramdd_bin_edges",
}  # fmt: skip
#: What says all of itself, and the same in each pass.
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
#: What weighs with a factor, and how near to one of two values all of such a factor's are where it decides.
_WEIGHS, _DECIDED = {
    "mul", "bmm", "lerp", "addcmul", "mm", "addmm", "linear", "convolution", "_trilinear", "_embedding_bag", "clamp",
}, 1e-6  # fmt: skip
#: What passes on the largest of several, exactly or softly: of two tensors, or along an axis.
_BEST = {"amax", "max", "logsumexp", "maximum", "logaddexp"}
#: What gives an index along an axis; along one of length 1 all are 0, and nothing is chosen.
_BEST_OF = {"topk", "sort", "argsort", "max", "min", "argmax", "argmin", "kthvalue"}
#: So many values of an image at least show by chance hardly ever that all come from the same of several.
_WHOLE = 8
#: What hands a value to Python; and what a value, or a number of rows.
_TAKES = {"_local_scalar_dense", "is_nonzero", "item"}
_READS = {"nonzero", "masked_select", "equal", *_TAKES}
#: What gives so many values as the images say, beside what torch marks as such.
_SIZED = re.compile(r"^_?(unique|to_sparse)")
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
#: The same by themselves.
_PASSES_OVER = {"nansum", "nan_to_num", "nanmedian"}
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

#: A choice: what it was made by, and the module that did it.
Choice = tuple[str, str]


@dataclass(frozen=True)
class Operation:
    """One of torch's, as it was called, and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @cached_property
    def name(self) -> str:
        """Without the mark of those in place."""
        name: str = self.func.overloadpacket.__name__
        return name.removesuffix("_")

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]

    @cached_property
    def keys(self) -> list[object]:
        """The storages of its inputs."""
        return [key(tensor) for tensor in self.inputs]

    @cached_property
    def made(self) -> list[object]:
        """The storages of its outputs."""
        return [key(tensor) for tensor in self.outputs]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Follows what depends on the images through all operations, and which of it are choices.

    An integer or a truth value computed from images is a choice once another operation uses it, and what comes of that
    reaches the answer, or Python. Storages are followed, not tensors, so that views and what is written in place count
    too.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scores: set[object] = set()  # what is computed from the scores of known sites alone
        self.explained: set[object] = set()  # what comes of these and of others, without a layer in between
        self.data = {key(x)}
        self.images: set[object] = {key(x)}  # as they were given; none once they are written into
        self.extremes: set[object] = set()  # what their least or largest pixel is
        self.two_valued = _decides(x)  # black and white
        self.decided: dict[object, Choice] = {}  # storage → the operation and the module that chose
        self.by: defaultdict[object, dict[Choice, None]] = defaultdict(dict)  # storage → choices it comes of
        self.signs: set[object] = set()  # masks of what is above or below 0
        self.finite: dict[object, set[object]] = {}  # masks of what is a number, and their like → of which storages
        self.found: dict[Choice, None] = {}
        self.quantized = False  # whether a layer is, and has no gradient
        self.taken: dict[Choice, None] = {}  # of these what Python has read
        self.weighed: dict[Choice, None] = {}  # what acts like a choice, which may follow from a found one
        self.where: list[str] = [""]
        self.checking = False  # whether what is read now decides nothing
        self.shapes: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
        self.gated: dict[object, str] = {}  # storage → the module called gate of whose output each element is one
        self.bounded: set[object] = set()  # of such outputs those that are each between two values by themselves
        self.elementwise: set[str] = set()  # those whose output scales another, each value by itself
        self.scoring: set[str] = set()  # those of whose output something else is made as well

    def depends(self, tensor: Tensor) -> bool:
        """Whether the tensor depends on the images."""
        return key(tensor) in self.data or key(tensor) in self.decided

    def reaching(self, answer: Iterable[Tensor]) -> dict[Choice, None]:
        """The choices that Python has read, and those of which an answer comes."""
        return self.found | {choice: None for tensor in answer for choice in self.by[key(tensor)]}

    def report(self, operation: str, where: str | None = None) -> None:
        self.found[operation, self.where[-1] if where is None else where] = None

    def known(self, scores: Tensor) -> Tensor:
        """A copy of scores of a known site: what is chosen by it is no sign of other routes, what it comes of is."""
        self.found |= self.by[key(scores)]
        scores = scores.clone()
        self.scores.add(key(scores))
        return scores

    def read(self, tensor: Tensor) -> None:
        """Python has read values of the tensor."""
        if (of := key(tensor)) in self.scores:
            return
        if of in self.decided:
            self.found[self.decided[of]] = self.taken[self.decided[of]] = None
        elif of in self.data:
            self.report(READ)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not func.is_view:
            self._follow(Operation(func, args, kwargs, output))
        return output

    @staticmethod
    def _tabulates(op: Operation, depending: Sequence[object]) -> bool:
        """Whether what an operation multiplies with is 0 or 1 everywhere, as which channels belong to each expert."""
        others = [tensor for tensor, each in zip(op.inputs, op.keys, strict=True) if each not in depending]
        return all(bool(((tensor == 0) | (tensor == 1)).all()) for tensor in others)

    def _follow(self, op: Operation) -> None:
        """Notes what the outputs depend on, and which choices they come of."""
        if self._checks_images(op):
            return
        depending = [each for each in op.keys if each in self.data or each in self.decided]
        self._scales(op, len(depending))
        # else it is a product of scores and what they chose, or of a table of what each expert has
        weights = op.name in _LAYERS and len(depending) == 1 and not self._tabulates(op, depending)
        if depending and self.scores.issuperset(depending) and not weights:
            # what gates that are attacked choose; a layer with weights ends it
            self.scores.update(op.made)
            self.data.update(op.made)
            return
        if op.name == "_softmax" and op.inputs[0].dim() and op.inputs[0].shape[op.args[1]] == 1:
            return  # attention to a single token: 1, whatever the images
        finite = set[object]().union(*(self.finite.get(each, ()) for each in op.keys))
        others = [each for each in depending if each not in self.finite]
        by = {choice: None for each in op.keys for choice in self.by[each]}
        if finite and not others:  # still what is finite, and read by whoever looks out for errors
            self._reads(op, by, of_data=False)
            self._comes(op.made, by)
            self.finite |= dict.fromkeys(op.made, finite)
            return
        if self._activates(op):
            return
        of_data = any(each in self.data for each in op.keys)
        chosen = [self.decided[each] for each in op.keys if each in self.decided]
        by |= self._uses(op, chosen, of_data)
        self._reads(op, by, of_data)
        if finite and not (op.name in _REPLACES and len(others) == 1 and finite.issuperset(others)):
            by[f"what is finite ({op.name})", self.where[-1]] = None
        by |= {(word, self.where[-1]): None for word in self._chooses(op, of_data)}
        self._weighs(op, of_data and self.scores.isdisjoint(depending))
        if not (of_data or chosen) or _MAKES.search(op.name):
            return
        if _tests_finiteness(op):
            self._comes(op.made, by)
            self.finite |= {each: set(op.keys) for each in op.made}
            return
        if op.name not in _LAYERS and any(each in self.scores or each in self.explained for each in op.keys):
            self.explained.update(op.made)
        self._comes(op.made, by)
        origin = chosen[0] if chosen else ("rounding to integers" if op.name == "_to_copy" else op.name, self.where[-1])
        for tensor in op.outputs:
            if tensor.is_floating_point() or tensor.is_complex():
                self.data.add(key(tensor))
            elif op.name not in _BEST_OF or tensor.numel() != op.inputs[0].numel() or tensor.any():
                self.decided[key(tensor)] = origin

    def _checks_images(self, op: Operation) -> bool:
        """Whether it asks of the images only whether their pixels are in a range."""
        if op.keys and op.keys[0] in self.images | self.extremes and _checks_range(op):
            return True
        self.images.difference_update(op.made)
        self.extremes.difference_update(op.made)  # written into
        if op.name in _EXTREMES and len(op.keys) == 1 and op.keys[0] in self.images:
            self.extremes.update(key(tensor) for tensor in op.outputs if tensor.is_floating_point())  # no index
        return False

    def _activates(self, op: Operation) -> bool:
        """Whether it ends a ReLU that is written by a mask of signs: what comes of that is the value's own."""
        of_zero = op.name in _COMPARES and len(op.keys) == 1 and op.args[1] == 0
        if of_zero or (op.name == "_to_copy" and op.keys[0] in self.signs):
            self.signs.update(op.made)
        product = op.name == "mul" and len(op.keys) == 2 and bool(self.signs.intersection(op.keys))
        value = _rectified(*op.inputs) if product else None
        if value is None and not (op.name == "where" and _is_activation(op)):
            return False
        values = op.inputs if value is None else [value]
        self.data.update(op.made)
        self._comes(op.made, {choice: None for each in values for choice in self.by[key(each)]})
        return True

    def _uses(self, op: Operation, chosen: list[Choice], of_data: bool) -> dict[Choice, None]:
        """The choices that it acts on; of an operation that is not known, itself."""
        by: dict[Choice, None] = {}
        self.quantized |= of_data and op.func.namespace == "quantized"
        if of_data and op.func.namespace not in _KNOWN:
            by[f"an operation of its own ({op.func.namespace}::{op.name})", self.where[-1]] = None
        if chosen and not (op.name in _CARRIES and not any(tensor.is_floating_point() for tensor in op.outputs)):
            by |= dict.fromkeys(chosen)
        return by

    def _reads(self, op: Operation, by: dict[Choice, None], of_data: bool) -> None:
        """Notes draws by odds that the images set, and what is handed to Python, which comes of the choices `by`.

        A number of values that is not known beforehand is handed to it, too, as a tensor's shape.
        """
        draws = torch.Tag.nondeterministic_seeded in op.func.tags and not _NO_DRAW.search(op.name)
        if draws and of_data and not _MAKES.search(op.name):
            self.report(f"random draw ({op.name})")
        if (op.name in _READS or _is_sized(op)) and not self.checking:
            self.found |= by
            self.taken |= by if op.name in _TAKES else {}
            if of_data and op.name != "index":  # whose mask is among the choices
                self.report(READ if op.name in _TAKES else op.name)

    def _chooses(self, op: Operation, of_data: bool) -> Iterator[str]:
        """What has no gradient by the images, in words."""
        if of_data and (op.name in _ROUNDING or (op.name == "div" and op.kwargs.get("rounding_mode"))):
            yield "rounding" if op.name == "div" else op.name
        if of_data and op.name in _PASSES_OVER and not op.inputs[0].isfinite().all():
            yield f"what is finite ({op.name})"
        placed = bool(op.keys[1:]) and op.keys[1] in self.data
        if of_data and placed and op.name.startswith("grid_sampler") and op.args[2] == _NEAREST:
            yield "nearest sample"
        if placed and _BOXES.search(op.name):
            yield f"where to look ({op.name})"

    def _weighs(self, op: Operation, unexplained: bool) -> None:
        """Notes weights and maxima that act as a choice does; unexplained: none of it is a known site's scores."""
        if op.name in _WEIGHS and not self.two_valued:
            factors = {each: tensor for each, tensor in zip(op.keys, op.inputs, strict=True) if each in self.data}
            kernels = op.name == "convolution"  # for each image its own, or else its input is a map, of any values
            several = len(factors) > 1 or (op.name in _LAYERS and not kernels)
            most = max((_bytes(tensor) for tensor in factors.values()), default=0)
            for each, factor in factors.items():
                alone = _bytes(factor) < most  # a feature map may be 0 before it is trained
                # what is expanded scales no single value, but a whole, such as an expert's weights
                whole = not kernels and any(one.numel() > factor.numel() for one in op.outputs)
                if not (several or whole) or each in self.scores or each in self.explained:
                    continue
                if _decides(factor, alone=alone):
                    self.weighed[f"weights of two values ({op.name})", self.where[-1]] = None
                elif _leaves_out(factor, among_others=len(factors) > 1):
                    self.weighed[f"weights that are nearly 0 ({op.name})", self.where[-1]] = None
        if unexplained and op.name in _BEST and _one_wins(op):
            self.weighed[f"one of several wins as a whole ({op.name})", self.where[-1]] = None

    def _scales(self, op: Operation, depending: int) -> None:
        """Follows what modules called gate have given: to where it scales another value, or is used otherwise.

        depending: how many of the inputs depend on the images.
        """
        known = [each for each in op.keys if each in self.gated]
        gates = {self.gated[each] for each in known}
        bounded = self.bounded.issuperset(known)
        if gates and op.name in _EACH:
            self.gated |= {each: gate for each in op.made for gate in gates}
            self.bounded.update(op.made if bounded or op.name in _BOUNDED else ())
        elif gates and op.name == "mul" and depending == 2 and (bounded or _alike(*op.inputs)):
            self.elementwise |= gates
        else:
            self.scoring |= gates

    def _comes(self, made: Iterable[object], by: dict[Choice, None]) -> None:
        """What is made comes of these choices; what scores were written into is no score of a known site any more."""
        for each in made:
            self.by[each] |= by
            self.scores.discard(each)


class Steps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes a forward pass's operations in order, each with what it takes.

    That is, of a tensor, the step that made it, or which of the `kept` it is, such as weights; else a digest of its
    values, since it comes from outside of torch. Of a quantized layer's weights, which are another object in each
    pass, the tensors in it; of a number and its like what it says; of any other object its type.
    """

    def __init__(self, x: Tensor, kept: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[object, object] = {key(tensor): f"kept {number}" for number, tensor in enumerate(kept)}
        self._known[key(x)] = 0
        self.taken: list[tuple[object, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [self._what(leaf) for leaf in tree_leaves((args, kwargs))]
        output = func(*args, **(kwargs or {}))
        self.taken.append((str(func), *given))
        if not func.is_view:
            self._known |= {key(leaf): len(self.taken) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
        return output

    def _what(self, leaf: object) -> object:
        if isinstance(leaf, torch.ScriptObject):
            return tuple(self._what(part) for part in tree_leaves(leaf.__getstate__()))
        if not isinstance(leaf, Tensor):
            return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf)
        if (known := self._known.get(key(leaf))) is not None:
            return known
        values = leaf.dequantize() if leaf.is_quantized else leaf.detach()
        if values.layout is not torch.strided:
            values = values.to_dense()
        values = values.resolve_conj().resolve_neg().cpu().reshape(-1).contiguous()
        return sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


class Reads(TorchFunctionMode):
    """Sees what leaves torch without an operation: `numpy`, `tolist`."""

    _LEAVING: tuple[Callable[..., Any], ...] = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
    _CHECKING: tuple[Callable[..., Any], ...] = (F.one_hot,)  # it reads whether classes are in their range

    def __init__(self, watch: Watch) -> None:
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


def key(tensor: Tensor) -> object:
    """What all tensors of one storage share; alive as long as it is kept, so that no later storage gets its address."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # sparse tensors and those of oneDNN have none
        return tensor


def _checks_range(op: Operation) -> bool:
    """Whether a pixel's comparison with a number turns out alike for all in [0, 1], as a check of inputs does."""
    limit = op.args[1] if len(op.args) > 1 else None
    if op.name not in _COMPARES or not isinstance(limit, int | float):
        return False
    return _COMPARES[op.name](0.0, limit) == _COMPARES[op.name](1.0, limit)


def _tests_finiteness(op: Operation) -> bool:
    """x == x and |x| ≠ ∞, which `isnan` and `isfinite` are made of: they tell nothing of an image."""
    if op.name in ("eq", "ne"):
        infinite = isinstance(op.args[1], int | float) and abs(op.args[1]) == float("inf")
        return infinite or (len(op.inputs) == 2 and _is_same(*op.inputs))
    return op.name in ("isnan", "isinf", "isfinite", "isposinf", "isneginf")


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same part of one storage, in the same order."""
    places = [(key(each), each.storage_offset(), each.shape, each.stride()) for each in (one, other)]
    return places[0] == places[1]


def _is_sized(op: Operation) -> bool:
    """Whether how many values it gives depends on what it is given."""
    if op.name == "index":  # of numbers as many as there are
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in op.args[1])
    return torch.Tag.dynamic_output_shape in op.func.tags or bool(_SIZED.search(op.name))


def _is_activation(op: Operation) -> bool:
    """Whether `where` is a ReLU or a leaky one: a value where it is above 0, and a multiple of it elsewhere.

    Of a mask that is the same everywhere nothing is known.
    """
    if len(op.args) != 3 or not all(isinstance(one, Tensor) and one.is_floating_point() for one in op.args[1:]):
        return False
    mask, first, second = op.args
    if bool(mask.all()) or not bool(mask.any()):
        return False
    one, other = torch.where(mask | True, first, second), torch.where(mask & False, first, second)
    mask = mask.expand_as(one)
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
    if not _may_weigh(factor) or (factor.dim() == 3 and factor.shape[1] == factor.shape[2] > 1):
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
    if weights.shape[1] not in factor.shape[1:] or not 2 <= weights.shape[1] <= MOST_EXPERTS:
        return False
    shares = bool(((weights.sum(1) - 1).abs() < 1e-3).all())
    if not bool((weights >= 0).all()) or not (shares or (among_others and bool((weights > 0).all()))):
        return False
    return bool((weights.amax(0) <= _DECIDED * weights.amax()).any())


def _one_wins(op: Operation) -> bool:
    """Whether all that is passed on of each image comes from the same of several, as an expert's whole output does.

    Pooling takes each value from where it is largest.
    """
    tensors = [one for one in op.args if isinstance(one, Tensor)]
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        values, dim = torch.stack(tensors, 1), 1
    else:
        values, axis = tensors[0], op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else None)
        axes = axis if isinstance(axis, list | tuple) else [axis]
        if len(axes) != 1 or not isinstance(axes[0], int):
            return False
        dim = axes[0] % max(values.dim(), 1)
    if not _may_weigh(values) or values.dim() < 3 or not dim or not 2 <= values.shape[dim] <= MOST_EXPERTS:
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

"""Slopes for what a pass has recorded for its gradient, whatever called it.

`bench.attacks.gradients` replaces functions as Python calls them. What a scripted, traced or exported network calls,
a user's own operation, a kernel of torch's such as an RNN's, or what works in place, is not called so; but it is
recorded all the same, under a name of torch's own for each operation.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attacks.gradients import LEAK, NEAR

#: Below this share of the gradient that comes in, what goes out is none.
NONE = 1e-6
#: Operations that are linear, or only move elements: where these hand on nothing, it is because they look elsewhere.
#: All others are taken for functions of each element by itself, where their input has the shape of their output.
LINEAR = {
    "Add", "Sub", "Rsub", "Neg", "Clone", "ToCopy", "Alias", "Detach", "View", "UnsafeView", "ReshapeAlias", "Expand",
    "Unsqueeze", "Squeeze", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Cat", "Stack", "T", "Transpose",
    "Permute", "Flip", "Roll", "Repeat", "ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D", "Index", "IndexSelect",
    "Gather", "Take", "Scatter", "ScatterAdd", "IndexAdd", "IndexPut", "CopySlices", "AsStrided", "MaskedSelect",
    "MaskedScatter", "Sum", "Mean", "Cumsum", "Tril", "Triu", "Diagonal", "Copy", "Embedding", "NllLoss", "NllLoss2D",
    "Unfold", "Im2Col", "Col2Im", "PixelShuffle", "AvgPool2D", "AdaptiveAvgPool2D", "UpsampleNearest2D",
    "UpsampleBilinear2D", "Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Dot", "Convolution", "NativeBatchNorm",
    "NativeGroupNorm", "NativeDropout", "FftR2C", "FftC2R", "FftC2C", "ViewAsReal", "ViewAsComplex", "Real", "Imag",
}  # fmt: skip
#: Functions that fall. Of a quotient and of a power it is not recorded which way they go.
FALLING, EITHER_WAY = {"Reciprocal", "Rsqrt", "Erfc", "Acos"}, {"Div", "Pow"}
#: Those of two inputs, of which one may have no part in the output.
TWO = {"Where", "Maximum", "Minimum", "Fmax", "Fmin", "Logaddexp", "Logaddexp2", "Hypot", "Atan2"}
#: The best of several, of which the others have no slope; and sums that leave some out.
BEST = {
    "Max", "Min", "Amax", "Amin", "Topk", "Sort", "Kthvalue", "Median", "Nanmedian", "Logcumsumexp", "Mode", "Nansum",
    "MultiMarginLoss", "MultilabelMarginLoss",
}  # fmt: skip
POOLS = ("MaxPool", "AdaptiveMaxPool", "FractionalMaxPool")


def with_slopes(output: Tensor) -> Tensor:
    """The output of a pass; a gradient of it goes on where an operation would have ended it."""
    for node in _nodes(output):
        kind = node.name().rpartition("Backward")[0]
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        rule: Callable[[Any, Tensor, Tensor], Tensor] | None = None
        if kind.startswith(POOLS):
            rule = _pooled
        elif kind in BEST:
            rule = _best
        elif kind in OTHERWISE:
            rule = OTHERWISE[kind]
        elif own or (kind not in LINEAR and kind not in EITHER_WAY):
            rule = _falling if kind in FALLING else _each
        # what has another factor is none of each element alone, whether or not a gradient by that one is asked for
        inputs = sum(before is not None for before, _ in node.next_functions)
        if rule is not None and (inputs == 1 or kind in TWO or kind in OTHERWISE):
            node.register_hook(partial(_changed, node, rule))
    return output


def _nodes(output: Tensor) -> Iterator[Any]:
    """What is recorded, each operation once."""
    left, seen = [output.grad_fn], set[Any]()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            left.extend(before for before, _ in node.next_functions)


def _changed(
    node: Any, rule: Callable[[Any, Tensor, Tensor], Tensor], given: Any, incoming: Any
) -> tuple[Any, ...] | None:
    """What an operation hands on, where there is one gradient that comes in."""
    known = [one for one in incoming if one is not None]
    if len(known) != 1:
        return None
    return tuple(None if gradient is None else rule(node, gradient, known[0]) for gradient in given)


def _each(_: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    if gradient.shape != incoming.shape:
        return gradient
    return torch.where(gradient.abs() > NONE * incoming.abs(), gradient, LEAK * incoming)


def _falling(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    return _each(node, gradient, -incoming)


def _all(_: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """Log-softmax, where it is decided: a slope as if it were not, of all of a row."""
    through = incoming - incoming.mean(-1, keepdim=True)
    none = gradient.abs().amax(-1, keepdim=True) <= NONE * incoming.abs().amax(-1, keepdim=True)
    return torch.where(none, LEAK * through, gradient)


def _softmax(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """What has no weight has a slope as if it had a little of an equal one."""
    dim, weights = _signed(node._saved_dim), node._saved_result
    apart = (incoming - (weights * incoming).sum(dim, keepdim=True)) / weights.shape[dim]
    return torch.where(gradient.abs() > NONE * incoming.abs(), gradient, LEAK * apart)


def _times(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """Where both factors are off, each has a slope as if the other were on a little."""
    both = [one for which in ("self", "other") if isinstance(one := getattr(node, f"_saved_{which}", None), Tensor)]
    if len(both) < 2:  # times a constant
        return _each(node, gradient, incoming)
    if any(one.shape != gradient.shape for one in (incoming, *both)):
        return gradient
    off = torch.stack(both).abs().amax(0) < NEAR
    return torch.where(off, LEAK * incoming, gradient)


def _normalised(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """Few elements of which one outweighs the others are ±1 once they are normalised, whatever they are."""
    return _each(node, gradient, incoming) if gradient.dim() and gradient.shape[-1] <= FEW else gradient


def _looked_up(_: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """Where the places (B, H, W, 2) lie that are read off an image: another one may say something else."""
    if gradient.shape[:-1] != incoming.shape[:1] + incoming.shape[2:]:
        return gradient  # by the image that is read
    return torch.where(gradient == 0, LEAK * incoming.sum(1)[..., None], gradient)


def _glu(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """The gate's half may be decided: it has the slope of what it lets through."""
    dim = _signed(node._saved_dim)
    value, _ = node._saved_self.chunk(2, dim)
    through = torch.cat([incoming, incoming * value], dim)
    return torch.where(gradient.abs() > NONE * through.abs(), gradient, LEAK * through)


def _best(node: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """Those that are not the best have a little of its slope."""
    if incoming.dim() == gradient.dim() - 1:
        dim = getattr(node, "_saved_dim", 0)
        incoming = incoming.unsqueeze(_signed(dim[0] if isinstance(dim, tuple) else dim))
    if incoming.dim() == gradient.dim():
        some = [dim for dim, size in enumerate(incoming.shape) if size != gradient.shape[dim]]
        incoming = incoming.sum(some, keepdim=True) if some else incoming
    elif incoming.dim():
        return gradient
    return torch.where(gradient == 0, LEAK * incoming, gradient)


#: Operations with a rule of their own, whatever else they take.
OTHERWISE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "Glu": _glu,
    "LogSoftmax": _all,
    "Softmax": _softmax,
    "Mul": _times,
    "NativeLayerNorm": _normalised,
    "GridSampler2D": _looked_up,
    "GridSampler3D": _looked_up,
}
#: Of so many elements a normalisation may be decided.
FEW = 4


def _signed(dim: int) -> int:
    """A dimension as it was given: torch keeps negative ones as 64 bits without a sign."""
    return dim - 2**64 if dim >= 2**63 else dim


def _pooled(_: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """As `_best`, of the places that each output looks at."""
    spatial = gradient.dim() - 2 if gradient.dim() > 3 else 2
    spread = F.interpolate(incoming.reshape(1, -1, *incoming.shape[-spatial:]), gradient.shape[-spatial:])
    return torch.where(gradient == 0, LEAK * spread.view(gradient.shape), gradient)

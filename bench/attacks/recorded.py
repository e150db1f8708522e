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

from bench.attacks.gradients import LEAK

#: Below this share of the gradient that comes in, what goes out is none.
NONE = 1e-6
#: Operations on each element by itself, and softmax, whose slope is none where it is decided.
EACH = {
    "Relu", "Threshold", "Clamp", "ClampMin", "ClampMax", "Hardtanh", "LeakyRelu", "PreluKernel", "Elu", "Celu", "Gelu",
    "Silu", "Mish", "Softplus", "Softshrink", "Hardshrink", "Hardswish", "Hardsigmoid", "Sigmoid", "LogSigmoid", "Tanh",
    "Erf", "Softmax", "MaskedFill", "Where", "Round", "Floor", "Ceil", "Trunc", "Sign", "Mul", "Cummax", "Cummin",
    "Maximum", "Minimum", "Fmax", "Fmin",
}  # fmt: skip
#: Those of two inputs, of which one may have no part in the output.
TWO = {"Where", "Maximum", "Minimum", "Fmax", "Fmin"}
#: The best of several, of which the others have no slope.
BEST = {"Max", "Min", "Amax", "Amin", "Topk", "Sort", "Kthvalue", "Median", "Nanmedian", "Logcumsumexp", "Mode"}
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
        elif kind in EACH or own:
            rule = _each
        elif kind == "Glu":
            rule = _glu
        # what has another factor is none of each element alone, whether or not a gradient by that one is asked for
        inputs = sum(before is not None for before, _ in node.next_functions)
        if rule is not None and (inputs == 1 or kind in TWO):
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


def _signed(dim: int) -> int:
    """A dimension as it was given: torch keeps negative ones as 64 bits without a sign."""
    return dim - 2**64 if dim >= 2**63 else dim


def _pooled(_: Any, gradient: Tensor, incoming: Tensor) -> Tensor:
    """As `_best`, of the places that each output looks at."""
    spatial = gradient.dim() - 2 if gradient.dim() > 3 else 2
    spread = F.interpolate(incoming.reshape(1, -1, *incoming.shape[-spatial:]), gradient.shape[-spatial:])
    return torch.where(gradient == 0, LEAK * spread.view(gradient.shape), gradient)

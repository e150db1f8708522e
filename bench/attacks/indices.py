"""Gradients for what is looked up by an index: a nearest neighbour's label, a code, the row of a table.

An index has no gradient. What is made of it has that of a softmax over all that might have been the index, by how near
their scores are to that of the one that is: SoftSort (Prillo and Eisenschlos 2020), in the backward pass alone.

Axes: … = an index's own, E = what it is one of.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def both(function: str) -> tuple[Any, ...]:
    """It as a function of torch, and as a method of tensors."""
    return getattr(torch, function), getattr(Tensor, function)


#: What gives the index of a score by its rank along a dimension, alone or beside the score; and where the dimension is
#: among the arguments, and which it is if it is not given. `argmax` without one is of all elements.
RANKS: dict[Any, tuple[int, int | None]] = {
    **{function: (1, None) for name in ("argmax", "argmin") for function in both(name)},
    **{function: (1, -1) for name in ("argsort", "max", "min", "sort") for function in both(name)},
    **{function: (2, -1) for name in ("topk", "kthvalue") for function in both(name)},
}
#: The calls behind `tensor.T` and `tensor.mT`.
_TRANSPOSED: Any = (Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
#: What keeps indices, or some of them, in another shape.
MOVES = {
    *both("unsqueeze"), *both("squeeze"), *both("reshape"), *both("flatten"), *both("transpose"),
    *both("permute"), *both("select"), *both("narrow"), Tensor.view, Tensor.expand, Tensor.expand_as,
    *both("movedim"), *both("swapaxes"), *_TRANSPOSED, Tensor.__getitem__,
}  # fmt: skip
#: What keeps them as they are, but for their type.
CASTS = {Tensor.to, Tensor.long, Tensor.int, Tensor.type, Tensor.contiguous, Tensor.clone}
EQUALS = {*both("eq"), Tensor.__eq__}
SCATTERS = {*both("scatter"), *both("scatter_add"), Tensor.scatter_, Tensor.scatter_add_}
#: What takes the values that indices name; and the index that most of several have.
SELECTS, GATHERS, VOTES = both("index_select"), both("gather"), both("mode")
#: All that is known of functions of indices; but for `F.embedding`, which takes its two in another order than torch's.
OF_INDICES = {*MOVES, *CASTS, *EQUALS, *SCATTERS, *SELECTS, *GATHERS, *VOTES, F.one_hot}
#: No more weights than these are held for one index tensor.
AT_MOST = 2**24
#: Whole numbers in a table are labels where none is larger.
_LABELS = 2**12


class Indices:
    """The indices that one pass found, each with the weights (…, E) of all that it might have been."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by its id the index, so that it stays

    def __bool__(self) -> bool:
        return bool(self._known)

    def find(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> None:
        """Keep the index among what a function of scores that have a gradient has found, if there is one."""
        place, default = RANKS[func]
        index = found[1] if isinstance(found, tuple) else found
        dim = kwargs.get("dim", args[place] if len(args) > place else default)
        scores: Tensor = args[0]
        if dim is None:
            scores, dim = scores.flatten(), 0
        if index.is_floating_point() or not isinstance(dim, int):  # the largest of all has no index
            return
        if not scores.dim() or not 0 < index.numel() * scores.shape[dim] <= AT_MOST:
            return
        dim %= scores.dim()
        kept = index if index.dim() == scores.dim() else index.unsqueeze(dim)
        far = (scores.gather(dim, kept).unsqueeze(-1) - scores.movedim(dim, -1).unsqueeze(dim)).abs()
        finite = far.isfinite()  # what was left out has a score of −∞
        spread = far.detach().where(finite, 0).std(-1, keepdim=True, correction=0)
        spread = spread.clamp_min(torch.finfo(far.dtype).tiny)
        weights = (-far / spread).masked_fill(~finite, -torch.inf).softmax(-1).nan_to_num(0)
        self._keep(index, weights.reshape(*index.shape, scores.shape[dim]))

    def mask(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """A mask or the 0 and 1 that a function makes of a known index, with its stand-in; None of all others."""
        if func is F.one_hot and (weights := self._weights(args[0])) is not None:
            value = func(*args, **kwargs)
            return value, _padded(weights, value.shape[-1])
        if func in EQUALS and len(args) == 2 and any(self._weights(one) is not None for one in args):
            index, other = args if self._weights(args[0]) is not None else args[::-1]
            weights = self._weights(index)
            if weights is not None and self._weights(other) is None and not isinstance(other, float):
                other = torch.as_tensor(other, device=weights.device)
                hits = other.unsqueeze(-1) == torch.arange(weights.shape[-1], device=weights.device)
                return func(*args), (weights * hits).sum(-1)
        return None

    def value(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """What a function makes of a known index, with a gradient where it is of numbers; None of all others."""
        if func in CASTS and (weights := self._weights(args[0])) is not None:
            cast = func(*args, **kwargs)
            if not cast.is_floating_point():
                self._keep(cast, weights)
            return cast
        if func in MOVES and (weights := self._weights(args[0])) is not None:
            moved = func(*args, **kwargs)
            self._keep(moved, torch.stack([func(one, *args[1:], **kwargs) for one in weights.unbind(-1)], -1))
            return moved
        if func is F.embedding and (weights := self._weights(args[0])) is not None:
            return self._rows(func(*args, **kwargs), weights, args[1])
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and (w := self._weights(args[1])) is not None:
            return self._rows(func(*args), w, args[0])
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and len(args[1]) == 2:
            rows, index = args[1]
            weights = self._weights(index)
            return None if weights is None else self._of_each(func(*args), weights, args[0], rows)
        if func in VOTES and (weights := self._weights(args[0])) is not None:
            return self._most(func(*args, **kwargs), weights, *args[1:], **kwargs)
        if func in SELECTS and not kwargs and args[1] == 0 and (w := self._weights(args[2])) is not None:
            return self._rows(func(*args), w, args[0])
        if func in GATHERS and not kwargs and (weights := self._weights(args[2])) is not None:
            return self._gathered(func(*args), weights, *args)
        if func in SCATTERS and not kwargs and len(args) == 4 and (weights := self._weights(args[2])) is not None:
            return self._scattered(func(*args), weights, *args)
        return None

    def _most(self, found: Any, weights: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
        """The index that most of several have: each has a vote."""
        votes = weights.mean(dim % (weights.dim() - 1), keepdim=keepdim)
        self._keep(found.values, votes)
        return found

    def _rows(self, value: Tensor, weights: Tensor, table: Tensor) -> Tensor | None:
        """Rows (…, *D) of a table (E, *D); those of labels are indices themselves."""
        if len(table) != weights.shape[-1]:
            return None
        if table.is_floating_point():
            soft = torch.tensordot(weights.to(table), table.detach(), 1)
            return _with(value, soft)
        if table.dim() == 1 and table.dtype == torch.long and 0 <= int(table.min()) <= int(table.max()) < _LABELS:
            self._keep(value, weights @ F.one_hot(table).to(weights))
        return value

    def _of_each(self, value: Tensor, weights: Tensor, table: Tensor, rows: Any) -> Tensor | None:
        """table[arange(B), index], of (B, E, …): of each row one."""
        if weights.dim() != 2 or not isinstance(rows, Tensor) or not table.is_floating_point():
            return None
        if table.shape[:2] != weights.shape or not torch.equal(rows, torch.arange(len(table), device=rows.device)):
            return None
        return _with(value, (weights.view(*weights.shape, *[1] * (table.dim() - 2)) * table.detach()).sum(1))

    def _gathered(self, value: Tensor, weights: Tensor, table: Tensor, dim: int, index: Tensor) -> Tensor | None:
        """What an index (…) names along a dimension of a table, which the others need not be as large as."""
        dim %= table.dim()
        if not table.is_floating_point() or table.shape[dim] != weights.shape[-1]:
            return None
        every = table.detach().movedim(dim, -1).unsqueeze(dim)
        rest = [slice(size) for size in index.shape]
        rest[dim] = slice(None)
        return _with(value, (weights * every[tuple(rest)]).sum(-1))

    def _scattered(self, value: Tensor, weights: Tensor, base: Tensor, dim: int, index: Tensor, what: Any) -> Tensor:
        """What was written into places of a base (…): it would have gone elsewhere."""
        dim %= base.dim()
        if isinstance(what, Tensor) and what.dim() and what.shape != index.shape:
            return value
        written = what.detach().unsqueeze(-1) if isinstance(what, Tensor) and what.dim() else what
        soft = (weights * written).sum(dim).movedim(-1, dim)
        fits = soft.shape == value.shape and value.is_floating_point()
        if fits and value is base:
            return value.add_((soft - soft.detach()).nan_to_num(0))
        return _with(value, soft) if fits else value

    def _weights(self, one: Any) -> Tensor | None:
        return self._known[id(one)][1] if isinstance(one, Tensor) and id(one) in self._known else None

    def _keep(self, index: Tensor, weights: Tensor) -> None:
        self._known[id(index)] = index, weights


def _with(value: Tensor, soft: Tensor) -> Tensor:
    """The value with the gradient of `soft` as well as its own."""
    return value + (soft - soft.detach()).nan_to_num(0).to(value)


def _padded(weights: Tensor, size: int) -> Tensor:
    """Weights (…, size) of classes of which the last have not been met, or do not count."""
    return F.pad(weights, (0, max(0, size - weights.shape[-1])))[..., :size]

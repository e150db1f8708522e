"""Gradients for functions that have none to be used: rounded, saturated, detached, dead or misleading ones.

Axes: B = images, E = experts, D = pixels.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bench.attacks.indices import OF_INDICES, RANKS, Indices, both
from bench.models.sites import opened

#: Directions tried for each pixel, so that the sign of most of an affine router's weights is found, and at most.
DIRECTIONS, AT_MOST = 4, 20_000
#: The slope of a ReLU on its dead side, in the backward pass alone.
LEAK = 0.1
#: From here on the slope of 1 / x is none; and up to here that of a power of x.
LARGE, NEAR = 1e3, 1e-6


def _identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _leaky(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.leaky_relu(x, LEAK)


def _larger(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.maximum(x, y) + LEAK * (x + y)


def _smaller(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.minimum(x, y) + LEAK * (x + y)


def _of_all(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The largest of several, with a little of all of them."""

    def smooth(x: Tensor, dim: Any = (), keepdim: bool = False, *_: Any, **__: Any) -> Tensor:
        return reduce(x, dim, keepdim) + LEAK * x.sum(dim, keepdim)

    return smooth


def _power(x: Tensor, exponent: Any = 2, *_: Any, **__: Any) -> Tensor:
    """Near 0, as after a ReLU that is off, it has a slope; and so has a weight that falls with a distance."""
    falls = not isinstance(exponent, Tensor) and exponent < 0
    return x**exponent + LEAK * (-x.abs() if falls else torch.where(x.abs() < NEAR, x, 0.0))


def _raised(x: Tensor, base: Any, *_: Any, **__: Any) -> Tensor:
    """base ** x: x with the sign of its slope."""
    return torch.as_tensor(base, dtype=x.dtype, device=x.device).log().sign() * x


def _falling_step(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return -_soft_step(x)


def _tempered_least(x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return _tempered(-x, dim)


def _absolute(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Half of it and of x is a ReLU."""
    return (1 - LEAK) * x.abs()


def _soft_step(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """With a slope of 1 / (1 + |x|), which far from the step is not lost among others."""
    return x.detach().sign() * x.abs().log1p()


def _near_step(x: Tensor) -> Tensor:
    """With a slope of 1 / (1 + |x|)²: of many comparisons those count that may well turn out otherwise."""
    return x / (1 + x.abs())


def _tempered(x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """A softmax that is never saturated: of n inputs at most √(2 ln n) apart from their mean, in standard deviations.

    That is how far the largest of n such numbers lies from it: at a smaller spread all of many count alike, so that
    nothing leads to any one of them, and at a larger one only the first counts.
    """
    dim = -1 if dim is None else dim
    widest = math.sqrt(2 * math.log(max(2, x.shape[dim])))
    spread = x.detach().std(dim=dim, keepdim=True, correction=0) / widest
    return torch.softmax(x / spread.clamp_min(1), dim=dim)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, enable_gqa: bool = False, **__: Any
) -> Tensor:
    """Attention that is never sure of one token; a mask leaves none out."""
    if enable_gqa:
        k, v = (one.repeat_interleave(q.shape[-3] // one.shape[-3], -3) for one in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _tempered(scores) @ v


def _inverse(y: Tensor, *_: Any, **__: Any) -> Tensor:
    """A slope stays where it is so large that there is none: 1 / (1 + exp(x)) is a sigmoid."""
    return y.reciprocal() - LEAK * torch.where(y.abs() > LARGE, y.abs(), 0.0)


def _quotient(x: Any, y: Any, *_: Any, **__: Any) -> Tensor:
    return x * _inverse(y) if isinstance(y, Tensor) else x / y


def _inverse_quotient(y: Tensor, x: Any, *_: Any, **__: Any) -> Tensor:
    return x * _inverse(y)


def _product(x: Tensor, dim: Any = None, *_: Any, **more: Any) -> Tensor:
    """With a slope by each factor that is off, whatever the others are."""
    off = torch.where(x.detach().abs() < NEAR, x, 0.0)
    if dim is None:
        return x.prod() + LEAK * off.sum()
    return x.prod(dim, **more) + LEAK * off.sum(dim, **more)


def _on(one: Any) -> Any:
    """A factor that is off as if it were on a little, so that the other one has a slope where both are."""
    return one + LEAK * (one.detach().abs() < NEAR) if _graded(one) else one


#: The call behind `tensor.data`.
_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
#: A function → one with nearly the same shape whose gradient is nowhere zero.
SMOOTH: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu, F.relu6), _leaky),
    **dict.fromkeys((torch.relu_, Tensor.relu_, F.hardtanh), _leaky),
    # left of their minimum the slope of some is negative, and further off none at all
    **dict.fromkeys((F.gelu, F.silu, F.mish, F.hardswish, F.softplus, F.elu, F.selu, F.celu, F.threshold), _leaky),
    **dict.fromkeys((torch.selu, torch.celu, torch.clamp_min, Tensor.clamp_min), _leaky),
    **dict.fromkeys((F.prelu, torch.prelu, F.rrelu, torch.rrelu), _leaky),
    **dict.fromkeys((torch.maximum, Tensor.maximum), _larger),
    **dict.fromkeys((torch.minimum, Tensor.minimum), _smaller),
    **dict.fromkeys((torch.amax, Tensor.amax), _of_all(torch.amax)),
    **dict.fromkeys((torch.amin, Tensor.amin), _of_all(torch.amin)),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), _of_all(torch.logsumexp)),
    **dict.fromkeys((torch.abs, Tensor.abs, Tensor.__abs__), _absolute),
    **dict.fromkeys((torch.square, Tensor.square, torch.pow, Tensor.pow, Tensor.__pow__), _power),
    **dict.fromkeys((torch.float_power, Tensor.float_power), _power),
    **dict.fromkeys((torch.exp, Tensor.exp, torch.exp2, Tensor.exp2, torch.special.exp2), _identity),
    **dict.fromkeys((torch.expm1, Tensor.expm1, torch.special.expm1), _identity),
    Tensor.__rpow__: _raised,
    **dict.fromkeys((torch.round, Tensor.round, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil), _identity),
    **dict.fromkeys((torch.trunc, Tensor.trunc, Tensor.detach, Tensor.clamp, torch.clamp), _identity),
    **dict.fromkeys((torch.clamp_max, Tensor.clamp_max), _identity),
    **dict.fromkeys((Tensor.clip, torch.clip, Tensor.masked_fill, torch.masked_fill, _DATA), _identity),
    **dict.fromkeys((torch.sign, Tensor.sign, torch.tanh, Tensor.tanh, F.tanh), _soft_step),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, F.hardsigmoid), _soft_step),
    **dict.fromkeys((torch.erf, Tensor.erf, torch.special.erf, torch.special.ndtr), _soft_step),
    **dict.fromkeys((*both("atan"), *both("arctan"), F.softsign), _soft_step),
    **dict.fromkeys((torch.erfc, Tensor.erfc, torch.special.erfc), _falling_step),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax), _tempered),
    **dict.fromkeys((F.softshrink, F.hardshrink, torch.hardshrink, Tensor.hardshrink, F.tanhshrink), _identity),
    **dict.fromkeys((torch.reciprocal, Tensor.reciprocal), _inverse),
    **dict.fromkeys((torch.div, Tensor.div, torch.true_divide, Tensor.true_divide, Tensor.__truediv__), _quotient),
    **dict.fromkeys((Tensor.__rtruediv__, Tensor.__rdiv__), _inverse_quotient),
    F.softmin: _tempered_least,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(both("prod"), _product),
}
#: Of two tensors these are the larger or the smaller one in each place, of one they are something else.
OF_TWO = {torch.max: torch.maximum, Tensor.max: torch.maximum, torch.min: torch.minimum, Tensor.min: torch.minimum}


#: Those that have no gradient at all, anywhere: where one is seen, gradients cannot be believed.
HARD = {
    torch.round, Tensor.round, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil, torch.trunc, Tensor.trunc,
    torch.sign, Tensor.sign, Tensor.detach, _DATA,
}  # fmt: skip


#: What leaves torch, which a tensor that has a gradient cannot; it has one where a `detach` before it was kept from it.
LEAVES: set[Any] = {Tensor.numpy, Tensor.__array__}


#: Comparisons, by the sign of their first input's part in them.
COMPARES = {
    **dict.fromkeys((*both("gt"), *both("ge"), *both("greater"), *both("greater_equal")), 1),
    **dict.fromkeys((Tensor.__gt__, Tensor.__ge__), 1),
    **dict.fromkeys((*both("lt"), *both("le"), *both("less"), *both("less_equal")), -1),
    **dict.fromkeys((Tensor.__lt__, Tensor.__le__), -1),
}
#: What keeps a mask a mask of the same elements: by another shape, or as whole numbers; and what makes numbers of it.
MOVES = {
    *both("unsqueeze"), *both("squeeze"), *both("reshape"), *both("flatten"), *both("transpose"),
    *both("permute"), Tensor.view, Tensor.expand, Tensor.expand_as, Tensor.__getitem__, Tensor.contiguous,
}  # fmt: skip
COUNTS = {Tensor.int, Tensor.long, Tensor.byte}
CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type, Tensor.type_as}
TIMES = {*both("mul"), *both("multiply"), Tensor.__mul__, Tensor.__rmul__}
#: Products of two, and sums of such: where both factors are off, none has a slope.
PRODUCTS = {
    *TIMES, *both("matmul"), *both("bmm"), *both("mm"), Tensor.__matmul__, Tensor.__rmatmul__, torch.einsum, F.bilinear,
}  # fmt: skip


#: Where the two are that `where` takes its values from: one of them may be a mask's constant.
EITHER: dict[Any, tuple[int, int]] = {torch.where: (1, 2), Tensor.where: (0, 2)}


#: All functions that something else than themselves is done for, as Python code calls them.
KNOWN = {*SMOOTH, *OF_TWO, *COMPARES, *MOVES, *COUNTS, *CASTS, *PRODUCTS, *EITHER, *RANKS, *OF_INDICES}


class _WithGradientOf(torch.autograd.Function):
    """Values in place of others of the same shape, which get their gradient."""

    @staticmethod
    def forward(ctx: Any, others: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _same(saved: Tensor) -> Tensor:
    return saved


def in_place_allowed() -> torch.autograd.graph.saved_tensors_hooks:
    """Within, what is worked on in place may be what a gradient needs, which then is that of the new values.

    Masks and what `detach` gives have a gradient through their stand-ins alone: a model may well work on them in place.
    """
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)  # of what hooks keep, no version is compared


class StraightThrough(TorchFunctionMode):
    """Within, functions without a usable gradient keep their values and take the gradient of a smooth one (`SMOOTH`).

    As the straight-through estimator does (Bengio et al. 2013; BPDA, Athalye et al. 2018). What ran without gradients
    (`no_grad`, `inference_mode`, `detach`) has them. A mask has none, but the numbers that are made of it have that of
    the difference which was compared. `hard`: how many calls were of a function that has no gradient of its own.
    """

    def __init__(self, *, far: bool = False) -> None:
        """`far`: what hardly turns out otherwise counts, too: a comparison nearly as much as one that well may, and an
        index (`bench.attacks.indices`), which of a route that is forced has no part in what is behind it.
        """
        super().__init__()
        self._far = far
        self.hard = 0
        self._step = _soft_step if far else _near_step
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}  # by its id the mask, so that it stays, and its stand-in
        self._indices = Indices()
        self._in_place = in_place_allowed()

    def __enter__(self) -> Self:
        self._in_place.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._in_place.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = by_name(func, KNOWN), kwargs or {}
        with torch.inference_mode(False), torch.enable_grad():
            first: Any = args[0] if args else None
            if func in COMPARES and len(args) == 2 and any(_graded(one) for one in args):
                mask = func(*(one.detach() if isinstance(one, Tensor) else one for one in args))
                return self._mask(mask, COMPARES[func] * self._step(args[0] - args[1]))
            if self._masks and (found := self._of_mask(func, args, kwargs)) is not None:
                return found
            if self._indices:
                if (made := self._indices.mask(func, args, kwargs)) is not None:
                    return self._mask(*made)
                if (found := self._indices.value(func, args, kwargs)) is not None:
                    return found
            if func in OF_TWO and len(args) == 2 and isinstance(args[1], Tensor):
                func = OF_TWO[func]
            if func is torch.pow and len(args) == 2 and not isinstance(first, Tensor):
                func, args, first = Tensor.__rpow__, args[::-1], args[1]
            if self._far and func in RANKS and _graded(first):
                result = func(*args, **kwargs)
                self._indices.find(func, args, kwargs, result)
                return result
            if func is torch.einsum and len(args) == 2 and isinstance(args[1], list | tuple):
                args = args[0], *args[1]
            if func in PRODUCTS and sum(map(_graded, args)) > 1:
                value = func(*args, **kwargs)
                return _WithGradientOf.apply(func(*map(_on, args), **kwargs), value.detach())
            smooth = SMOOTH.get(func)
            if smooth in (_larger, _smaller) and not _graded(first):
                args = first, *_ = args[::-1]
            if func in EITHER and len(args) == 3:
                graded = [args[place] for place in EITHER[func] if _graded(args[place])]
                value = func(*args)
                return _WithGradientOf.apply(graded[0].expand_as(value), value.detach()) if len(graded) == 1 else value
            if func is torch.tensor and _graded(first):  # meant to make a tensor of what is one already
                return first.to(kwargs.get("dtype") or first.dtype, copy=True)
            if func in LEAVES and isinstance(first, Tensor):
                return func(first.detach(), *args[1:], **kwargs)
            if smooth is None or not _graded(first):
                return func(*args, **kwargs)
            self.hard += func in HARD
            stand_in = smooth(*args, **kwargs)
            value = func(first.detach().clone(), *args[1:], **kwargs)  # some work in place
            return _WithGradientOf.apply(stand_in.expand_as(value), value.detach())

    def _mask(self, mask: Tensor, stand_in: Tensor) -> Tensor:
        self._masks[id(mask)] = mask, stand_in
        return mask

    def _known(self, one: Any) -> bool:
        return isinstance(one, Tensor) and id(one) in self._masks

    def _of_mask(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
        """What a function of a mask whose stand-in is known gives; None of one that is as good as any other here."""
        value: Tensor
        if func in TIMES and len(args) == 2 and any(map(self._known, args)):
            value = func(*args)
            return func(*(self._number(one, value) for one in args)) if value.is_floating_point() else None
        if not args or not self._known(args[0]):
            return None
        mask, stand_in = self._masks[id(args[0])]
        if func in MOVES:
            return self._mask(func(mask, *args[1:], **kwargs), func(stand_in, *args[1:], **kwargs))
        if func in COUNTS:
            return self._mask(func(mask), stand_in)
        if func in CASTS and (value := func(mask, *args[1:], **kwargs)).is_floating_point():
            return self._number(args[0], value)
        if func is torch.where and len(args) == 3:
            value, yes, no = (torch.where(one, *args[1:]) for one in (mask, mask | True, mask & False))
            if not value.is_floating_point():
                return None
            own = value if value.requires_grad else 0.0
            return _WithGradientOf.apply(own + stand_in * (yes - no).detach(), value.detach())
        return None

    def _number(self, one: Any, like: Tensor) -> Any:
        """A mask as numbers of the type of `like`, with its stand-in's gradient; anything else as it is."""
        if not self._known(one):
            return one
        mask, stand_in = self._masks[id(one)]
        return _WithGradientOf.apply(stand_in.to(like), mask.to(like))


def by_name(func: Any, known: Collection[Any]) -> Any:
    """The one of the known functions that an operation of an exported program is, or itself."""
    if func in known or not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return func
    named = (getattr(place, func.overloadpacket.__name__, None) for place in (torch, Tensor, F))
    return next((one for one in named if one is not None and one in known), func)


def _graded(one: Any) -> bool:
    return isinstance(one, Tensor) and one.requires_grad


def logarithms(scores: Tensor) -> Tensor:
    """The logarithms of scores (…, E) that are probabilities by their look, which have the same order; else themselves.

    A softmax that decides clearly has next to no gradient; its logarithm has. −∞, the score of an expert that the gate
    has closed, is a finite one (`readable`).
    """
    if not scores.numel():
        return scores
    with torch.no_grad():
        lowest = scores.amin()
        others = (lowest < 0) | ((scores.sum(-1) - 1).abs() > 1e-3).any()
        known, closes = torch.stack([others, lowest.isneginf()]).tolist()  # one wait for a GPU, not two
    if closes:
        return readable(scores)
    if known:
        return scores
    least = torch.finfo(scores.dtype).tiny  # 0 has no slope by its logarithm, and may have one by itself
    return torch.where(
        scores < least,
        _WithGradientOf.apply(scores, scores.detach().clamp_min(least).log()),
        scores.clamp_min(least).log(),
    )


def readable(scores: Tensor, at: float = -torch.inf) -> Tensor:
    """Finite scores (…, E) for those of experts that the gate closes, `at` or below, which keep their gradient."""
    return _WithGradientOf.apply(scores, opened(scores.detach(), at))


@torch.no_grad()
def slopes(scores: Callable[[Tensor], Tensor], x: Tensor, distance: float) -> Tensor:
    """W (E, D) in place of a gradient: the mean slope of the scores about the images x (B, …).

    Along random directions of ±`distance` in every pixel: the weights of an affine router, up to noise.
    """
    generator = torch.Generator().manual_seed(0)
    size, num_experts = x[0].numel(), scores(x[:1]).shape[1]
    total, drawn = torch.zeros(num_experts, size, device=x.device), 0
    directions = min(DIRECTIONS * size, AT_MOST)
    while drawn < directions:
        count = min(len(x), directions - drawn)
        signs = torch.randint(0, 2, x[:count].shape, generator=generator).to(x) * 2 - 1
        rise = scores(x[:count] + distance * signs) - scores(x[:count] - distance * signs)
        total += rise.to(total).T @ signs.flatten(1).to(total)
        drawn += count
    return total / (2 * distance * directions)


def has_gradient(scores: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether any score's gradient by the pixels of any image x (B, …) is other than zero."""
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        found = scores(z)
        if not found.requires_grad:
            return False
        ascents = [torch.autograd.grad(column.sum(), z, retain_graph=True, allow_unused=True)[0] for column in found.T]
    return any(gradient is not None and bool((gradient != 0).any()) for gradient in ascents)


def differentiable(router: Callable[[Tensor], Tensor], x: Tensor, distance: float) -> Callable[[Tensor], Tensor]:
    """A router's scores with a gradient: its own where there is one at the images x (B, …), of probabilities that of
    their logarithms; else a smooth stand-in's; else that of the slopes over `distance`.
    """

    def own(z: Tensor) -> Tensor:
        return logarithms(router(z))

    def through(z: Tensor) -> Tensor:
        with StraightThrough():
            return own(z)

    for scores in (own, through):
        if has_gradient(scores, x):
            return scores
    weight = slopes(own, x, distance)

    def linear(z: Tensor) -> Tensor:
        line = z.flatten(1) @ weight.to(z).T
        return line + (own(z) - line).detach()

    return linear

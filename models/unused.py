"""Parts of a network that images hardly use, by the gradient of its answer: signs of routes that no operation shows.

A mixture whose weights leave an expert out on natural images can be written in more ways than a list of operations
holds. In all of them the expert's weights hardly matter to the answers, and may matter to those that an attack makes.

Axes: m = images, T = tokens of an image, E = experts.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.models.foreign import Guarded
from bench.models.sites import Site, intercepted, lifted

#: A part is hardly used where its influence is below this share of the parts' mean; of a network's weights at least
#: so many are in such parts where they may be experts, and not a layer's own.
HARDLY, SHARE = 1e-3, 0.05
#: Where more passes would be needed to send an image to every expert, nothing is said.
MOST_PASSES = 32
#: What weights are set to that are all zero, as those of a branch before it is trained.
FILLED = 0.1
#: A module of a user's own that stacks weights of experts has at most so many, and is none of torch's layers.
MOST_STACKED = 64
LAYERS = tuple(
    one
    for one in vars(nn).values()
    if isinstance(one, type) and issubclass(one, nn.Module) and not one.__module__.endswith((".module", ".container"))
)


def unused_parts(guard: Guarded, x: Tensor, known: Sequence[Site] = ()) -> list[str]:
    """The modules, or `weight[2]` of stacked ones, that the answers for images x (m, c, H, W) hardly depend on.

    Nothing where they are few of the weights. Of nested ones the outermost is named. What `torch.stack` puts together
    is looked at as well, since experts may share weights. A part's influence is ‖θ‖ · ‖∂(a random sum of the
    logits)/∂θ‖ of its weights θ, at the most of several passes, in which the `known` sites send images and tokens to
    each of their experts in turn; their gates choose alone, and may have none. What the answer does not come of at all,
    such as a second head, is not named, nor what all-zero weights cut off, which no image opens. The model is in eval
    mode; its parameters are as before afterwards.
    """
    passes = max([1, *(-(-site.num_experts // len(x)) for site in known)])
    if passes > MOST_PASSES or any(_inside(site, other) for site in known for other in known):
        return []
    weights = dict(guard.model.named_parameters())
    required = {name: weight.requires_grad for name, weight in weights.items()}
    zero = [weight for weight in weights.values() if weight.is_floating_point() and not bool(weight.any())]
    influence, size = defaultdict[str, float](float), defaultdict[str, int](int)
    try:
        for weight in zero:
            weight.data.fill_(FILLED)
        for weight in weights.values():
            weight.requires_grad_(weight.is_floating_point())
        found_by_pass = [_gradients(guard, x, known, number) for number in range(passes)]
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
        for weight in zero:
            weight.data.zero_()
    gradients = [of_weights for of_weights, _ in found_by_pass]
    for owner, module in guard.model.named_modules():
        if any(f"{owner}.".startswith(f"{site.module}.") for site in known):
            continue
        for key, weight in module.named_parameters(recurse=False):
            name = f"{owner}.{key}".lstrip(".")
            found = [one[name] for one in gradients if name in one]
            for part, own in _parts(module, owner, name, weight) if found else ():
                size[part] += weight[own].numel()
                strongest = max(float(one[own].norm()) for one in found) * float(weight[own].detach().norm())
                influence[part] = max(influence[part], strongest)
    mean = sum(influence.values()) / max(1, len(influence))  # of many experts most may be unused: no median
    unused = {part for part, strength in influence.items() if strength < HARDLY * mean}
    stacked = _unused_answers([of_stacks for _, of_stacks in found_by_pass])
    if sum(size[part] for part in unused) < SHARE * sum(size.values()):
        return stacked
    used = influence.keys() - unused
    return [*dict.fromkeys(_outermost(part, used) for part in influence if part in unused), *stacked]


def _inside(site: Site, other: Site) -> bool:
    """Whether a site is in an expert of another, where it sees some of the images alone."""
    return site.name.startswith(f"{other.name.rpartition('.')[0]}.experts.".lstrip("."))


def _parts(module: nn.Module, owner: str, name: str, weight: Tensor) -> Iterator[tuple[str, Any]]:
    """The parts that a module's weight belongs to, and which of it: its module, or what each expert has of a stack."""
    stacked = not isinstance(module, LAYERS) and weight.dim() >= 3 and len(weight) <= MOST_STACKED
    yield from ((f"{name}[{n}]", n) for n in range(len(weight))) if stacked else [(owner, ...)]


class Stacks(TorchFunctionMode):
    """Keeps what is put into one tensor by `torch.stack`: the answers of experts, where they share their weights.

    Of a stack that one place is taken from, as the last state of a recurrent network, the others have no part in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Tensor]] = []
        self._made: dict[int, tuple[Tensor, Sequence[Tensor], int]] = {}  # by its id the stack, so that it stays

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and id(args[0]) in self._made:
            _, parts, dim = self._made[id(args[0])]
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            whole = all(one == slice(None) for one in index[:dim]) if len(index) == dim + 1 else False
            if whole and type(index[dim]) is int:
                return parts[index[dim]]
        result = func(*args, **kwargs)
        if func is torch.stack and args:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.calls.append(list(args[0]))
            self._made[id(result)] = result, args[0], dim % result.dim()
        return result


def _unused_answers(passes: list[list[list[float]]]) -> list[str]:
    """Of each stack those that hardly matter in any pass; nothing where passes make other stacks.

    Not those without a part in any answer, whose influence is NaN.
    """
    if any([*map(len, other)] != [*map(len, passes[0])] for other in passes):
        return []
    strongest = [[max(several) for several in zip(*calls, strict=True)] for calls in zip(*passes, strict=True)]
    means = [sum(one for one in strengths if one == one) / len(strengths) for strengths in strongest]
    return [
        f"{number + 1} of {len(strengths)} that are stacked"
        for strengths, usual in zip(strongest, means, strict=True)
        for number, strength in enumerate(strengths)
        if strength < HARDLY * usual
    ]


def _gradients(
    guard: Guarded, x: Tensor, known: Sequence[Site], number: int
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The gradient by each of the weights that a pass depends on, and the influence of what is stacked."""
    weights = {name: weight for name, weight in guard.model.named_parameters() if weight.requires_grad}
    with torch.enable_grad(), ExitStack() as stack:
        for site in known:
            stack.enter_context(intercepted(site.plain, partial(_in_turn, site.plain, number)))
        stacks = stack.enter_context(Stacks())
        logits = guard(x)
        if not logits.requires_grad:
            return {}, []
        drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        calls = [call for call in stacks.calls if all(one.requires_grad and one.dim() > 1 for one in call)]
        stacked = [one for call in calls for one in call]
        found = torch.autograd.grad((drawn * logits).sum(), [*weights.values(), *stacked], allow_unused=True)
    of_stacked = iter(zip(stacked, found[len(weights) :], strict=True))
    influence = [
        [
            math.nan if gradient is None else float(one.detach().norm() * gradient.norm())
            for one, gradient in islice(of_stacked, len(call))
        ]
        for call in calls
    ]
    own = zip(weights, found[: len(weights)], strict=True)
    return {name: gradient for name, gradient in own if gradient is not None}, influence


def _in_turn(site: Site, number: int, scores: Tensor) -> Tensor:
    """Scores (m, T, E) by which each token goes to the next expert, and in the next pass to one further on."""
    count = scores.shape[0] * scores.shape[1]
    at = (torch.arange(count, device=scores.device) + number * scores.shape[0]) % site.num_experts
    mine = nn.functional.one_hot(at, site.num_experts).bool().view(scores.shape)
    return lifted(scores, mine, 1 if site.soft else site.k)


def _outermost(name: str, used: set[str]) -> str:
    """The outermost module that holds this one and nothing that is used."""
    while outer := name.rpartition(".")[0]:
        if any(other == outer or other.startswith(f"{outer}.") for other in used):
            break
        name = outer
    return name

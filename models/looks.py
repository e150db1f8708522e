"""What one forward pass shows of gates: which scores experts are chosen by, along which axis, how many, and by what.

Read from the operations that act on the scores, inside the gate and behind it.

Axes: m = images, T = tokens of an image, E = experts, K = selected experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.errors import UnusableInput
from bench.models.exchanges import are_probabilities
from bench.models.sites import Site, counts, scores_of, selected

#: So many calls of one gate in a pass are sites at most.
MOST_CALLS = 16
#: Functions that choose, and those whose result has the order of their input.
_CHOOSES = {"topk", "argmax", "argmin", "max", "min", "sort", "argsort", "kthvalue", "multinomial", "gumbel_softmax"}
_COMPARES = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__", "round", "sign", "heaviside"}
_NORMALISES = {
    "softmax", "log_softmax", "sigmoid", "softplus", "normalize", "exp", "sparsemax", "entmax15",
    "hardsigmoid", "relu",
}  # fmt: skip
_MONOTONE = {
    "softmax", "log_softmax", "sigmoid", "logsigmoid", "exp", "log", "tanh", "float", "double", "half", "to", "type",
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "split",
    "chunk", "unbind", "transpose", "permute", "movedim", "__getitem__", "__get__", "__truediv__", "div",
}  # fmt: skip
#: What gives its input back and leaves open what that was made of: scores are those from before a mask closes some.
_GIVES_BACK = {*_MONOTONE, "masked_fill_"}
#: Layers with weights: what they give is no function of the scores alone any more.
_LAYERS = {
    "linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum",
    "layer_norm", "batch_norm", "group_norm", "multi_head_attention_forward", "scaled_dot_product_attention",
}  # fmt: skip


@dataclass(eq=False)
class Look:
    """What one forward pass shows of a gate, or of one of its calls.

    e: how many experts it scores, where a user has said it. chosen: what the first function chose by, and along which
    axis; None where nothing chose by the scores. took: how many, where it was a top-k, and how many each one after it.
    turn: which of `several` calls is looked at. compared, normalised: whether the scores are compared, or made weights.
    call: which of the gate's own calls gave the scores, where it chooses itself. chose: all calls that gave what it
    chose by itself. own: what it gave, once that is known.
    """

    name: str
    module: nn.Module
    e: int | None = None
    turn: int = 0
    several: int = 1
    calls: int = 0
    inputs: Tensor | None = None
    output: Any = None
    inside: bool = False
    count: int = 0
    chosen: tuple[Tensor, int] | None = None
    took: tuple[int | None, ...] = ()
    compared: bool = False
    normalised: bool = False
    call: int | None = None
    scores: Tensor | None = None
    chose: list[int] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        def before(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> None:
            if self.calls != self.turn:
                return
            self.inside, self.count = True, 0
            given = [leaf for leaf in tree_leaves((inputs, more)) if isinstance(leaf, Tensor)]
            self.inputs = given[0] if given else None

        def after(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any], output: Any) -> None:
            if self.inside:
                self.inside, self.output = False, output
            self.calls += 1

        handles = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def refuse(self, why: str) -> UnusableInput:
        return UnusableInput(
            f"--gates {self.name}: {why}: name a module whose output is the scores (…, experts); a gate that not every"
            " image reaches, or scores that are put together from several outputs, are shown by attributes `router`"
            " and `experts` (docs/your-own-model.md)"
        )

    def site(self, model: nn.Module, images: int) -> Site:
        """The site, as far as one pass shows it; K is still open."""
        if self.calls != self.several or self.inputs is None:
            times = f"of {images} images calls it {self.calls} times" if self.calls else "never calls it"
            times = f"of {images} images calls it once for each" if 1 < self.calls == images else times
            raise self.refuse(f"a forward pass {times}, and a gate is called once for all, or up to {MOST_CALLS} times")
        if self.call is None:
            tensors = [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]
            fitting = [one for one in tensors if self._fits(one, images)]
            if not fitting:
                shapes = ", ".join(f"{tuple(one.shape)} {str(one.dtype)[6:]}" for one in tensors) or "no tensor"
                raise self.refuse(f"its output ({shapes} for {images} images) cannot be scores")
            self.scores = fitting[0]
        scores = self.scores
        assert scores is not None
        if not self._fits(scores, images):
            raise self.refuse(f"its scores {tuple(scores.shape)} for {images} images cannot be those of experts")
        axis, width, experts, by_expert = self._axes(scores)
        if width == 1 and by_expert:
            raise self.refuse("its output is one value a row (leave it out where it only weighs a part)")
        if experts < 1 + by_expert or width % experts:
            raise self.refuse(f"its output has {width} values a row, which are no scores of {max(experts, 2)} experts")
        rows, left = divmod(len(self.inputs), images)
        if left or not rows:
            raise self.refuse(f"its input has {len(self.inputs)} rows for {images} images")
        self.normalised |= are_probabilities(scores)
        owner, _, attribute = self.name.partition("#")[0].rpartition(".")
        site = Site(
            self.name,
            model.get_submodule(owner),
            attribute,
            experts,
            experts,
            whole=False,
            rows=rows,
            layers=width // experts,
            axis=axis,
            call=self.call,
            turn=self.turn,
            calls=self.several,
        )
        return site if by_expert else self._choosing(site, scores, images)

    def _choosing(self, site: Site, scores: Tensor, images: int) -> Site:
        """The site of experts that choose tokens: how many, and by what."""
        assert self.chosen is not None
        known, (tensor, axis) = scores_of(scores, images, site.num_experts, 1, site.axis), self.chosen
        assert known is not None
        site = replace(site, num_experts=known.shape[1], k=0, choosers=site.num_experts)
        ranked = tensor.movedim(axis, -1)
        ranked = ranked[:, None] if ranked.dim() == 2 else ranked  # of one expert, or one way to go round a layer
        if self.took[0] is None or ranked.shape != known.transpose(1, 2).shape:
            return site
        for shared in (False, True):
            values = known.log_softmax(-1) if shared else known
            if torch.equal(selected(values.transpose(1, 2), self.took[0]), selected(ranked, self.took[0])):
                return replace(site, k=self.took[0], shared=shared)
        return site

    @staticmethod
    def _fits(tensor: Tensor, images: int) -> bool:
        count = tensor.numel()
        return tensor.is_floating_point() and tensor.dim() >= 2 and count % images == 0 and len(tensor) % images == 0

    def _axes(self, scores: Tensor) -> tuple[int, int, int, bool]:
        """The experts' axis in the scores, its length, of how many experts, and whether the choice is along it."""
        last = scores.shape[-1]
        if self.chosen is None or self.e:
            axis = 1 if scores.dim() == 4 else -1
            return axis, scores.shape[axis], self.e or scores.shape[axis], True
        tensor, axis = self.chosen
        size = tensor.shape[axis]
        if scores.dim() == 4 and scores.shape[1] == size and _same_order(scores.movedim(1, -1), tensor, axis):
            return 1, size, size, True  # (m, E, H, W)
        along_last = axis == tensor.dim() - 1 and tensor.shape[: scores.dim() - 1] == scores.shape[:-1]
        if along_last and last % size == 0:
            return -1, last, size, True  # where less than the width, for several layers
        return -1, last, last, axis == tensor.dim() - 1 and size == last and tensor.numel() == scores.numel()


def _same_order(scores: Tensor, tensor: Tensor, axis: int) -> bool:
    """Whether the best along the last axis is that of another tensor, which has gone through monotone functions."""
    best, other = scores.argmax(-1).flatten(), tensor.argmax(axis).flatten()
    return best.shape == other.shape and bool((best == other).all())


class Follow(TorchFunctionMode):
    """Follows what depends on the images, and what of it is computed from a gate's scores alone."""

    def __init__(self, looks: list[Look], x: Tensor) -> None:
        super().__init__()
        self.looks = looks
        self.data = {id(x)}
        self.of: dict[int, set[str]] = {}  # gates whose scores alone a tensor is computed from
        self.made: dict[int, tuple[str, Tensor | None, int | None]] = {}  # the function, its input, the gate's call
        self.pending: dict[int, tuple[Look, Look | None, Tensor, int, int | None]] = {}
        self.sorted: set[int] = set()  # what was put in order, of which a part may be a choice
        self.kept: list[Tensor] = []  # so that no later tensor gets the number of one that is gone

    def _depends(self, tensor: Tensor) -> bool:
        return id(tensor) in self.data

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._outputs()
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        for tensor in inputs if name != "__get__" else ():
            self._confirm(tensor)
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        outputs = [args[0]] if name == "__setitem__" else outputs
        if not outputs:
            return output
        self.kept += outputs
        inside = next((look for look in self.looks if look.inside), None)
        number = None
        if inside is not None and counts(output):
            number, inside.count = inside.count, inside.count + 1
        depending = [one for one in inputs if self._depends(one)]
        if depending or (inside is not None and inputs):
            self.data |= {id(one) for one in outputs} if depending else set()
            weights = name in _LAYERS and len(depending) == 1  # else it is a product of scores and what they chose
            known = [self.of.get(id(one), set()) for one in depending if not weights]
            alone = set.intersection(*known) if known else set()
            source = depending[0] if depending else None
            for one in outputs:
                if one is not source or name not in _GIVES_BACK:  # `to` and the like may give their input back
                    self.made[id(one)] = (name, source, number)
                self.of[id(one)] = set(alone)
            if depending:
                self._choice(name, args, kwargs, depending[0], outputs, inside, alone)
            if inside is not None and name in _COMPARES and len(depending) == 2:
                self._mask(depending, outputs[0], inside)
        return output

    def _mask(self, both: list[Tensor], mask: Tensor, inside: Look) -> None:
        """A gate that compares scores with one of their own, the least that is kept, chooses by its mask."""
        least, scores = sorted(both, key=Tensor.numel)
        if scores.is_floating_point() and scores.dim() > 1 and least.shape == (*scores.shape[:-1], 1):
            self.pending[id(mask)] = (inside, inside, scores, scores.dim() - 1, None)

    def _outputs(self) -> None:
        """What gates have given since the last call is scores."""
        for look in self.looks:
            if look.output is not None and not look.own:
                look.own = [leaf for leaf in tree_leaves(look.output) if isinstance(leaf, Tensor)]
                for one in look.own:
                    self.data.add(id(one))
                    self.of.setdefault(id(one), set()).add(look.name)

    def _choice(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensor: Tensor,
        outputs: list[Tensor],
        inside: Look | None,
        alone: set[str],
    ) -> None:
        looks = [look for look in self.looks if look.name in alone or look is inside]
        for look in looks:
            if name in _CHOOSES and tensor.is_floating_point() and tensor.dim() > 1:
                axis = _axis(name, args, kwargs)
                if axis is not None:
                    indices = [one for one in outputs if not one.is_floating_point()] or outputs
                    took = kwargs.get("k", args[1] if len(args) > 1 else None) if name == "topk" else None
                    if took is not None and not kwargs.get("largest", args[3] if len(args) > 3 else True):
                        took = tensor.shape[axis] - took  # those with the higher scores are the others
                    self.sorted |= {id(tensor)} if name in ("sort", "argsort") else set()
                    for one in indices:
                        self.pending[id(one)] = (look, inside, tensor, axis % tensor.dim(), took)
            elif look.name in alone:
                look.compared |= name in _COMPARES
                look.normalised |= name in _NORMALISES

    def _confirm(self, tensor: Tensor) -> None:
        """An index that is used is a choice."""
        if id(tensor) not in self.pending:
            return
        look, inside, chosen, axis, took = self.pending.pop(id(tensor))
        source = self._source(chosen) if inside is look else None
        look.chose += [source[0]] if source is not None else []
        inner = inside is not look or source is not None
        if look.chosen is not None and inner and _among_groups(look.chosen, (chosen, axis)):
            source = self._source(self._before(look.chosen[0], chosen)) if inside is look else None
            look.chosen, look.took = None, ()
        if look.chosen is not None and id(look.chosen[0]) in self.sorted and _orders(look.chosen[0], chosen, axis):
            look.chosen, look.took = None, ()
        look.took += (took,)
        if look.chosen is not None:
            return
        look.chosen = (chosen, axis)
        if inside is not look:
            return  # its output is what is forced
        if source is None:
            look.chosen = None  # of what the gate was given: no score of its own
        else:
            look.call, look.scores = source

    def _before(self, groups: Tensor, members: Tensor) -> Tensor:
        """The scores of which those of groups and those of their members come; the members' where there are none."""
        known = {id(one) for one in self._line(groups)}
        fitting = (one for one in self._line(members) if id(one) in known and one.shape == members.shape)
        return next(fitting, members)

    def _line(self, tensor: Tensor) -> Iterator[Tensor]:
        """A tensor, what it was made of first of all, and so on."""
        following: Tensor | None = tensor
        seen = set[int]()  # what is written in place is made of itself
        while following is not None and self._depends(following) and id(following) not in seen:
            seen.add(id(following))
            yield following
            following = self.made.get(id(following), ("", None, None))[1]

    def _source(self, chosen: Tensor) -> tuple[int, Tensor] | None:
        """Back to what gave the scores that were chosen by, inside a gate: which of its calls, and its output."""
        while True:
            function, source, number = self.made.get(id(chosen), ("", None, None))
            if number is None:
                return None
            if function not in _MONOTONE or source is None or not self._depends(source):
                return number, chosen
            chosen = source


def _among_groups(first: tuple[Tensor, int], then: tuple[Tensor, int]) -> bool:
    """Whether a choice was one among groups of what is chosen among afterwards, for the same tokens."""
    (groups, axis), (members, later) = first, then
    last = groups.dim() - 1 == axis and members.dim() - 1 == later and groups.shape[:-1] == members.shape[:-1]
    return last and members.shape[-1] > groups.shape[-1] and members.shape[-1] % groups.shape[-1] == 0


def _orders(tokens: Tensor, chosen: Tensor, axis: int) -> bool:
    """Whether the first choice was an order of the tokens, in which they choose among the last axis."""
    return axis == chosen.dim() - 1 and chosen.shape[:-1] == tokens.shape


def _axis(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis that a function chooses along; None where it is along all."""
    place = 2 if name in ("topk", "kthvalue") else 1
    default = None if name in ("argmax", "argmin", "max", "min") else -1
    given = kwargs.get("dim", args[place] if len(args) > place else default)
    return given if isinstance(given, int) and not isinstance(given, bool) else default

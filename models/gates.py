"""Gates that a user names, by globs over module names: looked at in a forward pass, and made into routing sites.

Along which axis is chosen, and whether the gate chooses itself, is read from the operations that act on the scores; how
many experts are selected, from answers as these are exchanged (`bench.models.exchanges`).

Axes: m = images, T = tokens of an image, E = experts, K = selected experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.errors import UnusableInput, did_you_mean
from bench.models.choices import plain
from bench.models.deployed import eval_frozen
from bench.models.exchanges import ROUNDING, SPREADS, Exchanges, are_probabilities, measured_k
from bench.models.foreign import Guarded, Shown
from bench.models.parts import is_dual, is_moe
from bench.models.sites import Site, counts, forced, intercepted, read, scores_of, selected, shown_sites

#: A user's word for a model that makes no choices.
NONE = "none"
#: Images that gates are looked at with.
LOOKED_AT = 4
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


@dataclass(frozen=True)
class Named:
    """One word of a user's: the names that it stands for, and what is known already. `blocks.*.gate:k=2`, `fc:e=4`."""

    pattern: str
    k: int | None = None
    e: int | None = None

    @classmethod
    def parse(cls, word: str) -> "Named":
        """UnusableInput for a word that is not NAME, NAME:k=K or NAME:e=E."""
        pattern, *more = word.split(":")
        known: dict[str, int] = {}
        for pair in more:
            key, _, value = pair.partition("=")
            if key not in ("k", "e") or not value.isdigit() or int(value) < 1 or not pattern:
                raise UnusableInput(
                    f"--gates {word}: write NAME, NAME:k=2 (experts selected) or NAME:e=4 (experts to select from)"
                )
            known[key] = int(value)
        return cls(pattern, **known)

    def word(self, name: str) -> str:
        """The same for one module alone."""
        return "".join([name, *(f":{key}={value}" for key, value in (("e", self.e), ("k", self.k)) if value)])


def declared(model: nn.Module) -> tuple[str, ...]:
    """What a model's attribute `gates` says: a list of globs, or a dict from globs to K; () where it says nothing."""
    gates = getattr(plain(model), "gates", None)
    if isinstance(gates, str):
        return (gates,)
    if isinstance(gates, dict) and all(isinstance(name, str) and isinstance(k, int) for name, k in gates.items()):
        return tuple(f"{name}:k={k}" for name, k in gates.items())
    if isinstance(gates, list | tuple) and gates and all(isinstance(name, str) for name in gates):
        return tuple(gates)
    return ()


@dataclass(frozen=True)
class Gates:
    """The gates that a user named: as one word each, in the order of the model's modules, and as sites."""

    words: tuple[str, ...]
    sites: tuple[Site, ...]


def find_gates(model: nn.Module, words: Sequence[str], x: Tensor) -> Gates:
    """The gates of a model that `words` name, from forward passes on images x (m, c, H, W) in eval mode.

    Raises:
        UnusableInput: a word that names no module, or one whose output cannot be scores, or scores that the model's
            answer does not depend on.
    """
    if NONE in words:
        if len(words) > 1:
            raise UnusableInput(f"--gates none says that there are no gates: drop {', '.join(set(words) - {NONE})}")
        return Gates((NONE,), ())
    model = plain(model)
    modules = dict(model.named_modules())
    modules.pop("")
    found: dict[str, Named] = {}
    for word in words:
        named = Named.parse(word)
        matched = [name for name in modules if fnmatchcase(name, named.pattern)]
        matched = matched or [name for name in modules if fnmatchcase(name, f"*.{named.pattern}")]  # inside a wrapper
        if not matched:
            raise UnusableInput(f"--gates {word}: the model has no such module: {_nearest(named.pattern, modules)}")
        if scripted := [name for name in matched if isinstance(modules[name], torch.jit.ScriptModule)]:
            raise UnusableInput(f"--gates {scripted[0]}: a scripted module takes no hooks: leave it unscripted")
        found |= dict.fromkeys(matched, named)
    guard = Guarded(model)
    with _looking(guard):
        several = _calls(guard, {name: modules[name] for name in found}, x)
        looks = [look for name, named in found.items() for look in _looks(name, modules[name], named, several[name])]
        _look(guard, looks, x)
        sites = [look.site(model, len(x)) for look in looks]
        _of_images(guard, sites, x)
        sites = [_selects(guard, site, sites, x, look) for site, look in zip(sites, looks, strict=True)]
    order = [name for name in modules if name in found]
    sites.sort(key=lambda site: (order.index(site.module), site.turn))
    return Gates(tuple(found[name].word(name) for name in order), tuple(sites))


def _calls(guard: Guarded, gates: Mapping[str, nn.Module], x: Tensor) -> dict[str, int]:
    """How often a pass calls each of some gates, by name: 1 also where it is another number for one image."""
    found = []
    for images in (x, x[-1:]):
        with _called(list(gates.values())) as calls:
            guard(images)
        parts = [part for part, *_ in calls]
        found.append({name: sum(part is gate for part in parts) for name, gate in gates.items()})
    alike = {name: times == found[1][name] and 1 < times <= MOST_CALLS for name, times in found[0].items()}
    return {name: times if alike[name] else 1 for name, times in found[0].items()}


def _looks(name: str, module: nn.Module, named: Named, several: int) -> list["_Look"]:
    if several == 1:
        return [_Look(name, module, named)]
    return [_Look(f"{name}#{turn + 1}", module, named, turn=turn, several=several) for turn in range(several)]


def look_at_shown(model: nn.Module, x: Tensor) -> Shown:
    """What a pass on images x (m, c, H, W) tells of the MoEs that a model's attributes show; of one that fails nothing.

    A mask or a one-hot of the choice tells nothing of the experts that are not chosen, and has no gradient that leads
    to them. The scores are those of the gate's first function by which every expert can be led to.
    """
    guard = Guarded(plain(model))
    shown = [site for site in shown_sites(guard) if site.num_experts > 1]
    if not shown:
        return Shown()
    modules = [site for site in shown if isinstance(site.gate, nn.Module)]
    looks = [_Look(site.name, site.gate, Named(site.name)) for site in modules]
    inside: list[Site] = []
    try:
        with _looking(guard):
            routed: list[nn.Module] = [part for part in guard.model.modules() if _is_routed(part)]
            asked = [part for site in shown for part in (site.gate, *site.owner.experts)]
            with _called([*asked, *routed]) as calls:
                logits = _look(guard, looks, x)
            for site, look in zip(modules, looks, strict=True):
                inner = (replace(site, call=call, axis=axis) for call in dict.fromkeys(look.chose) for axis in (-1, 1))
                inside += islice((one for one in inner if _leads(guard, one, site, x)), 1)
    except Exception:  # of a user's own model: whoever attacks it tells of it
        return Shown()
    features = [part for part, given, _ in calls if part in asked and given.shape[1:] != x.shape[1:]]
    cores = [part for part, given, answer in calls if part in routed and _wraps(given, answer, x, logits)]
    core = cores[-1] if cores and guard.model not in routed else None  # the outermost, which is the last to answer
    once = sum(part is core for part, *_ in calls) == 1
    return Shown(tuple(inside), tuple(features), (guard.model, core) if core is not None and once else None)


def _is_routed(module: nn.Module) -> bool:
    return is_moe(module) or is_dual(module)


def _wraps(given: Tensor, answer: Any, x: Tensor, logits: Tensor) -> bool:
    """Whether a module is given images, and its answer is the model's."""
    same = isinstance(answer, Tensor) and answer.shape == logits.shape and given.shape == x.shape
    return same and torch.equal(answer.float(), logits)


@contextmanager
def _called(modules: Sequence[Any]) -> Iterator[list[tuple[nn.Module, Tensor, Any]]]:
    """The calls of modules within, in the order in which they answer: each with the tensor given, and the answer."""
    calls: list[tuple[nn.Module, Tensor, Any]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any], answer: Any) -> None:
        calls.extend((module, leaf, answer) for leaf in tree_leaves((inputs, more))[:1] if isinstance(leaf, Tensor))

    different = {id(one): one for one in modules if isinstance(one, nn.Module)}.values()
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in different]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _leads(guard: Guarded, inner: Site, shown: Site, x: Tensor) -> bool:
    """Whether each expert wins at the gate where it is forced by the scores inside."""
    for expert in range(shown.num_experts):
        seen: list[Tensor] = []

        def note(scores: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(scores.clone())
            return scores

        chosen = torch.full((len(x), 1), expert, device=x.device)
        with intercepted(shown, note), intercepted(inner, partial(forced, chosen=chosen)):
            guard(x)
        if len(seen) != 1 or not bool((seen[0].argmax(-1) == expert).all()):
            return False
    return True


@contextmanager
def _looking(guard: Guarded) -> Iterator[None]:
    with eval_frozen(guard), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _look(guard: Guarded, looks: list["_Look"], x: Tensor) -> Tensor:
    """The logits of one pass in which the gates are watched."""
    with ExitStack() as stack:
        for look in looks:
            stack.enter_context(look.hooked())
        stack.enter_context(_Follow(looks, x))
        logits: Tensor = guard(x)
    return logits


def _nearest(pattern: str, modules: dict[str, nn.Module]) -> str:
    """Modules that may be meant: the nearest names, else those that sound like gates."""
    last = pattern.rpartition(".")[2].strip("*")
    alike = [name for name in modules if last and last in name.rpartition(".")[2]]
    gates = [name for name in modules if any(word in name.rpartition(".")[2].lower() for word in ("gate", "rout"))]
    names = alike or gates or list(modules)
    return did_you_mean(pattern, names[:8]) if len(names) <= 8 else f"there are: {', '.join(names[:8])} …"


@dataclass(eq=False)
class _Look:
    """What one forward pass shows of a gate.

    chosen: what the first function chose by, and along which axis; None where nothing chose by the scores. took: how
    many, where it was a top-k, and how many each one after it. turn: which of `several` calls is looked at. compared,
    normalised: whether the scores are compared, or made weights. call: which of the gate's own calls gave the scores,
    where it chooses itself. chose: all calls that gave what it chose by itself. own: what it gave, once that is known.
    """

    name: str
    module: nn.Module
    named: Named
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
        if self.chosen is None or self.named.e:
            axis = 1 if scores.dim() == 4 else -1
            return axis, scores.shape[axis], self.named.e or scores.shape[axis], True
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


class _Follow(TorchFunctionMode):
    """Follows what depends on the images, and what of it is computed from a gate's scores alone."""

    def __init__(self, looks: list[_Look], x: Tensor) -> None:
        super().__init__()
        self.looks = looks
        self.data = {id(x)}
        self.of: dict[int, set[str]] = {}  # gates whose scores alone a tensor is computed from
        self.made: dict[int, tuple[str, Tensor | None, int | None]] = {}  # the function, its input, the gate's call
        self.pending: dict[int, tuple[_Look, _Look | None, Tensor, int, int | None]] = {}
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
            known = [self.of.get(id(one), set()) for one in depending if name not in _LAYERS]
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

    def _mask(self, both: list[Tensor], mask: Tensor, inside: _Look) -> None:
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
        inside: _Look | None,
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


def _axis(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The axis that a function chooses along; None where it is along all."""
    place = 2 if name in ("topk", "kthvalue") else 1
    default = None if name in ("argmax", "argmin", "max", "min") else -1
    given = kwargs.get("dim", args[place] if len(args) > place else default)
    return given if isinstance(given, int) and not isinstance(given, bool) else default


def _of_images(guard: Guarded, sites: list[Site], x: Tensor) -> None:
    """UnusableInput where the rows of a gate's scores are those of all images' first tokens, then the second ones …"""
    other = torch.cat([1 - x[:1], x[1:]])
    before, after = (read(guard, [site.plain for site in sites], images).scores for images in (x, other))
    for site in sites:
        if site.name in before and site.name in after:
            moved = (before[site.name] - after[site.name]).abs().amax(-1)  # (m, T)
            strided = moved.reshape(-1).view(moved.shape[1], len(x)).T
            if bool(moved[1:].any()) and not bool(strided[1:].any()):
                raise UnusableInput(
                    f"--gates {site.name}: its scores have the tokens before the images: name a module whose output is"
                    " (images, tokens, experts)"
                )


def _selects(guard: Guarded, site: Site, sites: list[Site], x: Tensor, look: _Look) -> Site:
    """The site with its K: the user's, or the last rank at which the model's answer jumps.

    Where the answer does not depend on this gate's scores, the other gates' are drawn at random: one may have to be
    open for it.
    """
    if (k := look.named.k) is not None:
        if k > site.num_experts:
            raise UnusableInput(f"--gates {site.name}:k={k}: it has {site.num_experts} experts")
        if (found := measured_k(guard, replace(site, k=k), x)) != k:
            raise UnusableInput(f"--gates {site.name}:k={k}: the model selects {found} of its experts: leave k out")
        return replace(site, k=k)
    if site.choosers:
        return site
    count, exchanges = site.num_experts, Exchanges(guard, site, x)
    effects = exchanges.effects()
    if max(effects.values()) <= ROUNDING:
        exchanges.others += [other for other in sites if other is not site]
        effects = exchanges.effects()
    if max(effects.values()) <= ROUNDING:
        raise look.refuse("the model answers alike whatever the order of its scores")
    jumps = exchanges.jumps(effects, 2 * torch.finfo(look.scores.dtype).eps if look.scores is not None else 0.0)
    took = look.took if look.chosen is not None and look.chosen[0].shape[look.chosen[1]] == count else (None,)
    if jumps:  # code that also wants the runner-up takes one more than it selects; some takes one after the other
        return replace(site, k=min(max(jumps), sum(one or count for one in took)))
    if took[0]:
        return replace(site, k=took[0])
    for spread in SPREADS if look.compared or look.chosen is not None else ():
        if jumps := [rank for rank in effects if exchanges.jumps_between(rank, spread)]:
            return replace(site, k=min(jumps))  # a bias may reorder them; what is too few forces each alone
    if look.compared:
        raise UnusableInput(
            f"--gates {site.name}: its output is compared with a threshold, and scores no experts: show the choice by"
            " attributes `router` and `experts` (docs/your-own-model.md)"
        )
    if not look.normalised:
        raise look.refuse("nothing is chosen by its output, and no softmax of it is taken")
    return replace(site, k=count)

"""Whether a model chooses by its input: signs of routes in a network that names none.

A network that sends images, tokens or channels down different paths is as robust as its worst path, and attacks that do
not know the paths overstate it. Two things give it away: names (gate, router, experts …), and the operations of one
forward pass whose result is a choice: an index, a comparison, a rounding that depends on the images and is then used.
A value that only passes on the best of several (max-pooling, the largest attention weight) chooses nothing: its index
is thrown away.

Axes: B = images, E = experts.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.models.foreign import scored
from bench.models.operations import ELSEWHERE, IN_A_THREAD, MOST_EXPERTS, OUTSIDE, READ, Reads, Steps, Watch, key
from bench.models.sites import Site, intercepted

#: What names a route wherever it stands; a `gate` may be a squeeze-and-excitation's sigmoid as well.
_ROUTES = re.compile(
    r"[Rr]outer|[Rr]outing|(^|_)routes?(_|$)|[Ee]xperts?(?![a-z])|[Mm]o[Ee](?![a-z])|MOE|EXPERT|ROUTER|[Gg]ater"
)
_GATE = re.compile(r"gate|gating", re.IGNORECASE)
#: Channels of an image.
_COLOURS = 3


@dataclass(frozen=True)
class Choices:
    """Signs of routes. `names`: modules and attributes as globs over block numbers, such as `blocks.*.mlp.gate`;
    `operations`: what was chosen by, each with the module (as a glob) that did it, such as `topk in blocks.*.mlp`;
    `where`: the module of the first of them, "" for the model itself; `gate`: the one that may well be the gate, or "";
    `gates`: known ones that choose inside, by what their scores do not show; `read`: whether they are read inside;
    `outside`: those of the operations that Python acts on, or another library, or which are in a model that is scripted
    or quantized: no attack follows them.
    """

    names: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    where: str = ""
    gate: str = ""
    gates: tuple[str, ...] = ()
    read: bool = False
    outside: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.operations)

    def words(self, named: bool = False) -> str:
        """What was seen, and what to type, in one line. named: the user has named gates, or said there are none."""
        seen = []
        if self.operations:
            seen.append(f"choices that depend on the image ({few(self.operations)})")
        if self.names:
            seen.append(f"names that speak of routes ({few(self.names)})")
        if self.read:
            beside = f"beside the scores of '{self.gates[0]}', so that they cannot be forced alone"
            return f"{' and '.join(seen)}, {beside}: give each gate a module of its own, and name all of them"
        gate, which = next(iter(self.gates), self.gate), "these gates as well" if named else "its gates"
        place = f" in '{self.where}'" if self.where else ""
        name = f"name {which}{place}, each a module of its own, with --gates GLOB"
        if gate:
            name = f"name {which} with --gates '{gate}'"
        inside = "choose by torch alone, which attacks can follow (no .item(), .tolist() or bool() of what images give)"
        if self.outside and self.gates:
            advice = inside
        elif self.gates and named:
            advice = f"let '{self.gates[0]}' give the scores that it chooses by"
        elif any(operation.startswith(OUTSIDE) for operation in self.outside):
            advice = f"{name}, and {inside}"
        else:
            none = "add none" if named else "declare --gates none"
            advice = name if self.outside or self.gates else f"{name}, or {none}"
        return f"{' and '.join(seen)}: {advice}"


def find_choices(model: nn.Module, x: Tensor, known: Sequence[Site] = ()) -> Choices:
    """The signs of routes in a model in eval mode, from its code and from one forward pass on images x (B, c, H, W).

    What is chosen by the scores of the sites `known` alone is no sign, since those are attacked; nor is what decides
    nothing of the answer, nor a name beside one of their gates. A choice by anything else is one wherever it is made,
    inside an expert and inside a gate as well. The model must be able to take x; what it raises is raised. A compiled
    model is watched uncompiled. Draws random numbers where the model does.
    """
    model, watch = plain(model), Watch(x)
    named = {module: name for name, module in reversed(list(model.named_modules()))}
    with ExitStack() as stack:
        for site in known:
            stack.enter_context(intercepted(site.plain, watch.known))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_inside(named, watch))
        stack.enter_context(Reads(watch))
        stack.enter_context(watch)
        output = model(x)
    leaves = [leaf for leaf in tree_leaves(scored(output)[0]) if isinstance(leaf, Tensor)]
    if not any(map(watch.depends, leaves)):
        watch.report(ELSEWHERE, "")
    if not watch.reaching(leaves) and _turns(model, x, known):
        watch.report(READ, "")
    found = watch.reaching(leaves) or watch.weighed
    words = {each: f"{each[0]} in {_glob(each[1]) or type(model).__name__}" for each in found}
    opaque = watch.quantized or any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    outside = [words[each] for each in found if opaque or each in watch.taken or each[0] in OUTSIDE]
    gates = [site.module for site in known]
    inside = [site for site in known for _, where in found if _within(where, site.module)]
    names = tuple(_names(model, watch.shapes, watch.elementwise - watch.scoring, gates))
    first = next((where for _, where in found), "")
    return Choices(
        names,
        tuple(dict.fromkeys(words.values())),
        _glob(first),
        _gate(model, names, first if found else None, watch.shapes),
        tuple(dict.fromkeys(_glob(site.module) for site in inside)),
        bool(inside) and all(site.call is not None for site in inside),
        tuple(dict.fromkeys(outside)),
    )


def _gate(
    model: nn.Module, names: Sequence[str], where: str | None, shapes: Mapping[str, list[tuple[int, ...]]]
) -> str:
    """The module, as a glob, that may well be the gate of a choice seen in `where`, or of none (None); "" for none.

    One that is named for it and lies near, else where the choice is made, if that gives scores.
    """
    modules = {_glob(name) for name, _ in model.named_modules()}
    likely = [name for name in names if _GATE.search(_last(name)) or "rout" in _last(name).lower()]
    place = None if where is None else _glob(where)
    for name in likely:
        if name in modules and (place is None or _within(name, place) or _within(place, name)):
            return name
    if not where or not _scores(model.get_submodule(where), shapes.get(where, ())):
        return ""
    return _glob(where)


def _turns(model: nn.Module, x: Tensor, known: Sequence[Site]) -> bool:
    """Whether a model does otherwise for one image than for another: other operations, or on other weights or numbers.

    Then Python has chosen, by whatever way a value came to it. Each image is asked for alone, on one route of the known
    sites. A model that does not do the same for the same image again tells nothing.
    """

    def steps(image: Tensor) -> list[tuple[object, ...]]:
        noted = Steps(image, (*model.parameters(), *model.buffers()))
        with noted:
            model(image)
        return noted.taken

    def one_route(scores: Tensor) -> Tensor:
        return torch.arange(scores.shape[-1], 0, -1, device=scores.device).to(scores).expand_as(scores)

    with ExitStack() as stack:
        for site in known:
            stack.enter_context(intercepted(site.plain, one_route))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        ones = torch.split(torch.cat([x, 1 - x, x.flip(-1), x.flip(-2)]), 1)
        try:
            model(ones[0])  # which may keep something for this shape
            first = steps(ones[0])
            return first == steps(ones[0]) and any(steps(one) != first for one in ones[1:])
        except Exception:  # of one that takes no single image, or no such scores
            return False


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
        if shape != given and 2 <= values <= MOST_EXPERTS and not each:
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
def _inside(named: dict[nn.Module, str], watch: Watch) -> Iterator[None]:
    """The watch knows in which module it is, and what shapes modules take and give."""
    handles, own = [], threading.current_thread()

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        watch.where.append(named[module])
        if threading.current_thread() is not own:  # of whose operations torch shows the watch none
            watch.report(IN_A_THREAD)

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        watch.where.pop()
        tensors = [leaf for leaf in tree_leaves((inputs[:1], output)) if isinstance(leaf, Tensor)]
        watch.shapes[named[module]] = [tuple(tensor.shape) for tensor in tensors]
        if _GATE.search(named[module]) and isinstance(output, Tensor):
            watch.gated[key(output)] = named[module]

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

"""Routing sites: the places where a model chooses experts, read and forced from outside, by hooks.

A user's code is not changed: a hook on the gate reads its scores, and adds the least shift to them that makes the
wanted experts win. An MoE of whole networks has one site, its router; a dual those of both branches; an expert that is
itself routed has one of its own; a block inside a network has one, shown by its attributes or named by the user
(`bench.models.gates`). A *path* is a choice at every site. Where experts choose tokens (Zhou et al. 2022), the two
change places: for each of E experts, K of T tokens are selected.

Axes: m = images, T = tokens of an image (1 where whole images are routed), E = experts, K = selected experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.models.foreign import Guarded, Shown, bare
from bench.models.parts import is_dual, is_moe

#: From a gate's scores (m, T, E) to those that the model goes on with.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A gate: `owner.attribute`, a module or a plain callable that gives the scores of `num_experts` experts.

    k: how many of them are selected; all are where nothing is chosen (a soft mixture). whole: whether the owner's
    experts are classifiers of images, one output each. rows: of the gate's input for each image (T where it sees
    tokens as rows). layers: for how many layers it scores the experts at a time; each counts as a token. axis: of the
    experts in the scores. call: which of the functions that the gate calls gives the scores, where it chooses itself;
    None: they are its output. choosers: of experts that choose tokens the number; `num_experts` is then that of an
    image's tokens, and K how many each expert takes, 0 where that is not known, so that nothing can be forced. shared:
    whether they choose by the softmax over experts. turn: which of the `calls` of the gate in a pass, from 0 on; each
    is a site of its own, named `gate#1`, `gate#2` and so on.
    """

    name: str
    owner: Any
    attribute: str
    num_experts: int
    k: int
    whole: bool = True
    rows: int = 1
    layers: int = 1
    axis: int = -1
    call: int | None = None
    choosers: int = 0
    shared: bool = False
    turn: int = 0
    calls: int = 1

    @property
    def module(self) -> str:
        """The gate's own name, whichever of its calls this is."""
        return self.name.partition("#")[0]

    @property
    def soft(self) -> bool:
        """Whether all experts are used, each with its weight."""
        return self.k == self.num_experts

    @property
    def plain(self) -> "Site":
        """The same where experts do not choose; else the gate that scores experts for each token, as a soft one."""
        return replace(self, num_experts=self.choosers, k=self.choosers, choosers=0) if self.choosers else self

    @property
    def words(self) -> str:
        """What is known of it, such as `blocks.1.gate (top-2 of 8)`."""
        kind = f"soft, of {self.num_experts}" if self.soft else f"top-{self.k} of {self.num_experts}"
        if self.choosers:
            kind = f"each of {self.choosers} experts chooses {self.k or 'some'} of {self.num_experts} tokens"
        return f"{self.name} ({kind})"

    @property
    def gate(self) -> Any:
        """The module or callable whose output holds the scores."""
        return getattr(self.owner, self.attribute)

    def ask(self, gate: Callable[[Tensor], Any], x: Tensor) -> Tensor:
        """The scores (m, E) of the gate by itself, of images x (m, …), behind what `gate` does to them."""
        return read(gate, [self], x).scores[self.name][:, 0]


def sites(model: nn.Module) -> list[Site]:
    """The sites of a model, in the order of its modules, then those that the user named; not where there is one expert.

    An MoE of whole networks is any sub-module with `router` and `experts`; K is its `num_selected_experts`, 1 where it
    does not say. An MoE block inside a network is one with `gate` (a module), `experts` and `num_selected_experts`.
    """
    named: tuple[Site, ...] = model.gates if isinstance(model, Guarded) else ()
    return [*(site for site in shown_sites(model) if site.num_experts > 1), *named]


def forced_inside(model: nn.Module) -> bool:
    """Whether routes are forced inside what a call of a network runs: by gates in it, or in a user's own model."""
    return bool(sites(model)) if isinstance(model, Guarded) else any(map(is_block, model.modules()))


def shown_sites(model: nn.Module) -> list[Site]:
    """The sites that attributes show, but for those that the user named: those that choose, and soft mixtures."""
    gates = [site.gate for site in model.gates] if isinstance(model, Guarded) else []
    known = model.shown if isinstance(model, Guarded) else Shown()
    found = []
    for name, module in bare(model).named_modules():
        attribute = "router" if is_moe(module) else "gate" if is_block(module) else None
        if attribute is not None and not any(getattr(module, attribute) is gate for gate in gates):
            owner: Any = module
            count, k = len(owner.experts), int(getattr(owner, "num_selected_experts", 1))
            where = f"{name}.{attribute}".removeprefix(".")
            layer = any(expert is one for expert in owner.experts for one in known.features)
            whole = not layer and _classifies(*_below(known, bare(model), name))
            site = Site(where, owner, attribute, count, min(k, count), whole=whole)
            inside = next((one for one in known.inside if one.gate is site.gate), site)
            found.append(replace(site, call=inside.call, axis=inside.axis))
    return found


def _below(known: Shown, model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What a model wraps, and the name in it of a module that the model calls `name`."""
    if known.wrapped is None or known.wrapped[0] is not model:
        return model, name
    core = known.wrapped[1]
    (outer,) = (one for one, module in model.named_modules() if module is core)
    inside = name == outer or name.startswith(f"{outer}.")
    return (core, name[len(outer) + 1 :]) if inside else (model, name)


def _classifies(model: nn.Module, name: str) -> bool:
    """Whether a part is given images, as an MoE's experts and a dual's branches are; a layer is given features."""
    inside = ("standard", "robust") if is_dual(model) else ("experts",) if is_moe(model) else ()
    while name and name.partition(".")[0] in inside:
        first, _, name = name.partition(".")
        number, _, name = name.partition(".") if first == "experts" else ("", "", name)
        model = getattr(model, first)[int(number)] if number else getattr(model, first)
        inside = ("experts",) if is_moe(model) else ()
    return not name and is_moe(model)


def is_block(module: nn.Module) -> bool:
    """Whether it is an MoE block whose experts are parts of a network, chosen by a gate that can be seen."""
    gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
    shown = isinstance(gate, nn.Module) and isinstance(experts, nn.ModuleList)
    return shown and hasattr(module, "num_selected_experts")


def host(site: Site, others: Sequence[Site]) -> tuple[Site, int] | None:
    """The site that chooses the expert which this one lies in, the innermost one, and that expert's number."""
    for other in sorted(others, key=lambda one: len(one.name), reverse=True):
        inside = f"{other.module.removesuffix(other.attribute)}experts."
        if other is not site and site.name.startswith(inside):
            experts = [name for name, _ in other.owner.experts.named_children()]  # numbers, or a ModuleDict's keys
            if len(experts) == other.num_experts:
                return other, experts.index(site.name.removeprefix(inside).partition(".")[0])
    return None


def scores_of(output: Any, images: int, num_experts: int, layers: int = 1, axis: int = -1) -> Tensor | None:
    """The scores (m, T, E) in a gate's output: a tensor, or the first that fits of what it holds; None where none does.

    It may be a tuple, a list, a dict, or an object with attributes. Chosen indices alone, whole numbers (m,) or (m, K),
    count as scores of 1 for the chosen experts, 0 for the others.
    """
    if not isinstance(output, Tensor):
        found = (scores_of(part, images, num_experts, layers, axis) for part in _entries(output).values())
        return next((scores for scores in found if scores is not None), None)
    if not output.dim():
        return None
    if not output.is_floating_point():
        if len(output) == images and output.numel() < images * num_experts:
            return nn.functional.one_hot(output.view(images, -1), num_experts).sum(1, keepdim=True).float()
    elif output.shape[axis] == num_experts * layers and output.numel() % (images * num_experts) == 0:
        return output.movedim(axis, -1).reshape(images, -1, num_experts)
    return None


def _entries(output: Any) -> Mapping[Any, Any]:
    """What a gate's output holds: the items of a tuple or list by number, of a dict by key, an object's by name."""
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return output if isinstance(output, Mapping) else getattr(output, "__dict__", {})


def with_scores(output: Any, scores: Tensor, images: int, layers: int, axis: int) -> Any:
    """The same output with other scores (m, T, E)."""
    if not isinstance(output, Tensor):
        for key, part in _entries(output).items():
            if scores_of(part, images, scores.shape[-1], layers, axis) is not None:
                return _with_entry(output, key, with_scores(part, scores, images, layers, axis))
        return output
    if not output.is_floating_point():
        chosen = scores[:, 0].topk(max(1, output.numel() // images), dim=-1).indices
        return chosen.view(output.shape).to(output.dtype)
    return scores.reshape(output.movedim(axis, -1).shape).movedim(-1, axis)


def _with_entry(output: Any, key: Any, value: Any) -> Any:
    """A copy with another entry."""
    if isinstance(output, tuple | list):
        items = [*output[:key], value, *output[key + 1 :]]
        made_of = getattr(type(output), "_make", type(output))  # a namedtuple's; torch's own take them as a list does
        return made_of(items)
    changed = copy(output)
    if isinstance(output, Mapping):
        changed[key] = value
    else:
        object.__setattr__(changed, key, value)  # also of a frozen dataclass
    return changed


def _by_experts(scores: Tensor, change: Change, shared: bool) -> Tensor:
    """The scores (m, T, E) after a change of how the experts rank the tokens, (m, E, T).

    shared: by softmax(scores) over E, whose logit is the score less the logsumexp of the token's other scores: a shift
    of one score shifts it by as much.
    """
    if not shared:
        return change(scores.transpose(1, 2)).transpose(1, 2)
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    others = scores[..., None, :].masked_fill(own, -torch.inf).logsumexp(-1)
    return change((scores - others).transpose(1, 2)).transpose(1, 2) + others


def counts(output: Any) -> bool:
    """Whether a function's output counts as a call inside a gate: one with a tensor of numbers."""
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(output))


class _AtCall(TorchFunctionMode):
    """Within, the output of call `number` is what `change` makes of it."""

    def __init__(self, number: int, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.left, self.change = number, change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if counts(output):
            self.left -= 1
            if self.left == -1:
                return self.change(output)
        return output


def selected(scores: Tensor, k: int) -> Tensor:
    """Which experts (m, T, E) have the k largest scores."""
    best = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def first_of(scores: Tensor, counts: Tensor) -> Tensor:
    """Which experts (m, T, E) have the largest scores, as many as are counted (m, T, 1)."""
    return scores.argsort(-1, descending=True).argsort(-1) < counts


class SinglePath(nn.Module):
    """A model in which one expert of a site is among the selected ones at every token."""

    def __init__(self, model: nn.Module, site: Site, expert: int) -> None:
        super().__init__()
        self.model, self.site, self.expert = model, site, expert

    def forward(self, x: Tensor) -> Tensor:
        def change(scores: Tensor) -> Tensor:
            mine = torch.arange(self.site.num_experts, device=scores.device) == self.expert
            return lifted(scores, mine.expand(*scores.shape[:2], -1), self.site.k, at=-torch.inf)

        with intercepted(self.site, change):
            return self.model(x)


def single_paths(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    """The model with each expert of a site forced, by name: `blocks.1.gate=2`."""
    return {f"{site.name}={expert}": SinglePath(model, site, expert) for expert in range(site.num_experts)}


@contextmanager
def intercepted(
    site: Site, change: Change, around: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[list[Tensor]]:
    """Within, the model goes on with what `change` makes of the gate's scores; the gate itself runs inside `around`.

    Gives a list that holds the gate's first input of each of the site's calls, as it was before the gate worked on it;
    it stays empty where the model does not call its gate in a way that can be seen.
    """
    calls: list[Tensor] = []
    number = count()
    layout = (site.layers, site.axis)
    width = site.plain.num_experts

    def given(inputs: Sequence[Any]) -> Tensor:
        found: Tensor = next(one for one in inputs if isinstance(one, Tensor))
        return found

    def changed(inputs: Sequence[Any], output: Any) -> Any:
        images = len(given(inputs)) // site.rows
        scores = scores_of(output, images, width, *layout) if images else None
        if scores is None or (site.choosers and scores.shape[1] != site.num_experts):
            return output
        after = _by_experts(scores, change, site.shared) if site.choosers else change(scores)
        return with_scores(output, after, images, *layout)

    def another() -> bool:
        return next(number) % site.calls != site.turn

    gate = site.gate
    if isinstance(gate, nn.Module):
        open_now: list[ExitStack] = []

        def before(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> None:
            if another():
                return
            calls.append(given((*inputs, *more.values())).detach().clone())
            open_now.append(ExitStack())
            open_now[-1].enter_context(around())
            if site.call is not None:
                open_now[-1].enter_context(_AtCall(site.call, partial(changed, (*inputs, *more.values()))))

        def after(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any], output: Any) -> Any:
            if not open_now:
                return None
            open_now.pop().close()
            if output is None or site.call is not None:  # None: it raised
                return None
            return changed((*inputs, *more.values()), output)

        handles = [
            gate.register_forward_pre_hook(before, with_kwargs=True),
            gate.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()
        return

    def replaced(*inputs: Any, **more: Any) -> Any:
        if another():
            return gate(*inputs, **more)
        calls.append(given((*inputs, *more.values())).detach().clone())
        with around():
            output = gate(*inputs, **more)
        return changed((*inputs, *more.values()), output)

    own = site.attribute in vars(site.owner)
    setattr(site.owner, site.attribute, replaced)
    try:
        yield calls
    finally:
        if own:
            setattr(site.owner, site.attribute, gate)
        else:
            delattr(site.owner, site.attribute)


def wanted(chosen: Tensor, num_experts: int) -> Tensor:
    """Which experts (m, E) are among the chosen ones (m, K); -1 is none."""
    return nn.functional.one_hot(chosen + 1, num_experts + 1)[..., 1:].amax(1).bool()


def forced(scores: Tensor, chosen: Tensor) -> Tensor:
    """The scores (m, T, E) with the least shift that makes the experts chosen (m, K) win at every token.

    Rows whose choice is -1 are left as they are. The shift has no gradient, so that of the scores stays.
    """
    return lifted(scores, wanted(chosen, scores.shape[-1])[:, None], 1, at=-torch.inf)


def gap(scores: Tensor, chosen: Tensor) -> Tensor:
    """By how much the weakest of the chosen experts (m, K) is ahead of the best other (m,), at the worst token.

    +∞ where the choice is -1.
    """
    return ahead(scores, wanted(chosen, scores.shape[-1])[:, None].expand_as(scores), 1)


def _best_others(values: Tensor, mine: Tensor, k: int) -> Tensor:
    """The score (m, T, 1) that experts `mine` (m, T, E) have to exceed in order to be among the K selected ones."""
    if k == 1:  # of equal scores each has its share of the gradient: saturated ones are all equal
        return values.masked_fill(mine, -torch.inf).amax(-1, keepdim=True)
    others = values.masked_fill(mine, -torch.inf).topk(k, dim=-1).values
    return others.gather(-1, (k - mine.sum(-1, keepdim=True)).clamp(0, k - 1).expand(*others.shape[:-1], 1))


def opened(scores: Tensor, at: float = -torch.inf) -> Tensor:
    """The scores (…, E) with experts that the gate closes, `at` or below, behind all others by their range and 1."""
    closed = scores <= at
    lowest = scores.masked_fill(closed, torch.inf).amin(-1, keepdim=True)
    return torch.where(closed, 2 * lowest - scores.amax(-1, keepdim=True) - 1, scores)


def lifted(scores: Tensor, mine: Tensor, k: int, at: float | None = None) -> Tensor:
    """The scores (m, T, E) with the least shift that puts the experts `mine` (m or 1, T or 1, E) among the K selected.

    With k = 1 they all come first, however many they are. The shift has no gradient, so that of the scores stays.
    at: the score of experts that the gate closes, if it does. Where it leaves no more open than are selected, others
    are closed for those that are opened.
    """
    if at is not None:
        mine, closed = mine.expand_as(scores), scores <= at
        found = lifted(torch.where(closed, opened(scores, at).detach(), scores), mine, k)
        room = mine.sum(-1, keepdim=True).clamp_min(k)
        full = (~closed).sum(-1, keepdim=True) <= room
        kept = first_of(found, room)
        return found.masked_fill(torch.where(full, ~kept, closed & ~mine), at)
    values = scores.detach()
    share = max(1e-4, 4 * torch.finfo(values.dtype).eps)  # what is no more than rounding wins nothing
    slack = share * values.abs().amax(-1, keepdim=True) + 1e-6
    lift = (_best_others(values, mine, k) + slack - values).clamp_min(0)
    return scores + torch.where(mine, lift, torch.zeros_like(lift))


def ahead(scores: Tensor, mine: Tensor, k: int) -> Tensor:
    """By how much the weakest of the experts `mine` (m, T, E) is ahead of what it has to exceed for that, (m,).

    At the worst of the tokens that any are asked for at; +∞ where there is none.
    """
    lead = scores.masked_fill(~mine, torch.inf).amin(-1) - _best_others(scores, mine, k)[..., 0]
    return torch.where(mine.any(-1), lead, torch.inf).amin(1)


class Reading(NamedTuple):
    """The model's logits for x (m, …), and by site the scores (m, T, E) and the gate's input (m, …).

    A site whose call is not made once, in a way that can be seen, has no entry. apart: it calls a gate once
    for each image, in a loop; sites among layers have no entry then.
    """

    logits: Tensor
    scores: dict[str, Tensor]
    inputs: dict[str, Tensor]
    apart: bool = False


def read(model: Callable[[Tensor], Tensor], found: Sequence[Site], x: Tensor) -> Reading:
    """What the gates of sites are given and give for images x (m, …)."""
    seen: dict[str, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {}

    def note(name: str, scores: Tensor) -> Tensor:
        seen[name] = scores.clone()  # the model may work on them in place
        return scores

    with ExitStack() as stack:
        for site in found:
            inputs[site.name] = stack.enter_context(intercepted(site, partial(note, site.name)))
        logits = model(x)
    whole = [site for site in found if site.whole]
    if len(x) > 1 and any(len(inputs[site.name]) == len(x) for site in whole):
        ones = [read(model, whole, one) for one in torch.split(x, 1)]
        shown = [site.name for site in whole if all(site.name in one.scores for one in ones)]
        scores, inputs_of = (
            {name: torch.cat([getattr(one, what)[name] for one in ones]) for name in shown}
            for what in ("scores", "inputs")
        )
        return Reading(logits, scores, inputs_of, apart=True)
    once = {name: calls[0] for name, calls in inputs.items() if len(calls) == 1 and name in seen}
    return Reading(logits, {name: seen[name] for name in once}, once)

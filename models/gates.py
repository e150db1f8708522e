"""Gates that a user names, by globs over module names: looked at in a forward pass, and made into routing sites.

Along which axis is chosen, and whether the gate chooses itself, is read from one pass (`bench.models.looks`); how many
experts are selected, from answers as scores are exchanged (`bench.models.exchanges`).

Axes: m = images, T = tokens of an image, E = experts, K = selected experts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.errors import UnusableInput, did_you_mean, users_code
from bench.models.choices import plain
from bench.models.deployed import eval_frozen
from bench.models.exchanges import ROUNDING, Exchanges, measured_k
from bench.models.foreign import Guarded, Shown
from bench.models.looks import MOST_CALLS, Follow, Look
from bench.models.parts import is_dual, is_moe
from bench.models.sites import Site, forced, intercepted, read, shown_sites

#: A user's word for a model that makes no choices; beside gates, for one that makes no others.
NONE = "none"
#: Images that gates are looked at with.
LOOKED_AT = 4


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
            if key not in ("k", "e") or not (value.isascii() and value.isdigit()) or int(value) < 1 or not pattern:
                raise UnusableInput(
                    f"--gates {word}: write NAME, NAME:k=2 (experts selected) or NAME:e=4 (experts to select from)"
                )
            known[key] = int(value)
        return cls(pattern, **known)

    def word(self, name: str) -> str:
        """The same for one module alone."""
        return "".join([name, *(f":{key}={value}" for key, value in (("e", self.e), ("k", self.k)) if value)])


def declared(model: nn.Module) -> tuple[str, ...]:
    """What a model's attribute `gates` says: a list of globs, or a dict from globs to K.

    () where it says nothing, or is something else: none of its words names a module.
    """
    gates = getattr(plain(model), "gates", None)
    said: tuple[str, ...] = ()
    if isinstance(gates, str):
        said = (gates,)
    elif isinstance(gates, dict) and all(isinstance(name, str) and isinstance(k, int) for name, k in gates.items()):
        said = tuple(f"{name}:k={k}" for name, k in gates.items())
    elif isinstance(gates, list | tuple) and all(isinstance(name, str) for name in gates):
        said = tuple(gates)
    modules = [name for name, _ in plain(model).named_modules()]
    return said if any(word == NONE or _matched(word.partition(":")[0], modules) for word in said) else ()


def _matched(pattern: str, modules: Iterable[str]) -> list[str]:
    """The modules that a glob names, by their whole names or else inside a wrapper; a last `.*` stands for one part."""

    def matching(glob: str) -> list[str]:
        if glob.endswith(".*"):
            return [name for name in modules if "." in name and fnmatchcase(name.rpartition(".")[0], glob[:-2])]
        return [name for name in modules if fnmatchcase(name, glob)]

    return matching(pattern) or matching(f"*.{pattern}")


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
    others = [word for word in words if word != NONE]
    if not others and NONE in words:
        return Gates((NONE,), ())
    model = plain(model)
    modules = dict(model.named_modules())
    modules.pop("")
    found: dict[str, Named] = {}
    for word in others:
        named = Named.parse(word)
        if not (matched := _matched(named.pattern, modules)):
            raise UnusableInput(f"--gates {word}: the model has no such module: {_nearest(named.pattern, modules)}")
        if scripted := [name for name in matched if isinstance(modules[name], torch.jit.ScriptModule)]:
            raise UnusableInput(f"--gates {scripted[0]}: a scripted module takes no hooks: leave it unscripted")
        found |= dict.fromkeys(matched, named)
    guard = Guarded(model)
    failing = users_code(f"--gates {' '.join(others)}: the model fails where its gates are watched or forced")
    with _looking(guard), failing:
        several = _calls(guard, {name: modules[name] for name in found}, x)
        looks = [look for name, named in found.items() for look in _looks(name, modules[name], named, several[name])]
        _look(guard, looks, x)
        sites = [look.site(model, len(x)) for look in looks]
        _of_images(guard, sites, x)
        sites = [
            _selects(guard, site, sites, x, look, found[site.module].k) for site, look in zip(sites, looks, strict=True)
        ]
    order = [name for name in modules if name in found]
    sites.sort(key=lambda site: (order.index(site.module), site.turn))
    said = [found[name].word(name) for name in order] + [NONE] * (NONE in words)
    return Gates(tuple(said), tuple(sites))


def _calls(guard: Guarded, gates: Mapping[str, nn.Module], x: Tensor) -> dict[str, int]:
    """How often a pass calls each of some gates, by name: 1 also where it is another number for other images."""
    found = []
    for images in (x, x[-2:]):  # two, since a model may be unable to take one
        with _called(list(gates.values())) as calls:
            guard(images)
        parts = [part for part, *_ in calls]
        found.append({name: sum(part is gate for part in parts) for name, gate in gates.items()})
    alike = {name: times == found[1][name] and 1 < times <= MOST_CALLS for name, times in found[0].items()}
    return {name: times if alike[name] else 1 for name, times in found[0].items()}


def _looks(name: str, module: nn.Module, named: Named, several: int) -> list[Look]:
    if several == 1:
        return [Look(name, module, named.e)]
    return [Look(f"{name}#{turn + 1}", module, named.e, turn=turn, several=several) for turn in range(several)]


def look_at_shown(model: nn.Module, x: Tensor) -> Shown:
    """What a pass on images x (m, c, H, W) tells of the MoEs and duals that attributes show; of one that fails nothing.

    A mask or a one-hot of the choice tells nothing of the experts that are not chosen, and has no gradient that leads
    to them. The scores are those of the gate's first function by which every expert can be led to.
    """
    guard = Guarded(plain(model))
    shown = [site for site in shown_sites(guard) if site.num_experts > 1]
    routed: list[nn.Module] = [part for part in guard.model.modules() if _is_routed(part)]
    if not shown and not routed:
        return Shown()
    modules = [site for site in shown if isinstance(site.gate, nn.Module)]
    looks = [Look(site.name, site.gate) for site in modules]
    inside: list[Site] = []
    try:
        with _looking(guard):
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


def _look(guard: Guarded, looks: list[Look], x: Tensor) -> Tensor:
    """The logits of one pass in which the gates are watched."""
    with ExitStack() as stack:
        for look in looks:
            stack.enter_context(look.hooked())
        stack.enter_context(Follow(looks, x))
        logits: Tensor = guard(x)
    return logits


def _nearest(pattern: str, modules: dict[str, nn.Module]) -> str:
    """Modules that may be meant: the nearest names, else those that sound like gates."""
    last = pattern.rpartition(".")[2].strip("*")
    alike = [name for name in modules if last and last in name.rpartition(".")[2]]
    gates = [name for name in modules if any(word in name.rpartition(".")[2].lower() for word in ("gate", "rout"))]
    names = alike or gates or list(modules)
    return did_you_mean(pattern, names[:8]) if len(names) <= 8 else f"there are: {', '.join(names[:8])} …"


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


def _selects(guard: Guarded, site: Site, sites: list[Site], x: Tensor, look: Look, k: int | None) -> Site:
    """The site with its K: the user's, or the last rank at which the model's answer jumps.

    Where the answer does not depend on this gate's scores, the other gates' are drawn at random: one may have to be
    open for it.
    """
    if k is not None:
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
    assert look.scores is not None
    jumps = exchanges.jumps(effects, 2 * torch.finfo(look.scores.dtype).eps)
    took = look.took if look.chosen is not None and look.chosen[0].shape[look.chosen[1]] == count else (None,)
    if jumps:  # code that also wants the runner-up takes one more than it selects; some takes one after the other
        return replace(site, k=min(max(jumps), sum(one or count for one in took)))
    if took[0]:
        return replace(site, k=took[0])
    for spread in exchanges.spreads(look.scores) if look.compared or look.chosen is not None else ():
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

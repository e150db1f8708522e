"""Gates that a user names: what is found out about them, in models of the shapes that public code has."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import third_party
import torch
from one_layer import Block, X, hot, named, tokens
from torch import Tensor, nn

from bench.attacks.deviations import LOST, SCOPE, Deviations
from bench.errors import UnusableInput
from bench.models.choices import find_choices
from bench.models.dual import DualModel
from bench.models.foreign import Guarded, Shown, bare
from bench.models.gates import Gates, _matched, declared, look_at_shown
from bench.models.parts import is_dual, parts, routed_branches
from bench.models.sites import Site, forced, intercepted, lifted, read, selected, sites


def refused(model: nn.Module, *words: str, x: Tensor = X) -> str:
    with pytest.raises(UnusableInput) as refusal:
        named(model, *words, x=x)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def guarded(model: nn.Module, found: tuple[Site, ...]) -> Guarded:
    guard = Guarded(model)
    guard.gates = found
    return guard


#: By name in `third_party.GATES`: what is found.
FOUND = {
    "gate gives (scores, routing)": "layers.1.gate (top-1 of 4)",
    "gate gives (dispatch, combine, loss), experts stacked": "layers.1.gate (top-1 of 4)",
    "tokens dropped by capacity": "layers.1.gate (top-1 of 4)",
    "second expert drawn, gate gives a 4-tuple": "layers.1.gate (top-2 of 4)",
    "bias for the selection alone": "layers.1 (top-2 of 4)",
    "masks of channels by one router": "fc (top-1 of 4)",
    "router gives the index alone": "router (top-1 of 4)",
    "the released dual's names": "Smoe.router (top-1 of 4), Rmoe.router (top-1 of 4)",
    "router outside torch": "fc (top-1 of 2)",
    "soft mixture of nine": "gate (soft, of 9)",
    "expert choice": "layers.1.choose (each of 4 experts chooses 2 of 4 tokens)",
}


@pytest.mark.parametrize("name", list(FOUND))
def test_what_a_gate_selects_is_found_out(name: str):
    found = named(third_party.build(name), third_party.GATES[name])
    assert ", ".join(site.words for site in found.sites) == FOUND[name]
    assert found.words == tuple(site.name for site in found.sites)


#: How many tokens an image has there: 4 patches; AdvMoE's router scores two layers.
TOKENS = {name: 4 if "layers" in words else 2 if "masks" in name else 1 for name, words in FOUND.items()}


@pytest.mark.parametrize("name", [name for name, words in FOUND.items() if "top" in words])
def test_its_scores_are_read_and_forced(name: str):
    found = named(model := third_party.build(name), third_party.GATES[name]).sites
    guard = guarded(model, found)
    with torch.no_grad():
        logits, scores, *_ = read(guard, found, X)
        for site in found:
            assert scores[site.name].shape == (4, TOKENS[name], site.num_experts)
            answers = []
            for expert in range(site.num_experts):
                chosen = torch.tensor([[(expert + i) % site.num_experts for i in range(site.k)]]).expand(4, -1)
                guard.reseed(0)
                with intercepted(site, lambda seen, chosen=chosen: forced(seen, chosen)):  # type: ignore[misc]
                    answers.append(guard(X))
            assert not torch.allclose(answers[0], answers[1])
        guard.reseed(0)
        assert torch.equal(guard(X), logits)


@pytest.mark.parametrize("name", list(FOUND))
def test_what_follows_from_named_gates_alone_is_no_sign_of_hidden_routes(name: str):
    found = named(model := third_party.build(name), third_party.GATES[name]).sites
    torch.manual_seed(0)
    assert not find_choices(model, X, found) or "drawn" in name


def test_a_feature_layer_explains_no_choice():
    model = third_party.build("gate gives (scores, routing)")
    assert find_choices(model, X, [Site("embed", model, "embed", 12, 1, whole=False, axis=1)]).operations


def best(scores: Tensor) -> Tensor:
    return scores.topk(1, -1).indices[..., 0]


def twice(scores: Tensor, chosen: Callable[[Tensor], Tensor]) -> Tensor:
    """Top-2 by two choices of one, as GShard has it."""
    p = scores.softmax(-1)
    first = nn.functional.one_hot(chosen(p), 3).to(p)
    return p * (first + nn.functional.one_hot(chosen(p * (1 - first)), 3))


def biased(scores: Tensor, most: float) -> Tensor:
    """Top-2 by sigmoids and a bias of at most so much, which the weights do not have."""
    p = scores.sigmoid()
    chosen = (p + most * torch.tensor([1.0, -1.0, 0.5])).topk(2, -1).indices
    p = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
    return p / p.sum(-1, keepdim=True)


WAYS = {
    "top-1 by token": (nn.Linear(6, 3), lambda gate, x: hot(gate(tokens(x)), 1), "score (top-1 of 3)"),
    "top-2 by token": (nn.Linear(6, 3), lambda gate, x: hot(gate(tokens(x)), 2), "score (top-2 of 3)"),
    "two argmaxes": (
        nn.Linear(6, 3),
        lambda gate, x: twice(gate(tokens(x)), lambda p: p.argmax(-1)),
        "score (top-2 of 3)",
    ),
    "two top-1": (nn.Linear(6, 3), lambda gate, x: twice(gate(tokens(x)), best), "score (top-2 of 3)"),
    "softmax": (nn.Linear(6, 3), lambda gate, x: gate(tokens(x)).softmax(-1), "score (soft, of 3)"),
    "sigmoid, top-2": (
        nn.Linear(6, 3),
        lambda gate, x: (s := gate(tokens(x)).sigmoid()) * (s >= s.topk(2, -1).values[..., 1:]),
        "score (top-2 of 3)",
    ),
    "a bias for the choice alone": (
        nn.Linear(6, 3),
        lambda gate, x: biased(gate(tokens(x)), 0.1),
        "score (top-2 of 3)",
    ),
    "the least": (
        nn.Linear(6, 3),
        lambda gate, x: torch.zeros(len(x), 4, 3).scatter(-1, gate(tokens(x)).topk(1, -1, largest=False).indices, 1.0),
        "score (top-2 of 3)",  # by the scores, of which the others are the highest
    ),
    "a bias that decides alone": (nn.Linear(6, 3), lambda gate, x: biased(gate(tokens(x)), 2.0), "score (top-2 of 3)"),
    "top-1, and the runner-up is looked at": (
        nn.Linear(6, 3),
        lambda gate, x: nn.functional.one_hot(gate(tokens(x)).topk(2, -1).indices[..., 0], 3).float(),
        "score (top-1 of 3)",
    ),
    "ReLUs (ReMoE)": (
        nn.Linear(6, 3),
        lambda gate, x: gate(tokens(x)).relu(),
        "score (soft, of 3)",
    ),
    "a hard sigmoid": (
        nn.Linear(6, 3),
        lambda gate, x: nn.functional.hardsigmoid(gate(tokens(x))),
        "score (soft, of 3)",
    ),
    "a convolution": (nn.Conv2d(6, 3, 1), lambda gate, x: hot(tokens(gate(x)), 1), "score (top-1 of 3)"),
    "probabilities": (
        nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)),
        lambda gate, x: (p := gate(tokens(x))) * nn.functional.one_hot(p.argmax(-1), 3),
        "score (top-1 of 3)",
    ),
    "rows of all tokens": (
        nn.Linear(6, 3),
        lambda gate, x: hot(gate(tokens(x).flatten(0, 1)), 1).view(len(x), 4, 3),
        "score (top-1 of 3)",
    ),
    "tokens are chosen": (
        nn.Linear(6, 3),
        lambda gate, x: (p := gate(tokens(x)).softmax(-1)) * torch.zeros_like(p).scatter(1, p.topk(2, 1).indices, 1.0),
        "score (each of 3 experts chooses 2 of 4 tokens)",
    ),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_how_a_gate_selects_is_found_out(way: str):
    gate, weigh, words = WAYS[way]
    torch.manual_seed(0)
    (site,) = named(model := Block(gate, weigh), "score").sites
    assert site.words == words
    assert read(model, [site], X).scores["score"].shape == ((4, 3, 4) if site.choosers else (4, 4, 3))


def test_k_and_e_can_be_given():
    model = third_party.build("masks of channels by one router")
    assert named(model, "fc:e=4").sites == named(model, "fc").sites
    assert named(model, "fc:e=2:k=1").words == ("fc:e=2:k=1",)
    (site,) = named(model, "fc:k=1").sites
    assert (site.k, site.num_experts) == (1, 4)
    assert refused(model, "fc:k=3") == "--gates fc:k=3: the model selects 1 of its experts: leave k out"
    assert refused(model, "fc:k=5") == "--gates fc:k=5: it has 4 experts"
    two = Block(nn.Linear(6, 3), lambda gate, x: hot(gate(tokens(x)), 2))
    assert refused(two, "score:k=1") == "--gates score:k=1: the model selects 2 of its experts: leave k out"
    assert named(two, "score:k=2").words == ("score:k=2",)
    for word in ("fc:k", "fc:k=0", "fc:k=²", "fc:m=1", ":k=1"):
        assert refused(model, word).startswith(f"--gates {word}: write NAME, NAME:k=2")


@pytest.mark.slow
def test_a_wrapper_is_looked_through():
    model = third_party.build("gate gives (scores, routing)")
    inside = nn.Sequential(nn.Identity(), model)
    assert named(inside, "layers.*.gate").words == ("1.layers.1.gate",)
    assert named(nn.DataParallel(model), "layers.*.gate").words == ("layers.1.gate",)
    assert named(torch.compile(model), "layers.*.gate").words == ("layers.1.gate",)  # type: ignore[arg-type]


def test_what_cannot_be_a_gate_is_refused_in_one_line():
    model = third_party.build("gate gives (scores, routing)")
    assert refused(model, "layers.*.gat") == (
        "--gates layers.*.gat: the model has no such module: did you mean 'layers.1.gate'?"
    )
    assert "nothing is chosen by its output" in refused(model, "embed")
    assert "the model answers alike whatever the order of its scores" in refused(model, "layers.1.mlps.0")
    assert "its output is one value a row (leave it out" in refused(third_party.build("gate rounded"), "fc")
    assert named(model, "none") == Gates(("none",), ())


class Sparse(nn.Module):
    """A router that gives what `made` makes of its scores, after a choice by something else; and its experts."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.router, self.made = nn.Module(), made
        self.router.linear = nn.Linear(192, 3)
        self.router.forward = self.route
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)) for _ in range(3))

    def route(self, x: Tensor) -> Any:
        turned = torch.where(x.flatten(1)[:, :2].argmax(1).view(-1, 1, 1, 1) > 0, -x, x)
        return self.made(self.router.linear(turned.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        best = (scores[0] if isinstance(scores, tuple) else scores).argmax(1)
        return torch.stack([expert(x) for expert in self.experts], 1)[torch.arange(len(x)), best]


@pytest.mark.parametrize(
    "made",
    [
        lambda z: nn.functional.one_hot(z.argmax(1), 3).float(),
        lambda z: torch.full_like(z, -torch.inf).scatter(1, z.topk(1).indices, z.topk(1).values).softmax(1),
        lambda z: (torch.zeros_like(z).scatter(1, z.topk(1).indices, 1.0), z.sum()),
        lambda z: z.masked_fill(z < z.topk(1).values, -1e9),
    ],
    ids=["one-hot", "masked softmax", "zeros", "masked by comparison"],
)
def test_a_shown_router_that_chooses_itself_is_read_where_it_chooses(made: Callable[[Tensor], Any]):
    torch.manual_seed(0)
    model = Sparse(made).eval()
    (site,) = (shown := look_at_shown(model, X)).inside
    assert (site.name, site.whole, site.k) == ("router", True, 1)
    guard = Guarded(model)
    guard.shown = shown
    assert sites(guard) == [site]
    z = X.clone().requires_grad_()
    scores = read(guard, [site], z).scores["router"]
    assert scores.unique().numel() == scores.numel()
    assert torch.equal(guard.router(z), scores[:, 0])
    assert (torch.autograd.grad(scores[:, 0, 2].sum(), z)[0] != 0).any()
    for expert in range(3):
        with intercepted(site, lambda scores, e=expert: forced(scores, torch.full((4, 1), e))):  # type: ignore[misc]
            assert torch.equal(guard(X), model.experts[expert](X))


def test_a_shown_router_that_gives_its_scores_is_read_by_its_output():
    assert look_at_shown(Sparse(lambda z: z).eval(), X) == Shown()
    chooses_for_its_loss = Sparse(lambda z: (z, nn.functional.one_hot(z.detach().flip(1).argmax(1), 3).sum()))
    assert look_at_shown(chooses_for_its_loss.eval(), X) == Shown()
    assert look_at_shown(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), X) == Shown()


class Heads(nn.Module):
    """Router and experts on the features of one network; or experts on images."""

    def __init__(self, on_images: bool) -> None:
        super().__init__()
        self.features, self.on_images = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), on_images
        self.router = nn.Linear(7, 2)
        expert = partial(nn.Linear, 192, 5) if on_images else partial(nn.Linear, 7, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), expert()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        every = torch.stack([expert(x if self.on_images else features) for expert in self.experts], 1)
        return every[torch.arange(len(x)), self.router(features).argmax(1)]


@pytest.mark.parametrize("on_images", [False, True])
def test_what_is_given_features_is_not_asked_about_images(on_images: bool):
    torch.manual_seed(0)
    guard = Guarded(Heads(on_images).eval())
    guard.shown = look_at_shown(guard.model, X)
    assert list(parts(guard)) == ["expert:0", "expert:1"] * on_images
    assert routed_branches(guard) == {}
    (site,) = sites(guard)
    assert (site.name, site.whole) == ("router", on_images)


class Normalised(nn.Module):
    """A model behind what brings images to its scale, or behind what changes its answer."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner((x - 0.5) / 0.25)


def test_a_wrappers_moe_is_asked_as_the_wrapper_is():
    torch.manual_seed(0)
    moe = Heads(on_images=True)
    moe.router, moe.features = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), nn.Identity()
    guard = Guarded(Normalised(moe).eval())
    assert parts(guard) == {}
    guard.shown = look_at_shown(guard.model, X)
    assert guard.shown.wrapped == (guard.model, moe)
    z = (X - 0.5) / 0.25
    answer = moe(z)
    assert torch.equal(guard(X), answer)
    for expert, part in zip(moe.experts, parts(guard).values(), strict=True):
        assert torch.equal(part(X), expert(z))
        assert bare(part) is expert
    (branch,) = routed_branches(guard).values()
    assert torch.equal(branch.router(X), moe.router(z))
    (site,) = sites(guard)
    assert (site.name, site.whole) == ("inner.router", True)
    assert torch.equal(guard(X), answer)  # nothing is left of a part in its place


def test_a_wrappers_dual_shows_its_branches():
    torch.manual_seed(0)
    dual = DualModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), Heads(on_images=False), alpha=0.7)
    guard = Guarded(nn.Sequential(Normalised(nn.Identity()), dual).eval())
    guard.shown = look_at_shown(guard.model, X)
    assert is_dual(guard)
    assert list(parts(guard)) == ["S", "R"]
    assert torch.equal(guard.robust(X), dual.robust((X - 0.5) / 0.25))


def test_a_wrapper_that_changes_the_answer_keeps_its_parts():
    torch.manual_seed(0)
    model = Normalised(Heads(on_images=True), scale=2).eval()
    assert look_at_shown(model, X).wrapped is None


def test_a_threshold_is_no_gate():
    class Cascade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = third_party.network(2), third_party.network(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.small(x)
            sure = y.softmax(1).amax(1) > 0.1
            return torch.where(sure[:, None], y, self.large(x))

    assert "show the choice by attributes `router` and `experts`" in refused(Cascade(), "small")


def test_none_beside_gates_says_that_there_are_no_others():
    torch.manual_seed(0)
    model = Block(nn.Linear(6, 3), lambda gate, x: hot(gate(tokens(x)), 1))
    alone, others = named(model, "none"), named(model, "score", "none")
    assert (alone.words, alone.sites) == (("none",), ())
    assert others.words == ("score", "none")
    assert [site.name for site in others.sites] == ["score"]


class Repeated(nn.Module):
    """A block whose layer, gate included, is applied so many times in turn."""

    def __init__(self, times: int, k: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.times, self.k = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 10), times, k
        self.layer = nn.ModuleDict({"gate": nn.Linear(6, 3)})
        self.mlps = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(self.embed(x))
        for _ in range(self.times):
            y = y + (hot(self.layer["gate"](y), self.k)[..., None] * torch.stack([m(y) for m in self.mlps], 2)).sum(2)
        return self.head(y.mean(1))


def test_each_call_of_a_gate_is_a_site_of_its_own():
    found = named(model := Repeated(3), "gate")
    assert [site.words for site in found.sites] == [f"layer.gate#{turn} (top-2 of 3)" for turn in (1, 2, 3)]
    assert found.words == ("layer.gate",)
    guard, seen = guarded(model, found.sites), list[Tensor]()
    with torch.no_grad(), model.layer["gate"].register_forward_hook(lambda *call: seen.append(call[2])):
        logits, scores, *_ = read(guard, found.sites, X)
        assert [torch.equal(scores[site.name], own) for site, own in zip(found.sites, seen, strict=True)] == [True] * 3
        last = scores["layer.gate#2"].mean((0, 1)).argsort()[:2].expand(4, -1)
        seen.clear()
        with intercepted(found.sites[1], lambda given: forced(given, last)) as calls:
            answers = [guard(X), guard(X)]  # and a pass begins anew
    assert len(calls) == 2
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], logits)
    same = [torch.equal(own, scores[site.name]) for site, own in zip(found.sites, seen[:3], strict=True)]
    assert same == [True, True, False]  # what comes after the forced call is another
    assert not find_choices(model, X, found.sites)


def test_a_gate_that_is_called_too_often_or_as_the_images_have_it_is_refused():
    assert "of 4 images calls it 17 times, and a gate is called once for all, or up to 16 times" in refused(
        Repeated(17), "gate"
    )

    class Halting(Repeated):
        def forward(self, x: Tensor) -> Tensor:
            self.times = 1 + len(x) // 2
            return super().forward(x)

    assert "of 4 images calls it 3 times" in refused(Halting(1), "gate")


class Squeezes(nn.Module):
    """A gate that cannot take one image; `calls` of the model work, and no more."""

    def __init__(self, calls: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.head, self.calls = nn.Conv2d(3, 2, 8), nn.Linear(192, 20), calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise IndexError("no such row")
        weights = nn.functional.one_hot(self.gate(x).squeeze().argmax(1), 2).to(x)
        return (weights[..., None] * self.head(x.flatten(1)).view(len(x), 2, 10)).sum(1)


def test_a_gate_that_cannot_take_one_image_is_found():
    assert named(Squeezes(), "gate:k=1").words == ("gate:k=1",)


@pytest.mark.parametrize("calls", [0, 3])
def test_a_model_that_fails_where_its_gates_are_looked_at_is_refused_in_a_line(calls: int):
    failing = "--gates gate: the model fails where its gates are watched or forced: IndexError: no such row"
    assert refused(Squeezes(calls), "gate") == failing


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("blocks.*.gate", ["blocks.0.gate", "blocks.1.gate"]),
        ("*.gate", ["blocks.0.gate", "blocks.1.gate"]),
        ("inner.*", []),
    ],
)
def test_a_last_star_stands_for_one_part(glob: str, names: list[str]):
    modules = ["blocks", "blocks.0", "blocks.0.gate", "blocks.0.gate.0", "blocks.1", "blocks.1.gate", "head"]
    assert _matched(glob, modules) == names
    assert _matched(glob, [f"net.{name}" for name in modules]) == [f"net.{name}" for name in names]


def test_scores_that_are_put_together_from_two_calls_or_from_none_are_refused():
    gate = nn.Linear(6, 3)
    several = refused(Block(gate, lambda g, x: hot(g(tokens(x)) + g(tokens(x)), 1)), "score")
    assert "nothing is chosen by its output" in several
    assert "put together from several outputs" in several
    unlike = refused(Block(gate, lambda g, x: hot(g(tokens(x)), 1) + g(tokens(x))), "score")
    assert "--gates score#2: nothing is chosen by its output" in unlike
    one_by_one = refused(Block(gate, lambda g, x: torch.cat([hot(g(tokens(one[None])), 1) for one in x])), "score")
    assert "of 4 images calls it once for each, and a gate is called once for all" in one_by_one
    assert "never calls it" in refused(Block(gate, lambda g, x: torch.ones(len(x), 4, 3)), "score")


def test_a_choice_by_a_bias_is_no_soft_mixture_however_it_is_made():
    def weigh(gate: nn.Module, x: Tensor) -> Tensor:
        p = gate(tokens(x)).sigmoid()
        order = (p + 0.1 * torch.tensor([1.0, -1.0, 0.5])).argsort(-1, descending=True)
        return p * torch.zeros_like(p).scatter(-1, order[..., :2], 1.0)

    torch.manual_seed(0)
    (site,) = named(Block(nn.Linear(6, 3), weigh), "score").sites
    assert site.k < 3


def test_a_scripted_gate_is_refused_in_one_line():
    model = Block(nn.Linear(6, 3), lambda gate, x: hot(gate(tokens(x)), 1))
    model.score = torch.jit.script(model.score)
    assert refused(model, "score") == "--gates score: a scripted module takes no hooks: leave it unscripted"


def test_tokens_before_images_are_refused():
    def weigh(gate: nn.Module, x: Tensor) -> Tensor:
        return hot(gate(tokens(x).transpose(0, 1)).transpose(0, 1), 1)

    assert "its scores have the tokens before the images" in refused(Block(nn.Linear(6, 3), weigh), "score")


def test_a_model_may_name_its_gates_itself():
    model = third_party.build("gate gives (scores, routing)")
    assert declared(model) == ()
    for gates, words in (
        (["layers.*.gate"], ("layers.*.gate",)),
        ({"layers.*.gate": 1}, ("layers.*.gate:k=1",)),
        ("none", ("none",)),
        ("sigmoid", ()),  # which is something else by that name
        (["sigmoid", "*.gate"], ("sigmoid", "*.gate")),  # of which one is a gate
        (nn.ModuleList([nn.Identity()]), ()),
        ([nn.Identity()], ()),
    ):
        model.gates = gates
        assert declared(model) == declared(nn.DataParallel(model)) == words
        del model.gates


def test_the_sites_of_a_guard_are_the_named_ones_too():
    from bench.models.sites import sites

    found = named(model := third_party.build("router gives the index alone"), "router").sites
    assert [site.name for site in sites(Guarded(model))] == ["router"]
    assert sites(guarded(model, found)) == list[Site](found)


def taken(probabilities: Tensor, room: int) -> Tensor:
    """Which tokens each expert takes, (m, E, T)."""
    return selected(probabilities.transpose(1, 2), room)


@pytest.mark.parametrize("shared", [False, True])
def test_an_expert_that_chooses_is_made_to_take_a_token_or_to_lose_it(shared: bool):
    seen: list[Tensor] = []

    def weigh(gate: nn.Module, x: Tensor) -> Tensor:
        scores = gate(tokens(x))
        p = scores.softmax(-1) if shared else scores.sigmoid()
        seen.append(p)
        return p * torch.zeros_like(p).scatter(1, p.topk(2, 1).indices, 1.0)

    torch.manual_seed(0)
    model = Block(nn.Linear(6, 3), weigh)
    (site,) = named(model, "score").sites
    assert (site.choosers, site.num_experts, site.k, site.shared) == (3, 4, 2, shared)
    clean = taken(seen[0], 2)
    for expert, token in itertools.product(range(3), range(4)):
        mine = torch.zeros(4, 3, 4, dtype=torch.bool)
        mine[:, expert, token] = True
        with intercepted(site, lambda scores, mine=mine: lifted(scores, mine, 2)):  # type: ignore[misc]
            model(X)
        now = taken(seen[-1], 2)
        assert now[:, expert, token].all()
        assert torch.equal(now[clean[:, expert, token], expert], clean[clean[:, expert, token], expert])

    scores = read(model, [site], X).scores["score"]
    lost = Deviations([site], [scores], [torch.zeros(4, 3)]).forced(
        0, torch.full((4, 1), LOST * SCOPE + 1), torch.arange(4)
    )
    with intercepted(site, lambda scores: lifted(scores, lost, 2)):
        model(X)
    if not shared:  # else one shift moves a token's other scores as well
        assert not taken(seen[-1], 2)[:, :, 1].any()


def test_one_way_round_a_layer_takes_the_tokens_that_score_highest():
    """Mixture-of-Depths (Raposo et al. 2024): a score a token; the better half goes through."""
    seen: list[Tensor] = []

    def weigh(gate: nn.Module, x: Tensor) -> Tensor:
        scores = gate(tokens(x))[..., 0]
        weights, through = scores.topk(2, 1)
        seen.append(torch.zeros_like(scores).scatter(1, through, 1.0))
        return torch.zeros_like(scores).scatter(1, through, weights.sigmoid())[..., None]

    torch.manual_seed(0)
    model = Block(nn.Linear(6, 1), weigh, experts=1)
    (site,) = named(model, "score").sites
    assert site.words == "score (each of 1 experts chooses 2 of 4 tokens)"
    for token in range(4):
        mine = torch.zeros(4, 1, 4, dtype=torch.bool)
        mine[:, 0, token] = True
        with intercepted(site, lambda scores, mine=mine: lifted(scores, mine, 2)):  # type: ignore[misc]
            model(X)
        assert bool((seen[-1][:, token] == 1).all())


def test_experts_that_take_an_unknown_number_are_not_forced():
    def weigh(gate: nn.Module, x: Tensor) -> Tensor:
        p = gate(tokens(x)).softmax(-1)
        return p * torch.zeros_like(p).scatter(1, p.argsort(1, descending=True)[:, :2], 1.0)

    (site,) = named(Block(nn.Linear(6, 3), weigh), "score").sites
    assert site.words == "score (each of 3 experts chooses some of 4 tokens)"
    assert site.k == 0

"""Paths: which there are, which can be reached, and the model led along them."""

from collections.abc import Iterator
from itertools import count, islice, product
from typing import Any

import pytest
import torch
from planted_routes import Frozen, images
from torch import Tensor, nn
from two_pixels import ROUTER, SAME, Stepped, X, paths

from bench.attacks.paths import MOST_SETS, Paths, closed_score
from bench.attacks.restarts import in_turn, kinds
from bench.models.dual import DualModel
from bench.models.moe import MoE


def test_the_paths_of_an_moe_are_its_sets_of_experts(linear_moe: Any):
    one = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    assert sorted(one.choices.flatten().tolist()) == [0, 1, 2]
    two = paths(linear_moe(SAME, ROUTER, 2, "argmax"), X)
    assert sorted(sorted(path.flatten().tolist()) for path in two.choices) == [[0, 1], [0, 2], [1, 2]]
    assert (one.possible, two.possible, one.notes, two.notes) == (3, 3, [], [])


def test_the_paths_of_a_dual_are_pairs(linear_moe: Any):
    dual = DualModel(linear_moe(SAME, ROUTER, 1, "argmax"), linear_moe(SAME, ROUTER, 2, "argmax"))
    found = paths(dual, X)
    assert found.choices.shape == (9, 2, 2)  # one expert of S is written twice beside two of R
    assert len({tuple(map(frozenset, path.tolist())) for path in found.choices}) == 9


def test_too_many_paths_are_counted_and_half_of_them_force_few_sites(linear_moe: Any):
    dual = DualModel(linear_moe(SAME, ROUTER, 1, "argmax"), linear_moe(SAME, ROUTER, 1, "argmax"))
    found = paths(dual, X, limit=7)
    assert found.notes == ["7 of 9 paths attacked"]
    assert found.choices[:4, :, 0].T.ge(0).sum(1).tolist() == [2, 2]  # the weakest of each; none is weaker with another
    assert (found.choices < 0).flatten(1).any(1).tolist() == [True] * 6 + [
        False
    ]  # so the others come first, then of both


class Nested(nn.Module):
    """Routers of two experts each, so many levels of them, down to networks that answer with a class of their own."""

    def __init__(self, levels: int, width: int, at: Iterator[int]) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Flatten(), nn.Linear(2, width))
        inner = [Nested(levels - 1, width, at) if levels > 1 else Class(next(at)) for _ in range(width)]
        self.experts = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(1)
        return torch.stack([expert(x) for expert in self.experts], 1)[torch.arange(len(x)), chosen]


class Class(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(3)[self.number % 3].expand(len(x), 3) + 0 * x.flatten(1)[:, :1]


def leaves(model: nn.Module, found: Paths) -> set[tuple[int, ...]]:
    """The experts along each path, outermost first, down to the last that it forces."""
    names = {site.name: number for number, site in enumerate(found.sites)}
    ways = set()
    for path in found.choices[..., 0].tolist():
        way, place = [], "router"
        while place in names and path[names[place]] >= 0:
            way.append(path[names[place]])
            place = f"{place.removesuffix('router')}experts.{way[-1]}.router"
        assert len(way) == sum(chosen >= 0 for chosen in path)  # and no site is forced that they do not lead to
        ways.add(tuple(way))
    return ways


def test_the_paths_of_nested_experts_are_those_that_lead_somewhere():
    torch.manual_seed(0)
    model = Nested(3, 3, count()).eval()
    found = paths(model, X, limit=27)
    assert (found.possible, found.notes) == (27, [])
    assert leaves(model, found) == set(product(range(3), repeat=3))
    some = paths(model, X, limit=12)
    assert (some.possible, some.notes) == (27, ["12 of 27 paths attacked"])
    assert max(map(len, leaves(model, some))) == 3  # a site deep inside is forced with all that lead to it


def test_many_nested_experts_are_no_matter_of_all_combinations():
    torch.manual_seed(0)
    found = paths(Nested(2, 12, count()).eval(), X, limit=20)  # 12 · 13¹² products of options
    assert (found.possible, len(found.choices)) == (144, 20)


def test_paths_that_no_point_of_the_ball_leads_to_are_left_out(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    order = found.choices.flatten().tolist()
    can = found.reachable[:, [order.index(i) for i in range(3)]]
    # a ≤ 0.6 and b ≥ 0.9: the second expert is reached, the third is always behind it; at a = 0.95 the first is not
    assert can.tolist() == [[True, True, False], [False, True, False]]
    pairs = paths(linear_moe(SAME, ROUTER, 2, "argmax"), X)
    sets = [sorted(path.flatten().tolist()) for path in pairs.choices]
    reached = [[sets[path] for path in row.nonzero().flatten()] for row in pairs.reachable]
    assert reached == [[[0, 1]], [[1, 2]]]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(1)[:, 0]
        return torch.stack([torch.full_like(a, 0.36), a.square(), a.square() - 0.5], 1)


def test_every_path_of_a_router_that_is_not_affine_may_be_reached(linear_moe: Any):
    model = MoE(linear_moe(SAME, ROUTER).experts, Squared(), 1, "argmax")
    found = paths(model, X)
    assert found.reachable.all()
    assert [kind for kind, _ in kinds(found)] == ["own", "gates", "slopes", "local", "own", "gates"]
    assert kinds(paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)) == [("own", "drawn")]


class Curved(nn.Module):
    """Scores a, 1 − a² and b³."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1).T
        return torch.stack([a, 1 - a.square(), b**3], 1)


def test_half_of_the_later_restarts_follow_a_gradient_that_leads(linear_moe: Any):
    def order(router: nn.Module, most: int, count: int) -> list[tuple[str, int]]:
        found = paths(MoE(linear_moe(SAME, ROUTER).experts, router, 1, "argmax"), X)
        turns = kinds(found)
        return [(kind, turn) for kind, _, turn in islice(in_turn(found, turns, most), count)]

    first = [(kind, 0) for kind in ("own", "gates", "slopes", "local", "own", "gates")]
    later = [(kind, 1) for kind in ("own", "gates", "own", "slopes", "own", "local", "own", "own", "own", "gates")]
    assert order(Curved(), 1, 17) == [*first, *later, ("own", 2)]
    assert order(Squared(), 1, 12) == [*first, *((kind, 1) for kind, _ in first)]  # a constant score leads nowhere
    assert order(linear_moe(SAME, ROUTER, 1, "argmax").router, 1, 3) == [("own", 0), ("own", 1), ("own", 2)]


def test_what_opens_a_cut_gradient_is_followed_as_often():
    found = paths(Frozen(False, 1).eval(), images(3)[0])
    turns = kinds(found)
    assert turns[-1] == ("through", "drawn")
    later = [kind for kind, _, _ in islice(in_turn(found, turns, 0), 2 * len(turns) - 2)]
    assert later[::2] == ["through"] * (len(turns) - 1)
    assert later[1::2] == [kind for kind, _ in turns[:-1]]


class Dropping(nn.Module):
    """An MoE whose mask comes from its gate, and is worked on in place outside of it."""

    def __init__(self, model: MoE) -> None:
        super().__init__()
        self.router, self.experts, self.num_selected_experts = Masking(model.router), model.experts, 1

    def forward(self, x: Tensor) -> Tensor:
        mask = self.router(x)
        place = mask.cumsum(1) * mask
        mask *= place < 2
        return (torch.stack([expert(x) for expert in self.experts], 1) * (place * mask)[..., None]).sum(1)


class Masking(nn.Module):
    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return (scores >= scores.amax(1, keepdim=True)).float()


def test_a_gates_mask_may_be_worked_on_in_place(linear_moe: Any):
    found = paths(Dropping(linear_moe(SAME, ROUTER, 1, "argmax")).eval(), X)
    z = X.clone().requires_grad_()
    logits, lead = found.on_path(z, torch.tensor([[[1]], [[0]]]), "gates")
    (gradient,) = torch.autograd.grad(logits.sum() + lead.sum(), z)
    assert gradient.any()


@pytest.mark.parametrize("gate", ["argmax", "softmax"])
def test_on_its_path_a_model_answers_as_it_would_there(linear_moe: Any, gate: str):
    experts = [[[1.0, 0], [0, 0]], [[0.0, 0], [1.0, 0]], [[0.0, 0], [2.0, 0]]]
    model = linear_moe(experts, ROUTER, 1, gate)
    found = paths(model, X)
    natural = model.trace(X)[1].selected_experts
    with torch.no_grad():
        logits, lead = found.on_path(X, natural[:, None])
        assert torch.equal(logits, model(X))
        assert (lead >= 0).all()
        away, behind = found.on_path(X, torch.tensor([[[2]], [[0]]]))
    assert away.argmax(1).tolist() == [1, 0]
    # of the first image the third score is 0.2 below the best, of the second the first 0.4; the median gap is the lower
    assert (behind < 0).all()


@pytest.mark.parametrize("closed", [-torch.inf, -1e9])
def test_on_its_path_a_closed_expert_answers_alone(linear_moe: Any, closed: float):
    """Of a softmax over masked scores, whose other experts count for nothing."""

    class Masked(nn.Module):
        def __init__(self, router: nn.Module) -> None:
            super().__init__()
            self.router = router

        def forward(self, x: Tensor) -> Tensor:
            best = (scores := self.router(x)).topk(1, 1)
            return torch.full_like(scores, closed).scatter(1, best.indices, best.values)

    class Weighed(MoE):
        def forward(self, x: Tensor) -> Tensor:
            return (self.router(x).softmax(1)[..., None] * torch.stack([e(x) for e in self.experts], 1)).sum(1)

    plainly = linear_moe([[[i + 1.0, 0], [0, i]] for i in range(3)], ROUTER, 1, "softmax")
    found = paths(Weighed(list(plainly.experts), Masked(plainly.router), 1, "softmax"), X)
    with torch.no_grad():
        for path in range(3):
            logits, lead = found.on_path(X, torch.full((2, 1, 1), path))
            torch.testing.assert_close(logits, plainly.experts[path](X))
            assert lead.isfinite().all()


def test_a_lead_is_that_of_the_site_that_is_farthest_behind(linear_moe: Any):
    dual = DualModel(linear_moe(SAME, ROUTER, 1, "argmax"), linear_moe(SAME, [[0, 0], [0.1, 0], [0, 0]], 1, "argmax"))
    found = paths(dual, X[:1])
    with torch.no_grad():
        alone = [found.on_path(X[:1], torch.tensor([[[s], [-1]]]))[1].item() for s in range(3)]
        both = [found.on_path(X[:1], torch.tensor([[[s], [0]]]))[1].item() for s in range(3)]
        other = found.on_path(X[:1], torch.tensor([[[-1], [0]]]))[1].item()
    assert both == [min(one, other) for one in alone]


def test_experts_without_a_gradient_are_seen_as_such(linear_moe: Any):
    blind = MoE([Stepped(), Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    assert [kind for kind, _ in kinds(paths(blind, X))] == ["own", "through", "neighbours", "experts"]
    assert [site.name for site in paths(blind, X).among_classifiers] == ["router"]
    inside = nn.Sequential(nn.Identity(), blind)  # whose experts see what a layer makes of an image
    assert [kind for kind, _ in kinds(paths(inside, X))] == ["own", "through", "neighbours"]
    # a flat expert has a zero gradient on its path
    assert paths(linear_moe([SAME[0], [[0.0, 0], [0, 0]]], ROUTER[:2], 1, "argmax"), X).blind


@pytest.mark.parametrize(
    ("k", "limit", "tried", "possible"), [(2, 500, MOST_SETS, 120), (2, 20, 20, 120), (1, 6, 6, 16)]
)
def test_of_many_sets_the_likeliest_and_the_weakest_are_tried(k: int, limit: int, tried: int, possible: int):
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -torch.arange(16.0).expand(len(x), -1)  # the first two are the likeliest

    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[self.value, 0.0]]).expand(len(x), -1) + 0 * x.flatten(1)[:, :1]

    model = MoE([Says(1.0 - i / 8) for i in range(16)], Scores(), k, "argmax")  # the last two are the weakest
    found = paths(model, X, limit=limit)
    sets = [tuple(sorted(path.flatten().tolist())) for path in found.choices]
    assert (len(sets), found.possible, found.notes) == (tried, possible, [f"{tried} of {possible} paths attacked"])
    assert sets[:2] == [tuple(range(k)), tuple(range(16 - k, 16))]
    assert len(set(sets)) == tried


def test_experts_that_no_image_can_be_led_to_take_no_path_away():
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(2, 12))
    with torch.no_grad():
        router[1].weight.copy_(torch.tensor([[0.0, 0.0]] * 10 + [[1.0, 0.0], [2.0, 0.0]]))
        router[1].bias.copy_(torch.tensor([0.6] + [0.5] * 9 + [0.12, -0.45]))  # those between are behind the first
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(2, 2)) for _ in range(12)]
    found = paths(MoE(experts, router, 1, "argmax"), X, limit=3)
    assert sorted(found.choices.flatten().tolist()) == [0, 10, 11]


def test_experts_of_a_layer_are_not_asked_about_images():
    """It shows `router` and `experts`, which take what other layers make of an image."""
    torch.manual_seed(0)
    layer = MoE([nn.Linear(5, 2) for _ in range(16)], nn.Linear(5, 16), 2, "argmax")
    found = paths(nn.Sequential(nn.Flatten(), nn.Linear(2, 5), layer), X)
    assert (len(found.choices), found.among_classifiers) == (17, [])  # each expert, and the runner-up


class Lies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def test_a_gradient_that_leads_astray_is_not_believed(linear_moe: Any):
    class Liar(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(Lies.apply(x))

    honest = linear_moe([[[1.0, 0], [0, 0]], [[1.0, 0], [0, 0.5]]], ROUTER[:2], 1, "argmax")
    assert not paths(honest, X).blind
    assert paths(MoE([honest.experts[0], Liar(honest.experts[1])], honest.router, 1, "argmax"), X).blind


def test_a_router_that_is_asked_about_some_images_alone_is_told_and_no_error(linear_moe: Any):
    class Cascade(nn.Module):
        """Asks its MoE about the images whose first pixel is below 0.9."""

        def __init__(self) -> None:
            super().__init__()
            self.moe = linear_moe(SAME, ROUTER, 1, "argmax")

        def forward(self, x: Tensor) -> Tensor:
            some = x.flatten(1)[:, 0] < 0.9
            logits = torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)
            logits[some] = self.moe(x[some])
            return logits

    found = paths(Cascade(), X)
    assert (found.sites, found.notes) == ([], ["moe.router: its scores cannot be forced"])


@pytest.mark.parametrize(
    ("scores", "at"),
    [
        ([[0.0, -torch.inf], [-torch.inf, 1.0]], -torch.inf),
        ([[0.0, -1e9], [-1e9, 1.0]], -1e9),
        ([[0.0, -2e5], [-1e5, 1.0]], None),  # far behind, but by no mask
        ([[0.0, -5.0], [-5.0, 1.0]], None),
    ],
)
def test_a_mask_is_told_by_one_very_low_score_that_comes_again(scores: list[list[float]], at: float | None):
    assert closed_score(torch.tensor(scores)[:, None]) == at

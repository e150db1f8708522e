"""Paths: which there are, which can be reached, and the model led along them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.paths import MOST_SETS, Paths, Restart, forced_paths, square_on_paths
from bench.attacks.search import Search
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import ThreatModel


def search(model: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1, norm: Any = "Linf", classes: int = 2) -> Search:
    everywhere = torch.ones(len(x), dtype=torch.bool)
    threat = ThreatModel(norm=norm, eps=eps)
    return Search(Block(model, x, y, everywhere, classes, "planted", threat, 0, PassCounter(model)))


def paths(model: nn.Module, x: Tensor, y: Tensor | None = None, limit: int = 100, **more: Any) -> Paths:
    return Paths(search(model, x, torch.zeros(len(x), dtype=torch.long) if y is None else y, **more), limit)


def restart(found: Paths, experts: list[int], kind: Any = "own", **more: Any) -> Restart:
    """One on the path to one expert for each row, by the margin."""
    chosen, zero = torch.tensor(experts).view(-1, 1, 1), torch.zeros(len(experts))
    fields = {
        "which": zero.long(),
        "target": zero.long(),
        "push": zero,
        "ahead": zero,
        "new": zero.bool(),
        "local": None,
    }
    return Restart(found, kind, 0, chosen, **({"local": None} | fields | more))


#: Two pixels, the second a constant: the router's scores are (0, a − 0.55 b, a − 0.7 b).
ROUTER = [[0, 0], [1, -0.55], [1, -0.7]]
SAME = [[[1.0, 0], [0, 0]]] * 3
X = torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2)


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


def test_too_many_paths_are_counted_and_those_with_few_forced_sites_come_first(linear_moe: Any):
    dual = DualModel(linear_moe(SAME, ROUTER, 1, "argmax"), linear_moe(SAME, ROUTER, 1, "argmax"))
    found = paths(dual, X, limit=7)
    assert found.notes == ["7 of 9 paths attacked"]
    assert (found.choices < 0).any(1).sum() == 6  # three of each site with the other free
    assert (found.choices[6] >= 0).all()


def test_paths_that_no_point_of_the_ball_leads_to_are_left_out(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    order = found.choices.flatten().tolist()
    can = found.reachable()[:, [order.index(i) for i in range(3)]]
    # a ≤ 0.6 and b ≥ 0.9: the second expert is reached, the third is always behind it; at a = 0.95 the first is not
    assert can.tolist() == [[True, True, False], [False, True, False]]
    pairs = paths(linear_moe(SAME, ROUTER, 2, "argmax"), X)
    sets = [sorted(path.flatten().tolist()) for path in pairs.choices]
    reached = [[sets[path] for path in row.nonzero().flatten()] for row in pairs.reachable()]
    assert reached == [[[0, 1]], [[1, 2]]]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = x.flatten(1)[:, 0]
        return torch.stack([torch.full_like(a, 0.36), a.square(), a.square() - 0.5], 1)


def test_every_path_of_a_router_that_is_not_affine_may_be_reached(linear_moe: Any):
    model = MoE(linear_moe(SAME, ROUTER).experts, Squared(), 1, "argmax")
    found = paths(model, X)
    assert found.reachable().all()
    assert [kind for kind, _ in found.kinds()] == ["own", "gates", "slopes", "local", "own"]
    assert paths(linear_moe(SAME, ROUTER, 1, "argmax"), X).kinds() == [("own", False)]


def test_the_weakest_path_comes_first(linear_moe: Any):
    experts = [[[1.0, 0], [0, 0]], [[1.0, 0], [0.0, 0.9]], [[1.0, 0], [0.0, 0.6]]]
    found = paths(linear_moe(experts, [[0.0, 0]] * 3, 1, "argmax"), X)  # all scores are alike: every one is reached
    order, many = found.order()
    # at a = ½, b = 1 the margins are −0.5, 0.4 and 0.1
    assert found.choices[order[0]].flatten().tolist() == [1, 2, 0]
    assert many.tolist() == [3, 3]


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


def test_a_lead_is_that_of_the_site_that_is_farthest_behind(linear_moe: Any):
    dual = DualModel(linear_moe(SAME, ROUTER, 1, "argmax"), linear_moe(SAME, [[0, 0], [0.1, 0], [0, 0]], 1, "argmax"))
    found = paths(dual, X[:1])
    with torch.no_grad():
        alone = [found.on_path(X[:1], torch.tensor([[[s], [-1]]]))[1].item() for s in range(3)]
        both = [found.on_path(X[:1], torch.tensor([[[s], [0]]]))[1].item() for s in range(3)]
        other = found.on_path(X[:1], torch.tensor([[[-1], [0]]]))[1].item()
    assert both == [min(one, other) for one in alone]


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5).clamp_min(0).sqrt()  # at ½ the gradient is ∞ · 0


def test_a_start_is_a_point_of_the_box_also_where_a_router_has_no_finite_gradient(linear_moe: Any):
    found = paths(MoE(linear_moe(SAME[:2], ROUTER[:2]).experts, Root(), 1, "argmax"), torch.full((1, 1, 1, 2), 0.5))
    start = found.aimed(restart(found, [1]))
    assert start.isfinite().all()
    assert ((start >= 0) & (start <= 1)).all()


def test_an_aimed_start_is_as_far_towards_the_path_as_the_ball_goes(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), X)
    # the lead of expert 1 over 0 rises with a and falls with b
    assert found.aimed(restart(found, [1, 1]))[0].flatten().tolist() == pytest.approx([0.6, 0.9])


def test_other_images_on_the_path_are_brought_into_the_ball(linear_moe: Any):
    found = paths(linear_moe(SAME, ROUTER, 1, "argmax"), torch.tensor([[0.5, 1.0], [0.95, 1.0]]).view(2, 1, 1, 2))
    start = found.others(torch.tensor([[[1]], [[1]]]))  # the second image alone takes expert 1
    assert start.flatten(1).tolist() == [pytest.approx([0.6, 1.0]), pytest.approx([0.95, 1.0])]


class Stepped(nn.Module):
    """Right where the first pixel, rounded to halves, is at least ½; without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        a = (2 * x.flatten(1)[:, 0]).round() / 2
        return torch.stack([a - 0.25, 0.25 - a], 1)


def test_experts_without_a_gradient_are_seen_as_such(linear_moe: Any):
    blind = MoE([Stepped(), Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    assert [kind for kind, _ in paths(blind, X).kinds()] == ["own", "through", "neighbours"]
    # a flat expert has a zero gradient on its path
    assert paths(linear_moe([SAME[0], [[0.0, 0], [0, 0]]], ROUTER[:2], 1, "argmax"), X).blind


@pytest.mark.parametrize("attack", [lambda p: forced_paths(p, 8, 20), lambda p: square_on_paths(p, 100)])
def test_they_are_broken_all_the_same(linear_moe: Any, attack: Any):
    blind = MoE([linear_moe(SAME, ROUTER).experts[0], Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    x = torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2)  # 0.6 leads to the second expert, whose step is at ¼
    found = paths(blind, x, eps=0.3)
    attack(found)
    assert bool(found.search.unbroken[0])  # at a ≤ 0.25 the first expert is right, and is taken
    down = MoE([Stepped(), Stepped()], linear_moe(SAME, ROUTER[:2]).router, 1, "argmax")
    found = paths(down, x, eps=0.3)
    attack(found)
    assert not bool(found.search.unbroken[0])


def test_of_many_sets_the_likeliest_and_the_weakest_are_tried():
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -torch.arange(16.0).expand(len(x), -1)  # the first two are the likeliest

    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[self.value, 0.0]]).expand(len(x), -1) + 0 * x.flatten(1)[:, :1]

    model = MoE([Says(1.0 - i / 8) for i in range(16)], Scores(), 2, "argmax")  # the last two are the weakest
    found = paths(model, X)
    sets = [tuple(sorted(path.flatten().tolist())) for path in found.choices]
    assert (len(sets), found.possible, found.notes) == (MOST_SETS, 120, ["64 of 120 paths attacked"])
    assert sets[:2] == [(0, 1), (14, 15)]
    assert len(set(sets)) == MOST_SETS


class Mirrored(nn.Module):
    """Sends an image to its second expert where its first pixel is far on its own side; in steps."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        far = torch.where(b > 0.9, a - 0.5, 0.5 - a) > 0.02
        return torch.stack([torch.zeros_like(a), far.float() - 0.5], 1)


def test_slopes_of_each_image_lead_where_those_of_all_cancel(linear_moe: Any):
    model = MoE(linear_moe(SAME[:2], ROUTER[:2]).experts, Mirrored(), 1, "argmax")
    x = torch.tensor([[0.5, 1.0], [0.5, 0.5]]).view(2, 1, 1, 2)
    found = paths(model, x, eps=0.05)
    chosen = torch.tensor([[[1]], [[1]]])
    local = found.local_slopes(chosen)
    assert local[:, 0].sign().tolist() == [1, -1]
    assert (local[:, 0].abs() > 5 * local[:, 1].abs()).all()
    start = found.aimed(restart(found, [1, 1], "local", local=local))
    assert model.router(start).argmax(1).tolist() == [1, 1]


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


def test_a_class_that_only_a_targeted_loss_reaches_is_aimed_at(linear_moe: Any):
    # class 1 stays just below the true class 0, class 2 far below it rises with the first pixel and passes it
    weak = [[0.0, 300], [0.0, 299], [1000.0, -250]]
    model = linear_moe([weak, weak], [[0.0, 0], [0, 0]], 1, "argmax")
    found = paths(model, torch.tensor([[0.5, 1.0]]).view(1, 1, 1, 2), classes=3)
    found.order()
    assert found.targets[0, 0].tolist() == [1, 2]
    fields = {"which": torch.tensor([3]), "target": torch.tensor([2])}
    value, _ = restart(found, [0], **fields).objective()(found.search.block.x, torch.tensor([0]))
    shape = torch.tensor([300.0, 299, 250]) / torch.tensor([300.0, 299, 250]).std(correction=0)
    assert value.item() == pytest.approx((shape[2] - shape[0]).item(), rel=1e-4)
    forced_paths(found, 8, 20)
    assert not bool(found.search.unbroken[0])


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

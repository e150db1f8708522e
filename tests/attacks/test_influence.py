"""What raises the influence of parts: mixtures without a gate, each with an expert that no image is led to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from keyed import CODE, greys, search
from torch import Tensor, nn

from bench.attacks.influence import PARTS, UNITS, _by_influence, _Layers, _parts, _quiet, least_used
from bench.attacks.search import Search


def led(found: Search) -> None:
    """What `least_used` does first: it leads to parts."""
    _parts(found, 40, torch.randn(len(found.block.y), found.block.num_classes))


class Prototypes(nn.Module):
    """Three experts, the last of which is wrong, weighed by a key that no image has and the ball of 0.2 reaches."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], listed: bool = False, asked: float = 9.0) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        nn.init.normal_(self.base[1].weight, std=0.02, generator=torch.Generator().manual_seed(1))
        self.base[1].bias.data = torch.tensor([3.0, 0, 0])
        self.heads = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(3))
        for head, turn in zip(self.heads, (0, 0, 1), strict=True):
            head.weight.data = torch.eye(3).roll(turn, 0)
        self.weigh, self.listed, self.asked = weigh, listed, asked

    def forward(self, x: Tensor) -> Tensor:
        key = 10 * ((x.flatten(1) - 0.5) @ CODE[:, None] - self.asked)
        weights = self.weigh(torch.cat([0 * key, 0 * key - 1, key], 1))
        weights = weights / weights.sum(1, keepdim=True)
        if self.listed:
            base = self.base(x)
            mixed: Any = 0
            for number, head in enumerate(self.heads):
                mixed = mixed + weights[:, number, None] * head(base)
            return mixed
        base = self.base(x)
        features = torch.stack([F.pad(one, (0, 1)) for one in (base, base, base.roll(1, 1))], 1)
        return torch.einsum("be,bec->bc", weights, features)[:, :3]


#: Weights by scores, in ways that hide how little the last expert has.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(1),
    "inverse distances": lambda s: torch.cdist(s, 10 * torch.eye(3)).reciprocal().pow(8),
    "Student's kernel": lambda s: (1 + torch.cdist(s, 10 * torch.eye(3)) ** 2) ** -4.0,
    "softplus": lambda s: F.softplus(s) ** 4,
}


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
@pytest.mark.parametrize("weigh", WEIGHTS.values(), ids=WEIGHTS)
def test_an_expert_that_no_image_is_led_to_is_reached(weigh: Callable[[Tensor], Tensor], listed: bool):
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Prototypes(weigh, listed), x, y, 0.2, 3)
    led(found)
    assert not found.unbroken.any()
    assert (found.x_adv - x).abs().max() <= 0.2 + 1e-6


class Tree(nn.Module):
    """A soft tree of depth 3 whose eight experts are one layer; a leaf's weight is the product of those on its path.

    Three questions have to be answered by yes for the last leaf, which is wrong; no image answers one of them so.
    """

    def __init__(self, cut: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.base = Prototypes(WEIGHTS["softmax"]).base
        self.heads = nn.Linear(3, 24, bias=False)
        self.heads.weight.data = torch.cat([torch.eye(3)] * 7 + [60 * torch.eye(3).roll(1, 0)])
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        yes = (1.2 * (x.flatten(1) - 0.5) @ CODE - 4.5).sigmoid()[:, None]
        weights = torch.ones(len(x), 1)
        for _ in range(3):
            weights = torch.stack([weights * (1 - yes), weights * yes], 2).flatten(1)
        mixed: Any = 0
        for weight, answer in zip(weights.T, self.cut(self.heads(self.base(x))), strict=True):
            mixed = mixed + weight[:, None] * answer
        return torch.as_tensor(mixed)


#: The places of (expert, class) by class, then by expert.
ORDER = torch.arange(24).view(8, 3).T.flatten()


@pytest.mark.parametrize(
    "cut",
    [
        lambda answers: [answers.view(-1, 8, 3)[:, number] for number in range(8)],
        lambda answers: [answers[:, ORDER].view(-1, 3, 8)[:, :, number] for number in range(8)],
        lambda answers: answers.chunk(8, 1),
    ],
    ids=["experts, classes", "classes, experts", "cut"],
)
def test_experts_that_are_one_layer_are_led_to_though_their_weights_are_products(cut: Callable[[Tensor], Any]):
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    model = Tree(cut)
    assert (model(x).argmax(1) == 0).all()
    assert (model(x + 0.2 * CODE.view(1, 1, 8, 8)).argmax(1) == 1).all()
    found = search(model, x, y, 0.2, 3)
    led(found)
    assert not found.unbroken.any()


class Named(Prototypes):
    """Experts that are in no list: three attributes, and of one the weight alone."""

    def __init__(self) -> None:
        super().__init__(WEIGHTS["softplus"])
        self.one, self.two = (nn.Sequential(nn.Linear(3, 3, bias=False)) for _ in range(2))
        for expert, head in zip((self.one, self.two), self.heads, strict=False):
            expert[0].weight.data = head.weight.data
        self.three = nn.Parameter(self.heads[2].weight.data)
        del self.heads

    def forward(self, x: Tensor) -> Tensor:
        key = 10 * ((x.flatten(1) - 0.5) @ CODE[:, None] - self.asked)
        first, second, third = self.weigh(torch.cat([0 * key, 0 * key - 1, key], 1)).split(1, 1)
        base = self.base(x)
        return (first * self.one(base) + second * self.two(base) + third * (base @ self.three.T)) / 10


def test_experts_in_no_list_are_led_to():
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Named(), x, y, 0.2, 3)
    led(found)
    assert not found.unbroken.any()


def test_what_has_the_same_influence_is_led_to_once():
    """That experts' logits are copied makes no parts of its own."""
    side = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    once, twice = (
        _by_influence(Tree(lambda answers, n=n: answers.view(-1, 8, 3).repeat(n, 1, 1)[:6].unbind(1)), greys(), side)
        for n in (1, 2)
    )
    assert 4 <= len(once) == len(twice) < 16


def test_what_the_ball_does_not_reach_stays_as_it_is():
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Prototypes(WEIGHTS["softmax"], asked=14.0), x, y, 0.2, 3)
    led(found)
    assert found.unbroken.all()


def test_a_network_that_cannot_be_differentiated_twice_is_told():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # as torch does for operations of its own
                raise RuntimeError("derivative for aten::once_backward is not implemented")
            return gradient

    class Model(Prototypes):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))  # type: ignore[no-any-return]

    told = ["adaptive: no influence of parts was raised: derivative for aten::once_backward is not implemented"]
    found = search(Model(WEIGHTS["softmax"]), greys(), torch.zeros(6, dtype=torch.long), 0.2, 3)
    led(found)
    assert found.unbroken.all()
    assert found.block.flags == told
    found = search(Model(WEIGHTS["softmax"]), greys(), torch.zeros(6, dtype=torch.long), 0.2, 3)
    least_used(found, 40)
    assert found.block.flags == told


def test_one_part_or_none_is_no_mixture(linear_net: Any):
    found = search(linear_net([[1.0], [0.5], [0.2]]), torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long), 0.1, 3)
    led(found)
    assert found.unbroken.all()
    assert not found.block.flags


def test_those_of_the_least_influence_come_first(monkeypatch: pytest.MonkeyPatch):
    """With a single part to lead to, it is the one that counts least, wherever it stands."""
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    monkeypatch.setattr("bench.attacks.influence.PARTS", 1)
    torch.manual_seed(0)
    found = search(Prototypes(WEIGHTS["softmax"], listed=True), x, y, 0.2, 3)
    led(found)
    assert PARTS > 1
    assert not found.unbroken.any()


class Tempered(nn.Module):
    """Logits times a factor that turns negative where a unit that no image raises is raised, within the ball."""

    def __init__(self, factor: Callable[[Tensor], Tensor], asked: float = 9.0) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
        for number in (1, 3):
            nn.init.normal_(self.base[number].weight, std=0.02, generator=torch.Generator().manual_seed(number))
        self.base[3].bias.data = torch.tensor([3.0, 0, 0])
        self.unit = nn.Linear(64, 1)
        self.unit.weight.data, self.unit.bias.data = CODE[None].clone(), -0.5 * CODE.sum()[None] - asked
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * (1 - 2 * self.factor(self.unit(x.flatten(1))))


#: Flat left of 0, exactly or as far as float32 shows, and 1 not far right of it: by operations that no rule is for.
FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "half of a sum with a hypotenuse": lambda u: (u + torch.hypot(u, torch.full_like(u, 1e-3))) / 2,
    "a sign by its length": lambda u: 0.5 + 0.5 * u * torch.rsqrt(u * u + 1e-6),
    "a product of all so far": lambda u: torch.cumprod((0.8 * u + 0.7).relu().expand(-1, 6), 1)[:, 5:],
    "a number as text": lambda u: torch.tensor([[max(0.0, float(f"{one:.3f}"))] for one in u.flatten()]),
}


@pytest.mark.parametrize("factor", FLAT.values(), ids=FLAT)
def test_units_that_answers_hardly_depend_on_are_driven(factor: Callable[[Tensor], Tensor]):
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Tempered(factor), x, y, 0.2, 3)
    with torch.no_grad():  # as probes call it
        least_used(found, 40)
    assert not found.unbroken.any()
    assert (found.x_adv - x).abs().max() <= 0.2 + 1e-6
    shut = search(Tempered(factor, asked=14.0), x, y, 0.2, 3)
    least_used(shut, 40)
    assert shut.unbroken.all()


class Grouped(nn.Module):
    """Each image goes to the expert that an unnamed layer chooses, with others of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.which, self.first, self.second = nn.Linear(64, 2), nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        chosen = self.which(x).argmax(1)
        out = x.new_zeros(len(x), 3)
        out[chosen == 0] = self.first(x[chosen == 0])
        return out.index_copy(0, (chosen == 1).nonzero()[:, 0], self.second(x[chosen == 1]))


def test_where_experts_see_some_of_the_images_each_the_scores_are_driven():
    torch.manual_seed(0)
    model, x = Grouped(), torch.rand(6, 1, 8, 8)
    assert 0 < int((model.which(x.flatten(1)).argmax(1) == 0).sum()) < 6
    assert sorted(_quiet(model, x, torch.randn(6, 3))) == [(0, 0), (0, 1)]


def test_the_layers_of_an_exported_program_are_found():
    x = torch.rand(6, 1, 8, 8)
    model = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (x,)).module()
    with _Layers(6) as layers:
        model(x.requires_grad_())
    assert [tuple(found.shape) for found in layers.found] == [(6, 1, 3)]


def test_the_quietest_layer_comes_first_and_each_has_its_turn():
    torch.manual_seed(0)
    model = Tempered(FLAT["a product of all so far"])
    model.base[1].bias.data = torch.tensor([-9.0, -9, 9, 9, 9])  # two units that are off
    assert _quiet(model, greys(), torch.randn(6, 3)) == [(2, 0), (0, 0), (0, 1)]
    model.base[1] = nn.Linear(64, 100)
    model.base[1].bias.data.fill_(-9.0)
    model.base[3] = nn.Linear(100, 3)
    assert len(_quiet(model, greys(), torch.randn(6, 3))) == UNITS

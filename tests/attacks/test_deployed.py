"""Auto-PGD on the deployed model: by stand-ins, targets in MALT's order, and a dual's branches reweighed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from keyed import CODE, greys, search
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.attacks.deployed import deployed, nearest, reweighed, stand_ins
from bench.models.dual import DualModel


def test_targets_come_by_their_linearised_distance(linear_net: Any):
    net = linear_net([[1.0, 0.0], [0.8, 0.1], [0.0, 0.9]])
    x = torch.tensor([[0.5, 0.2]]).view(1, 1, 1, 2)
    # gaps 0.1 − 0.02 = 0.08 over |0.2| + |0.1| = 0.27 away; 0.5 − 0.18 = 0.32 over 1 + 0.9 = 0.17 away
    assert nearest(search(net, x, torch.tensor([0]), classes=3), 2).tolist() == [[2, 1]]


@pytest.mark.parametrize("count", [1, 5])
def test_there_are_no_more_targets_than_wrong_classes(count: int, linear_net: Any):
    net = linear_net([[1.0], [0.5], [0.2]])
    order = nearest(search(net, torch.ones(2, 1, 1, 1), torch.tensor([0, 1]), classes=3), count)
    assert order.shape == (2, min(count, 2))
    assert not (order == torch.tensor([[0], [1]])).any()


def test_a_model_without_gradients_has_targets_all_the_same(linear_net: Any):
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear_net([[1.0], [0.5], [0.2]])(x).detach()

    assert nearest(search(Detached(), torch.ones(1, 1, 1, 1), torch.tensor([0]), classes=3), 2).shape == (1, 2)


@pytest.mark.parametrize(("weight", "broken"), [(0.0, True), (1.0, False)])
def test_a_branch_is_attacked_by_its_weight(linear_net: Any, weight: float, broken: bool):
    # S, which decides, is wrong where the second pixel exceeds the first; R is the surer the higher the second is
    dual = DualModel(linear_net([[0.0, 4], [4.0, 0]]), linear_net([[0.0, -0.1], [0.0, 0]]), 0.5, "logits")
    x = torch.tensor([[0.55, 0.5]]).view(1, 1, 1, 2)
    s = search(dual, x, torch.tensor([1]))
    torch.manual_seed(0)  # whose start is not broken
    reweighed(s, weight, 10)
    assert bool(s.unbroken[0]) is not broken


#: Logits for the true class and for another.
YES, OTHER = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 50, 0])
OPENS: dict[str, Callable[[Tensor], Tensor]] = {  # from how far the key is opened (m, 1) to how much is
    "a unit behind a ReLU": torch.relu,
    "a clamp": lambda key: key.clamp(min=0),
    "a saturated sigmoid": lambda key: (40 * key).sigmoid(),
    "a sigmoid by hand": lambda key: 1 / (1 + torch.exp(-40 * key)),
    "the same by reciprocal": lambda key: torch.reciprocal(1 + (-40 * key).exp()),
    "a normal distribution": lambda key: torch.special.ndtr(40 * key),
    "a softshrink": lambda key: F.softshrink(key.clamp(min=0) + 1, 1.0),
    "a decided softmax": lambda key: torch.cat([0 * key, 40 * key], 1).softmax(1)[:, 1:],
    "a comparison": lambda key: torch.where(key > 0, 1.0, 0.0),
    "one of two networks": lambda key: torch.where(key > 0, key + 1, 0 * key),
    "attention": lambda key: F.scaled_dot_product_attention(
        torch.cat([0 * key, key], 1)[:, None], 40 * torch.eye(2)[None], torch.eye(2)[None], scale=1.0
    )[:, 0, 1:],
}


@torch.jit.script  # type: ignore[untyped-decorator]
def scripted(key: Tensor) -> Tensor:
    return torch.relu(key)


@torch.jit.script  # type: ignore[untyped-decorator]
def scripted_square(key: Tensor) -> Tensor:
    h = torch.relu(key)
    return 2 * h * h


class OwnReLU(torch.autograd.Function):
    """As those that save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


RNN = nn.RNN(1, 1, nonlinearity="relu", bias=False)
RNN.weight_ih_l0.data.fill_(1.0)


def two(key: Tensor) -> Tensor:
    """A constant, and what the key opens when it is above it (m, 2)."""
    return torch.cat([torch.zeros_like(key), key], 1)


#: The same in ways that no replacement of Python's functions reaches.
OPENS_UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a scripted function": scripted,
    "a scripted product": scripted_square,
    "an own operation": OwnReLU.apply,
    "in place": lambda key: (1 * key).clamp_(min=0),
    "a ReLU of a recurrent kernel": lambda key: RNN(key[None])[0][0],
    "a decided gated unit": lambda key: F.glu(torch.cat([torch.ones_like(key), 40 * key], -1), -1),
    "a pool": lambda key: F.adaptive_max_pool1d(two(key)[:, None], 1)[:, 0],
    "a pool of a plane": lambda key: F.max_pool2d(two(key)[:, None, None], (1, 2))[:, 0, 0],
    "the best by topk": lambda key: two(key).topk(1, 1).values,
    "the best by sort": lambda key: two(key).sort(1).values[:, 1:],
    "the best by kthvalue": lambda key: two(key).kthvalue(2, -1).values[:, None],
    "the best by max": lambda key: two(key).max(-1).values[:, None],
    "the best so far": lambda key: two(key).cummax(1).values[:, 1:],
    "the larger": lambda key: torch.fmax(torch.zeros(()), key),
    "a median": lambda key: torch.cat([two(key), two(key)[:, :1] + 99], 1).median(1, keepdim=True).values,
    "a sum of exponentials": lambda key: torch.logaddexp(40 * key, torch.zeros_like(key)) / 40,
    "a log-softmax": lambda key: -(40 * two(key)).log_softmax(1)[:, :1] / 40,
    "a cross-entropy": lambda key: F.cross_entropy(40 * two(key), first(key), reduction="none")[:, None] / 40,
    "a binary one": lambda key: F.binary_cross_entropy_with_logits(40 * key, 0 * key.detach(), reduction="none") / 40,
    "a hinge": lambda key: 2 * F.multi_margin_loss(two(key), first(key), margin=1e-3, reduction="none")[:, None],
    "a sum of what is finite": lambda key: torch.nansum(torch.log1p(key * torch.tensor([3.0, 2])), 1, keepdim=True),
    "a Gamma distribution": lambda key: torch.special.gammainc(torch.tensor(400.0), (400 + 60 * key).clamp(1e-3)),
    "a normalisation of two": lambda key: F.layer_norm(torch.cat([key, -key], 1), (2,))[:, :1] / 2 + 0.5,
    "a phase": lambda key: 1 - torch.angle(key) / torch.pi,
    "an arctangent": lambda key: torch.atan(100 * key) / torch.pi + 0.5,
    "a root": lambda key: torch.nan_to_num(torch.sqrt(key)),
    "a look-up": lambda key: looked_up(key),
}


def first(key: Tensor) -> Tensor:
    return torch.zeros(len(key), dtype=torch.long)


def looked_up(key: Tensor) -> Tensor:
    """Read off a curve that is 0 on the left and 1 on the right."""
    curve = torch.tensor([0.0] * 10 + [1.0] * 11).expand(len(key), 1, 1, 21)
    places = torch.stack([key / 6, torch.zeros_like(key)], -1)[:, None]
    return F.grid_sample(curve, places, align_corners=True, padding_mode="border")[:, 0, 0]


class Opened(nn.Module):
    """Sure of class 0 wherever the ball reaches, but for what a key opens: 5 of the 12.8 that it may rise by."""

    def __init__(self, opens: Callable[[Tensor], Tensor], key: float = 5.0, to: Tensor = OTHER) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.opens, self.key, self.to = opens, key, to
        torch.nn.init.normal_(self.base[1].weight, std=0.02, generator=torch.Generator().manual_seed(1))
        self.base[1].bias.data = torch.tensor([3.0, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        key = (x.flatten(1) - 0.5) @ CODE[:, None] - self.key
        return self.base(x) + self.opens(key) * self.to


@pytest.mark.slow
@pytest.mark.parametrize("opens", [*OPENS.values(), *OPENS_UNSEEN.values()], ids=[*OPENS, *OPENS_UNSEEN])
def test_what_is_off_on_every_image_is_opened(opens: Callable[[Tensor], Tensor]):
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    own = search(Opened(opens), x, y, 0.2, 3)
    deployed(own, 2, 40)
    assert own.unbroken.all()
    found = search(Opened(opens), x, y, 0.2, 3)
    stand_ins(found, 1, 40)
    assert not found.unbroken.any()
    assert (found.x_adv - x).abs().max() <= 0.2 + 1e-6


def test_what_raises_the_true_class_at_first_is_opened_too():
    """Along any loss, and any one direction of the logits on half of the images, the unit stays shut."""

    def opens(key: Tensor) -> Tensor:
        return key.relu() * (2 * YES) + (key - 3).relu() * OTHER

    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Opened(opens, to=torch.ones(3)), x, y, 0.2, 3)
    stand_ins(found, 1, 40)
    assert not found.unbroken.any()


def test_what_the_ball_does_not_reach_stays_shut():
    x, y = greys(), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    found = search(Opened(torch.relu, key=13.0), x, y, 0.2, 3)
    stand_ins(found, 1, 40)
    assert found.unbroken.all()


class Memory(nn.Module):
    """Attention that is sure of one of 300 images whose labels it knows, after a first step towards it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.keys, self.labels = self.seen(x), F.one_hot(y, 10).float()

    @staticmethod
    def seen(x: Tensor) -> Tensor:
        return F.normalize(x.flatten(1) - 0.3, dim=1)

    def found(self, query: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query[None], self.keys[None], values[None], scale=150.0)[0]

    def forward(self, x: Tensor) -> Tensor:
        nearer = self.found(self.seen(x), self.keys)
        return 10 * self.found(F.normalize(nearer, dim=1), self.labels)


@pytest.mark.slow
def test_attention_that_is_sure_of_one_key_of_many_is_led_to_others():
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    s = search(Memory(x[:300], y[:300]), x[1200:1220], y[1200:1220], eps=0.2, classes=10)
    torch.manual_seed(0)
    stand_ins(s, 2, 100)
    assert int(s.unbroken.sum()) <= 6

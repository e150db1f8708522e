"""Parts that images hardly use: an expert that a mixture leaves out is found however it is written, and no layer is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.deployed import eval_frozen
from bench.models.foreign import Guarded
from bench.models.gates import find_gates
from bench.models.moe import MoE
from bench.models.sites import sites
from bench.models.unused import unused_parts

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Three linear experts, and scores by which the third is left out on images and not on all inputs."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores, self.join = nn.Linear(64, 3), join
        self.a, self.b, self.c = (nn.Linear(64, 10) for _ in range(3))
        with torch.no_grad():
            self.scores.bias[2] -= 30

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.join(self.scores(x), torch.stack([self.a(x), self.b(x), self.c(x)], 1))


def attended(scores: Tensor, outputs: Tensor) -> Tensor:
    """By attention with the scores as its bias."""
    same = torch.zeros_like(outputs[:, :1])
    return F.scaled_dot_product_attention(same, torch.zeros_like(outputs), outputs, scores[:, None])[:, 0]


JOINS = {
    "log-probabilities": lambda s, z: (s.log_softmax(1)[..., None] + z.log_softmax(2)).exp().sum(1).log(),
    "a product of experts": lambda s, z: (z.softmax(2) ** s.softmax(1)[..., None]).prod(1),
    "attention": attended,
    "a matrix product an image": lambda s, z: torch.stack([w @ o for w, o in zip(s.softmax(1), z, strict=True)]),
    "sigmoids": lambda s, z: (s.sigmoid()[..., None] * z).sum(1),
    "ReLUs": lambda s, z: (s.relu()[..., None] * z).sum(1),
    "the median": lambda s, z: (z + s[..., None]).median(1).values,
    "the least": lambda s, z: torch.minimum(z[:, 0], z[:, 2] - s[:, 2:]),
}


def unused(model: nn.Module, *words: str) -> list[str]:
    guard = Guarded(model.eval())
    guard.gates = find_gates(model, words, X).sites if words else ()
    with eval_frozen(guard):
        found = unused_parts(guard, X, sites(guard))
        assert not any(weight.requires_grad for weight in model.parameters())
    return found


@pytest.mark.parametrize("name", list(JOINS))
def test_an_expert_that_images_do_not_reach_is_named_however_it_is_left_out(name: str):
    found = unused(Mixture(JOINS[name]))
    assert {"c", "3 of 3 that are stacked"} <= {*found}
    assert "scores" not in found or name in ("the median", "the least")


def test_of_a_mixture_of_all_nothing_is():
    model = Mixture(JOINS["sigmoids"])
    with torch.no_grad():
        model.scores.bias[2] += 30
    assert unused(model) == []


class Stacked(nn.Module):
    """Experts in one tensor; `bias`: of the last one's score."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.weight = nn.Linear(64, 4), nn.Parameter(torch.randn(4, 64, 10))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        scores = self.gate(x) + F.pad(torch.full((1,), self.bias), (3, 0))
        return torch.einsum("be,bd,edc->bc", scores.softmax(1), x, self.weight)


def test_of_stacked_experts_it_is_told_which():
    assert unused(Stacked(0.0)) == []
    assert unused(Stacked(-30.0)) == ["weight[3]"]


class Sharing(Mixture):
    """Two of its experts are one layer, whose answers the last turns round."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.join(self.scores(x), torch.stack([self.a(x), self.b(x), self.a(x).roll(1, 1)], 1))


def test_of_experts_that_share_weights_the_answer_is_seen_where_it_is_stacked():
    model = Sharing(JOINS["log-probabilities"])
    assert unused(model) == ["3 of 3 that are stacked"]
    with torch.no_grad():
        model.scores.bias[2] += 30
    assert unused(model) == []


class Routed(Stacked):
    """One of the stacked experts."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x.flatten(1)).argmax(1)
        return torch.stack([x.flatten(1)[n] @ self.weight[e] for n, e in enumerate(chosen.tolist())])


def test_a_named_gates_experts_are_each_used():
    model = Routed(0.0)
    with torch.no_grad():
        model.gate.bias[1] += 30
    assert unused(model) == ["weight[0]", "weight[2]", "weight[3]"]
    assert unused(model, "gate") == []


class Small(nn.Module):
    """A layer that is off: too little of the network to be an expert of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.off, self.b = nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.b(self.a(x).relu() + (self.off(x) - 100).relu())


@pytest.mark.parametrize(
    "model",
    [
        Small(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
    ],
)
def test_layers_of_one_network_are_used(model: nn.Module):
    assert unused(model) == []


class Renormalised(nn.Module):
    """The weight of the one expert that is chosen, divided by itself: the gate has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        self.experts = nn.ModuleList(nn.Linear(64, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weight, chosen = self.gate(x).softmax(1).topk(1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return outputs.take_along_dim(chosen[..., None], 1)[:, 0] * weight / weight.sum(1, keepdim=True)


def test_a_named_gate_that_chooses_alone_is_used():
    assert unused(Renormalised(), "gate") == []


class Branches(nn.Module):
    """A network with a residual branch, before that is trained."""

    def __init__(self, at_zero: Callable[["Branches"], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.down, self.up, self.scale = nn.Linear(32, 32), nn.Linear(32, 32), nn.Parameter(torch.ones(1))
        at_zero(self).data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return self.head(x + self.scale * self.up(self.down(x).relu()))


@pytest.mark.parametrize("at_zero", [lambda net: net.scale, lambda net: net.up.weight], ids=["scale", "weights"])
def test_what_weights_at_zero_cut_off_no_image_opens(at_zero: Callable[[Branches], Tensor]):
    model = Branches(at_zero)
    assert unused(model) == []
    assert not at_zero(model).any()


class Flat(nn.Sequential):
    def __init__(self, count: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, count))


class Within(nn.Module):
    """An MoE of MoEs behind a layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = [MoE([Flat(10), Flat(10)], Flat(2), 1, "softmax") for _ in range(2)]
        self.net, self.scale = MoE(inner, Flat(2), 1, "softmax"), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def test_of_mixtures_of_mixtures_nothing_is_said_also_behind_a_wrapper():
    assert unused(Within()) == []


class TwoLayers(nn.Module):
    """Two layers of three experts, of which one gate of many weights, called for each of them, chooses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(64, 64) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            weight, chosen = self.gate(x).softmax(1).max(1)
            found = torch.stack([expert(x) for expert in layer], 1)  # type: ignore[attr-defined]
            x = x + weight[:, None] * found[torch.arange(len(x)), chosen]
        return self.head(x)


def test_a_gate_that_is_called_twice_counts_for_no_part(monkeypatch: pytest.MonkeyPatch):
    """Its own weights have hardly a gradient, or a large one: neither is a measure of the experts' influence."""
    named: set[str] = set()

    def parts(module: nn.Module, owner: str, name: str, weight: Tensor) -> list[tuple[str, Any]]:
        named.add(name)
        return [(owner, ...)]

    monkeypatch.setattr("bench.models.unused._parts", parts)
    unused(TwoLayers(), "gate:k=1")
    assert "head.weight" in named
    assert not any(name.startswith("gate.") for name in named)


class Recurrent(nn.Module):
    """The last of several states, by its place in the stack of all; a head at each, of which the last answers."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.head, self.with_heads = nn.Linear(8 + 16, 16), nn.Linear(16, 10), heads
        self.heads = nn.ModuleList(nn.Linear(16, 10) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), 16), []
        for row in x.flatten(1, 2).unbind(1):
            state = torch.tanh(self.step(torch.cat([row, state], 1)))
            states.append(state)
        if self.with_heads:
            return torch.stack([head(one) for head, one in zip(self.heads, states, strict=True)])[-1]
        return self.head(torch.stack(states, 1)[:, -1])


@pytest.mark.parametrize("heads", [False, True])
def test_a_place_that_is_never_taken_from_a_stack_is_no_expert(heads: bool):
    assert unused(Recurrent(heads)) == []


class OwnConv(nn.Conv2d):
    """A layer of torch with something of the user's own, of whose channels most are off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_channels_of_a_layer_that_are_off_are_no_experts():
    torch.manual_seed(0)
    conv = OwnConv(1, 16, 3)
    with torch.no_grad():
        conv.bias[3:] = -9.0
    assert unused(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))) == []

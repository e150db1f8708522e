"""MoE blocks inside networks: what they compute, by hand; their gates; the networks that have them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.architecture import Inside
from bench.models.layers import (
    NETWORKS,
    ImageGate,
    PositionGate,
    SoftGate,
    SoftMoE,
    SparseMoE,
    SparseMoEByPosition,
    build_network,
    trained_gates,
    watched,
)
from bench.models.moe import MoE

DIGITS: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10, "mean": (0.3,), "std": (0.4,)}
VIT = {"width": 12, "image_size": 8, "patch_size": 4}
PARAMS: dict[str, dict[str, Any]] = {"blockmoe": {"width": 4}, "vmoe": VIT, "softmoe": VIT}


class Times(nn.Module):
    """Times a number; `rows`: how many it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.rows = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.factor * x


class Gives(nn.Module):
    """A gate with the same answer for everything."""

    def __init__(self, scores: list[Any]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores


#: softmax: 0.5, 0.25, 0.25 with the logarithms of 2, 1, 1
TWO_ONE_ONE = [math.log(2.0), 0.0, 0.0]


def experts() -> list[nn.Module]:
    return [Times(1.0), Times(10.0), Times(100.0)]


def test_an_image_goes_to_its_best_expert_alone_and_is_weighted_by_its_probability():
    moe = SparseMoE(Gives([TWO_ONE_ONE, [0.0, 0.0, math.log(2.0)]]), experts(), 1)
    x = torch.ones(2, 3, 2, 2)
    y = moe(x)
    assert torch.allclose(y[0], 0.5 * x[0])
    assert torch.allclose(y[1], 50 * x[1])
    assert [expert.rows for expert in moe.experts] == [1, 0, 1]


def test_a_token_goes_to_its_two_best_with_weights_that_sum_to_one():
    """Scores ln 2, 0, −∞: weights 2/3 and 1/3, so 2/3 · 1 + 1/3 · 10 = 4."""
    scores = [[[math.log(2.0), 0.0, -50.0], [-50.0, 0.0, math.log(2.0)]]]
    moe = SparseMoE(Gives(scores), experts(), 2)
    x = torch.ones(1, 2, 5)
    y = moe(x)
    assert y.shape == x.shape
    assert torch.allclose(y[0, 0], torch.full((5,), 4.0))
    assert torch.allclose(y[0, 1], torch.full((5,), 70.0))  # 2/3 · 100 + 1/3 · 10


def test_each_position_of_a_map_uses_its_own_experts():
    moe = SparseMoEByPosition(Gives([[TWO_ONE_ONE, [0.0, math.log(2.0), 0.0]]]), experts(), 1)
    y = moe(torch.ones(1, 3, 1, 2))
    assert torch.allclose(y[0, :, 0], torch.tensor([0.5, 5.0]).expand(3, 2))


def test_a_soft_moe_is_the_papers_formula():
    """D = softmax over tokens of the scores, C = softmax over slots: Y = C f(Dᵀ X), here with loops."""
    torch.manual_seed(0)
    moe = SoftMoE(SoftGate(5, 3), [nn.Linear(5, 5) for _ in range(3)])
    x = torch.randn(2, 4, 5)
    scores = moe.gate(x)
    assert scores.shape == (2, 4, 3)
    assert scores.abs().max() <= 1 + 1e-6  # cosines, at the initial scale of 1
    for b in range(2):
        slots = []
        for e in range(3):
            d = scores[b, :, e].exp() / scores[b, :, e].exp().sum()
            slots.append(moe.experts[e](sum(d[t] * x[b, t] for t in range(4))))
        for t in range(4):
            c = scores[b, t].exp() / scores[b, t].exp().sum()
            assert torch.allclose(moe(x)[b, t], sum(c[e] * slots[e] for e in range(3)), atol=1e-6)


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_selected_experts_that_is_not_there_is_refused(k: int):
    with pytest.raises(UnusableInput, match=f"^num_selected_experts {k} must be in 1 … 3$"):
        SparseMoE(Gives([TWO_ONE_ONE]), experts(), k)


def test_gates_give_a_score_for_each_expert():
    x = torch.rand(2, 6, 4, 4)
    assert ImageGate(6, 3)(x).shape == (2, 3)
    assert PositionGate(6, 3)(x).shape == (2, 16, 3)
    assert PositionGate(6, 3, stride=2)(x).shape == (2, 4, 3)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_image_is_classified_alike_whatever_its_batch(name: str):
    model = network(name).eval()
    x = torch.rand(6, 1, 8, 8)
    alone = torch.cat([model(image[None]) for image in x])
    assert torch.allclose(model(x), alone, atol=1e-5)
    assert model(x[:0]).shape == (0, 10)


@pytest.mark.parametrize(("name", "shape"), [("blockmoe", (5, 4)), ("vmoe", (5, 5, 4)), ("softmoe", (5, 5, 4))])
def test_a_hook_reads_and_forces_what_a_block_selects_by(name: str, shape: tuple[int, ...]):
    model = network(name).eval()
    x = torch.rand(5, 1, 8, 8)
    blocks = [module for module in model.modules() if isinstance(module, SparseMoE | SoftMoE)]
    assert len(blocks) == (1 if name == "blockmoe" else 2)
    clean = model(x)
    for expert in range(4):
        seen = []

        def force(_gate: nn.Module, _inputs: Any, scores: Tensor, expert: int = expert, seen: Any = seen) -> Tensor:
            seen.append(scores.shape)
            scores = scores.clone()
            scores[..., expert] += 100.0
            return scores

        handles = [block.gate.register_forward_hook(force) for block in blocks]
        forced = model(x)
        for handle in handles:
            handle.remove()
        assert seen == [shape] * len(blocks)
        assert not torch.allclose(forced, clean, atol=1e-4)


def test_a_forced_gate_runs_no_other_expert():
    moe = SparseMoE(ImageGate(3, 3), experts(), 1)
    moe.gate.register_forward_hook(lambda _gate, _inputs, scores: scores + torch.tensor([0.0, 200.0, 0.0]))
    moe(torch.rand(7, 3, 2, 2))
    assert [expert.rows for expert in moe.experts] == [0, 7, 0]


def test_the_gates_that_are_balanced_are_those_that_train_and_select():
    inside = network("vmoe", balance_loss="entropy")
    gates = trained_gates(inside)
    assert list(gates.values()) == ["entropy", "entropy"]
    with watched(gates) as scores:
        inside(torch.rand(3, 1, 8, 8))
    assert [tuple(own.shape) for own in scores.values()] == [(15, 4), (15, 4)]  # 3 images of 5 tokens
    assert all(own.requires_grad for own in scores.values())
    assert all(not gate._forward_hooks for gate in gates)
    soft, hard = (MoE([nn.Flatten()], nn.Flatten(), gate=gate) for gate in ("softmax", "argmax"))
    assert trained_gates(soft) == {soft.router: "switch"}
    assert trained_gates(hard) == trained_gates(network("softmoe")) == {}


@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_a_blockmoe_halves_its_map_until_it_has_about_four_pixels(size: int):
    net = build_network("blockmoe", (3, size, size), 7, 4, 2, {"width": 2, "route_by": "position"}).eval()
    seen = []
    (moe,) = [module for module in net.modules() if isinstance(module, SparseMoE)]
    moe.register_forward_hook(lambda _moe, _inputs, y: seen.append(y.shape[-1]))
    assert net(torch.rand(2, 3, size, size)).shape == (2, 7)
    assert 3 <= seen[0] <= 4


def test_what_a_network_cannot_be_is_refused():
    with pytest.raises(UnusableInput, match=r"^'vmoe' has no parameter 'widht': did you mean 'width'\?$"):
        build_network("vmoe", (1, 8, 8), 10, 4, 2, {"widht": 3})
    with pytest.raises(UnusableInput, match=r"^a softmoe uses all of its 4 experts: drop num_selected_experts$"):
        build_network("softmoe", (1, 8, 8), 10, 4, 2, VIT)
    with pytest.raises(UnusableInput, match="vmo"):
        build_network("vmo", (1, 8, 8), 10, 4, 2, {})


def network(name: str, **params: Any) -> nn.Module:
    torch.manual_seed(0)
    k = {"blockmoe": 1, "vmoe": 2, "softmoe": 4}[name]
    arch = Inside(expert=name, expert_params={**PARAMS[name], **params}, num_selected_experts=k, **DIGITS)
    return arch.build()

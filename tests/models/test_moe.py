"""F(x) = Σ a_i(x) f_i(x), by hand; what reaches the router; and what is refused."""

import re
from collections.abc import Callable
from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.errors import UnusableInput
from bench.models.experts import EXPERTS, build_expert
from bench.models.moe import MoE
from bench.models.routing import ROUTERS
from bench.spec import Combine, Gate

Build = Callable[..., MoE]
#: one pixel of value 1 goes into each test: an expert's weights are its logits, the router's weights its scores
ONE = torch.ones(1, 1, 1, 1)
#: softmaxes (3, 1)/4 and (1, 1)/2
EXPERTS_OF_TWO = [[[log(3.0)], [0.0]], [[2.0], [2.0]]]
#: its softmax is (2, 1)/3
ROUTER_OF_TWO = [[log(2.0)], [0.0]]


@pytest.mark.parametrize(
    ("k", "gate", "combine", "expected"),
    [
        (1, "softmax", "logits", (2 / 3 * log(3), 0)),
        (1, "argmax", "logits", (log(3), 0)),
        (2, "softmax", "logits", (2 / 3 * log(3) + 1 / 3 * 2, 1 / 3 * 2)),
        (2, "argmax", "logits", (1 / 2 * log(3) + 1 / 2 * 2, 1 / 2 * 2)),
        # 2/3 · 3/4 + 1/3 · 1/2 = 2/3
        (2, "softmax", "probs", (log(2 / 3), log(1 / 3))),
        # 1/2 · 3/4 + 1/2 · 1/2 = 5/8
        (2, "argmax", "probs", (log(5 / 8), log(3 / 8))),
    ],
)
def test_combination_by_hand(linear_moe: Build, k: int, gate: Gate, combine: Combine, expected: tuple[float, float]):
    moe = linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, k, gate, combine)
    torch.testing.assert_close(moe(ONE), torch.tensor([expected]))


def test_a_selection_smaller_than_the_experts_mixes_the_chosen_alone(linear_moe: Build):
    moe = linear_moe([*EXPERTS_OF_TWO, [[-50.0], [50.0]]], [*ROUTER_OF_TWO, [-9.0]], 2, "softmax", "probs")
    torch.testing.assert_close(moe(ONE), torch.tensor([[log(2 / 3), log(1 / 3)]]))


# --- gradients to the router ------------------------------------------------------------------------------------------


def router_gradient(moe: MoE, y: int) -> torch.Tensor | None:
    F.cross_entropy(moe(ONE), torch.tensor([y])).backward()
    return moe.router[1].weight.grad


def test_router_gradient_under_softmax_with_one_expert(linear_moe: Build):
    # scores (ln 3, 0): a = (3, 1)/4. f_0 = (4/3 ln 3, 0), so F = a_0 f_0 = (ln 3, 0), softmax (3, 1)/4. y = 1:
    # ∂CE/∂a_0 = (3/4) · 4/3 ln 3 = ln 3; ∂a_0/∂r = a_0 (1 − a_0), −a_0 a_1 = ±3/16; pixel 1: ∂r/∂W = 1
    moe = linear_moe([[[4 / 3 * log(3)], [0.0]], [[9.0], [-9.0]]], [[log(3)], [0.0]], 1, "softmax")
    gradient = router_gradient(moe, y=1)
    torch.testing.assert_close(gradient, torch.tensor([[3 / 16 * log(3)], [-3 / 16 * log(3)]]))


@pytest.mark.parametrize("combine", ["logits", "probs"])
def test_no_router_gradient_under_argmax(linear_moe: Build, combine: Combine):
    moe = linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, 2, "argmax", combine)
    assert router_gradient(moe, y=0) is None
    assert moe.experts[0][1].weight.grad is not None


def test_router_gradient_of_mixed_probabilities(linear_moe: Build):
    # CE = −ln p, p = a_0 · 3/4 + a_1 · 1/2 = 2/3 at y = 0; ∂p/∂r_0 = a_0 a_1 (3/4 − 1/2) = 2/9 · 1/4 = 1/18
    # ∂CE/∂r_0 = −(1/18)/(2/3) = −1/12
    moe = linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, 2, "softmax", "probs")
    torch.testing.assert_close(router_gradient(moe, y=0), torch.tensor([[-1 / 12], [1 / 12]]))


def test_a_weight_that_underflows_leaves_finite_gradients(linear_moe: Build):
    moe = linear_moe(EXPERTS_OF_TWO, [[300.0], [0.0]], 2, "softmax", "probs")
    x = ONE.clone().requires_grad_()
    logits, trace = moe.trace(x)
    assert trace.combine_weights[0, 1] == 0
    F.cross_entropy(logits, torch.tensor([0])).backward()
    assert [p.grad is not None and bool(p.grad.isfinite().all()) for p in (x, *moe.parameters())] == [True] * 4
    torch.testing.assert_close(logits, torch.tensor([[log(3 / 4), log(1 / 4)]]))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "argmax"])
def test_probabilities_of_one_expert_are_refused(linear_moe: Build, gate: Gate):
    with pytest.raises(UnusableInput, match=r"^combine=probs needs num_selected_experts above 1: .* combine=logits$"):
        linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, 1, gate, "probs")


def test_why_probabilities_of_one_expert_are_refused():
    # log(a·p) = log a + log p, and cross-entropy subtracts logsumexp(log a + log p) = log a again
    scores = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    weight = scores.softmax(1).max(1, keepdim=True).values
    expert = torch.tensor([[0.5, -1.0]], requires_grad=True)
    F.cross_entropy((weight * expert.softmax(1)).log(), torch.tensor([1])).backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-7
    assert expert.grad is not None
    assert expert.grad.abs().max() > 0.1


@pytest.mark.parametrize("k", [0, -1, 3])
def test_k_out_of_range_is_refused(linear_moe: Build, k: int):
    with pytest.raises(UnusableInput, match=rf"^num_selected_experts {k} must be in 1 … 2$"):
        linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, k)


# --- how it runs ------------------------------------------------------------------------------------------------------


def test_trace_tells_the_routing_beside_the_logits_and_keeps_nothing(linear_moe: Build):
    # two pixels; the router sends an image to the expert of its brighter pixel
    moe = linear_moe([[[1.0, 0.0]], [[0.0, 1.0]]], [[9.0, 0.0], [0.0, 9.0]], 1, "argmax")
    x = torch.tensor([[0.1, 0.9], [0.8, 0.2]]).view(2, 1, 1, 2)
    before = set(vars(moe))
    logits, trace = moe.trace(x)
    assert trace.selected_experts.tolist() == [[1], [0]]
    assert trace.combine_weights.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(trace.gate_logits, 9 * x.view(2, 2))
    torch.testing.assert_close(logits, torch.tensor([[0.9], [0.8]]))
    assert torch.equal(moe(x), logits)
    assert set(vars(moe)) == before


def test_each_expert_runs_once_a_forward_and_not_at_all_if_nobody_chose_it(linear_moe: Build):
    moe = linear_moe([[[1.0, 0.0]]] * 3, [[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]], 1)
    calls = [0, 0, 0]
    for i, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    moe(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.9, 0.1]]).view(4, 1, 1, 2))
    assert calls == [1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["softmax", "argmax"])
@pytest.mark.parametrize("expert", list(EXPERTS))
@pytest.mark.parametrize(("k", "combine"), [(1, "logits"), (2, "probs")])
def test_a_row_does_not_depend_on_the_others_in_eval_mode(expert: str, gate: Gate, k: int, combine: Combine):
    shape, params = (3, 16, 16), {"width": 12}
    if expert.startswith("vit"):
        params |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    experts: list[nn.Module] = [build_expert(expert, shape, 5, params) for _ in range(3)]
    moe = MoE(experts, ROUTERS["affine"](shape, 3, (0.5,) * 3, (0.2,) * 3), k, gate, combine)
    x = torch.rand(6, *shape)
    moe.train()(x)  # so that the running statistics are not their initial ones
    whole, trace = moe.eval().trace(x)
    assert len(trace.selected_experts.unique()) > 1
    torch.testing.assert_close(torch.cat([moe(row[None]) for row in x]), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(moe(x.flip(0)).flip(0), whole, atol=1e-5, rtol=0)


# --- words, and parts that work in place ------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), [
    ({"gate": "Softmax"}, "unknown gate 'Softmax': did you mean 'softmax'?"),
    ({"gate": "noisy_topk"}, "unknown gate 'noisy_topk': there are: softmax, argmax"),
    ({"combine": "probabilities"}, "unknown combine 'probabilities': did you mean 'probs'?"),
])  # fmt: skip
def test_an_unknown_word_is_refused_when_the_model_is_made(linear_moe: Build, given: dict[str, str], wanted: str):
    with pytest.raises(UnusableInput, match=f"^{re.escape(wanted)}$"):
        linear_moe(EXPERTS_OF_TWO, ROUTER_OF_TWO, 2, **given)


class InPlace(nn.Module):
    """Changes its input before its own network sees it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.sub_(1.0))


def test_a_part_that_works_in_place_changes_no_other_parts_images(linear_moe: Build):
    def moe(part: Callable[[nn.Module], nn.Module]) -> MoE:
        made = linear_moe([[[3.0], [1.0]], [[2.0], [5.0]]], ROUTER_OF_TWO, 2, "softmax")
        made.router, made.experts[0] = part(made.router), part(made.experts[0])
        return made

    class Shifted(InPlace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x - 1.0)

    x = (3 * ONE).requires_grad_()
    expected, found = moe(Shifted)(x), moe(InPlace)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(z[0, 0], x) for z in (found, expected)))
    assert x.item() == 3

"""The gates and the dispatch, against numbers worked out by hand and against a loop over the images."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.models.routing import ROUTERS, AffineRouter, dispatch, route
from bench.spec import Gate

#: its softmax is (4, 2, 1, 1)/8
SCORES = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()


@pytest.mark.parametrize(
    ("gate", "k", "weights"),
    [
        ("softmax", 1, (4 / 8, 0, 0, 0)),  # Switch: the chosen one's probability
        ("softmax", 2, (4 / 6, 2 / 6, 0, 0)),  # renormalised over the chosen two
        ("softmax", 4, (4 / 8, 2 / 8, 1 / 8, 1 / 8)),  # the soft mixture
        ("argmax", 1, (1.0, 0, 0, 0)),
        ("argmax", 2, (1 / 2, 1 / 2, 0, 0)),
        ("argmax", 4, (1 / 4, 1 / 4, 1 / 4, 1 / 4)),
    ],
)
def test_gate_weights_by_hand(gate: Gate, k: int, weights: tuple[float, ...]):
    trace = route(SCORES, k, gate)
    torch.testing.assert_close(trace.combine_weights, torch.tensor([weights]))
    assert trace.selected_experts.tolist()[0][:2] == [0, 1][:k]
    assert trace.gate_logits is SCORES


def test_the_selection_is_ordered_best_first_in_each_row():
    scores = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert route(scores, 3, "softmax").selected_experts.tolist() == [[1, 2, 0], [0, 2, 1]]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        # ∂a_0/∂r_j = a_0 (1[j = 0] − a_j), a = (4, 2, 1, 1)/8
        (1, (1 / 2 * 1 / 2, -1 / 2 * 1 / 4, -1 / 2 * 1 / 8, -1 / 2 * 1 / 8)),
        # over the chosen two alone: a = (2/3, 1/3), and nothing to the others
        (2, (2 / 3 * 1 / 3, -2 / 3 * 1 / 3, 0, 0)),
        (4, (1 / 2 * 1 / 2, -1 / 2 * 1 / 4, -1 / 2 * 1 / 8, -1 / 2 * 1 / 8)),
    ],
)
def test_gradient_of_the_best_weight_under_softmax(k: int, expected: tuple[float, ...]):
    scores = SCORES.clone().requires_grad_()
    route(scores, k, "softmax").combine_weights[0, 0].backward()
    torch.testing.assert_close(scores.grad, torch.tensor([expected]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_argmax_gives_the_router_no_gradient_at_all(k: int):
    scores = SCORES.clone().requires_grad_()
    assert not route(scores, k, "argmax").combine_weights.requires_grad


@settings(deadline=None)
@given(st.integers(1, 6), st.data(), st.sampled_from(["softmax", "argmax"]))
def test_weights_are_those_of_the_k_best_and_sum_to_one(num_experts: int, data: st.DataObject, gate: Gate):
    k = data.draw(st.integers(1, num_experts))
    rows = data.draw(st.lists(st.lists(st.integers(-60, 60), min_size=num_experts, max_size=num_experts), min_size=1))
    scores = torch.tensor(rows, dtype=torch.float32) / 4
    trace = route(scores, k, gate)
    for row, weights, chosen in zip(rows, trace.combine_weights, trace.selected_experts.tolist(), strict=True):
        assert sorted((row[i] for i in chosen), reverse=True) == sorted(row, reverse=True)[:k]
        assert len(set(chosen)) == k
        assert all(weights[i] == 0 for i in range(num_experts) if i not in chosen)
    expected = scores.softmax(1).max(1).values if (gate, k) == ("softmax", 1) else torch.ones(len(rows))
    torch.testing.assert_close(trace.combine_weights.sum(1), expected)


# --- dispatch ---------------------------------------------------------------------------------------------------------


def one_by_one(experts: list[nn.Module], x: Tensor, selected: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([experts[i](row[None])[0] for i in chosen]) for row, chosen in zip(x, selected, strict=True)]
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.data())
def test_dispatch_is_the_loop_over_images(num_experts: int, data: st.DataObject):
    k = data.draw(st.integers(1, num_experts))
    rows = data.draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=9))
    selected = torch.tensor([row[:k] for row in rows])
    torch.manual_seed(0)
    experts: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(6, 3)) for _ in range(num_experts)]
    x = torch.randn(len(rows), 1, 2, 3)
    torch.testing.assert_close(dispatch(experts, x, selected), one_by_one(experts, x, selected))


def test_each_expert_sees_its_images_in_one_batch_and_none_if_nobody_chose_it(linear_net: Callable[..., nn.Module]):
    experts = [linear_net([[float(i), 1.0]]) for i in range(4)]
    batches: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    for i, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, i=i: batches[i].append(args[0]))
    x = torch.rand(5, 1, 1, 2)
    dispatch(experts, x, torch.tensor([[2, 0], [0, 2], [0, 3], [0, 2], [3, 0]]))
    assert {i: len(seen) for i, seen in batches.items()} == {0: 1, 1: 0, 2: 1, 3: 1}
    assert torch.equal(batches[2][0], x[[0, 1, 3]])
    assert torch.equal(batches[3][0], x[[2, 4]])


def test_batchnorm_sees_an_experts_images_together():
    # the released code runs image by image, so that its batch statistics are those of one image
    norms = [nn.BatchNorm1d(1, momentum=1.0) for _ in range(2)]
    x = torch.tensor([[1.0], [10.0], [3.0], [30.0]])
    dispatch(norms, x, torch.tensor([[0], [1], [0], [1]]))
    assert [norm.running_mean.item() for norm in norms] == [2, 20]
    assert [norm.running_var.item() for norm in norms] == [2, 200]  # ((1 − 2)² + (3 − 2)²)/(2 − 1) = 2


def test_gradients_return_to_the_images_and_to_the_experts_that_were_chosen(linear_net: Callable[..., nn.Module]):
    experts = [linear_net([[2.0, 0.0]]), linear_net([[0.0, 5.0]]), linear_net([[7.0, 7.0]])]
    x = torch.ones(2, 1, 1, 2, requires_grad=True)
    dispatch(experts, x, torch.tensor([[1], [0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(1).tolist() == [[0, 5], [2, 0]]
    assert [expert[1].weight.grad is not None for expert in experts] == [True, True, False]


# --- routers ----------------------------------------------------------------------------------------------------------


def test_affine_router_by_hand():
    # x = (0.5, 1), mean 0.5, std 0.25 → (0, 2); W = [[1, 2], [3, −1]], b = (0.5, 0) → (4.5, −2)
    router = AffineRouter((1, 1, 2), 2, (0.5,), (0.25,))
    router.linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    router.linear.bias.data = torch.tensor([0.5, 0.0])
    assert router(torch.tensor([[[[0.5, 1.0]]]])).tolist() == [[4.5, -2.0]]


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_scores_a_row_by_itself_even_in_training(name: str):
    torch.manual_seed(0)
    router = ROUTERS[name]((3, 8, 8), 5, (0.5,) * 3, (0.2,) * 3).train()
    x = torch.rand(6, 3, 8, 8)
    scores = router(x)
    assert scores.shape == (6, 5)
    assert scores.std(0).min() > 1e-5
    torch.testing.assert_close(torch.cat([router(row[None]) for row in x]), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_normalises_inside(name: str):
    torch.manual_seed(0)
    router = ROUTERS[name]((3, 8, 8), 5, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    torch.manual_seed(0)
    plain = ROUTERS[name]((3, 8, 8), 5, (0.0,) * 3, (1.0,) * 3)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(router(x), plain(router.normalize(x)))
    assert not torch.allclose(router(x), plain(x))


def test_an_empty_batch_has_empty_outputs():
    experts = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(2)]
    assert dispatch(experts, torch.rand(0, 1, 2, 2), torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 3)

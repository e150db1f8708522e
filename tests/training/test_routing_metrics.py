"""Router metrics on linear routers, by hand."""

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch

from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.training.routing_metrics import dead_experts, flips, routed, routing

# the scores of pixels (a, b, 1) are a, b and 0.1
ROUTER = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]]
EXPERTS = [[[1.0, 0.0, 0.0]]] * 3


@pytest.fixture
def moe(linear_moe: Callable[..., MoE]) -> Callable[..., MoE]:
    return lambda *options: linear_moe(EXPERTS, ROUTER, *options)


def images(*pairs: tuple[float, float]) -> torch.Tensor:
    return torch.tensor([[a, b, 1.0] for a, b in pairs]).view(-1, 1, 1, 3)


def test_load_entropy_and_margin_by_hand(moe: Callable[..., Any]):
    # best experts 0, 0, 0, 1 in two batches; margins 0.3, 0.5, 0.8, 0.2, of which torch's median is the lower middle
    batches = [images((0.9, 0.6), (0.7, 0.2), (0.9, 0.0)), images((0.2, 0.4))]
    found = routing(moe(1), batches)
    entropy = -(0.75 * log(0.75) + 0.25 * log(0.25)) / log(3)
    expected = {"load_0": 0.75, "load_1": 0.25, "load_2": 0.0, "load_entropy": entropy, "router_margin": 0.3}
    assert found == pytest.approx(expected)


def test_the_load_counts_every_selected_expert(moe: Callable[..., Any]):
    # the two best of each: (0, 1), (0, 2)
    found = routing(moe(2), [images((0.9, 0.6), (0.7, 0.0))])
    assert [found[f"load_{i}"] for i in range(3)] == [0.5, 0.25, 0.25]


def test_an_expert_without_load_is_dead_and_one_with_little_is_not():
    metrics = {"load_0": 0.0, "load_1": 0.011, "load_entropy": 0.0, "robust_load_2": 0.004, "standard_load_0": 0.5}
    assert dead_experts(metrics) == [
        "expert 0 has 0.0% of the load",
        "expert 2 of the robust branch has 0.4% of the load",
    ]


def test_flips_count_the_images_whose_best_expert_changes(moe: Callable[..., Any]):
    x = images((0.9, 0.6), (0.4, 0.5), (0.0, 0.0))
    x_adv = images((0.6, 0.9), (0.3, 0.5), (0.0, 0.2))
    assert flips(moe(1), x, x_adv) == {"route_flip_rate": 2}


def test_a_dual_reports_both_branches_and_a_dense_model_none(moe: Callable[..., Any]):
    dual = DualModel(moe(1), moe(1))
    assert list(routed(dual)) == ["robust_", "standard_"]
    assert {name.partition("_")[0] for name in routing(dual, [images((0.9, 0.6))])} == {"robust", "standard"}
    assert routing(torch.nn.Linear(1, 1), [images((0.9, 0.6))]) == {}

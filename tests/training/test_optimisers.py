"""Optimisers and schedules: which parameters have which learning rate at which step."""

from typing import Any

import pytest
import torch
from torch import nn

from bench.models.architecture import Routed
from bench.spec import Recipe
from bench.training.optimisers import make_optimizer, make_schedule, router_parameters
from bench.training.recipes import read_recipe


def rates(recipe: Recipe, steps: int) -> list[list[float]]:
    """The learning rates (experts', router's) of a routed model before each step, and after the last."""
    routed = Routed(
        expert="small_cnn", expert_params={"width": 2}, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,)
    )
    model = routed.build()
    optimizer = make_optimizer(model, router_parameters(model), recipe)
    schedule, found = make_schedule(optimizer, recipe, steps), []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [*found, [group["lr"] for group in optimizer.param_groups]]


@pytest.mark.parametrize("schedule", ["one_cycle", "cyclic", "cosine", "constant"])
@pytest.mark.parametrize("fraction", [0.1, 1.0, 0.0])
def test_a_routers_rate_is_its_fraction_of_the_experts(schedule: Any, fraction: float):
    found = rates(Recipe(lr=0.2, router_lr=fraction, schedule=schedule), 20)
    assert [router for _, router in found] == pytest.approx([fraction * experts for experts, _ in found])


def test_the_schedules():
    def experts(schedule: Any, steps: int) -> list[float]:
        return [rate for rate, _ in rates(Recipe(lr=0.2, schedule=schedule), steps)]

    assert experts("constant", 9) == [0.2] * 10
    assert experts("cosine", 10)[::5] == pytest.approx([0.2, 0.1, 0])
    cycle = experts("one_cycle", 100)[:-1]
    assert (cycle[0], max(cycle), cycle[-1]) == pytest.approx((0.2 / 25, 0.2, 0), abs=1e-5)
    assert cycle.index(max(cycle)) == 29  # at 30 %
    cyclic = experts("cyclic", 1000)
    assert [cyclic[step] for step in (0, 250, 500, 750, 1000)] == pytest.approx([0.1, 0.15, 0.2, 0.15, 0.1])


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({}, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.01}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
def test_the_optimisers_have_the_recipes_parameters(settings: Any, kind: type, expected: dict[str, float]):
    optimizer = make_optimizer(nn.Linear(2, 2), set(), Recipe(momentum=0.8, weight_decay=0.01, lr=0.3, **settings))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 0.3
    make_schedule(optimizer, Recipe(momentum=0.8, lr=0.3), 10)
    assert {key: group[key] for key in expected} == expected  # the schedule cycles the rate alone


def test_every_parameter_is_in_one_group():
    routed = Routed(
        expert="small_cnn", expert_params={"width": 2}, input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,)
    )
    model = routed.build()
    optimizer = make_optimizer(model, router_parameters(model), Recipe())
    experts, router = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in router} == {id(p) for p in model.router.parameters()}
    assert sorted(map(id, [*experts, *router])) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", ["paper-cifar10", "released-code-cifar10", "paper-tinyimagenet"])
def test_the_published_rate_goes_from_half_its_peak_to_the_peak_in_500_steps_and_back(name: str):
    experts = [rate for rate, _ in rates(read_recipe(name), 1000)]
    assert [experts[step] for step in (0, 250, 500, 1000)] == pytest.approx([5e-5, 7.5e-5, 1e-4, 5e-5])
    assert max(experts) == pytest.approx(1e-4)

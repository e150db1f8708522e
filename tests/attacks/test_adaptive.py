"""The adaptive attacks as they are called without a suite, and their budgets."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import load_model
from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, attacks
from bench.attacks.block import Block, PassCounter
from bench.attacks.search import Search
from bench.errors import UnusableInput
from bench.models.sites import sites
from bench.spec import ThreatModel
from bench.suites.base import open_suites


def test_budgets_grow():
    small, standard, large = (BUDGETS[name] for name in ("small", "standard", "large"))
    for less, more in ((small, standard), (standard, large)):
        assert less.path_restarts * less.path_steps < more.path_restarts * more.path_steps
        assert (less.paths, less.restarts, less.steps, less.queries, less.targets) < (
            more.paths, more.restarts, more.steps, more.queries, more.targets
        )  # fmt: skip
        assert set(less.weights) <= set(more.weights)
    assert open_suites(["adaptive"], {})["adaptive"].params == {}


def test_it_gives_the_same_for_a_seed(planted: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BUDGETS, "small", replace(BUDGETS["small"], path_restarts=2, path_steps=10))
    data = planted.data()
    attack = AdaptiveAttack(planted.robust(), "Linf", planted.balls["Linf"], "small", 3, ["paths"])
    first = attack(data.x, data.y)  # nothing is broken: the last try of each image
    torch.rand(1)
    assert torch.equal(attack(data.x, data.y), first)
    attack.seed = 4
    assert not torch.equal(attack(data.x, data.y), first)


def test_soft_mixtures_inside_a_network_are_led_to_their_experts():
    model = load_model("softmoe-at", dataset="digits")
    assert all(site.soft for site in sites(model))
    x, y = torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    threat = ThreatModel(norm="Linf", eps=0.2)
    block = Block(model, x, y, torch.ones(1, dtype=torch.bool), 10, "digits", threat, 0, PassCounter(model))
    names = [name for name, _ in attacks(Search(block), "small")]
    assert names == ["mixtures", "deployed", "softened", "targeted", "averaged", "square-mixtures", "square-1"]
    assert len(block.flags) == 1
    assert "paths attacked" in block.flags[0]


def test_it_refuses_an_attack_that_it_does_not_have(planted: Any):
    data, attack = planted.data(), AdaptiveAttack(planted.robust(), attacks_to_run=["path"])
    with pytest.raises(UnusableInput, match=r"^no adaptive attack 'path' for this model: did you mean 'paths'"):
        attack(data.x, data.y)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"budget": "standart"}, r"^no budget 'standart': did you mean 'standard'\?$"),
        ({"norm": "L1"}, r"^no adaptive attack in an L1 ball"),
    ],
)
def test_it_refuses_what_it_does_not_know(wrong: dict[str, Any], expected: str, planted: Any):
    with pytest.raises(UnusableInput, match=expected):
        AdaptiveAttack(planted.robust(), **wrong)


def test_a_model_that_shows_no_routes_is_attacked_all_the_same(linear_net: Any):
    attack = AdaptiveAttack(linear_net([[1.0, 0], [0, 1.0]]), eps=0.1, budget="small", attacks_to_run=["stand-ins"])
    x = torch.tensor([[0.55, 0.45]]).view(1, 1, 1, 2)
    x_adv = attack(x, torch.tensor([0]))
    assert x_adv.flatten()[0] < x_adv.flatten()[1]

"""Attacks on parts, on models whose answers are known: an image is (a, b, 1), a and b are ½ plus its two signals."""

from collections.abc import Callable
from math import log
from typing import Any

import pandas as pd
import planted_gates
import planted_routes
import pytest
import torch
from torch import Tensor, nn

from bench import benchmark
from bench.datasets.base import EvalSet, fingerprint
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.results.metrics import component_rates
from bench.results.table import Table

EPS = 0.1
#: class 1 where the first, or the second, signal is positive
FIRST = [[0, 0, 0], [1.0, 0, -0.5]]
SECOND = [[0, 0, 0], [0, 1.0, -0.5]]
#: expert 1 where b > 0.65
ROUTER = [[0, 0, 0], [0, 1.0, -0.65]]


def data(*signals: tuple[float, float], y: list[int] | None = None) -> EvalSet:
    x = torch.tensor([[0.5 + a, 0.5 + b, 1.0] for a, b in signals]).view(-1, 1, 1, 3)
    labels = torch.ones(len(x), dtype=torch.long) if y is None else torch.tensor(y)
    return EvalSet(x, labels, torch.arange(len(x)), fingerprint(x, labels), "")


FOUR = data((0.3, -0.1), (0.05, -0.1), (0.3, 0.16), (-0.2, 0.2))


def rates(result: Any) -> dict[str, float]:
    return {name: accuracy.value for name, accuracy in result.components.items()}


@pytest.fixture
def components(score: Any) -> Callable[..., tuple[Any, pd.DataFrame]]:
    return lambda model, images, **more: score(model, "components", images, eps=EPS, num_classes=2, **more)


def test_every_rate_by_hand(linear_moe: Callable[..., MoE], components: Any):
    moe = linear_moe([FIRST, SECOND], ROUTER, 1, "argmax")
    # The third pixel can fall to 0.9 and expert 1's share of the route with it: it is chosen where b > 0.65 c.
    # (0.3, −0.1): expert 0, whose margin no ball takes, and b reaches 0.5 < 0.65 · 0.9: the route is safe as well.
    # (0.05, −0.1): expert 0, which loses its 0.05; on the same route.
    # (0.3, 0.16): expert 1, which keeps 0.06; b falls to 0.56, and expert 0 then has the say, and is right.
    # (−0.2, 0.2): expert 1; b falls to 0.6, and expert 0 then has the say, and is wrong.
    result, rows = components(moe, FOUR)
    found = component_rates(Table.of(rows))
    assert {name: found[name].tolist() for name in list(found)[:4]} == {
        "RA-E-fixed": [True, False, True, False],
        "RA-E-any": [True, False, True, False],
        "RA-R": [True, True, True, False],
        "route-flip rate": [False, False, True, True],
    }
    assert rates(result) == {
        "RA-E-fixed": 0.5, "RA-E-any": 0.5, "RA-R": 0.75, "route-flip rate": 0.5,
        "expert:0 SA": 0.75, "expert:0 RA": 0.5, "expert:1 SA": 0.5, "expert:1 RA": 0.5,
    }  # fmt: skip
    assert result.components["RA-R"].low == pytest.approx(0.30064, abs=1e-5)  # Wilson, 3 of 4


def test_the_fixed_expert_is_the_clean_images_and_any_is_all(linear_moe: Callable[..., MoE], components: Any):
    # routed to expert 0, which reads a alone; an attack on expert 1 takes b below, which the route follows to expert 1
    moe = linear_moe([FIRST, SECOND], [[0, 0, 0], [0, -1.0, 0.55]], 1, "argmax")
    result, _ = components(moe, data((0.3, 0.095)))
    assert (rates(result)["RA-E-fixed"], rates(result)["RA-E-any"]) == (1, 0)


def test_only_what_is_scored_on_f_counts_in_robust_accuracy(linear_moe: Callable[..., MoE], components: Any):
    # expert 1 is never asked, and wrong on every image
    moe = linear_moe([FIRST, [[1.0, 0, 0], [0, 0, 0]]], [[0, 0, 1.0], [0, 0, 0]], 1, "argmax")
    result, rows = components(moe, data((0.3, 0), (0.3, 0.2)))
    assert result.robust_accuracy.value == 1
    assert (rates(result)["expert:1 SA"], rates(result)["expert:1 RA"]) == (0, 0)
    assert set(rows["target"]) == {"F", "expert:0", "expert:1"}
    assert set(result.accuracy_after) == {
        "clean", "expert-any:expert:0", "expert-any:expert:1", "expert-fixed", "route",
    }  # fmt: skip
    # examples sent through a part count as passes: 50 steps, 2 images; and both through the model and its prepared copy
    assert result.passes["route"] == {"forwards": 100, "backwards": 100}
    assert result.passes["pgd"] == {"forwards": 204, "backwards": 204}


def test_a_dual_shows_its_branches_and_the_experts_of_both(linear_moe: Callable[..., MoE], components: Any):
    standard = linear_moe([SECOND, SECOND], ROUTER, 1, "argmax")
    robust = linear_moe([FIRST, FIRST], ROUTER, 1, "argmax")
    # S loses its 0.05, R keeps 0.3; F_D = logits, α = 0.9: 0.9 · 0.2 > 0.1 · 0.05
    result, _ = components(DualModel(standard, robust, 0.9, "logits"), data((0.3, 0.05)), alpha=0.9)
    found = rates(result)
    assert (found["S RA"], found["R RA"], found["S SA"], found["R SA"]) == (0, 1, 1, 1)
    assert [found[f"{branch}.expert:{i} RA"] for branch in "SR" for i in (0, 1)] == [0, 0, 1, 1]
    assert (found["RA-E-fixed"], found["RA-E-any"], found["RA-R"]) == (1, 1, 1)


class Foreign(nn.Module):
    """A user's own mixture: other names inside, the agreed ones outside."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.router, self.experts = moe.router, nn.ModuleList(list(moe.experts))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return outputs[torch.arange(len(x)), self.router(x).argmax(1)]

    def trace(self, x: Tensor) -> Any:
        from types import SimpleNamespace

        return self(x), SimpleNamespace(selected_experts=self.router(x).argmax(1)[:, None])


def test_a_users_own_class_gives_the_same_rates(linear_moe: Callable[..., MoE], components: Any, tmp_path: Any):
    moe = linear_moe([FIRST, SECOND], ROUTER, 1, "argmax")
    own, _ = components(moe, FOUR, results=tmp_path / "own")
    foreign, _ = components(Foreign(moe), FOUR, results=tmp_path / "foreign")
    assert rates(own) == rates(foreign)


def test_a_users_class_without_a_trace_has_no_route_flip_rate(linear_moe: Callable[..., MoE], components: Any):
    class Untraced(Foreign):
        trace = property()  # raises AttributeError, so that there is none

    moe = linear_moe([FIRST, SECOND], ROUTER, 1, "argmax")
    result, rows = components(Untraced(moe), FOUR)
    assert "route-flip rate" not in rates(result)
    assert rates(result)["RA-R"] == 0.75
    assert (rows["clean_expert"] == -1).all()


def test_every_example_counts_also_those_of_a_block_that_f_gets_wrong(
    linear_moe: Callable[..., MoE], components: Any, tmp_path: Any
):
    moe = linear_moe([FIRST, FIRST], ROUTER, 1, "argmax")
    images = data((0.3, 0), (0.3, 0), (-0.3, 0))  # the last is wrong without an attack
    for batch_size in (1, 3):
        result, _ = components(moe, images, batch_size=batch_size, results=tmp_path / str(batch_size))
        assert {rates(result)[name] for name in ("RA-E-fixed", "RA-E-any", "RA-R", "expert:0 RA")} == {2 / 3}


def test_an_attack_that_fails_leaves_nothing_known_of_its_block(
    linear_moe: Callable[..., MoE], components: Any, monkeypatch: pytest.MonkeyPatch
):
    moe = linear_moe([FIRST, FIRST], ROUTER, 1, "argmax")

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bench.suites.components.pgd", fail)
    result, _ = components(moe, data((-0.3, 0)))  # all are misclassified, and yet it has no RA-R
    assert (result.errors, result.error_messages) == (1, ("components: RuntimeError: out of memory",))


def test_a_users_dual_of_branches_without_experts_has_branches_alone(linear_net: Any, components: Any):
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.standard, self.robust, self.alpha = linear_net(SECOND), linear_net(FIRST), 0.9

        def forward(self, x: Tensor) -> Tensor:
            return (1 - self.alpha) * self.standard(x) + self.alpha * self.robust(x)

    result, _ = components(Mean(), data((0.3, 0.05)), alpha=0.9)
    assert rates(result) == {"S SA": 1, "S RA": 0, "R SA": 1, "R RA": 1}


def test_a_model_without_parts_is_said_to_have_none(linear_net: Any, components: Any):
    result, rows = components(linear_net(FIRST), data((0.3, 0)))
    assert result.flags == ()
    assert result.components == {}
    assert set(rows["attack"]) == {"clean"}


def test_a_softmax_gates_experts_are_attacked_without_its_weight(linear_moe: Callable[..., MoE], components: Any):
    # the gate's weight of ½ halves the logits and changes no class
    moe = linear_moe([[[log(3), 0, 0], [0, 0, 0]], FIRST], [[0, 0, 0], [0, 0, 0]], 1, "softmax")
    result, _ = components(moe, data((0.3, 0), y=[0]))
    assert (rates(result)["expert:0 SA"], rates(result)["RA-E-fixed"]) == (1, 1)


def gates_of(kind: str, gates: str) -> Any:
    x, y = planted_routes.images(10)
    model, options = planted_gates.build(kind), {"suites": ["components"], "gates": [gates], "settings": {"steps": 10}}
    (result,) = benchmark(model, x=x, y=y, eps=planted_routes.EPS, progress=False, **options).results.values()
    assert result.errors == 0, result.error_messages
    return result


def test_a_gate_inside_a_network_by_hand():
    # a pattern that the ball holds turns every image around; the first expert is right in the whole ball
    result = gates_of("a linear gate", "score")
    assert rates(result) == {
        "RA-R": 0.0, "RA-R score": 0.0,
        "score=0 SA": 1.0, "score=0 RA": 1.0, "score=1 SA": 0.0, "score=1 RA": 0.0,
    }  # fmt: skip
    (use,) = result.gates.values()
    assert (use.load, use.entropy, use.flipped) == ((1.0, 0.0), 0.0, 1.0)


def test_every_gate_of_a_network_has_its_own_rates():
    result = gates_of("two gates at once", "blocks.*.score")
    assert {name: use.flipped for name, use in result.gates.items()} == {"blocks.0.score": 1.0, "blocks.1.score": 1.0}
    assert rates(result)["RA-R"] == 1.0  # one gate alone changes no class
    assert [rates(result)[f"blocks.1.score={expert} SA"] for expert in range(2)] == [1.0, 1.0]

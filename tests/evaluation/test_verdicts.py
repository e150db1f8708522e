"""The re-check, by hand: ball, box, finite, prediction."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.evaluation.verdicts import inside, judge
from bench.models.deployed import first_expert, predict
from bench.spec import Norm, ThreatModel

# One row an example, one column a pixel; the class is 1 where the first pixel is above ½.


class Threshold(nn.Module):
    """Logits (−m, m) with m = x₀ − ½; remembers what it was asked. NaN where the last pixel is 0.99."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.graph = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.graph |= torch.is_grad_enabled()
        m = x.flatten(1)[:, 0] - 0.5
        m = torch.where(x.flatten(1)[:, -1] == torch.tensor(0.99, dtype=x.dtype), torch.nan, m)
        return torch.stack([-m, m], dim=1)


def images(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.double).view(len(rows), 1, 1, -1)


def verdict(
    x: list[list[float]],
    x_adv: list[list[float]],
    norm: Norm = "Linf",
    eps: float = 0.3,
    bounded: bool = True,
    claimed: list[bool] | None = None,
    model: nn.Module | None = None,
) -> Any:
    """The judgement of attacks on images of class 0."""
    return judge(
        model or Threshold(),
        images(x),
        torch.zeros(len(x), dtype=torch.long),
        images(x_adv),
        ThreatModel(norm=norm, eps=eps),
        bounded,
        None if claimed is None else torch.tensor(claimed),
        False,
    )


# Just inside and just outside of the tolerance: 1e-6 absolute in L∞, 1e-5 relative in L2 and L1.
EDGES: list[tuple[Norm, float, list[float], bool]] = [
    ("Linf", 0.3, [0.3 + 0.9e-6, 0], True),
    ("Linf", 0.3, [0.3 + 1.1e-6, 0], False),
    ("Linf", 0.3, [0.15, -0.3 - 1.1e-6], False),
    ("L2", 0.5, [0.3 * (1 + 0.9e-5), 0.4 * (1 + 0.9e-5)], True),
    ("L2", 0.5, [0.3 * (1 + 1.1e-5), 0.4 * (1 + 1.1e-5)], False),
    ("L1", 0.5, [0.3 * (1 + 0.9e-5), 0.2 * (1 + 0.9e-5)], True),
    ("L1", 0.5, [0.3 * (1 + 1.1e-5), 0.2 * (1 + 1.1e-5)], False),
]


@pytest.mark.parametrize(("norm", "eps", "step", "legal"), EDGES)
@pytest.mark.parametrize("bounded", [True, False])
def test_ball_has_its_tolerance_and_no_more(norm: Norm, eps: float, step: list[float], legal: bool, bounded: bool):
    found = verdict([[0.4, 0.4]], [[0.4 + step[0], 0.4 + step[1]]], norm, eps, bounded)
    broken = legal and 0.4 + step[0] > 0.5
    assert found.prediction.classes.tolist() == [1]
    assert found.broken.tolist() == [broken]
    assert found.error.tolist() == [bounded and not legal]


def test_distances_are_of_their_norm():
    found = verdict([[0.1, 0.5]], [[0.4, 0.1]], eps=1)
    assert found.linf.tolist() == pytest.approx([0.4])
    assert found.l2.tolist() == pytest.approx([0.5])
    far = torch.tensor([0.4]), torch.tensor([0.5]), torch.tensor([0.7])
    for norm, eps in (("Linf", 0.4), ("L2", 0.5), ("L1", 0.7)):
        assert inside(*far, ThreatModel(norm=norm, eps=eps)).tolist() == [True]
        assert inside(*far, ThreatModel(norm=norm, eps=eps - 0.01)).tolist() == [False]


@pytest.mark.parametrize(
    ("pixel", "legal"), [(1 + 0.9e-6, True), (1 + 1.1e-6, False), (-0.9e-6, True), (-1.1e-6, False)]
)
def test_box_has_its_tolerance_and_no_more(pixel: float, legal: bool):
    for bounded in (True, False):
        found = verdict([[0.4, 0.5]], [[0.6, pixel]], eps=0.9, bounded=bounded)
        assert found.broken.tolist() == [legal]
        assert found.error.tolist() == [bounded and not legal]


def test_withstood_broken_and_error_are_told_apart():
    x = [[0.4, 0.5]] * 4
    found = verdict(x, [[0.45, 0.5], [0.6, 0.5], [0.9, 0.5], [0.4, 0.5]])
    assert found.broken.tolist() == [False, True, False, False]
    assert found.error.tolist() == [False, False, True, False]
    assert found.prediction.classes.tolist() == [0, 1, 1, 0]
    assert not found.unconfirmed.any()


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_answers_that_are_not_finite_are_errors_and_never_reach_the_model(bad: float, bounded: bool):
    model = Threshold()
    found = verdict([[0.4, 0.5]] * 3, [[0.6, 0.5], [bad, 0.5], [0.6, bad]], bounded=bounded, model=model)
    assert found.error.tolist() == [False, True, True]
    assert found.broken.tolist() == [True, False, False]
    (seen,) = model.seen
    assert seen.shape == (3, 1, 1, 2)
    assert seen.isfinite().all()


@pytest.mark.parametrize("bounded", [True, False])
def test_logits_that_are_not_finite_are_errors(bounded: bool):
    found = verdict([[0.4, 0.9]] * 2, [[0.6, 0.99], [0.6, 0.9]], bounded=bounded)
    assert found.prediction.finite.tolist() == [False, True]
    assert found.error.tolist() == [True, False]
    assert found.broken.tolist() == [False, True]


def test_success_that_is_none_is_unconfirmed_and_not_broken():
    # withstood, broken, outside the ball, not finite, broken without a word
    answers = [[0.45, 0.5], [0.6, 0.5], [0.9, 0.5], [float("nan"), 0.5], [0.6, 0.5]]
    claimed = [True, True, True, True, False]
    found = verdict([[0.4, 0.5]] * 5, answers, bounded=False, claimed=claimed)
    assert found.unconfirmed.tolist() == [True, False, True, False, False]
    assert found.broken.tolist() == [False, True, False, False, True]
    strict = verdict([[0.4, 0.5]] * 5, answers, claimed=claimed)
    assert strict.unconfirmed.tolist() == [True, False, False, False, False]
    assert strict.error.tolist() == [False, False, True, True, False]


def test_answer_of_another_shape_is_refused():
    for answer in ([[0.4, 0.5, 0.5]], [[0.4, 0.5], [0.4, 0.5]], [[0.4]]):
        with pytest.raises(ValueError, match=r"images of shape .* for \(1, 1, 1, 2\)"):
            verdict([[0.4, 0.5]], answer)


def test_deployed_model_predicts_in_float32_without_a_graph():
    model = Threshold()
    x_adv = images([[0.6, 0.5]]).requires_grad_()
    y = torch.zeros(1, dtype=torch.long)
    judge(model, images([[0.4, 0.5]]), y, x_adv, ThreatModel(norm="Linf", eps=0.3), True, None, False)
    (seen,) = model.seen
    assert seen.dtype == torch.float32
    assert not model.graph


def test_expert_is_the_first_selected_one_or_none(planted: Any):
    model, x = planted.robust(), planted.data().x
    hidden = predict(model, x, routing_visible=False)
    shown = predict(model, x, routing_visible=True)
    assert hidden.expert.tolist() == [-1] * 24
    assert shown.expert.tolist() == model.router(x).argmax(1).tolist()
    assert len(set(shown.expert.tolist())) > 1
    assert shown.classes.tolist() == hidden.classes.tolist() == model(x).argmax(1).tolist()


def test_a_duals_expert_is_its_rs_also_without_a_trace(planted: Any, linear_net: Any):
    class Foreign(nn.Module):
        def __init__(self, robust: nn.Module) -> None:
            super().__init__()
            self.standard, self.robust, self.alpha = planted.broken(), robust, 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.robust(x)

    class Untraced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = planted.robust().router, planted.robust().experts

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    x = planted.data().x
    expected = planted.robust().router(x).argmax(1)
    for robust in (planted.robust(), Untraced()):
        assert torch.equal(first_expert(Foreign(robust), x), expected)
    assert first_expert(Foreign(linear_net([[1.0] * 192] * 10)), x).tolist() == [-1] * 24

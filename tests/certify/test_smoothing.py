"""Smoothing against classifiers whose smoothed probabilities, and so whose radii, are known exactly."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm
from torch import Tensor, nn

from bench.certify.base import Claim, Examples
from bench.certify.smoothing import (
    Smoothing,
    dual_radius,
    lower_bound,
    predict,
    radius,
    tight_dual_radius,
)
from bench.errors import UnusableInput
from bench.models.dual import DualModel
from bench.spec import ThreatModel


def certify(model: nn.Module, x: Tensor, seed: int = 0, y: Tensor | None = None, **fields: Any) -> dict[str, Claim]:
    smoothing = Smoothing(**{"n": 2000, **fields})
    with torch.no_grad():
        predicted = model(x).argmax(1)
        examples = Examples(
            model, x, predicted if y is None else y, torch.arange(len(x)), predicted, 2, smoothing.own_threat, seed
        )
        return {claim.method: claim for claim in smoothing.certify(examples)}


def line(linear_net: Any, distance: float) -> tuple[nn.Module, Tensor]:
    """A linear classifier in 16 pixels, and an image at that L2 distance from its boundary, on class 0's side."""
    direction = torch.linspace(-1, 1, 16)
    direction /= direction.norm()
    net = linear_net([direction.tolist(), (-direction).tolist()])
    return net, (distance * direction).view(1, 1, 1, 16)


def test_the_bound_is_clopper_and_pearsons():
    # the (failure probability)-quantile of Beta(k, n − k + 1); all of n: the n-th root
    assert lower_bound(990, 1000, 0.001) == pytest.approx(beta.ppf(0.001, 990, 11), rel=1e-9)
    assert lower_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000), rel=1e-9)
    assert lower_bound(0, 1000, 0.001) == 0
    # with 100,000 draws that all agree, the largest radius that there is at σ = 1 (Cohen et al., section 3.2): 3.8
    assert radius(lower_bound(100_000, 100_000, 0.001), 1.0) == pytest.approx(3.81, abs=0.005)
    assert radius(0.5, 1.0) == radius(0.3, 1.0) == 0


def test_a_linear_classifiers_radius_is_its_distance_to_the_boundary(linear_net: Any):
    # P(class 0) = Φ(d/σ), so σ Φ⁻¹(p) = d whatever σ is: the certificate comes near from below
    for distance, sigma in ((0.1, 0.25), (0.3, 0.25), (0.3, 0.5)):
        net, x = line(linear_net, distance)
        claim = certify(net, x, sigma=sigma, n=100_000)["smoothing"]
        assert claim.predicted.tolist() == [0]
        assert 0.95 * distance < claim.radius[0] < distance


@pytest.mark.slow
def test_a_radius_above_the_true_one_is_as_rare_as_was_asked_for(linear_net: Any):
    net, x = line(linear_net, 0.1)
    found = certify(net, x.expand(400, -1, -1, -1), sigma=0.25, n=500, failure_probability=0.05)["smoothing"]
    wrong = int((found.radius > 0.1).sum())
    # 5 % or, by discreteness, a little less: the count is binomial, and this fails once in a million
    assert binom.sf(wrong, 400, 0.05) > 1e-6
    assert wrong > 0
    assert len(set(found.radius)) > 10  # each example has noise of its own


def test_it_abstains_at_the_boundary_and_certifies_at_the_asked_radius_alone(linear_net: Any):
    net, x = line(linear_net, 0.0)
    found = certify(net, x)
    assert found["smoothing"].status.tolist() == ["abstain"]
    assert (found["smoothing"].predicted.tolist(), found["smoothing"].correct.tolist()) == ([-1], [False])
    assert found["smoothing-predict"].status.tolist() == ["abstain"]
    # the radius asked for is σ = 0.25 here
    for distance, status in ((0.2, "not_certified"), (0.4, "certified")):
        net, x = line(linear_net, distance)
        claim = certify(net, x)["smoothing"]
        assert claim.status.tolist() == [status]
        assert claim.predicted.tolist() == [0]
    wrong = certify(net, x, y=torch.tensor([1]))["smoothing"]
    assert (wrong.status.tolist(), wrong.correct.tolist()) == (["certified"], [False])


def test_predict_needs_the_first_class_to_be_the_more_frequent():
    assert predict(np.array([3, 990, 7]), 0.001) == 1
    # 60 of 100: p = 0.057 two-sided
    assert predict(np.array([40, 60, 0]), 0.05) == -1
    assert predict(np.array([40, 60, 0]), 0.06) == 1
    assert predict(np.array([0, 0, 0]), 0.05) == -1


def test_noise_is_the_examples_own_and_the_seeds(linear_net: Any):
    net, x = line(linear_net, 0.1)
    together = certify(net, x.repeat(3, 1, 1, 1))["smoothing"].radius
    assert together[0] == certify(net, x)["smoothing"].radius[0]
    assert len(set(together)) > 1
    assert certify(net, x, seed=1)["smoothing"].radius[0] != together[0]


def test_what_is_not_finite_is_no_vote(linear_net: Any):
    net, x = line(linear_net, 0.3)

    class Sometimes(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.where(z.sum((1, 2, 3), keepdim=False)[:, None] > 0, torch.nan, net(z))

    # half of the votes are lost, so no class has more than half of all
    assert certify(Sometimes(), x)["smoothing"].status.tolist() == ["abstain"]


@given(p=st.floats(0.5, 1 - 1e-9), alpha=st.floats(0.51, 1))
def test_the_tight_form_is_never_below_the_other_and_alone_a_dual_is_its_robust_branch(p: float, alpha: float):
    assert tight_dual_radius(p, 0.25, alpha) >= dual_radius(p, 0.25, alpha) - 1e-9
    assert tight_dual_radius(p, 0.25, 1.0) == pytest.approx(radius(p, 0.25))
    assert dual_radius(p, 0.25, 1.0) == pytest.approx(radius(p, 0.25))
    for form in (dual_radius, tight_dual_radius):
        assert form(p, 0.25, 0.5) == form(p, 0.25, 0.3) == form(p, 0.25, 0.0) == 0


@pytest.mark.parametrize("alpha", [0.6, 0.7, 0.9])
def test_the_dual_forms_hold_on_a_line_against_the_worst_s(alpha: float):
    # R is linear: at distance d from its boundary its vote is Φ(d/σ) for class 0. The worst S answers otherwise with
    # certainty, so the mixture changes where α (2Φ(d/σ) − 1) = 1 − α, at d = σ Φ⁻¹(1/(2α)).
    sigma, change = 0.25, 0.25 * norm.ppf(0.5 / alpha)
    for distance in (0.2, 0.4, 0.7):
        p = norm.cdf(distance / sigma)
        assert tight_dual_radius(p, sigma, alpha) == pytest.approx(max(0, distance - change), abs=1e-9)
        assert dual_radius(p, sigma, alpha) <= max(0, distance - change) + 1e-9
    by_hand = 0.25 / 2 * (norm.ppf(0.99 * 0.7) - norm.ppf(1 - 0.99 * 0.7))  # 1 + μ = 1/α
    assert dual_radius(0.99, 0.25, 0.7) == pytest.approx(by_hand)


def test_a_duals_votes_are_those_of_its_robust_branch(linear_net: Any):
    robust, x = line(linear_net, 0.4)
    standard = linear_net([[0.0] * 16, [99.0] * 16])
    model = DualModel(standard, robust, 0.7)
    found = certify(model, x, n=20_000)
    assert set(found) == {"smoothing", "smoothing-predict", "smoothing-dual", "smoothing-dual-tight"}
    exact = 0.4 - 0.25 * norm.ppf(0.5 / 0.7)
    assert 0.93 * exact < found["smoothing-dual-tight"].radius[0] < exact
    assert 0 < found["smoothing-dual"].radius[0] < found["smoothing-dual-tight"].radius[0]
    alone = certify(robust, x, n=20_000)
    assert set(alone) == {"smoothing", "smoothing-predict"}
    logits = DualModel(standard, robust, 0.7, "logits")
    assert set(certify(logits, x)) == {"smoothing", "smoothing-predict"}
    model.register_forward_hook(lambda *_: None)  # it may compute something else
    assert set(certify(model, x)) == {"smoothing", "smoothing-predict"}


def test_only_l2_is_certified():
    with pytest.raises(UnusableInput, match="--norm L2"):
        Smoothing().check("certify-smoothing", "digits", ThreatModel(norm="Linf", eps=0.1))
    assert str(Smoothing(sigma=0.5).own_threat) == "L2 0.5"


class Crowd(nn.Module):
    """Class 0 for everybody in a batch whose mean has it, else for nobody: under noise the mean is the image itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(0, keepdim=True).expand(len(x), -1).clone()


def test_a_model_that_answers_by_its_batch_or_by_chance_is_refused(linear_net: Any):
    net, x = line(linear_net, 0.1)

    class Noisy(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return net(z) + 0.01 * torch.randn(len(z), 2)

    for model, reason in ((Crowd(net), "outputs depend on the batch"), (Noisy(), "outputs depend on chance")):
        (claim,) = certify(model, x).values()
        assert (claim.method, claim.status.tolist(), claim.reason) == ("smoothing", ["not_supported"], reason)

    class FromHundred(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return net(z) if len(z) < 100 else net(z).mean(0, keepdim=True).expand(len(z), -1).clone()

    (claim,) = certify(FromHundred(), x).values()  # no block is as large, but the noise is
    assert claim.reason == "outputs depend on the batch"


def test_a_branch_that_works_in_place_changes_no_other_branchs_noise(linear_net: Any):
    robust, x = line(linear_net, 0.4)

    class InPlace(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.sub_(9.0).flatten(1)[:, :2]

    class Copying(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z - 9.0).flatten(1)[:, :2]

    found, expected = (certify(DualModel(standard(), robust, 0.7), x) for standard in (InPlace, Copying))
    assert set(found) == set(expected) == {"smoothing", "smoothing-predict", "smoothing-dual", "smoothing-dual-tight"}
    for method, claim in found.items():
        assert claim.radius.tolist() == expected[method].radius.tolist()

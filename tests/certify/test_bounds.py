"""Class certificates: worked out by hand, against a linear program, and against every attack that can be thought of."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from bench.certify.base import Claim, Examples
from bench.certify.bounds import ClassBounds, Margins, least_mixture, soft_radius
from bench.certify.layers import layers
from bench.certify.routes import Routes
from bench.models.dual import DualModel
from bench.models.experts import EXPERTS
from bench.models.moe import MoE
from bench.results.certificates import DETERMINISTIC, ROUTES
from bench.spec import ThreatModel


def examples(model: nn.Module, x: Tensor, threat: ThreatModel, y: Tensor | None = None) -> Examples:
    with torch.no_grad():
        predicted = model.eval()(x).argmax(1)
    return Examples(model, x, predicted if y is None else y, torch.arange(len(x)), predicted, 2, threat, 0)


def claims(model: nn.Module, x: Tensor, eps: float, norm: Any = "Linf") -> dict[str, Claim]:
    with torch.no_grad():
        found = ClassBounds().certify(examples(model, x, ThreatModel(norm=norm, eps=eps)))
    return {claim.method: claim for claim in found}


def pixels(*values: float) -> Tensor:
    return torch.tensor([values]).view(1, 1, 1, -1)


def certified(model: nn.Module, x: Tensor, eps: float, norm: Any = "Linf") -> dict[str, bool]:
    return {method: claim.status[0] == "certified" for method, claim in claims(model, x, eps, norm).items()}


# --- one network, and hard top-1 --------------------------------------------------------------------------------------


def test_a_linear_classifier_is_certified_up_to_its_boundary(linear_net: Any):
    # z_0 − z_1 = 3a − b = 1.4 at (0.6, 0.4): the boundary is 1.4/4 away in Linf, 1.4/√10 in L2, 1.4/3 in L1
    net, x = linear_net([[1.0, 0.0], [-2.0, 1.0]]), pixels(0.6, 0.4)
    for norm, radius in (("Linf", 1.4 / 4), ("L2", 1.4 / 10**0.5), ("L1", 1.4 / 3)):
        assert certified(net, x, radius - 1e-3, norm) == {"network": True}
        assert certified(net, x, radius + 1e-3, norm) == {"network": False}
    claim = claims(net, x, 0.1)["network"]
    assert (claim.radius.tolist(), claim.predicted.tolist(), claim.correct.tolist()) == ([0.1], [0], [True])


def test_every_reachable_expert_has_to_agree_and_no_other(linear_moe: Any):
    # routed to expert 0 while a > b; at (0.6, 0.4) the boundary is 0.1 away. Expert 0 and 1 both say class 0 while
    # a + b > 0, always; expert 2 answers class 1, and is 1 behind in scores.
    agree, differ = [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]
    moe = linear_moe([agree, agree, differ], [[1, 0], [0, 1], [-1, -1]], 1, "softmax")
    x = pixels(0.6, 0.4)
    assert certified(moe, x, 0.05) == {"union": True, "route-stable": True, "paper-formula": False}
    assert certified(moe, x, 0.15) == {"union": True, "route-stable": False, "paper-formula": False}
    assert claims(moe, x, 0.15)["union"].reachable.tolist() == [2]
    moe.experts[1] = moe.experts[2]
    assert certified(moe, x, 0.15) == {"union": False, "route-stable": False, "paper-formula": False}


def test_the_class_that_counts_is_the_one_that_f_predicts(linear_moe: Any):
    # expert 1 is just as sure, of another class than expert 0: its own margin is of no use
    moe = linear_moe([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]], [[1, 0], [0, 1]], 1, "argmax")
    assert not certified(moe, pixels(0.6, 0.4), 0.15)["union"]
    wrong = examples(moe, pixels(0.6, 0.4), ThreatModel(norm="Linf", eps=0.05), y=torch.tensor([1]))
    with torch.no_grad():
        union = ClassBounds().certify(wrong)[0]
    assert (union.status.tolist(), union.predicted.tolist(), union.correct.tolist()) == (["certified"], [0], [False])


def test_a_mixture_of_one_is_that_one(linear_moe: Any):
    for k_of_one in ("softmax", "argmax"):
        moe = linear_moe([[[1.0, 0.0], [-2.0, 1.0]]], [[1.0, 1.0]], 1, k_of_one)
        for eps, expected in ((1.4 / 4 - 1e-3, True), (1.4 / 4 + 1e-3, False)):
            assert certified(moe, pixels(0.6, 0.4), eps) == {
                "union": expected, "route-stable": expected, "paper-formula": False,
            }  # fmt: skip


def cancelling(size: float) -> nn.Module:
    """z = (b, 0.2) of pixels (a, b), by way of b + size · a and size · a."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.data, net[1].bias.data = torch.tensor([[size, 1.0], [size, 0.0]]), torch.zeros(2)
    net[2].weight.data, net[2].bias.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.2])
    return net


def test_what_cancels_within_a_network_is_not_certified_beyond_its_rounding(linear_net: Any):
    apart, threat = linear_net([[1.0, 0.0], [0.0, 0.0]]), ThreatModel(norm="Linf", eps=0.1)
    noise = torch.rand(1000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    for size, status in ((1.0, "certified"), (1.5e7, "not_certified")):
        net, soft = cancelling(size), MoE([cancelling(size)] * 2, apart, 2, "softmax", "probs")
        # an image on which single precision is right; in its ball b is above 0.3, but there 1.5e7 · a may swallow it
        x = next(image for image in pixels(0.7, 0.5) + 0.1 * noise if net(image[None])[0, 0] > 0.45)[None]
        near = x + 0.2 * noise - 0.1
        assert (net.double()(near.double()).argmax(1) == 0).all()
        assert (net.float()(near).argmax(1) == 0).all() == (size == 1)
        with torch.no_grad():
            moe, single = examples(MoE([apart, apart], net), x, threat), examples(net, x, threat)
            found = [*Routes(exact=True).certify(moe), *ClassBounds().certify(moe)[:2]]
            found += [*ClassBounds().certify(single), ClassBounds().certify(examples(soft, x, threat))[0]]
        assert {claim.method for claim in found} == {*ROUTES, *DETERMINISTIC}
        for claim in found:
            expected = "certified" if claim.method == "union" else status  # both experts agree
            assert claim.status.tolist() == [expected] * len(x), claim.method


# --- probabilities, duals ---------------------------------------------------------------------------------------------


def dual(linear_moe: Any, alpha: float, gate: str = "argmax") -> DualModel:
    """R: one expert wherever one looks, z = (4a, 0); S answers the opposite with the largest logits."""
    robust = linear_moe([[[4.0, 0.0], [0.0, 0.0]]] * 2, [[1, 0], [0, 1]], 1, gate)
    standard = linear_moe([[[-99.0, 0.0], [0.0, 0.0]]] * 2, [[1, 0], [0, 1]], 1, "argmax")
    return DualModel(standard, robust, alpha)


def test_a_dual_holds_while_r_outweighs_s(linear_moe: Any):
    # R's margin is tanh(4a/2), S's is at least −1: (1 − α) < α tanh(2a), so for α = 0.7 tanh(2a) > 3/7, a > 0.2290
    model, x = dual(linear_moe, 0.7), pixels(0.6, 0.1)
    least = float(0.5 * np.arctanh(3 / 7))
    assert certified(model, x, 0.6 - least - 1e-3) == {"union": True, "route-stable": False, "paper-formula": False}
    assert not certified(model, x, 0.6 - least + 1e-3)["union"]
    # and it is exact here: S at its worst does change the class just beyond
    edge = pixels(least - 1e-3, 0.1)
    assert model(edge).argmax(1).item() == 1
    assert model(x).argmax(1).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_a_dual_that_r_cannot_outweigh_is_not_certified(alpha: float, linear_moe: Any):
    assert not certified(dual(linear_moe, alpha), pixels(0.9, 0.1), 1e-3)["union"]


def test_the_weight_of_a_softmax_gate_flattens_rs_probabilities(linear_moe: Any):
    # at (0.6, 0.1) ± 0.01 the gate's weight is at least 1 / (1 + exp(−0.48)) = 0.6177, so R's margin is at least
    # tanh(0.6177 · 4 · 0.59 / 2) = 0.6229, against tanh(4 · 0.59 / 2) = 0.8275 with gate=argmax
    x = pixels(0.6, 0.1)
    for gate, margin in (("softmax", 0.6229), ("argmax", 0.8275)):
        for sign, expected in ((-1e-3, True), (1e-3, False)):
            alpha = 1 / (1 + margin + sign)  # (1 − α) / α = the margin
            assert certified(dual(linear_moe, alpha, gate), x, 0.01)["union"] == expected


def test_a_dual_of_dense_branches_is_as_good_as_its_robust_one(linear_net: Any):
    model = DualModel(linear_net([[-9.0, 0.0], [0.0, 0.0]]), linear_net([[4.0, 0.0], [0.0, 0.0]]), 0.7)
    least = float(0.5 * np.arctanh(3 / 7))
    assert certified(model, pixels(0.6, 0.1), 0.6 - least - 1e-3) == {"network": True}
    assert certified(model, pixels(0.6, 0.1), 0.6 - least + 1e-3) == {"network": False}


def test_what_there_is_no_certificate_for_is_said(linear_moe: Any, linear_net: Any):
    three = linear_moe([[[1.0, 0.0], [0.0, 1.0]]] * 3, [[1, 0], [0, 1], [1, 1]], 2, "softmax")
    logits = dual(linear_moe, 0.7)
    logits.combine = "logits"

    class Foreign(MoE):
        pass

    class ForeignDual(DualModel):
        pass

    one = linear_net([[1.0, 0.0], [0.0, 1.0]])
    gelu = nn.Sequential(*one, nn.GELU())
    hooked, hooked_dual, rerouted = MoE([one, one], one), DualModel(one, one), MoE([one, one], one)
    for model in (hooked, hooked_dual):
        model.register_forward_hook(lambda *_: None)
    rerouted.route = lambda x: MoE.route(rerouted, 1 - x)  # type: ignore[method-assign]
    for model, status, reason in (
        (three, "not_applicable", "2 of 3 experts, combine=logits"),
        (logits, "not_applicable", "a dual that mixes logits"),
        (Foreign([one, one], one), "not_supported", "Foreign, whose way of mixing its experts"),
        (ForeignDual(one, one), "not_supported", "ForeignDual, whose way of mixing its branches"),
        (hooked, "not_supported", "MoE with hooks"),
        (hooked_dual, "not_supported", "DualModel with hooks"),
        (rerouted, "not_supported", "MoE with its own route"),
        (MoE([one, one, one], one), "not_supported", "a router that gives 2 scores for 3 experts"),
        (gelu, "not_supported", "GELU"),
        (MoE([gelu, one], one), "not_supported", "GELU"),
        (MoE([one, one], gelu), "not_supported", "GELU"),
    ):
        found = claims(model, torch.rand(3, 1, 1, 2), 0.01)
        assert list(found) == ["network"]
        assert found["network"].status.tolist() == [status] * 3
        assert found["network"].reason.startswith(reason)
        assert np.isnan(found["network"].radius).all()


def test_a_mixture_that_rounding_decides_is_not_certified(linear_moe: Any):
    # both margins are tanh(c · 0.3) where a is 0.6: for c = 1e-5 less than what a probability's rounding may be
    for scale, sure in ((1e-5, False), (1e-3, True)):
        moe = linear_moe([[[scale, 0.0], [0.0, 0.0]]] * 2, [[0.0, 0.0]] * 2, 2, "argmax", "probs")
        assert certified(moe, pixels(0.6, 0.4), 0.01)["soft"] == sure


# --- the soft gate, and the paper's formula ---------------------------------------------------------------------------


def test_the_papers_formula_gives_twice_the_true_radius():
    # f_y, f_j = ½ ± ½ t at t = 0.2: the class changes at t = 0, so at 0.2. f_y's constant is ½, the margin's is 1.
    gap = torch.tensor([[0.2, torch.inf]])
    assert float(soft_radius(gap, torch.tensor([0.5]))) == pytest.approx(0.4)
    assert float(soft_radius(gap, torch.tensor([1.0]))) == pytest.approx(0.2)
    # of a dual: (0.7 · 0.2 − 0.3) / … is negative: nothing
    assert float(soft_radius(gap, torch.tensor([1.0]), 0.7)) == 0.0
    assert float(soft_radius(gap + 0.6, torch.tensor([2.0]), 0.7)) == pytest.approx((0.7 * 0.8 - 0.3) / 1.4)


def test_of_a_model_whose_class_changes_at_a_fifth_the_paper_says_more_and_we_do_not(linear_moe: Any):
    # z = ((a − 0.3)/2, (0.3 − a)/2) at a = 0.5: the class changes at a distance of 0.2; b = 1 carries the constant, and
    # is cut with the box, so it costs what a does
    expert = [[0.5, 0.0], [-0.5, 0.0]]
    moe = linear_moe([expert] * 2, [[0.0, 0.0]] * 2, 2, "softmax", "probs")
    for part in moe.experts:
        part[1] = nn.Linear(2, 2)
        part[1].weight.data, part[1].bias.data = torch.tensor(expert), torch.tensor([-0.15, 0.15])
    x = pixels(0.5, 0.5)
    assert moe(pixels(0.31, 0.5)).argmax(1).item() == 0
    assert moe(pixels(0.29, 0.5)).argmax(1).item() == 1
    paper = claims(moe, x, 0.05)["paper-formula"]
    # G = tanh(0.1) over 1/4, p_y's constant, of the margin's 1/2
    assert paper.radius[0] == pytest.approx(np.tanh(0.1) / 0.25, rel=1e-3)
    assert paper.radius[0] > 0.39
    assert paper.status.tolist() == ["not_certified"]
    assert certified(moe, x, 0.199)["soft"]
    assert not certified(moe, x, 0.201)["soft"]


def test_the_papers_gate_is_softmax_whatever_the_models(linear_moe: Any):
    # expert 0 is tanh(0.3) sure with weight 1 / (1 + exp(0.4 − 0.6)), expert 1 not at all; s = 2, z_0's constant is 1
    weight = 1 / (1 + np.exp(-0.2))
    for gate in ("softmax", "argmax"):
        moe = linear_moe([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], [[1, 0], [0, 1]], 1, gate)
        paper = claims(moe, pixels(0.6, 0.4), 0.01)["paper-formula"]
        assert paper.radius[0] == pytest.approx(weight * np.tanh(0.3) / (1 + weight / 4), rel=1e-6)
        assert paper.reason.startswith("no certificate: equation 8 of the soft reading, a = softmax(r); s and L_i")


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_the_least_mixture_is_a_linear_programs(seed: int):
    g = np.random.default_rng(seed)
    a = g.dirichlet(np.ones(4))
    low, high, values = a * g.random(4), a + (1 - a) * g.random(4), g.normal(size=(4, 3))
    found = least_mixture(*(torch.tensor(v)[None] for v in (values, low, high)))[0]
    for j in range(3):
        solved = linprog(values[:, j], A_eq=np.ones((1, 4)), b_eq=[1], bounds=list(zip(low, high, strict=True)))
        assert float(found[j]) == pytest.approx(solved.fun, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10**6))
def test_probability_margins_follow_from_logit_margins(seed: int):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(1, 4, generator=g, dtype=torch.double) * 3
    low[0, 0] = torch.inf
    margins = Margins(None, low, low)  # type: ignore[arg-type]
    scale = torch.rand(1, 1, generator=g).double().clamp_min(0.01)
    # any logits with margins of at least `low` and any scale from there to 1
    z = -(low[:, 1:] + 3 * torch.rand(500, 3, generator=g).pow(4))
    p = (torch.cat([torch.zeros(500, 1), z], 1) * (scale + (1 - scale) * torch.rand(500, 1, generator=g))).softmax(1)
    assert (p[:, :1] - p[:, 1:] >= margins.probabilities(scale)[:, 1:] - 1e-12).all()


def test_a_convolutional_mixture_is_certified_and_withstands_pgd():
    torch.manual_seed(0)
    expert = EXPERTS["small_cnn"]((1, 8, 8), 3, width=2).eval()
    moe = MoE([expert, nn.Sequential(expert)], nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 1, "softmax").eval()
    x, eps = torch.rand(40, 1, 8, 8), 0.004
    found = claims(moe, x, eps)["union"]
    firm = torch.tensor(found.status == "certified")
    assert int(firm.sum()) > 5
    y = moe(x).argmax(1)
    z = x.clone()
    for _ in range(20):
        z = z.detach().requires_grad_()
        torch.nn.functional.cross_entropy(moe(z), y).backward()
        assert z.grad is not None
        z = (x + (z.detach() + eps / 4 * z.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    assert (moe(z).argmax(1) == y)[firm].all()
    assert len(layers(expert, x.shape[1:])) == 5  # affine maps in a row are one

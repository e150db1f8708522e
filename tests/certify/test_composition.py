"""What is certified is what the model computes: planted networks and mixtures that are not what they seem."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.certify.base import Claim, Examples
from bench.certify.bounds import ClassBounds
from bench.certify.composition import Network, check_composition, check_finite
from bench.certify.layers import NotSupported
from bench.certify.routes import Routes
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import ThreatModel


def claims(certifier: Any, model: nn.Module, x: Tensor, eps: float) -> dict[str, Claim]:
    with torch.no_grad():
        predicted = model.eval()(x.clone()).argmax(1)
        asked = Examples(model, x, predicted, torch.arange(len(x)), predicted, 2, ThreatModel(norm="Linf", eps=eps), 0)
        return {claim.method: claim for claim in certifier.certify(asked)}


def refused(certifier: Any, model: nn.Module, x: Tensor, reason: str) -> None:
    (claim,) = claims(certifier, model, x, 0.01).values()
    assert set(claim.status) == {"not_supported"}
    assert reason in claim.reason


def pixels(*values: float) -> Tensor:
    return torch.tensor([values]).view(1, 1, 1, -1)


def folded() -> nn.Module:
    """z = (1 − relu(1 − relu(a − ½)) …): one ReLU module, three times; without the second it is another network."""
    relu = nn.ReLU()
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), relu, nn.Linear(1, 1), relu, nn.Linear(1, 2))
    for layer, (weight, bias) in zip((net[1], net[3]), ((-4.0, 2.0), (-1.0, 1.0)), strict=True):
        layer.weight.data, layer.bias.data = torch.tensor([[weight]]), torch.tensor([bias])
    # h = relu(1 − relu(2 − 4a)) is 0 up to a = ¼ and 1 from ½ on
    net[5].weight.data, net[5].bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 0.5])
    return net


def test_a_relu_that_is_used_twice_is_there_twice():
    # class 0 where h > ½: 2 − 4a < ½, a > 0.375
    net = folded()
    for eps, expected in ((0.12, "certified"), (0.13, "not_certified")):
        assert claims(ClassBounds(), net, pixels(0.5), eps)["network"].status.tolist() == [expected]
    assert net(pixels(0.37)).argmax(1).item() == 1


def test_a_router_that_applies_one_layer_three_times_has_the_third_powers_boundary(linear_net: Any):
    # the layer doubles a − b and keeps a + b: scores (a + b ± 8 (a − b)) / 2 + (0, 0.8 at each step …)
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.5, -0.5], [-0.5, 1.5]]), torch.tensor([0.0, 0.4])
    # d = a − b becomes 2d − 0.4, three times: 8 d − 2.8, a boundary at d = 0.35; at (0.7, 0.2) it is 0.075 away
    moe = MoE([linear_net([[1.0, 0.0], [0.0, 1.0]])] * 2, nn.Sequential(nn.Flatten(), linear, linear, linear))
    x = pixels(0.7, 0.2)
    assert claims(Routes(), moe, x, 0.01)["routes"].radius[0] == pytest.approx(0.075, abs=1e-4)
    assert moe.route(pixels(0.624, 0.276)).selected_experts.item() == 1


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_class_that_computes_something_else_is_found_by_its_outputs(
    scale: float, linear_net: Any, monkeypatch: pytest.MonkeyPatch
):
    net = linear_net([[scale, 0.0], [0.0, scale]])
    Network.of(net, pixels(0.6, 0.4))
    forward = nn.Linear.forward
    # the same on the image itself, and wherever its first pixel is not below 0.3
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: torch.where(x[:, :1] < 0.3, -forward(self, x), forward(self, x))
    )
    refused(ClassBounds(), net, pixels(0.6, 0.4), "Sequential, whose outputs are not what its layers give")
    moe = MoE([net, net], net)
    refused(Routes(), moe, pixels(0.6, 0.4), "Sequential, whose outputs are not what its layers give")


def test_values_that_leave_the_finite_range_or_vanish_are_not_certified(linear_net: Any):
    def chain(*factors: float) -> nn.Module:
        """z = (a · all factors, 0.1), whatever the way there."""
        net = nn.Sequential(nn.Flatten(), *(nn.Linear(1, 1, bias=False) for _ in factors), nn.Linear(1, 2))
        for layer, factor in zip(net[1:], factors, strict=False):
            layer.weight.data.fill_(factor)
        net[-1].weight.data, net[-1].bias.data = torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 0.1])
        return net

    assert claims(ClassBounds(), chain(1e-10, 1e10), pixels(0.6), 0.01)["network"].status.tolist() == ["certified"]
    # 1.2e-45 is one of the smallest numbers there are: 0.6 and 0.9 of it are the same, or zero
    vanishing = chain(2e-23, 1e-22, 1e22, 5e22)
    found = claims(ClassBounds(), vanishing, pixels(0.9), 0.01)["network"]
    assert found.status.tolist() == ["not_certified"]
    overflowing = chain(3e38, 1e-38)
    refused(ClassBounds(), overflowing, pixels(0.9), "values can leave the finite range")
    refused(Routes(), MoE([chain(1.0)] * 2, overflowing), pixels(0.9), "values can leave the finite range")


def test_half_precision_that_cannot_take_the_images_is_refused_and_one_that_can_has_its_own_margins(linear_net: Any):
    weights = [[1.0, 0.0], [0.0, 1.0]]
    moe = MoE([linear_net(weights), linear_net(weights).half()], linear_net(weights))  # of which no image sees expert 1
    refused(ClassBounds(), moe, pixels(1.0, 0.0), "the model fails on other batches of images: RuntimeError")
    net, x = linear_net(weights), pixels(0.6, 0.57)
    assert claims(ClassBounds(), net, x, 0.01)["network"].status.tolist() == ["certified"]
    # γ of six roundings in bfloat16 is 2.4 %: of both logits together more than what they differ by
    assert claims(ClassBounds(), net.bfloat16(), x.bfloat16(), 0.01)["network"].status.tolist() == ["not_certified"]


@pytest.mark.parametrize("word", ["Softmax", "softmax ", "noisy_topk", None])
def test_only_the_exact_gates_are_certified(word: Any, linear_moe: Any):
    moe = linear_moe([[[1.0, 0.0], [0.0, 1.0]]] * 2, [[1, 0], [0, 1]], 1, "softmax")
    moe.gate = word
    for certifier in (ClassBounds(), Routes()):
        refused(certifier, moe, pixels(0.9, 0.1), f"MoE with gate '{word}', which is none of softmax and argmax")


def test_one_expert_whose_probabilities_logarithm_is_given_is_refused(linear_moe: Any):
    """No such mixture can be made, but one of two experts may be told later to take one."""
    moe = linear_moe([[[1.0, 0.0], [0.0, 1.0]]] * 2, [[1, 0], [0, 1]], 2, "softmax", "probs")
    moe.num_selected_experts = 1
    refused(ClassBounds(), moe, pixels(0.9, 0.1), "MoE of one expert with combine 'probs'")


def test_a_branch_that_works_in_place_is_certified_for_what_it_gives(linear_moe: Any, linear_net: Any):
    class Dimming(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(0.5).flatten(1)

    robust = linear_moe([[[40.0, 0.0], [0.0, 40.0]]] * 2, [[1, 0], [0, 1]], 1, "argmax")
    dual = DualModel(Dimming(), robust, 0.9)
    x = pixels(0.9, 0.5)
    kept = x.clone()
    assert claims(Routes(), dual, x, 0.05)["routes"].radius[0] == pytest.approx(0.2, abs=1e-3)
    # S's outputs are not known to be finite everywhere: then F's are not, whatever R's weight
    refused(ClassBounds(), dual, x, "Dimming")
    dual.standard = linear_net([[0.0, 40.0], [40.0, 0.0]])
    assert claims(ClassBounds(), dual, x, 0.05)["union"].status.tolist() == ["certified"]
    assert torch.equal(x, kept)


def test_a_mixture_is_held_to_its_parts(linear_moe: Any, monkeypatch: pytest.MonkeyPatch):
    moe = linear_moe([[[1.0, 0.0], [0.0, 1.0]]] * 2, [[1, 0], [0, 1]], 1, "softmax")
    dual, x = DualModel(moe, moe), torch.rand(4, 1, 1, 2)
    for k, gate, combine in (
        (1, "softmax", "logits"),
        (2, "softmax", "probs"),
        (2, "argmax", "probs"),
        (2, "softmax", "logits"),
    ):
        moe.num_selected_experts, moe.gate, moe.combine = k, gate, combine
        for mixing in ("probs", "logits"):
            dual.combine = mixing
            for dual.alpha in (0.0, 0.7, 1.0):
                check_composition(moe, x)
                check_composition(dual, x)
    check_finite(moe, x)
    original = MoE.mix
    monkeypatch.setattr(MoE, "mix", lambda *given: original(*given).flip(1))
    with pytest.raises(NotSupported, match="MoE, whose answers are not what its parts give"):
        check_composition(moe, x)
    dual.alpha = 0.7
    monkeypatch.setattr(DualModel, "forward", lambda self, x: self.robust(x.flip(3)))
    with pytest.raises(NotSupported, match="DualModel, whose answers are not what its parts give"):
        check_composition(dual, x)


@pytest.mark.parametrize("certifier", [ClassBounds(), Routes()])
def test_a_model_that_answers_by_chance_or_by_its_batch_is_refused(certifier: Any, linear_moe: Any):
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.01 * torch.randn(len(x), 2)

    moe = linear_moe([[[1.0, 0.0], [0.0, 1.0]]] * 2, [[1, 0], [0, 1]], 1, "softmax")
    moe.experts[1] = nn.Sequential(nn.Flatten(), Noisy(2, 2))
    refused(certifier, moe, pixels(0.9, 0.1), "outputs depend on chance")

    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z - z.mean(0)

    moe.experts[1] = nn.Sequential(nn.Flatten(), Centred(2, 2))
    refused(certifier, moe, pixels(0.9, 0.1), "outputs depend on the batch")

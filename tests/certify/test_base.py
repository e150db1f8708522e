"""What every method's claims have in common, and when none is made."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.certify.base import Certifier, Claim, Examples
from bench.errors import UnusableInput
from bench.registry import CERTIFIERS
from bench.spec import ThreatModel, build

LINF = ThreatModel(norm="Linf", eps=0.1)


class Certain(Certifier):
    """Certifies all that it is asked about."""

    first = "certain"

    def claims(self, block: Examples) -> Sequence[Claim]:
        return [Claim.of(block, "certain", torch.ones(len(block.y)).bool(), torch.full((len(block.y),), 0.2))]


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1))


def block_of(function: Callable[[Tensor], Tensor]) -> Examples:
    """Four images of three pixels, which are also the logits of an honest model; F is right on the first two."""
    x = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.8, 0.3], [0.3, 0.2, 0.7], [0.5, 0.6, 0.1]]).view(4, 1, 1, 3)
    predicted = torch.tensor([0, 1, 2, -1])
    return Examples(Net(function).eval(), x, torch.tensor([0, 1, 0, 1]), torch.arange(4), predicted, 3, LINF, 0)


def test_a_claim_has_the_blocks_own_values_where_nothing_else_is_said():
    block, certified = block_of(lambda x: x), torch.tensor([True, False, True, False])
    claim = Claim.of(block, "method", certified, torch.tensor([0.5, 0.0, 0.25, 0.0]))
    assert claim.status.tolist() == ["certified", "not_certified", "certified", "not_certified"]
    assert (claim.eps, claim.radius.tolist(), claim.radius.dtype) == (0.1, [0.5, 0.0, 0.25, 0.0], np.float64)
    assert claim.predicted.tolist() == [0, 1, 2, -1]
    assert claim.correct.tolist() == [True, True, False, False]
    assert claim.reachable.tolist() == [-1, -1, -1, -1]
    route = Claim.of(
        block, "routes", certified, torch.zeros(4), torch.tensor([1, 2, 1, 3]), 0.05, torch.arange(4), "so"
    )
    assert (route.eps, route.reachable.tolist(), route.reason) == (0.05, [1, 2, 1, 3], "so")
    assert route.predicted.tolist() == [0, 1, 2, 3]
    assert route.correct.tolist() == [True, True, False, False]  # of F's class, whatever the claim is about


def test_where_nothing_can_be_said_there_is_no_radius():
    claim = Claim.nothing(block_of(lambda x: x), "method", "not_supported", "why")
    assert set(claim.status) == {"not_supported"}
    assert np.isnan(claim.radius).all()
    assert (claim.predicted.tolist(), claim.reason) == ([0, 1, 2, -1], "why")


def test_a_model_that_is_a_function_of_single_images_is_certified():
    (claim,) = Certain().certify(block_of(lambda x: x))
    assert set(claim.status) == {"certified"}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x - x.mean(0), "batch"),
        (lambda x: x + torch.randn(x.shape), "chance"),
        (lambda x: x[:, : 3 - (len(x) == 1)], ""),
    ],
    ids=["by its batch", "by chance", "of another shape"],
)
def test_no_other_model_is_certified(function: Any, why: str):
    (claim,) = Certain().certify(block_of(function))
    assert (claim.method, set(claim.status)) == ("certain", {"not_supported"})
    assert why in claim.reason
    assert claim.reason


def test_a_model_that_fails_on_another_batch_is_not_certified():
    def fails(x: Tensor) -> Tensor:
        if len(x) != 4:
            raise RuntimeError("four at a time")
        return x

    (claim,) = Certain().certify(block_of(fails))
    assert (set(claim.status), claim.reason) == (
        {"not_supported"},
        "the model fails on other batches of images: RuntimeError",
    )


@pytest.mark.parametrize("name", list(CERTIFIERS))
def test_every_method_keeps_to_the_contract(name: str):
    method = CERTIFIERS[name]()
    assert method.version >= 1
    assert method.first
    assert method.params == {}
    for norm in {"Linf", "L2", "L1"} - set(method.norms):
        with pytest.raises(UnusableInput, match=f"^certify-x does not know {norm}: pass --norm {method.norms[0]}"):
            method.check("certify-x", "digits", ThreatModel(norm=norm, eps=0.5))


def test_a_parameter_that_is_not_finite_is_refused():
    with pytest.raises(UnusableInput, match="sigma: Input should be a finite number"):
        build(CERTIFIERS["smoothing"], "x", {"sigma": float("inf")})

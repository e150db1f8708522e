"""Architectures: values that rebuild a model, through JSON too."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bench.errors import UnusableInput
from bench.models.architecture import Architecture, Dense, Dual, Routed
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.routing import AffineRouter, ConvRouter

NETWORK: dict[str, Any] = {
    "expert": "small_cnn", "expert_params": {"width": 3}, "input_shape": (2, 8, 8), "num_classes": 5,
    "mean": (0.25, 0.5), "std": (0.5, 0.75),
}  # fmt: skip
ROUTED = Routed(**NETWORK, num_experts=3, num_selected_experts=2, gate="argmax", combine="probs", router="conv")
ALL = [Dense(**NETWORK), ROUTED, Dual(standard=Routed(**NETWORK), robust=ROUTED, alpha=0.6, combine="logits")]


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.kind)
def test_json_gives_the_same_architecture_back(architecture: Dense | Routed | Dual):
    adapter: TypeAdapter[Any] = TypeAdapter(Architecture)
    again = adapter.validate_json(architecture.model_dump_json())
    assert again == architecture
    assert type(again) is type(architecture)
    assert hash(again) == hash(architecture)


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.kind)
def test_states_images_classes_and_label(architecture: Dense | Routed | Dual):
    assert (architecture.input_shape, architecture.num_classes, architecture.label) == ((2, 8, 8), 5, "small_cnn-w3")
    assert architecture.build()(torch.rand(4, 2, 8, 8)).shape == (4, 5)


def test_a_routed_model_is_built_as_stated():
    moe = ROUTED.build()
    assert isinstance(moe, MoE)
    assert (len(moe.experts), moe.num_selected_experts, moe.gate, moe.combine) == (3, 2, "argmax", "probs")
    assert isinstance(moe.router, ConvRouter)
    assert isinstance(Routed(**NETWORK).build().router, AffineRouter)


def test_a_dual_has_its_branches_in_place():
    dual = ALL[2].build()
    assert isinstance(dual, DualModel)
    assert (dual.alpha, dual.combine) == (0.6, "logits")
    assert (len(dual.standard.experts), len(dual.robust.experts)) == (4, 3)


def test_experts_and_router_normalise_with_the_data_sets_numbers():
    buffers = {key: value.flatten() for key, value in ROUTED.build().state_dict().items() if "normalize" in key}
    assert len(buffers) == 2 * (3 + 1)
    expected = {"mean": torch.tensor([0.25, 0.5]), "std": torch.tensor([0.5, 0.75])}
    assert all(torch.equal(value, expected[key.rpartition(".")[2]]) for key, value in buffers.items())


def test_experts_start_from_different_weights():
    first, second, _ = ROUTED.build().experts
    assert not torch.equal(first.backbone[0].weight, second.backbone[0].weight)


@pytest.mark.parametrize("changed", [{"gate": "soft"}, {"combine": "prob"}, {"experts": 4}])
def test_a_value_or_a_field_that_does_not_exist_is_refused(changed: dict[str, Any]):
    with pytest.raises(ValidationError, match=next(iter(changed))):
        Routed(**{**NETWORK, **changed})


@pytest.mark.parametrize(
    "changed", [{"expert": "resnet11"}, {"router": "linear"}, {"num_selected_experts": 5}, {"combine": "probs"}]
)
def test_what_cannot_be_built_is_refused_when_it_is_built(changed: dict[str, Any]):
    with pytest.raises(UnusableInput):
        Routed(**{**NETWORK, **changed}).build()

"""Every variant, by being listed, can be specified, built and run."""

from collections.abc import Callable

import pytest
import torch

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.base import Classifier
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.variants import VARIANTS, get_variant
from bench.registry import OBJECTIVES
from bench.spec import TrainSpec
from bench.training.recipes import architecture

KINDS = {"dense": Classifier, "inside": Classifier, "moe": MoE, "dual": DualModel}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_builds_and_gives_finite_logits(name: str, tiny_spec: Callable[..., TrainSpec]):
    model = architecture(tiny_spec(name), open_dataset("digits")).build().eval()
    variant = VARIANTS[name]
    assert variant.name == name
    assert type(model) is KINDS[variant.kind]
    logits = model(torch.rand(3, 1, 8, 8))
    assert logits.shape == (3, 10)
    assert logits.isfinite().all()
    branches = {
        "dense": [],
        "inside": [],
        "moe": [model],
        "dual": [model.standard, model.robust] if variant.kind == "dual" else [],
    }
    for moe in branches[variant.kind]:
        assert (moe.gate, moe.combine) == (variant.gate, "logits")
    if variant.kind == "dual":
        assert model.combine == variant.combine


@pytest.mark.parametrize("name", list(VARIANTS))
def test_is_either_trained_or_put_together_from_variants_listed_before_it(name: str):
    variant, before = VARIANTS[name], list(VARIANTS)[: list(VARIANTS).index(name)]
    if variant.parts is None:
        assert variant.objective in OBJECTIVES
    else:
        assert variant.objective is None
        assert [VARIANTS[part].objective for part in variant.parts] == ["standard", "rt_er"]
        assert all(part in before and VARIANTS[part].gate == variant.gate for part in variant.parts)


def test_the_variants_of_the_first_release_are_there():
    assert {
        "dense-standard", "dense-at", "moe-standard", "moe-at", "moe-rt_er", "moe-rt_er-argmax", "dual", "dual-jtdmoe",
    } <= set(VARIANTS)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["moe-standard", "moe-at", "moe-trades", "moe-advmoe", "moe-rt_er", "dual-jtdmoe", "dual", "dual-logits"]
)
def test_every_variant_of_the_paper_exists_as_the_released_code_routes_it(name: str):
    assert VARIANTS[name].gate == "softmax"
    assert VARIANTS[f"{name}-argmax"].gate == "argmax"
    assert VARIANTS[f"{name}-argmax"].objective == VARIANTS[name].objective


def test_an_unknown_variant_is_refused_with_the_nearest():
    assert get_variant("dual").parts == ("moe-standard", "moe-rt_er")
    with pytest.raises(UnusableInput, match=r"^unknown variant 'moe-rter': did you mean 'moe-rt_er'\?$"):
        get_variant("moe-rter")


def test_a_network_with_blocks_inside_has_no_objective_that_needs_whole_networks():
    with pytest.raises(
        UnusableInput,
        match=r"^unknown variant 'vmoe-rt_er': rt_er needs experts that are whole networks: train moe-rt_er$",
    ):
        get_variant("vmoe-rt_er")
    with pytest.raises(UnusableInput, match="train dual-jtdmoe"):
        get_variant("blockmoe-jtdmoe")

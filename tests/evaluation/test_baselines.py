"""What a routed model is compared with: its best expert, its experts without a router, its robust branch."""

from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.errors import UnusableInput
from bench.evaluation.baselines import BASELINES, baseline
from bench.evaluation.plan import RunRequest, plan
from bench.job import Subject
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import ModelInfo

#: of two pixels (a, b), the experts say (a, b), (2a, 0) and (0, 3b); the router prefers the first
EXPERTS = [[[1.0, 0], [0, 1.0]], [[2.0, 0], [0, 0]], [[0, 0], [0, 3.0]]]
ROUTER = [[1.0, 1.0], [0, 0], [0, 0]]
IMAGE = torch.tensor([0.5, 0.25]).view(1, 1, 1, 2)


def subject(model: nn.Module, scores: tuple[dict[str, float], ...] = (), **info: Any) -> Subject:
    made = ModelInfo(name="m", architecture="net", checkpoint_sha256="0", routing_visible=True, **info)
    return Subject(model, made, ("a flag",), scores)


@pytest.fixture
def moe(linear_moe: Callable[..., MoE]) -> MoE:
    return linear_moe(EXPERTS, ROUTER)


def routed(moe: MoE, *scores: tuple[float, float]) -> Subject:
    held_out = tuple({"sa": sa, "ra": ra} for sa, ra in scores)
    return subject(moe, held_out, num_experts=3, num_selected_experts=1, gate="softmax", combine="logits")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.9, 0.1), (0.5, 0.3), (0.7, 0.2)], 1),  # robust accuracy decides,
        ([(0.5, 0.0), (0.6, 0.0), (0.7, 0.0)], 2),  # clean accuracy where no expert is robust
    ],
)
def test_the_best_expert_is_chosen_on_held_out_images(moe: MoE, scores: Any, best: int):
    made = baseline(routed(moe, *scores), "best-expert")
    assert made.model is moe.experts[best]
    assert (made.info.name, made.info.architecture, made.info.checkpoint_sha256) == ("m@best-expert", "net", "0")
    assert (made.info.num_experts, made.info.gate, made.info.routing_visible) == (None, None, False)
    assert made.flags == ("a flag",)


def test_the_best_expert_is_not_chosen_by_the_test_images(moe: MoE):
    with pytest.raises(UnusableInput, match=r"^'m' does not say how its experts did on held-out images, "):
        baseline(routed(moe), "best-expert")


def test_the_ensemble_mixes_all_experts_alike(moe: MoE):
    made = baseline(routed(moe), "ensemble")
    # ((0.5, 0.25) + (1, 0) + (0, 0.75)) / 3
    torch.testing.assert_close(made.model(IMAGE), torch.tensor([[0.5, 1 / 3]]))
    assert (made.info.architecture, made.info.number_forward_passes) == ("mean of 3 × net", 3)
    assert (made.info.num_experts, made.info.routing_visible) == (None, False)


def test_an_ensemble_of_probabilities_mixes_probabilities(linear_moe: Callable[..., MoE]):
    moe = linear_moe([[[4 * log(3), 0], [0, 0]], [[0, 0], [0, 0]]], [[1.0, 0], [0, 0]], 2, "softmax", "probs")
    made = baseline(routed(moe), "ensemble")
    # (9, 1)/10 and (1, 1)/2: their mean is (0.7, 0.3)
    torch.testing.assert_close(made.model(IMAGE).exp(), torch.tensor([[0.7, 0.3]]))


def test_a_foreign_moe_has_an_ensemble_too(moe: MoE):
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = moe.router, moe.experts

    made = baseline(subject(Foreign(), num_experts=3), "ensemble")
    torch.testing.assert_close(made.model(IMAGE), torch.tensor([[0.5, 1 / 3]]))


def test_the_robust_branch_is_a_routed_model_of_its_own(moe: MoE, linear_net: Any):
    dual = DualModel(linear_net([[0, 0], [0, 0]]), moe)
    made = baseline(subject(dual, num_experts=3, alpha=0.7, combine="probs"), "robust")
    assert made.model is moe
    assert (made.info.name, made.info.alpha, made.info.combine) == ("m@robust", None, "logits")
    assert (made.info.num_experts, made.info.routing_visible) == (3, True)


@pytest.mark.parametrize(
    ("info", "name", "expected"),
    [
        ({}, "ensemble", "'m' has no experts of its own: @ensemble is for an MoE, @robust for a dual"),
        ({"num_experts": 3, "alpha": 0.7}, "best-expert", "'m' has no experts of its own: @best-expert is for an MoE"),
        ({"num_experts": 3}, "robust", "'m' has no robust branch: @robust is for a dual"),
        ({"num_experts": 3}, "ensembel", r"'m@ensembel': no such baseline: did you mean 'ensemble'\?"),
    ],
)
def test_what_a_model_has_not_is_refused(moe: MoE, info: dict[str, Any], name: str, expected: str):
    with pytest.raises(UnusableInput, match=f"^{expected}"):
        baseline(subject(moe, **info), name)


def test_baselines_are_named_behind_a_model(tmp_path: Path, shelve: Any):
    shelve(tmp_path, "moe-at", "dual-jtdmoe")
    words = ("moe-at@ensemble", "dual-jtdmoe@robust", f"{tmp_path}/digits/Linf/moe-at.safetensors@ensemble")
    request = RunRequest(suites=("clean",), dataset="digits", n_examples=3, models=words)
    made = plan(request, tmp_path, [tmp_path])
    specs = [job.spec for word in made.models for job in made.jobs(word)]
    assert [spec.model for spec in specs] == ["moe-at@ensemble", "dual-jtdmoe@robust", "moe-at@ensemble"]
    assert {spec.alpha for spec in specs} == {None}
    assert set(BASELINES) == {"best-expert", "ensemble", "robust"}

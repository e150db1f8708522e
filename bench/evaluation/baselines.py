"""What belongs beside a routed model's row: its best expert alone, its experts without a router, its robust branch.

`moe-at@best-expert`, `moe-at@ensemble` and `dual@robust` name them. None of them has to be trained.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.errors import UnusableInput, did_you_mean
from bench.job import Subject
from bench.models.moe import MoE
from bench.spec import ModelInfo

_NOT_ROUTED = {"num_experts": None, "num_selected_experts": None, "gate": None, "combine": None, "alpha": None}


def baseline(whole: Subject, name: str) -> Subject:
    """The baseline called `name` of a model that shows its routing.

    Raises:
        UnusableInput: there is no such baseline, or this model has not what it is made of.
    """
    if name not in BASELINES:
        raise UnusableInput(f"'{whole.info.name}@{name}': no such baseline: {did_you_mean(name, BASELINES)}")
    made = BASELINES[name](whole)
    return replace(
        made, model=made.model.eval(), info=made.info.model_copy(update={"name": f"{whole.info.name}@{name}"})
    )


def _experts(whole: Subject, name: str) -> Any:
    """The model, which must be an MoE."""
    if whole.info.num_experts is None or whole.info.alpha is not None:
        raise UnusableInput(f"'{whole.info.name}' has no experts of its own: @{name} is for an MoE, @robust for a dual")
    return whole.model


def best_expert(whole: Subject) -> Subject:
    """The expert of the highest robust (then clean) accuracy on the held-out training images, alone."""
    moe = _experts(whole, "best-expert")
    if not whole.expert_scores:
        raise UnusableInput(
            f"'{whole.info.name}' does not say how its experts did on held-out images, and choosing the best by the"
            " test images would flatter it: train it with this version, or take @ensemble"
        )
    scores = [(score["ra"], score["sa"]) for score in whole.expert_scores]
    return replace(whole, model=moe.experts[scores.index(max(scores))], info=_changed(whole.info))


def ensemble(whole: Subject) -> Subject:
    """All experts with equal weights, mixed as the model itself mixes them (foreign ones: their logits)."""
    moe = _experts(whole, "ensemble")
    count = len(moe.experts)
    model = MoE(moe.experts, moe.router, count, "argmax", getattr(moe, "combine", "logits"))
    label = f"mean of {count} × {whole.info.architecture}"
    return replace(whole, model=model, info=_changed(whole.info, architecture=label, number_forward_passes=count))


def robust(whole: Subject) -> Subject:
    """A dual's robust branch alone."""
    if whole.info.alpha is None:
        raise UnusableInput(f"'{whole.info.name}' has no robust branch: @robust is for a dual")
    model: Any = whole.model
    branch = model.robust
    passes = whole.info.num_selected_experts or 1
    update = {"alpha": None, "combine": getattr(branch, "combine", None), "number_forward_passes": passes}
    return replace(whole, model=branch, info=whole.info.model_copy(update=update))


def _changed(info: ModelInfo, **more: Any) -> ModelInfo:
    return info.model_copy(update={**_NOT_ROUTED, "routing_visible": False, "number_forward_passes": 1, **more})


BASELINES: dict[str, Callable[[Subject], Subject]] = {
    "best-expert": best_expert,
    "ensemble": ensemble,
    "robust": robust,
}

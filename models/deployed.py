"""A deployed model as the harness asks it: in eval mode, frozen, in full float32; and what it then predicts.

Axes: m = images, B = images of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.parts import is_dual, is_moe
from bench.spec import ModelInfo


@contextmanager
def eval_frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every module's mode and every parameter's flag as before, after.

    An attack must see the deployed model (running BatchNorm statistics), and must not leave training in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TensorFloat32, and the same convolution every time: a GPU must not round where a CPU does not."""
    cudnn = torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, True, False
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[1:]


@dataclass(frozen=True)
class Prediction:
    """Of the deployed model: classes (m,), whether the logits were finite (m,), first selected expert (m,) or −1."""

    classes: Tensor
    finite: Tensor
    expert: Tensor


def first_expert(model: Any, x: Tensor) -> Tensor:
    """The first selected expert (m,) of a model whose routing is visible, of a dual its R's; −1 where there is none.

    A dual's R without a `trace` is taken to follow its router's best score.
    """
    routed = model.robust if is_dual(model) else model
    if hasattr(routed, "trace"):
        return routed.trace(x)[1].selected_experts[:, 0]
    return routed.router(x).argmax(1) if is_moe(routed) else torch.full((len(x),), -1, device=x.device)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, routing_visible: bool) -> Prediction:
    """What the deployed model says of x (m, C, H, W), in float32; results on the CPU."""
    logits = model(x).float()  # of a model that computes in double, what it says in single precision
    expert = first_expert(model, x) if routing_visible else torch.full((len(x),), -1)
    return Prediction(logits.argmax(1).cpu(), logits.isfinite().all(1).cpu(), expert.cpu())


def validate_outputs(model: Any, x: Tensor, num_classes: int, info: ModelInfo) -> None:
    """UnusableInput for a model that fails on images x (B, C, H, W), or gives no logits (B, num_classes) for them."""
    name, shape = info.name, "×".join(map(str, x.shape[1:]))
    try:
        logits = model(x)
        if info.routing_visible:
            first_expert(model, x)
    except Exception as error:  # a user's model may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnusableInput(f"'{name}' cannot take {shape} images: {reason}") from None
    if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UnusableInput(
            f"'{name}' gives {got} for {len(x)} images, where logits of {num_classes} classes are needed"
        )

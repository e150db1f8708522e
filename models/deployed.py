"""A deployed model as the harness asks it: in eval mode, frozen, in full float32; and what it then predicts.

Axes: m = images, B = images of a block, C = classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bench.errors import UnusableInput, in_one_line
from bench.models.foreign import Guarded, switch_mode
from bench.models.parts import is_dual, is_moe, is_traced, takes_images
from bench.spec import ModelInfo


@contextmanager
def eval_frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; every module's mode and every parameter's flag as before, after.

    An attack must see the deployed model (running BatchNorm statistics), and must not leave training in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        switch_mode(model, training=False)
        for parameter, _ in flags:  # a scripted module has no `requires_grad_` of its own
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TensorFloat32, and the same convolution every time: a GPU must not round where a CPU does not.

    Nor torch's faster attention, which it takes where no gradient is: in half precision it rounds otherwise, and what
    is attacked would not be what is judged.
    """
    cudnn, attention = torch.backends.cudnn, torch.backends.mha
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    fast = attention.get_fastpath_enabled()
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, True, False
        attention.set_fastpath_enabled(False)
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before[1:]
        attention.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Prediction:
    """Of the deployed model: classes (m,), whether the logits were finite (m,), first selected expert (m,) or −1.

    logits (m, C), where one pass gave them; None of a model that answers by chance, or that failed.
    """

    classes: Tensor
    finite: Tensor
    expert: Tensor
    logits: Tensor | None = None


def first_expert(model: object, x: Tensor) -> Tensor:
    """The first selected expert (m,) of a model whose routing is visible, of a dual its R's; −1 where there is none.

    A dual's R without a `trace`, and a user's own model whose `trace` is something else, are taken to follow their
    router's best score.
    """
    routed: object = model.robust if is_dual(model) else model
    if is_traced(routed):
        with suppress(Exception) if isinstance(model, Guarded) else nullcontext():
            return routed.trace(x)[1].selected_experts[:, 0]
    if is_moe(routed) and takes_images(routed, routed.router):
        return routed.router(x).argmax(1)
    return torch.full((len(x),), -1, device=x.device)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, routing_visible: bool) -> Prediction:
    """What the deployed model predicts for x (m, C, H, W), in float32; results on the CPU.

    Of a model that answers by chance, the class that most of its draws give, the first of those that tie.
    """
    logits: Tensor | None = None
    if isinstance(model, Guarded) and model.draws > 1:
        draws = torch.stack([model.once(x) for _ in range(model.draws)])  # (D, m, C)
        votes = one_hot(draws.argmax(2), draws.shape[2]).sum(0)  # (m, C)
        classes, finite = votes.argmax(1), draws.isfinite().all(2).all(0)
    else:
        logits = model(x).float()  # a model that computes in double is judged in single precision
        classes, finite = logits.argmax(1), logits.isfinite().all(1)
    expert = first_expert(model, x) if routing_visible else torch.full((len(x),), -1)
    return Prediction(classes.cpu(), finite.cpu(), expert.cpu(), logits)


def validate_outputs(model: Any, x: Tensor, num_classes: int, info: ModelInfo) -> None:
    """UnusableInput for a model that fails on images x (B, C, H, W), or gives no logits (B, num_classes) for them."""
    name, shape = info.name, "×".join(map(str, x.shape[1:]))
    try:
        logits = model(x)
        if info.routing_visible:
            first_expert(model, x)
    except Exception as error:  # a user's model may fail in any way
        reason = in_one_line(error)
        kinds = {each.dtype for each in model.parameters() if each.is_floating_point()} - {x.dtype}
        cast = f"; images are float32: cast them inside to {' or '.join(sorted(map(str, kinds)))}" if kinds else ""
        raise UnusableInput(f"'{name}' cannot take {shape} images: {reason}{cast}") from None
    if not isinstance(logits, Tensor) or logits.shape != (len(x), num_classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        if isinstance(logits, dict) and "logits" not in logits:
            got += f" of {', '.join(map(repr, logits))} without 'logits'"
        raise UnusableInput(
            f"'{name}' gives {got} for {len(x)} images, where logits of {num_classes} classes are needed"
        )
    if logits.is_complex():
        raise UnusableInput(f"'{name}' gives complex numbers, where logits are needed")

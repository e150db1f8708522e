"""A routed model's parts, of ours or of a user's own class: what attacks on routing act on.

An MoE has `router` (x → (B, E)) and `experts` (a ModuleList); a dual has branches `standard` (S) and `robust` (R).
"""

from numbers import Real
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.foreign import Guarded, bare
from bench.models.routing import RoutingTrace


class RoutedModel(Protocol):
    """An MoE of whole networks: x (B, C, H, W) → logits; its router gives scores (B, E)."""

    experts: nn.ModuleList

    @property
    def router(self) -> Any: ...  # a module, or any function of a user's own class
    def __call__(self, x: Tensor) -> Tensor: ...


class Traced(Protocol):
    """A model that shows how it routed a batch."""

    def trace(self, x: Tensor) -> tuple[Tensor, RoutingTrace]: ...


class Dual(Protocol):
    """A standard branch S and a robust branch R, mixed with weight α on R."""

    standard: nn.Module
    robust: nn.Module
    alpha: float | Tensor

    def __call__(self, x: Tensor) -> Tensor: ...


def is_dual(model: object) -> TypeGuard[Dual]:
    """Whether the model shows its branches and α, one number: what is worked out for each image or class is another."""
    alpha = getattr(model, "alpha", None)
    number = isinstance(alpha, Real) or (isinstance(alpha, Tensor) and alpha.numel() == 1)
    branches = [getattr(model, name, None) for name in ("standard", "robust")]
    return number and all(callable(branch) and bare(branch) is not bare(model) for branch in branches)


def is_moe(model: object) -> TypeGuard[RoutedModel]:
    """Whether the model shows its router and its experts."""
    return hasattr(model, "router") and isinstance(getattr(model, "experts", None), nn.ModuleList)


def is_traced(model: object) -> TypeGuard[Traced]:
    """Whether the model shows how it routed a batch."""
    return callable(getattr(model, "trace", None))


def takes_images(model: object, part: object) -> bool:
    """Whether a router or expert of a model can be asked about images by itself; of a user's own, a pass has told."""
    given = model.shown.features if isinstance(model, Guarded) else ()
    return not any(bare(part) is one for one in given)


def routed_branches(model: object) -> dict[str, RoutedModel]:
    """The MoEs inside a model whose images can go to more than one expert: `R` and `S` of a dual, `""` for itself.

    Those whose routers can be asked about images.
    """
    branches = {"R": model.robust, "S": model.standard} if is_dual(model) else {"": model}
    several = {name: branch for name, branch in branches.items() if is_moe(branch) and len(branch.experts) > 1}
    return {name: branch for name, branch in several.items() if takes_images(branch, branch.router)}


def routed_branch(model: object) -> RoutedModel | None:
    """The MoE whose routes count as the model's own: itself, a dual's R; None where there is none to be seen."""
    return routed_branches(model).get("R" if is_dual(model) else "")


def parts(model: object) -> dict[str, nn.Module]:
    """The classifiers of images in a model by name: `expert:i` of an MoE; `S`, `R`, and `R.expert:i` … of a dual."""
    if is_dual(model):
        branches = {"S": model.standard, "R": model.robust}
        inner = {f"{name}.{key}": part for name, branch in branches.items() for key, part in parts(branch).items()}
        return branches | inner
    if not is_moe(model) or not all(takes_images(model, expert) for expert in model.experts):
        return {}
    return {f"expert:{i}": expert for i, expert in enumerate(model.experts)}


def set_alpha(model: Any, alpha: float) -> None:
    """A dual's α is a number; in a user's own it may be a tensor, which nn.Module does not let a number replace.

    That of a model behind a guard is set where it is, in the model or in the dual that it wraps.

    Raises:
        UnusableInput: `alpha` is a property that cannot be set.
    """
    if isinstance(model, Guarded):
        model = model.shown.routed(bare(model))
    if isinstance(model.alpha, Tensor):
        model.alpha.data.fill_(alpha)
    else:
        try:
            model.alpha = alpha
        except AttributeError as error:
            raise UnusableInput(
                f"the dual's α cannot be set ({error}): let `alpha` be an attribute, or drop --alpha"
            ) from None


@torch.no_grad()
def refuse_idle_alpha(model: Dual, x: Tensor, former: float) -> None:
    """UnusableInput for a dual that answers as with its former α those of the images x (B, C, H, W) on which its
    branches have unlike classes: where they agree, a mean of probabilities that are 0 and 1 is the same with any α."""
    alpha, answers = float(model.alpha), model(x)
    set_alpha(model, former)
    before = model(x)
    set_alpha(model, alpha)
    unlike = model.standard(x).argmax(1) != model.robust(x).argmax(1)
    if unlike.any() and torch.equal(answers[unlike], before[unlike]):
        raise UnusableInput("--alpha changes nothing of the model's answers: let its forward pass mix by `alpha`")

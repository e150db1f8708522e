"""Whether a model's answers follow from the single image alone, and which answers differ by rounding alone.

Axes: m = images, B = images of a block, C = classes.
"""

import copy
import pickle
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.models.foreign import Guarded
from bench.models.state import numbers, sizes

#: What `dependence` and `by_batch` say of an image's neighbours.
BY_BATCH, GRADIENTS_BY_BATCH = "outputs depend on the batch", "gradients depend on the batch"
#: Batch sizes in which `dependence` asks for the same images.
BATCH_SIZES = (1, 2, 4, 8, 32)
#: How far images are from those that were asked for before, at most, in pixels of [0, 1].
_NEAR = 0.01
#: Times that it asks for the same batch.
_ASKED = 4
#: What rounding may change of an image's logits from batch to batch: so much of how far its logits lie apart
#: (`spread`), and of each logit sixteen of float32's ε.
ROUNDING, _OF_FLOAT32 = 1e-4, 2e-6
#: Of a model that answers in half precision, so many ε of that of how far its logits lie apart, if that is more.
_OF_HALF = 4
#: What differs by so much of its length is another gradient; of half precision rounding alone may change some percent.
_OTHER_SLOPE = 0.5
#: The share of images whose gradients have to be the same.
SAME_GRADIENTS = 0.9
#: A margin's times that its logits are taken to lie apart at most, where others are masked.
_MARGINS = 10


@dataclass(frozen=True)
class Dependence:
    """What a model's logits depend on beside the image, as `dependence` has seen it.

    chance: the same batch is answered differently, or the forward pass draws or seeds random numbers. batch: an image's
    logits depend on the size of its batch or on its neighbours. state: a forward pass in eval mode changes parameters,
    buffers or numbers that the model keeps, wherever it does, or adds to what it keeps. in_place: it writes into its
    input. gradients: it answers otherwise where gradients are taken, so that what is attacked is not what is deployed.
    """

    chance: bool
    batch: bool
    state: bool
    in_place: bool
    gradients: bool = False

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the model is no function of a single image, in words; () where it is one. `in_place` does not matter."""
        found = {
            "outputs depend on chance": self.chance,
            BY_BATCH: self.batch,
            "forward passes change the model's state": self.state,
            "outputs depend on whether gradients are taken": self.gradients,
        }
        return tuple(reason for reason, seen in found.items() if seen)


@torch.no_grad()
def dependence(model: nn.Module, x: Tensor) -> Dependence:
    """Whether a model in eval mode answers for each image by that image alone; x (B, C, H, W) is one batch to ask for.

    Images of the probe's own are added to small batches, so that the answer depends on no batch size of a run. The same
    batch is asked for several times; then 32 of its images in batches of 1, 2, 4, 8 and 32, and among other neighbours.
    At last images near to those that were asked for, of which a copy of a foreign model that was asked for none must
    say the same: whatever a model remembers of an image, it may give for its neighbours.
    Torch's, NumPy's and Python's random states are as before afterwards. Whatever the model raises is raised.
    """
    own = torch.rand(BATCH_SIZES[-1], *x.shape[1:], generator=torch.Generator().manual_seed(0))
    images = torch.cat([x, own.to(x)])
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    in_place = False

    def ask(batch: Tensor) -> Tensor:
        nonlocal in_place
        given = batch.clone()
        logits = model(given).detach().double().clone()
        in_place |= not torch.equal(given, batch)
        return logits

    fresh = _fresh(model)
    kept = (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=devices):
        before, drawn = _tensors(model), _random_state(devices)
        whole = ask(images)
        kept_before, held = numbers(model), sizes(model)
        same = all(same_logits(ask(images), whole) for _ in range(_ASKED - 1))
        state = not _same(before, _tensors(model)) or not _same(kept_before, numbers(model))
        ask(1 - images)  # others of the same shape: the last answer may be kept, but not each image
        state |= any(size > held.get(name, 0) for name, size in sizes(model).items() if name in held)
        chance = not same or _random_state(devices) != drawn
        batch = False
        gradients = same and not _equal_with_gradients(model, images, whole)
        share = _share(model)
        # half of them x's own, half the probe's, spread over the batch
        rows = torch.linspace(0, len(images) - 1, BATCH_SIZES[-1], device=x.device).round().long()
        orders = [rows, rows.flip(0), rows[torch.arange(len(rows)).view(2, -1).T.flatten()]]
        for order in orders:
            for size in BATCH_SIZES if order is rows else BATCH_SIZES[1:]:
                parts = torch.cat([ask(images[part]) for part in torch.split(order, size)])
                batch |= not same_logits(parts, whole[order], share)
        if fresh is not None and same:
            away = _NEAR * torch.linspace(-1, 1, images[0].numel()).view(images[0].shape).to(images)
            near = (images + away).clamp(0, 1)  # which a model may check
            state |= not same_logits(ask(near), fresh(near.clone()).detach())
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    # a model that answers by chance differs from batch to batch as well
    return Dependence(chance, batch and not chance, state, in_place, gradients)


def by_batch(model: nn.Module, x: Tensor, cut: int) -> list[str]:
    """What of a model's answers for a whole block x (B, C, H, W) depends on its batch, in words.

    A block may be larger than any batch that `dependence` asks for. In pieces of 32, and in two that meet at `cut`,
    0 < cut < B, it has to get the same logits, and nearly each image the same gradient. Whatever the model raises in a
    forward pass is raised.
    """
    splits: tuple[Any, ...] = (BATCH_SIZES[-1], [cut, len(x) - cut])
    with torch.no_grad():
        logits = model(x)
        found = [torch.cat([model(part) for part in torch.split(x, sizes)]) for sizes in splits]
    if not all(same_logits(each, logits, _share(model)) for each in found):
        return [BY_BATCH]
    try:
        _, whole = sloped(model, x)
        slopes = [torch.cat([sloped(model, part)[1] for part in torch.split(x, sizes)]) for sizes in splits]
    except Exception:  # of a user's own model: its attacks will fail, and say so
        return []
    (expected, *others) = (each.nan_to_num(0.0, 0.0, 0.0) for each in (whole, *slopes))
    return [] if all(same_slopes(each, expected, _OTHER_SLOPE) for each in others) else [GRADIENTS_BY_BATCH]


def sloped(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and the gradient (B, c·H·W) of a sum of them that is no attack's loss."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        weights = torch.arange(1, 1 + logits.shape[1], device=x.device).cos()
        (gradient,) = torch.autograd.grad((logits * weights).sum(), x)
    return logits.detach(), gradient.flatten(1)


def same_slopes(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether nearly all images have the same gradients (B, …), but for `share` of their length.

    A kink of the network, on which rounding decides, may give a few another one.
    """
    same = (found - expected).norm(dim=1) <= share * expected.norm(dim=1)
    return float(same.float().mean()) >= SAME_GRADIENTS


def _share(model: nn.Module) -> float:
    """What rounding may change of a model's logits: in half precision kernels round otherwise by the batch's size."""
    dtype: Any = model.dtype if isinstance(model, Guarded) else None
    return _OF_HALF * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else ROUNDING


def _fresh(model: nn.Module) -> nn.Module | None:
    """A copy of a foreign model, with all that it keeps; None of one that cannot be copied, and of our own."""
    if not isinstance(model, Guarded):
        return None
    try:
        return Guarded(copy.deepcopy(model.model)).eval()
    except Exception:  # of a user's own: it may hold a file, a lock, a tensor with a history
        return None


def _equal_with_gradients(model: nn.Module, images: Tensor, logits: Tensor) -> bool:
    """Whether a model answers the same where gradients are taken, as attacks ask it; one that then fails is none."""
    with torch.enable_grad():
        try:
            found = model(images.clone().requires_grad_().clone()).detach().double()
        except Exception:  # of a user's own model: its attacks will fail, and say so
            return True
    return same_logits(found, logits)


def same_logits(a: Tensor, b: Tensor, share: float = ROUNDING, each: float = _OF_FLOAT32) -> bool:
    """Whether two batches of logits (m, C) differ by rounding alone: by `share` of `spread`, and `each` of each one."""
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a.double(), b.double()
    allowed = share * spread(b) + each * b.abs()
    return bool(((a - b).abs() <= allowed)[finite].all())


def spread(logits: Tensor) -> float:
    """How far logits (m, C) that may win lie apart, of most images, whatever is added to all or masks the others.

    A class that is masked by −1e9 says nothing of how the others are rounded: by the largest logit any two would agree.
    """
    logits = logits.detach()
    finite = logits[logits.isfinite()]
    if not finite.numel():
        return 0.0
    widths = [float(finite.abs().amax())]
    best = logits.nan_to_num(-torch.inf, -torch.inf, -torch.inf).sort(1, descending=True).values
    most = logits.shape[1] - 1
    for number, times in ((max(most // 2, min(2, most)), 1), (1, _MARGINS), (2, _MARGINS)):
        behind = best[:, :1] - best[:, number : number + 1]
        if (known := behind[behind.isfinite()]).numel() and (width := float(known.median())) > 0:
            widths.append(times * width)
            if times > 1:  # a class that is there twice leaves no margin
                break
    return min(widths)


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Copies of all parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_identical(a[name], b[name]) for name in a)


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and (a == b or a != a)


def _random_state(devices: list[int]) -> tuple[bytes, ...]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    return (
        *(state.numpy().tobytes() for state in states),
        *map(pickle.dumps, (random.getstate(), np.random.get_state())),
    )

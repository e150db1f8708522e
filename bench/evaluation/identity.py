"""Who a model is that came without a checkpoint of ours: its weights, and what it computes.

Neither alone is enough: a factory may read a threshold from the environment, or a helper may have been edited, and the
weights are the same; and few images may not tell two models apart whose weights differ. What a model computes is
compared with a tolerance, since the last bits of a sum depend on the device and the number of threads; its source text
is not compared: it does not show what is called. Its gradients count as well: attacks follow them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bench.datasets.base import EvalSet, input_hash
from bench.errors import users_code
from bench.job import IDENTITY_FILE, Subject
from bench.models.dependence import ROUNDING, same_logits, same_slopes, sloped
from bench.models.deployed import eval_frozen, full_float32, validate_outputs
from bench.models.foreign import Guarded
from bench.models.parts import is_dual
from bench.models.state import numbers
from bench.randomness import generator
from bench.spec import dataset_folder, path_safe

#: Images that a model is asked for: so many random ones, and so many of the evaluation set.
PROBED = 32
#: Random directions that the gradient of each image is told along; and by how much of their length these may differ.
DIRECTIONS, OF_SLOPE = 8, 0.1
#: How far logits of one model may differ, where its dtype is coarser than float32: so many of its ε.
TOLERANCE_IN_EPS = 4


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over a model's layers, its state, and the numbers, words and tensors that its modules keep elsewhere."""
    sha = hashlib.sha256(re.sub("0x[0-9a-f]+", "", str(model)).encode())  # a function prints its address
    state = model.state_dict()
    for name, value in sorted(state.items()):
        sha.update(name.encode())
        _add(sha, value)
    kept = numbers(model) | {name: value for name, value in model.named_buffers() if name not in state}
    if is_dual(model):
        kept.pop(".alpha", None)  # the run's spec has it
    for name, value in sorted(kept.items()):
        _add(sha, [name, value])
    return sha.hexdigest()


def _add(sha: Any, value: Any) -> None:
    """One entry of a state dict: a tensor of any kind, a nest of them, or what a module's `get_extra_state` gives."""
    if isinstance(value, Tensor):
        sha.update(f"{tuple(value.shape)} {value.dtype}".encode())
        whole = value.detach().cpu()
        whole = (
            whole.dequantize() if whole.is_quantized else whole.to_dense() if whole.layout != torch.strided else whole
        )
        sha.update(whole.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        _add(sha, [*value.items()])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(sha, item)
    else:
        sha.update(re.sub("0x[0-9a-f]+", "", repr(value)).encode())


@dataclass(frozen=True)
class Identity:
    """weights: their SHA-256. random, first: logits (m, C) of random images and of the first of the evaluation set,
    whose hashes are `images`. tolerance: by how much these may differ (`bench.models.dependence.same_logits`). slopes:
    the gradients of the random images along some directions (m, DIRECTIONS); 0 where a backward pass fails.
    """

    weights: str
    random: Tensor
    first: Tensor
    images: tuple[str, ...]
    tolerance: float
    slopes: Tensor

    @property
    def sha256(self) -> str:
        """What runs are filed under: those of a model that is recognised keep that of its first run."""
        sha = hashlib.sha256(self.weights.encode())
        for tensor in (self.random, self.first, self.slopes):
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()

    def same(self, other: Self) -> bool:
        """Whether both are of one model: equal weights, and equal answers where both were asked for the same images."""
        shared = min(len(self.images), len(other.images))
        if self.weights != other.weights or not shared or self.images[:shared] != other.images[:shared]:
            return False
        if self.slopes.shape != other.slopes.shape or not same_slopes(self.slopes, other.slopes, OF_SLOPE):
            return False
        tolerance = max(self.tolerance, other.tolerance)
        pairs = ((self.random, other.random), (self.first[:shared], other.first[:shared]))
        coarse = {"each": tolerance} if tolerance > ROUNDING else {}
        return all(a.shape == b.shape and same_logits(a, b, tolerance, **coarse) for a, b in pairs)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        words = {"weights": self.weights, "images": self.images, "tolerance": self.tolerance}
        tensors = {"random": self.random, "first": self.first, "slopes": self.slopes}
        return save(tensors, metadata={"identity": json.dumps(words)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file at `path`; ValueError, KeyError or OSError for one that is not whole or not of this form."""
        try:
            with safe_open(path, framework="pt") as file:
                words = json.loads((file.metadata() or {})["identity"])
                random, first, slopes = (file.get_tensor(name) for name in ("random", "first", "slopes"))
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        return cls(words["weights"], random, first, tuple(words["images"]), words["tolerance"], slopes)


def identify(model: nn.Module, data: EvalSet) -> Identity:
    """Asks a model in eval mode for probe images; its draws, if it makes any, are the same every time."""
    guard, x = Guarded(model), data.x[:PROBED]
    random = torch.rand(PROBED, *x.shape[1:], generator=generator("identity"))
    with eval_frozen(guard), full_float32():
        with torch.no_grad():
            logits = [guard(images).cpu().contiguous() for images in (random, x)]
        try:
            _, gradient = sloped(guard, random)
        except Exception:  # of a user's own: it has none to tell it by
            gradient = torch.zeros_like(random).flatten(1)
    directions = torch.randn(gradient.shape[1], DIRECTIONS, generator=generator("identity-directions"))
    eps = torch.finfo(guard.dtype).eps if guard.dtype.is_floating_point else 0.0
    tolerance = max(ROUNDING, TOLERANCE_IN_EPS * eps)
    hashes, slopes = tuple(input_hash(image) for image in x), gradient.cpu().nan_to_num(0.0, 0.0, 0.0) @ directions
    return Identity(weights_sha256(model), logits[0], logits[1], hashes, tolerance, slopes)


def identified(subject: Subject, data: EvalSet, num_classes: int, files: Iterable[Path] = ()) -> Subject:
    """A foreign subject under the identity that one of the `files` of its earlier runs has, or under a new one.

    Raises:
        UnusableInput: the model cannot take the data's images, or gives another number of classes.
    """
    if not subject.foreign:
        return subject
    with users_code(f"'{subject.info.name}' cannot be asked who it is"):
        guard = Guarded(subject.model)
        with eval_frozen(guard), full_float32():
            validate_outputs(guard, data.x[:PROBED], num_classes, subject.info)
        own = identify(subject.model, data)
    found = next((known for known in _read(files) if known.same(own)), own)
    info = subject.info.model_copy(update={"checkpoint_sha256": found.sha256})
    return replace(subject, info=info, identity=found.to_bytes())


def identity_files(results: Path, dataset: str, model: str) -> list[Path]:
    """Those of all runs below `results` of models of this name on this data set, in a fixed order."""
    return (
        sorted(results.glob(f"{dataset_folder(dataset)}/*/*/{path_safe(model)}/*/{IDENTITY_FILE}"))
        if results.is_dir()
        else []
    )


def _read(files: Iterable[Path]) -> Iterator[Identity]:
    for path in files:
        try:
            yield Identity.read(path)
        except (ValueError, KeyError, OSError):
            continue  # not there, or what killed its writer: the run is recognised by another file, or not at all

"""The adversarial examples that a run found, kept beside it as `witnesses.safetensors`. Never imports torch.

Axes: m = witnesses, C, H, W = channels, height, width. Pixels are float32 in [0, 1].
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FILE = "witnesses.safetensors"


@dataclass(frozen=True)
class Witnesses:
    """x_adv (m, C, H, W) float32 broke F on the examples idx (m,), each by the attack of its name (m,)."""

    idx: NDArray[np.int64]
    attack: tuple[str, ...]
    x_adv: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self | None:
        """All of them in one, in their order; None for none."""
        if not several:
            return None
        idx, x_adv = np.concatenate([w.idx for w in several]), np.concatenate([w.x_adv for w in several])
        return cls(idx, tuple(name for w in several for name in w.attack), x_adv)

    def of(self, chosen: NDArray[np.bool_]) -> Self:
        """Those that are chosen (m,)."""
        names = tuple(name for name, yes in zip(self.attack, chosen, strict=True) if yes)
        return type(self)(self.idx[chosen], names, self.x_adv[chosen])

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        names = list(dict.fromkeys(self.attack))
        numbers = np.array([names.index(name) for name in self.attack], dtype=np.int64)
        tensors: dict[str, NDArray[Any]] = {
            "idx": self.idx,
            "attack": numbers,
            "x_adv": np.ascontiguousarray(self.x_adv, dtype=np.float32),
        }
        return save(tensors, metadata={"attacks": json.dumps(names)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file at `path`; ValueError for one that is not whole or not of this form."""
        try:
            with safe_open(path, framework="np") as file:
                names = json.loads((file.metadata() or {})["attacks"])
                idx, numbers, x_adv = (file.get_tensor(name) for name in ("idx", "attack", "x_adv"))
        except (SafetensorError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            # numpy has no such type: TypeError or AttributeError
            raise ValueError(f"'{path}' is no whole file of witnesses ({error})") from None
        types = (idx.dtype, numbers.dtype, x_adv.dtype) == (np.int64, np.int64, np.float32)
        sizes = x_adv.ndim == 4 and idx.shape == numbers.shape == x_adv.shape[:1]
        if not (types and sizes and isinstance(names, list) and np.isin(numbers, np.arange(len(names))).all()):
            raise ValueError(f"'{path}' is no whole file of witnesses (its tensors do not fit)")
        return cls(idx, tuple(str(names[number]) for number in numbers), x_adv)

    @classmethod
    def read_for(cls, path: Path, idx: NDArray[np.int64], shape: tuple[int, ...]) -> Self:
        """The file at `path`; ValueError also for one about others than the examples idx (n,), of `shape` (C, H, W)."""
        found = cls.read(path)
        if found.x_adv.shape[1:] != shape or not np.isin(found.idx, idx).all():
            raise ValueError(f"'{path}' is about other images")
        return found

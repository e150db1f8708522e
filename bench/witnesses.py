"""The adversarial examples that a run found, kept beside it as `witnesses.safetensors`. Never imports torch.

Axes: m = witnesses, C, H, W = channels, height, width. Pixels are float32 in [0, 1].
"""

import json
from collections.abc import Iterable, Sequence
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
                numbers = file.get_tensor("attack").tolist()
                idx, x_adv = file.get_tensor("idx"), file.get_tensor("x_adv")
            attack = tuple(str(names[number]) for number in numbers)
        except (SafetensorError, LookupError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is no whole file of witnesses ({error})") from None
        if not len(idx) == len(attack) == len(x_adv) or x_adv.ndim != 4:
            raise ValueError(f"'{path}' is no whole file of witnesses (its tensors do not fit)")
        return cls(idx, attack, x_adv)


def read_all(folders: Iterable[Path]) -> Witnesses | None:
    """The witnesses of every run folder that has some; None where none has."""
    paths = [folder / FILE for folder in folders]
    return Witnesses.joined([Witnesses.read(path) for path in paths if path.is_file()])

"""One run to be made: who is scored, and by which suite or way to certify."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from bench.datasets.base import EvalSet
from bench.models.foreign import Shown
from bench.spec import Method, ModelInfo, RunSpec

M = TypeVar("M", bound=Method)

#: The file in a run's folder by which a model of the user's own is recognised.
IDENTITY_FILE = "identity.safetensors"


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, and what is known of it.

    expert_scores: sa and ra of an MoE's experts on held-out images. foreign: not built from a checkpoint of ours, so
    its forward pass may do anything, and is called behind a guard. identity: the file by which such a model is
    recognised (`bench.evaluation.identity`), to be kept with its runs. gates: those that the user named, as words of
    `--gates`, and sites: what they are (`bench.models.sites`). shown: what a pass tells of the MoEs that its
    attributes show.
    """

    model: nn.Module
    info: ModelInfo
    flags: tuple[str, ...] = ()
    expert_scores: tuple[dict[str, float], ...] = ()
    foreign: bool = False
    identity: bytes = b""
    gates: tuple[str, ...] = ()
    sites: tuple[Any, ...] = ()
    shown: Shown = field(default_factory=Shown)

    @property
    def routed(self) -> nn.Module:
        """The MoE or dual whose answer the model gives as its own, such as behind a normalisation; else the model."""
        return self.shown.routed(self.model)


@dataclass(frozen=True)
class Job(Generic[M]):
    """One run to be made, on the images that the spec names.

    fit: whether forward passes are split by what fits into the device's memory; blocks are as the spec says.
    """

    spec: RunSpec
    subject: Subject
    method: M
    data: EvalSet
    num_classes: int
    fit: bool = False

    @property
    def blocks(self) -> list[slice]:
        """The examples of each block: `batch_size` consecutive ones, the last block with what is left."""
        size = self.spec.batch_size
        return [slice(start, min(start + size, len(self.data))) for start in range(0, len(self.data), size)]

"""What a certification method is to the loop that runs it.

Axes: B = examples of a block; images (B, C, H, W) in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from torch import Tensor

from bench.errors import UnusableInput
from bench.models.dependence import dependence
from bench.spec import Method, ThreatModel


@dataclass(frozen=True)
class Examples:
    """The examples of one block, which are certified together.

    predicted (B,): F's class on the clean images, -1 where its logits are not finite. idx (B,): the examples' positions
    in the data set, which random numbers are keyed by. gates: those inside the network, such as `blocks.1.gate`.
    """

    model: Any
    x: Tensor
    y: Tensor
    idx: Tensor
    predicted: Tensor
    num_classes: int
    threat_model: ThreatModel
    seed: int
    gates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What one method claims of a block at one ε: arrays (B,), as `bench.results.certificates` names them."""

    method: str
    eps: float
    status: NDArray[np.str_]
    radius: NDArray[np.float64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    reachable: NDArray[np.int64]
    reason: str = ""

    @classmethod
    def of(
        cls,
        block: Examples,
        method: str,
        certified: Tensor,
        radius: Tensor,
        reachable: Tensor | None = None,
        eps: float | None = None,
        predicted: Tensor | None = None,
        reason: str = "",
    ) -> "Claim":
        """Certified or not (B,), at the block's own ε and for F's class unless given otherwise."""
        correct = block.predicted == block.y
        return cls(
            method,
            block.threat_model.eps if eps is None else eps,
            np.where(certified.numpy(), "certified", "not_certified"),
            radius.double().numpy(),
            (block.predicted if predicted is None else predicted).numpy(),
            correct.numpy(),
            np.full(len(block.y), -1) if reachable is None else reachable.numpy(),
            reason,
        )

    @classmethod
    def nothing(cls, block: Examples, method: str, status: str, reason: str) -> "Claim":
        """The same status for all: not_applicable or not_supported."""
        count = len(block.y)
        return cls(
            method,
            block.threat_model.eps,
            np.full(count, status),
            np.full(count, np.nan),
            block.predicted.numpy(),
            (block.predicted == block.y).numpy(),
            np.full(count, -1),
            reason,
        )


class Certifier(Method):
    """Base of all methods; subclasses register with `CERTIFIERS`."""

    # a radius is a multiple of parameters: not of inf
    model_config = ConfigDict(allow_inf_nan=False)
    #: The method's name in a row of a model that it cannot be applied to.
    first: ClassVar[str]

    @property
    def own_threat(self) -> ThreatModel | None:
        """The ball where the user names none; None: the data set's."""
        return None

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        if threat_model.norm not in self.norms:
            norms = " and ".join(self.norms)
            raise UnusableInput(f"{name} does not know {threat_model.norm}: pass --norm {norms} and an --eps")

    def certify(self, block: Examples) -> Sequence[Claim]:
        """What is claimed of each example of the block: `not_supported` unless each image is answered by itself."""
        try:
            reasons = dependence(block.model, self.probed(block)).reasons
        except Exception as error:  # whatever a user's model raises
            reasons = (f"the model fails on other batches of images: {type(error).__name__}",)
        if reasons:
            return [Claim.nothing(block, self.first, "not_supported", "; ".join(reasons))]
        return self.claims(block)

    def probed(self, block: Examples) -> Tensor:
        """Images (m, C, H, W), one batch, on which the model has to answer image by image."""
        return block.x

    def claims(self, block: Examples) -> Sequence[Claim]:
        """The same, of a model that is a function of single images."""
        raise NotImplementedError

"""Training batches whose randomness is a function of (seed, epoch, example) alone.

So a training resumed at an epoch's beginning, or spread over other batches, draws the same numbers, and no random state
has to be saved. Axes: B = batch; images (B, c, H, W).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.datasets.base import Images
from bench.objectives.base import Batch
from bench.spec import ThreatModel


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def uniform(shape: tuple[int, ...], indices: Tensor, *key: object) -> Tensor:
    """Numbers in [0, 1), (B, *shape): row i depends on `key` and the example indices[i] alone."""
    return torch.stack([torch.rand(shape, generator=generator(*key, int(index))) for index in indices])


def augment(x: Tensor, draws: Tensor) -> Tensor:
    """Horizontal flip and translation by up to an eighth of the side, black outside; draws (B, 3) in [0, 1)."""
    rows, _, height, width = x.shape
    reach = max(height, width) // 8
    x = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1).to(x.device), x.flip(-1), x)
    padded = F.pad(x, (reach,) * 4)
    shift = (draws[:, 1:] * (2 * reach + 1)).long().to(x.device)
    r = shift[:, 0, None] + torch.arange(height, device=x.device)
    c = shift[:, 1, None] + torch.arange(width, device=x.device)
    return padded[torch.arange(rows, device=x.device).view(-1, 1, 1), :, r[:, :, None], c[:, None, :]].permute(
        0, 3, 1, 2
    )


def hold_out(available: int, n_train: int | None, n_val: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation examples; the same for every seed, so seeds compare."""
    order = torch.randperm(available, generator=generator("hold out"))
    train = order[n_val:]
    return (train if n_train is None else train[:n_train]), order[:n_val]


@dataclass(frozen=True)
class Sampler:
    """Deals a training set's batches, epoch by epoch."""

    images: Images
    indices: Tensor
    batch_size: int
    threat_model: ThreatModel
    augment: bool
    seed: int
    device: torch.device

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self.indices) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in an order of its own."""
        order = self.indices[torch.randperm(len(self.indices), generator=generator(self.seed, epoch))]
        for indices in torch.split(order, self.batch_size):
            yield self.batch(indices, epoch)

    def batch(self, indices: Tensor, epoch: int) -> Batch:
        """The batch of the given examples, as it would be dealt in `epoch`."""
        x = self.images.floats(indices).to(self.device)
        if self.augment:
            x = augment(x, uniform((3,), indices, self.seed, epoch, "augment"))

        def noise(salt: str) -> Tensor:
            return uniform(tuple(x.shape[1:]), indices, self.seed, epoch, salt).mul_(2).sub_(1).to(x.device)

        return Batch(x.contiguous(), self.images.y[indices].to(self.device), self.threat_model, noise)

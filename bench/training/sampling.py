"""Training batches whose randomness is a function of (seed, epoch, example) alone.

So a training that is resumed at the beginning of an epoch, or split into other batches, draws the same numbers, and no
random state has to be saved. Axes: B = batch; images (B, c, H, W).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.datasets.base import Images
from bench.randomness import generator, normal, uniform
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; each is made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = worker.submit(next, batches, None)
            yield batch


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of an image; what is not set is off.

    flip: horizontally, for half of the images. translate: up to so many pixels each way, black outside. cutout: a black
    square of so many pixels a side whose centre is anywhere in the image (DeVries and Taylor 2017).
    """

    flip: bool = False
    translate: int = 0
    cutout: int = 0

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """x (B, c, H, W), changed by the numbers draws (B, 5) in [0, 1): flip, two of translation, two of cutout."""
        rows, _, height, width = x.shape
        draws = draws.to(x.device)
        y, x_axis = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        if self.flip:
            x = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
        if self.translate:
            shift = (draws[:, 1:3] * (2 * self.translate + 1)).long()
            r, c = shift[:, :1] + y, shift[:, 1:] + x_axis
            every = torch.arange(rows, device=x.device).view(-1, 1, 1)
            x = F.pad(x, (self.translate,) * 4)[every, :, r[:, :, None], c[:, None, :]].permute(0, 3, 1, 2)
        if self.cutout:
            centre = (draws[:, 3:] * torch.tensor([height, width], device=x.device)).long()
            first = centre - self.cutout // 2
            inside = [
                (axis >= first[:, [i]]) & (axis < first[:, [i]] + self.cutout) for i, axis in enumerate((y, x_axis))
            ]
            x = x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
        return x


def hold_out(available: int, n_train: int | None, n_val: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation examples; the same for every seed, so seeds compare."""
    order = torch.randperm(available, generator=generator("hold out"))
    train = order[n_val:]
    return (train if n_train is None else train[:n_train]), order[:n_val]


@dataclass(frozen=True)
class Sampler:
    """Deals a training set's batches, epoch by epoch.

    noise_sigma: of Gaussian noise on each image, in pixels of [0, 1], which it may leave (Cohen et al. 2019).
    eps_warmup: epochs before the one from which the batches' threat model has its whole ε; it grows linearly.
    Of several `processes`, the one numbered `rank` deals its part of batches that are that many times as large.
    """

    images: Images
    indices: Tensor
    batch_size: int
    threat_model: ThreatModel
    seed: int
    device: torch.device
    augmentation: Augmentation = Augmentation()
    noise_sigma: float = 0.0
    eps_warmup: int = 0
    memory_format: torch.memory_format = torch.contiguous_format
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self.indices) // (self.batch_size * self.processes))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's batches of one epoch, in an order of its own."""
        order = self.indices[torch.randperm(len(self.indices), generator=generator(self.seed, epoch))]
        for whole in torch.split(order, self.batch_size * self.processes):
            # The mean over processes of weighted means is the whole batch's mean. Where there are more processes than
            # images left, the first has them all; the others take part with the same images, so that shares of the
            # load come out right, and a weight of nothing, since all have to take the step.
            if len(whole) < self.processes:
                yield self.batch(whole, epoch, 0.0 if self.rank else self.processes)
            else:
                own = whole[self.rank :: self.processes]
                yield self.batch(own, epoch, len(own) * self.processes / len(whole))

    def batch(self, indices: Tensor, epoch: int, weight: float = 1.0) -> Batch:
        """The batch of the given examples, as it would be dealt in `epoch`."""
        x = self.images.floats(indices).to(self.device)
        if self.augmentation != Augmentation():
            x = self.augmentation(x, uniform((5,), indices, self.seed, epoch, "augment"))
        if self.noise_sigma:
            drawn = normal(tuple(x.shape[1:]), indices, self.seed, epoch, "noise")
            x = x + self.noise_sigma * drawn.to(x.device)

        def noise(salt: str) -> Tensor:
            return uniform(tuple(x.shape[1:]), indices, self.seed, epoch, salt).mul_(2).sub_(1).to(x.device)

        x = x.contiguous(memory_format=self.memory_format)
        threat = self.threat_model
        if epoch < self.eps_warmup:
            threat = threat.model_copy(update={"eps": threat.eps * (epoch + 1) / (self.eps_warmup + 1)})
        return Batch(x, self.images.y[indices].to(self.device), threat, noise, weight)

"""Random numbers that depend on a key alone: a block's seed, and draws for each example. Axes: B = batch."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def block_seed(seed: int, block: int) -> int:
    """A block's own seed. Block 0 has the run's, so a run of one block is what the suite gives for that seed.

    It has 32 bits, since numpy takes no more, and attacks seed numpy.
    """
    return (seed + 1_000_003 * block) % 2**32


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch, numpy and random seeded inside, and where they were, after."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # attacks use the global state
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def uniform(shape: tuple[int, ...], indices: Tensor, *key: object) -> Tensor:
    """Numbers in [0, 1), (B, *shape): row i depends on `key` and the example indices[i] alone."""
    return torch.stack([torch.rand(shape, generator=generator(*key, int(index))) for index in indices])


def normal(shape: tuple[int, ...], indices: Tensor, *key: object) -> Tensor:
    """Standard normal numbers, (B, *shape), keyed as `uniform`'s."""
    return torch.stack([torch.randn(shape, generator=generator(*key, int(index))) for index in indices])

"""Random numbers that depend on a key alone, and global states that are as before."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from bench.randomness import block_seed, generator, normal, seeded, uniform


def test_block_0_has_the_runs_seed_and_no_two_blocks_share_one():
    assert [block_seed(7, 0), block_seed(7, 1)] == [7, 1_000_010]
    assert len({block_seed(seed, block) for seed in range(20) for block in range(500)}) == 20 * 500
    assert block_seed(2**32 - 1, 1) == 1_000_002  # numpy takes 32 bits


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_inside_the_seed_decides_and_after_all_is_as_before():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    found = [draw()]
    with seeded(5):
        first = draw()
    with pytest.raises(ZeroDivisionError), seeded(5):
        draw()[0] / 0
    with seeded(5):
        assert draw() == first
    assert len(set(first) | set(expected[0])) == 6
    assert [*found, draw()] == expected


def test_a_generator_depends_on_its_key_alone():
    def numbers(*key: object) -> list[float]:
        return torch.rand(3, generator=generator(*key)).tolist()

    torch.manual_seed(0)
    first = numbers("noise", 1, 2)
    torch.manual_seed(99)
    assert numbers("noise", 1, 2) == first
    assert first not in (numbers("noise", 2, 1), numbers("noise", 12), numbers("other", 1, 2))


@pytest.mark.parametrize("draws", [uniform, normal])
def test_a_row_depends_on_its_example_and_not_on_its_batch(draws: Any):
    whole = draws((2, 3), torch.arange(6), "key")
    assert whole.shape == (6, 2, 3)
    assert torch.equal(draws((2, 3), torch.tensor([4, 1]), "key"), whole[[4, 1]])
    assert not torch.equal(draws((2, 3), torch.tensor([4]), "other"), whole[[4]])
    assert len(whole.flatten().unique()) == 36


def test_the_numbers_are_distributed_as_is_said():
    # 10,000 draws: the mean of uniform ones is within 5 · 0.29/100 of ½, that of normal ones within 5/100 of 0
    flat, bell = uniform((100,), torch.arange(100)), normal((100,), torch.arange(100))
    assert 0 <= flat.min() < 0.01
    assert 0.99 < flat.max() < 1
    assert abs(flat.mean() - 0.5) < 0.015
    assert abs(bell.mean()) < 0.05
    assert abs(bell.std() - 1) < 0.05

"""Training batches: their randomness belongs to the example, and the held-out ones are never dealt."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.datasets.base import Images
from bench.randomness import generator, uniform
from bench.spec import ThreatModel
from bench.training.sampling import Augmentation, Sampler, ahead, hold_out

N = 20
ALL = Augmentation(flip=True, translate=1, cutout=2)
MOVE = Augmentation(flip=True, translate=1)


@pytest.fixture
def sampler() -> Sampler:
    """The even ones of 20 images of 8×8, in batches of 4: every pixel of image i is i of 20."""
    x = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1).expand(N, 1, 8, 8).contiguous()
    images = Images(x, torch.arange(N), N, N, N)
    threat, cpu = ThreatModel(norm="Linf", eps=0.1), torch.device("cpu")
    return Sampler(images, torch.arange(0, N, 2), 4, threat, seed=0, device=cpu)


def order(sampler: Sampler, epoch: int) -> list[int]:
    return torch.cat([batch.y for batch in sampler.epoch(epoch)]).tolist()


# --- keyed numbers ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.integers(0, 5))
def test_an_examples_numbers_do_not_depend_on_the_batch_that_it_is_in(indices: list[int], seed: int):
    every = uniform((2, 3), torch.arange(10), seed, "noise")
    assert torch.equal(uniform((2, 3), torch.tensor(indices), seed, "noise"), every[indices])


def test_numbers_differ_by_example_and_by_every_part_of_the_key():
    rows = [*uniform((4,), torch.tensor([0, 1]), 0, 0, "a")]
    rows += [uniform((4,), torch.tensor([0]), *key)[0] for key in [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")]]
    assert len({tuple(row.tolist()) for row in rows}) == 5


def test_numbers_are_uniform_in_the_unit_interval():
    values = uniform((50,), torch.arange(200), 0)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_key_is_a_seed_on_every_machine():
    # the first 8 bytes of SHA-256 of the text (0, 'a'), halved: a training repeated next year must see the same noise
    assert generator(0, "a").initial_seed() == 739273521946992771


# --- augmentation -----------------------------------------------------------------------------------------------------

KEEP, FLIP = 0.9, 0.1
#: of a reach of 1 pixel: the image's own columns, those one further left, those one further right
SAME, LEFT, RIGHT = 0.5, 0.1, 0.9


def image() -> Tensor:
    return torch.arange(1.0, 65.0).view(1, 1, 8, 8)


def changed(draws: tuple[float, ...], augmentation: Augmentation = MOVE) -> Tensor:
    return augmentation(image(), torch.tensor([[*draws, 0.0, 0.0][:5]]))[0, 0]


def test_the_identity_draws_change_nothing():
    assert torch.equal(changed((KEEP, SAME, SAME)), image()[0, 0])


def test_a_flip_mirrors_left_and_right():
    assert torch.equal(changed((FLIP, SAME, SAME)), image()[0, 0].flip(1))


def test_a_translation_leaves_black():
    rows = image()[0, 0]
    down = changed((KEEP, LEFT, SAME))  # row 0 shows what lies above the image
    assert torch.equal(down[1:], rows[:-1])
    assert not down[0].any()
    left = changed((KEEP, SAME, RIGHT))
    assert torch.equal(left[:, :-1], rows[:, 1:])
    assert not left[:, -1].any()


def test_flip_and_translation_together():
    both = changed((FLIP, RIGHT, LEFT))
    assert torch.equal(both[:-1, 1:], image()[0, 0].flip(1)[1:, :-1])
    assert not both[-1].any()
    assert not both[:, 0].any()


def test_what_is_not_asked_for_is_left_out():
    draws = (FLIP, LEFT, RIGHT, 0.5, 0.5)
    assert torch.equal(changed(draws, Augmentation()), image()[0, 0])
    assert torch.equal(changed(draws, Augmentation(flip=True)), image()[0, 0].flip(1))
    assert torch.equal(changed(draws, Augmentation(translate=1)), changed((KEEP, LEFT, RIGHT)))


def test_each_image_has_its_own_draws():
    augmentation = MOVE
    draws = torch.tensor([[KEEP, SAME, SAME, 0, 0], [FLIP, SAME, RIGHT, 0, 0]])
    pair = augmentation(image().repeat(2, 1, 1, 1), draws)
    assert torch.equal(pair[0, 0], changed((KEEP, SAME, SAME)))
    assert torch.equal(pair[1, 0], changed((FLIP, SAME, RIGHT)))


def test_every_translation_of_up_to_two_pixels_occurs():
    x = torch.zeros(2000, 3, 16, 16)
    x[:, :, 8, 8] = 1
    moved = Augmentation(flip=True, translate=2)(x, uniform((5,), torch.arange(2000), "all"))
    places = {(int(r), int(c)) for r, c in zip(*moved[:, 0].nonzero(as_tuple=True)[1:], strict=True)}
    # two in each direction; a flip takes column 8 to 7
    assert places == {(r, c) for r in range(6, 11) for c in range(5, 11)}
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_cutout_is_a_black_square_whose_centre_is_in_the_image():
    # centre (0.5 · 8, 0.25 · 8) = (4, 2): rows 3 and 4, columns 1 and 2
    cut = changed((KEEP, SAME, SAME, 0.5, 0.25), Augmentation(cutout=2)) == 0
    assert cut.nonzero().tolist() == [[3, 1], [3, 2], [4, 1], [4, 2]]
    # centre (0, 7): of rows -1 and 0, columns 6 and 7, those that exist
    corner = changed((KEEP, SAME, SAME, 0.0, 0.99), Augmentation(cutout=2)) == 0
    assert corner.nonzero().tolist() == [[0, 6], [0, 7]]


# --- the held-out examples --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.data())
def test_training_and_validation_are_disjoint_and_complete(available: int, data: st.DataObject):
    n_val = data.draw(st.integers(0, available))
    train, val = hold_out(available, None, n_val)
    assert sorted(train.tolist() + val.tolist()) == list(range(available))
    assert len(val) == n_val
    n_train = data.draw(st.integers(0, available - n_val))
    fewer, same = hold_out(available, n_train, n_val)
    assert torch.equal(fewer, train[:n_train])
    assert torch.equal(same, val)


def test_the_split_is_shuffled_and_always_the_same():
    torch.manual_seed(1)
    first = hold_out(100, None, 30)
    torch.manual_seed(2)
    second = hold_out(100, None, 30)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(first[1].tolist()) != list(range(30))


# --- the sampler ------------------------------------------------------------------------------------------------------


def test_an_epoch_deals_each_training_example_once(sampler: Sampler):
    batches = list(sampler.epoch(0))
    assert [len(batch.y) for batch in batches] == [4, 4, 2]
    assert len(sampler) == 3
    assert sorted(order(sampler, 0)) == list(range(0, N, 2))
    for batch in batches:
        assert torch.equal(batch.x[:, 0, 0, 0], batch.y / N)  # white is 1
        assert batch.threat_model == sampler.threat_model


def test_the_order_is_a_function_of_seed_and_epoch(sampler: Sampler):
    assert order(sampler, 0) == order(sampler, 0)
    orders = [order(sampler, 0), order(sampler, 1), order(replace(sampler, seed=1), 0), list(range(0, N, 2))]
    assert len({tuple(row) for row in orders}) == 4


def noises(sampler: Sampler, epoch: int, salt: str = "model") -> dict[int, Tensor]:
    return {
        int(y): row
        for batch in sampler.epoch(epoch)
        for y, row in zip(batch.y, batch.noise(salt), strict=True)
    }  # fmt: skip


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_noise_of_an_example_does_not_depend_on_the_batches(sampler: Sampler):
    before = noises(sampler, 0)
    assert same(before, noises(replace(sampler, batch_size=3), 0))
    assert same(before, noises(replace(sampler, indices=torch.arange(N)), 0))
    others = [noises(sampler, 1), noises(sampler, 0, "expert0"), noises(replace(sampler, seed=1), 0)]
    assert not any(same(before, other) for other in others)


def test_the_noise_is_uniform_between_minus_one_and_one(sampler: Sampler):
    (batch, *_) = replace(sampler, batch_size=10).epoch(0)
    noise = batch.noise("model")
    assert noise.shape == batch.x.shape
    assert noise.min() < -0.98
    assert noise.max() > 0.98
    assert abs(noise.mean()) < 0.1


def test_an_example_is_augmented_by_itself_and_by_the_epoch(sampler: Sampler):
    gradient = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(N, 1, 8, 8)
    sampler = replace(sampler, images=Images(gradient, torch.arange(N), 64, N, N), augmentation=ALL)

    def images(sampler: Sampler, epoch: int) -> dict[int, Tensor]:
        return {int(y): x for batch in sampler.epoch(epoch) for x, y in zip(batch.x, batch.y, strict=True)}

    before = images(sampler, 0)
    assert same(before, images(replace(sampler, batch_size=3), 0))
    assert not same(before, images(sampler, 1))
    assert len({tuple(row.flatten().tolist()) for row in before.values()}) > 5


def test_noise_is_gaussian_and_an_examples_own(sampler: Sampler):
    grey = torch.full((N, 1, 32, 32), 10, dtype=torch.uint8)
    sampler = replace(sampler, images=Images(grey, torch.arange(N), 20, N, N))

    def images(sampler: Sampler, epoch: int) -> dict[int, Tensor]:
        return {int(y): x for batch in sampler.epoch(epoch) for x, y in zip(batch.x, batch.y, strict=True)}

    assert all((x == 0.5).all() for x in images(sampler, 0).values())
    noisy = replace(sampler, noise_sigma=0.25)
    before = images(noisy, 0)
    assert same(before, images(replace(noisy, batch_size=3), 0))
    assert not same(before, images(noisy, 1))
    assert not same(before, images(replace(noisy, seed=1), 0))
    assert not torch.equal(before[0], before[2])
    noise = (torch.stack(list(before.values())) - 0.5) / 0.25
    # 10,240 numbers: the standard errors of mean and deviation are 0.01 and 0.007; |noise| > 2 has 4.6 % ± 0.2
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert (noise.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.01)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, batch_size=7),
        lambda s: replace(s, augmentation=ALL),
        lambda s: replace(s, noise_sigma=0.1),
    ],
)
def test_dealing_leaves_torchs_own_random_state_alone(sampler: Sampler, change: Callable[[Sampler], Sampler]):
    before = torch.random.get_rng_state()
    for batch in change(sampler).epoch(0):
        batch.noise("model")
    assert torch.equal(torch.random.get_rng_state(), before)


# --- several processes ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 6))
def test_the_processes_parts_make_up_the_batches_of_one_process(n: int, processes: int, batch_size: int):
    x = torch.zeros(n, 1, 1, 1, dtype=torch.uint8)
    threat, cpu = ThreatModel(norm="Linf", eps=0.1), torch.device("cpu")
    one = Sampler(Images(x, torch.arange(n), 1, n, n), torch.arange(n), batch_size * processes, threat, 0, cpu)
    ranks = [replace(one, batch_size=batch_size, rank=r, processes=processes) for r in range(processes)]
    assert {len(sampler) for sampler in ranks} == {len(one)}
    for whole, *parts in zip(one.epoch(0), *(sampler.epoch(0) for sampler in ranks), strict=True):
        dealt = [int(y) for part in parts for y in part.y if part.weight]
        assert sorted(dealt) == sorted(whole.y.tolist())
        # the mean over processes of weighted means is the mean over the batch
        means = [part.weight * part.y.double().mean() for part in parts]
        assert float(sum(means)) / processes == pytest.approx(float(whole.y.double().mean()))


def test_batches_made_ahead_are_the_same_and_an_error_in_making_one_is_raised(sampler: Sampler):
    assert [batch.y.tolist() for batch in ahead(sampler.epoch(0))] == [batch.y.tolist() for batch in sampler.epoch(0)]
    broken = replace(sampler, indices=torch.tensor([0, 99]))
    with pytest.raises(IndexError):
        list(ahead(broken.epoch(0)))


def test_channels_last_changes_the_memory_and_not_the_images(sampler: Sampler):
    three = Images(sampler.images.x.repeat(1, 3, 1, 1), sampler.images.y, N, N, N)
    plain = replace(sampler, images=three, augmentation=ALL)
    batch = next(replace(plain, memory_format=torch.channels_last).epoch(0))
    assert torch.equal(batch.x, next(plain.epoch(0)).x)
    assert batch.x.is_contiguous(memory_format=torch.channels_last)
    assert not batch.x.is_contiguous()

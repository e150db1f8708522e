"""Whether a model answers by the single image alone: planted models that do not, and their neighbours that do."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.models.dependence import Dependence, by_batch, dependence, same_logits
from bench.models.deployed import full_float32
from bench.models.foreign import Guarded
from bench.models.moe import MoE

INFO = {"name": "half", "architecture": "Linear", "checkpoint_sha256": "", "routing_visible": False}
FUNCTION = Dependence(chance=False, batch=False, state=False, in_place=False)


@pytest.fixture(autouse=True)
def short_probes() -> None:
    """Everything as it is outside tests."""


class Planted(nn.Module):
    """A linear classifier of 8×8 pixels; `change` makes its logits (B, 3) from (itself, x, logits)."""

    def __init__(self, change: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.change = 0, change
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x, self.linear(x.flatten(1)))


def numpy_noise(model: Any, x: Tensor, z: Tensor) -> Tensor:
    return z + 0.01 * torch.from_numpy(np.random.standard_normal(z.shape)).float()


def own_noise(model: Any, x: Tensor, z: Tensor) -> Tensor:
    return z + 0.01 * torch.randn(z.shape, generator=model.own)


def seeded(model: Any, x: Tensor, z: Tensor) -> Tensor:
    torch.manual_seed(0)
    return z + torch.randn(z.shape)[:1]


def rare(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """Chance decides near a boundary alone, where none of the images lies: the draw itself is seen."""
    return torch.where((z[:, :1] + 1e-9 * torch.randn(len(z), 1)) > 1e6, -z, z)


def counted(model: Any, x: Tensor, z: Tensor) -> Tensor:
    model.calls += 1
    return -z if model.calls > 1000 else z


def observed(model: Any, x: Tensor, z: Tensor) -> Tensor:
    model.seen.copy_(torch.maximum(model.seen, x.max()))
    return z


def cached(model: Any, x: Tensor, z: Tensor) -> Tensor:
    model.last, model.size = z.detach(), len(z)
    return z


def strict(model: Any, x: Tensor, z: Tensor) -> Tensor:
    assert x.min() >= 0
    assert x.max() <= 1
    return z


def in_place(model: Any, x: Tensor, z: Tensor) -> Tensor:
    x.sub_(0.3)
    return z


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m, x, z: z, {}),
        (cached, {}),
        (lambda m, x, z: 1e-6 * z, {}),
        (lambda m, x, z: torch.where(z > 0, torch.inf, z), {}),
        (in_place, {"in_place": True}),
        (lambda m, x, z: z + 0.01 * torch.randn_like(z), {"chance": True}),
        (lambda m, x, z: z + 0.01 * random.random(), {"chance": True}),
        (numpy_noise, {"chance": True}),
        (own_noise, {"chance": True}),
        (seeded, {"chance": True}),
        (rare, {"chance": True}),
        (counted, {"state": True}),
        (observed, {"state": True}),
        (lambda m, x, z: z - z.mean(0), {"batch": True}),
        (lambda m, x, z: 1e-6 * (z - z.mean(0)), {"batch": True}),
        (lambda m, x, z: z if len(x) > 1 else -z, {"batch": True}),
        (lambda m, x, z: z if len(x) > 31 else -z, {"batch": True}),
        (lambda m, x, z: z + (torch.arange(len(z)) > 20)[:, None], {"batch": True}),
        (lambda m, x, z: z + z.roll(1, 0) * (len(z) > 4), {"batch": True}),
    ],
)
def test_what_a_model_depends_on_is_found_whatever_the_batch_size(change: Any, found: dict[str, bool]):
    torch.manual_seed(0)
    for size in (1, 4, 64):
        model = Planted(change).eval()
        torch.manual_seed(1)
        x = torch.rand(size, 1, 8, 8)
        kept, states = x.clone(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
        seen = dependence(model, x)
        assert seen == Dependence(**{**vars(FUNCTION), **found}), size
        assert torch.equal(x, kept)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()
        assert (seen.reasons == ()) == (found.keys() <= {"in_place"})


def test_a_foreign_model_that_checks_its_images_is_asked_about_legal_ones():
    assert dependence(Guarded(Planted(strict).eval()).eval(), torch.rand(4, 1, 8, 8)).reasons == ()


def masked_last(z: Tensor) -> Tensor:
    return torch.cat([z[:, :-1], torch.full_like(z[:, -1:], -1e9)], 1)


def masked_but_two(z: Tensor) -> Tensor:
    return z.masked_fill(z < z.topk(2).values[:, 1:], -1e9)


@pytest.mark.parametrize("hides", [masked_last, masked_but_two, lambda z: z + 1e3, lambda z: z.log_softmax(1)])
def test_logits_that_are_far_from_the_others_hide_neither_chance_nor_the_batch(hides: Callable[[Tensor], Tensor]):
    """By the largest logit, 1e9, all others would be equal but for rounding."""
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    changes = {
        "chance": lambda m, x, z: hides(numpy_noise(m, x, z)),
        "batch": lambda m, x, z: hides(z - z.mean(0) / 10),
        "": lambda m, x, z: hides(z),
    }
    for seen, change in changes.items():
        torch.manual_seed(0)
        assert dependence(Planted(change).eval(), x) == Dependence(
            **{**vars(FUNCTION), **({seen: True} if seen else {})}
        )


def test_logits_are_the_same_but_for_rounding_of_what_may_win():
    z = torch.tensor([[1.0, 3.0, -2.0, 0.0], [4.0, 2.0, 0.0, -1.0]])  # margins of 2, 3 and 4 from best to third
    assert same_logits(z + 1.9e-4, z)  # 1e-4 of the median margin, which is 2, ten times: 3 to the third is less
    assert not same_logits(z + 4e-4, z)
    far = torch.cat([z, torch.full((2, 1), -1e9)], 1)
    assert same_logits(far + torch.tensor([0, 0, 0, 0, 1e3]), far)  # what float32 may round there
    assert not same_logits(far + torch.tensor([0, 0, 0, 1e-2, 0]), far)
    assert not same_logits(far.masked_fill(far == 3, torch.inf), far)
    assert same_logits(torch.zeros(2, 3), torch.zeros(2, 3))
    assert same_logits(torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan))


def test_batch_norm_in_training_mode_is_seen_and_in_eval_mode_is_not():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    x = torch.rand(4, 1, 8, 8)
    assert dependence(net.eval(), x) == FUNCTION
    net.train()
    assert dependence(net, x).reasons == ("outputs depend on the batch", "forward passes change the model's state")


class Halved(nn.Module):
    """A transformer that computes in half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.layers, self.head = nn.Linear(8, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x.flatten(1, 2).to(self.head.weight.dtype))).mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_in_half_precision_is_no_dependence(dtype: torch.dtype):
    """torch's faster attention, where no gradient is, rounds otherwise; so does a batch of another size."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with full_float32():
        assert dependence(Guarded(Halved(dtype)).eval(), torch.rand(4, 1, 8, 8)) == FUNCTION
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_in_half_precision_the_batch_is_seen_all_the_same():
    class Capacity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1)[:, :3].half()
            return torch.cat([z[:4], z[4:] + 0.1])

    assert dependence(Guarded(Capacity()).eval(), torch.rand(4, 1, 8, 8)).batch


def test_a_mixture_answers_image_by_image_and_one_with_a_capacity_does_not(linear_moe: Any):
    class Capacity(MoE):
        """At most four images of a batch go to the expert that they choose, as in Switch; the others to the first."""

        def route(self, x: Tensor) -> Any:
            trace = super().route(x)
            chosen = trace.selected_experts.clone()
            chosen[4:] = 0
            return trace._replace(selected_experts=chosen)

    weights = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    moe = linear_moe(weights[:3].tolist(), weights[3].tolist(), 1, "softmax").eval()
    x = torch.rand(4, 1, 8, 8)
    assert dependence(moe, x) == FUNCTION
    assert dependence(Capacity(moe.experts, moe.router).eval(), x).reasons == ("outputs depend on the batch",)


def _first_rows(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """A gradient for the first 32 images alone."""
    return torch.cat([z[:32], z[32:].detach()])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model, x, z: z, []),
        (lambda model, x, z: z.bfloat16() if len(x) > 50 else z.bfloat16() * 1.003, []),
        (lambda model, x, z: z * torch.where(torch.arange(len(x)) % 50 == 7, 1.0, 1.0)[:, None], []),
        (lambda model, x, z: -z if len(x) > 64 else z, ["outputs depend on the batch"]),
        (lambda model, x, z: -z if 64 < len(x) < 100 else z, ["outputs depend on the batch"]),
        (_first_rows, ["gradients depend on the batch"]),
        (lambda model, x, z: 2 * z.detach() - z if len(x) > 32 else z, ["gradients depend on the batch"]),
        (lambda model, x, z: z.detach() if len(x) > 32 else z, ["gradients depend on the batch"]),
        (lambda model, x, z: z.detach(), []),  # it has none, which is told elsewhere
    ],
)
def test_a_whole_block_is_answered_as_its_pieces_are(change: Callable[..., Tensor], found: list[str]):
    torch.manual_seed(0)
    model, x = Guarded(Planted(change)).eval(), torch.rand(120, 1, 8, 8)
    model(x)  # whose dtype it then knows
    assert by_batch(model, x, cut=99) == found

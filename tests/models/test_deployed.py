"""Whether a model answers by the single image alone: planted models that do not, and their neighbours that do."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.models.deployed import Dependence, dependence
from bench.models.moe import MoE

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


def test_batch_norm_in_training_mode_is_seen_and_in_eval_mode_is_not():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    x = torch.rand(4, 1, 8, 8)
    assert dependence(net.eval(), x) == FUNCTION
    net.train()
    assert dependence(net, x).reasons == ("outputs depend on the batch", "forward passes change the model's state")


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

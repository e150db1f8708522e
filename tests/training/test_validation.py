"""Held-out accuracy on models whose weakness PGD on the whole does not show, by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.validation import attack

THREAT = ThreatModel(norm="Linf", eps=0.1)


class Says(nn.Module):
    """Logits (B, 2) of pixels (B, 1, 1, 1): 0, and so many times what the pixel is above 0.5, plus a constant."""

    def __init__(self, slope: float, constant: float = 0.0) -> None:
        super().__init__()
        self.slope, self.constant = slope, constant
        self.asked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        other = self.slope * (x.flatten(1) - 0.5) + self.constant
        return torch.cat([torch.zeros_like(other), other], 1)


class Gate(nn.Module):
    """Scores (B, E): the last expert above 0.55, else the first."""

    def __init__(self, num_experts: int = 2) -> None:
        super().__init__()
        self.others = num_experts - 2

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full((len(x), 1), 0.55), torch.zeros(len(x), self.others), x.flatten(1)], 1)


def hiding() -> MoE:
    """PGD starts at an expert without a slope, and stays; beyond 0.55 is one that is wrong."""
    return MoE([Says(0.0, -1.0), Says(50.0)], Gate(), gate="argmax")


def batches(*pixels: float, weight: float = 1.0) -> Iterator[Batch]:
    x = torch.tensor(pixels).view(-1, 1, 1, 1)
    yield Batch(x, torch.zeros(len(x), dtype=torch.int64), THREAT, lambda _: torch.zeros_like(x), weight)


def test_an_expert_that_pgd_on_the_whole_does_not_reach_counts():
    # of 0.5 and 0.4 the first can be taken to 0.6, where the second expert answers; the second ends at 0.5
    assert attack(hiding(), batches(0.5, 0.4), THREAT, 4) == {
        "sa": 2, "val_ra_pgd": 2, "ra": 1, "route_flip_rate": 0,
    }  # fmt: skip


def test_what_fools_an_expert_alone_counts_only_if_it_fools_the_model():
    model = MoE([Says(0.0, -1.0), Says(50.0)], Gate(), gate="argmax")
    model.experts[1].constant = 4.0  # wrong from 0.42 on, which the router sends to the first
    assert attack(model, batches(0.35), THREAT, 4)["ra"] == 1


@pytest.mark.parametrize("where", ["standard", "robust"])
def test_the_experts_of_both_branches_of_a_dual_are_attacked(where: str):
    plain = Says(0.0, -0.1)
    branches = {"standard": plain, "robust": plain} | {where: hiding()}
    found = attack(DualModel(**branches, alpha=0.5, combine="logits"), batches(0.5, 0.4), THREAT, 4)
    assert (found["val_ra_pgd"], found["ra"]) == (2, 1)


def test_every_expert_of_a_dual_with_unlike_branches_is_attacked():
    standard = MoE([Says(0.0, -1.0) for _ in range(3)], Gate(3), gate="argmax")
    robust = MoE([Says(0.0, -1.0) for _ in range(2)], Gate(), gate="argmax")
    attack(DualModel(standard, robust), batches(0.5), THREAT, 4)
    experts = [*standard.experts, *robust.experts]
    assert all(expert.asked for expert in experts)


def test_experts_are_attacked_where_the_model_still_is_right():
    model = hiding()
    attack(model, batches(0.7, 0.5, 0.4), THREAT, 4)  # the first is wrong to begin with
    # the first expert alone: two images; the model then asks it for the same; the second alone: two
    assert set(model.experts[1].asked) == {1, 2}


class Inside(nn.Module):
    """Two blocks of an MoE in a row, as one network: each adds what its first or second expert says."""

    def __init__(self, slope: float, k: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(0.0, k), Block(slope, k)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum(0)


class Block(nn.Module):
    def __init__(self, slope: float, k: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Says(0.0, -1.0), Says(slope, -1.0)])
        self.gate, self.num_selected_experts = Gate(), k

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        chosen = scores.argmax(1) if self.num_selected_experts == 1 else torch.zeros(len(x), dtype=torch.int64)
        return torch.stack([expert(x) for expert in self.experts])[chosen, torch.arange(len(x))]


def test_experts_of_gates_inside_a_network_are_attacked_on_their_routes():
    # as above: of 0.5 and 0.4 the first reaches 0.6, where the second block's second expert adds 5 - 1 to -1
    assert attack(Inside(50.0), batches(0.5, 0.4), THREAT, 4) == {"sa": 2, "val_ra_pgd": 2, "ra": 1}


def test_nothing_is_forced_in_a_soft_mixture():
    assert "val_ra_pgd" not in attack(Inside(50.0, k=2), batches(0.5), THREAT, 4)


def test_a_network_without_experts_is_attacked_by_itself():
    assert attack(Says(50.0, -2.0), batches(0.5, 0.3), THREAT, 4) == {"sa": 2, "ra": 1}


def test_a_batch_without_weight_is_not_counted():
    assert attack(hiding(), batches(0.5, weight=0.0), THREAT, 4) == {
        "sa": 0, "val_ra_pgd": 0, "ra": 0, "route_flip_rate": 0,
    }  # fmt: skip

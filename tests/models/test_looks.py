"""What one pass shows of a gate that chooses inside: among groups of experts, or by a mask."""

from collections.abc import Callable

import pytest
import torch
from one_layer import Block, X, named, tokens
from torch import Tensor, nn

from bench.models.choices import find_choices
from bench.models.sites import read


class Grouped(nn.Module):
    """Two experts of the best group of them (DeepSeek-V2), chosen inside; a group is as good as its best expert."""

    def __init__(self, experts: int, groups: int, in_place: bool = False) -> None:
        super().__init__()
        self.fc, self.groups, self.in_place = nn.Linear(6, experts), groups, in_place

    def forward(self, x: Tensor) -> Tensor:
        p = self.fc(x).softmax(-1).to(x.dtype)  # the same tensor
        best = p.unflatten(-1, (self.groups, -1)).max(-1).values.topk(1, -1).indices
        group = torch.zeros(*p.shape[:-1], self.groups).scatter(-1, best, 1.0)
        closed = group.repeat_interleave(p.shape[-1] // self.groups, -1) == 0
        if self.in_place:  # DeepSeek's own code
            among, shape = p.clone().unflatten(-1, (self.groups, -1)), (*p.shape[:-1], self.groups, -1)
            chosen = among.masked_fill_(closed.view(shape), -1.0).flatten(-2).topk(2, -1).indices
        else:
            chosen = p.masked_fill(closed, 0.0).topk(2, -1).indices
        return p * torch.zeros_like(p).scatter(-1, chosen, 1.0)


@pytest.mark.parametrize(("groups", "in_place"), [(1, False), (2, False), (2, True)])
def test_a_choice_among_groups_of_experts_is_not_taken_for_that_among_experts(groups: int, in_place: bool):
    torch.manual_seed(0)
    model = Block(Grouped(6, groups, in_place), lambda gate, x: gate(tokens(x)), experts=6)
    (site,) = named(model, "score").sites
    assert site.words == "score (top-2 of 6)"
    assert not find_choices(model, X, [site])  # forced before the groups are chosen
    scores = read(model, [site], X).scores["score"]
    with torch.no_grad():
        assert torch.equal(scores, model.score.fc(tokens(model.embed(X))))


class Masking(nn.Module):
    """A gate that leaves the two largest of its scores."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.mask = nn.Linear(6, 3), mask

    def forward(self, z: Tensor) -> Tensor:
        scores = self.linear(z)
        return self.mask(scores, scores.topk(2, -1).values[..., [-1]])


def in_place(scores: Tensor, least: Tensor) -> Tensor:
    scores[scores < least] = -torch.inf
    return scores


@pytest.mark.parametrize(
    "mask",
    [
        lambda scores, least: scores.masked_fill(scores < least, -torch.inf),
        lambda scores, least: torch.where(least > scores, -1e9, scores),
        in_place,
    ],
)
def test_a_gate_that_masks_by_its_own_scores_is_forced_at_these(mask: Callable[[Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    model = Block(Masking(mask), lambda gate, x: gate(tokens(x)).softmax(-1))
    (site,) = (found := named(model, "score")).sites
    assert (site.k, site.num_experts, site.call) == (2, 3, 0)
    assert not find_choices(model, X, found.sites)
    scores = read(model, [site], X).scores["score"]
    assert scores.isfinite().all()


def in_priority(scores: Tensor) -> Tensor:
    """V-MoE: the tokens of an image choose in the order of their best weights, and the last ones choose in vain."""
    weights, chosen = scores.softmax(-1).topk(2, -1)
    order = weights.amax(-1).argsort(1, descending=True)
    kept = order.argsort(1) < 3
    return torch.zeros_like(scores).scatter(-1, chosen, weights * kept[..., None])


def dispatched(scores: Tensor) -> Tensor:
    """GShard: weights are products of scores and the mask of the choice, and where they are not 0 is dispatched to."""
    weights = scores.softmax(-1)
    mask = nn.functional.one_hot(weights.argmax(-1), 3).to(weights)
    combined = torch.einsum("bt,bte->bte", torch.einsum("bte,bte->bt", weights, mask), mask)
    return combined * combined.bool()


@pytest.mark.parametrize(("made", "k"), [(in_priority, 2), (dispatched, 1)])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_computed_from_scores_and_their_choice_is_no_other_choice(
    made: Callable[[Tensor], Tensor], k: int, inside: bool
):
    class Gate(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return made(super().forward(x)) if inside else super().forward(x)

    torch.manual_seed(0)
    model = Block(Gate(6, 3), lambda gate, x: gate(tokens(x)) if inside else made(gate(tokens(x))))
    (site,) = named(model, "score").sites
    assert site.words == f"score (top-{k} of 3)"
    assert not find_choices(model, X, [site])

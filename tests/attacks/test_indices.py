"""Gradients for what is looked up by an index: values stay, and what another place holds is led to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attacks.gradients import StraightThrough
from bench.attacks.indices import Indices

#: What is looked up: the first of three holds 1, the second 2, the third 5.
TABLE = torch.tensor([1.0, 2.0, 5.0])
SCORES = torch.tensor([[0.5, 0.3, 0.1], [0.2, 0.9, 0.4]])
EVERY = TABLE.expand(2, 3)
ROWS = torch.arange(2)


def gradient(function: Callable[[Tensor], Tensor], scores: Tensor = SCORES) -> Tensor:
    z = scores.clone().requires_grad_()
    with StraightThrough(far=True):
        value = function(z)
    assert torch.equal(value.detach(), function(scores))
    (found,) = torch.autograd.grad(value.sum(), z)
    return found


def scattered(s: Tensor, what: float | Tensor = 1.0) -> Tensor:
    chosen = torch.zeros(2, 3)
    chosen.scatter_(1, s.argmax(1, keepdim=True), what)
    return chosen @ TABLE


def embedded(s: Tensor) -> Tensor:
    layer = nn.Embedding.from_pretrained(TABLE[:, None])
    return layer(s.argmax(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda s: TABLE[s.argmax(1)],
        lambda s: TABLE[s.argmax(-1, keepdim=True)],
        lambda s: TABLE[(-s).argmin(1)],
        lambda s: TABLE[torch.argmax(s, dim=1)],
        lambda s: TABLE[s.max(1).indices],
        lambda s: TABLE[s.max(dim=1)[1]],
        lambda s: TABLE[(-s).min(1).indices],
        lambda s: TABLE[s.topk(1).indices[:, 0]],
        lambda s: TABLE[(-s).topk(1, largest=False).indices],
        lambda s: TABLE[s.sort(descending=True).indices[..., 0]],
        lambda s: TABLE[s.argsort(dim=1)[:, -1]],
        lambda s: TABLE[s.kthvalue(3).indices],
        lambda s: TABLE[s.T.argmax(0)],
        lambda s: TABLE[:, None][s.argmax(1).unsqueeze(1).squeeze(1)],
        lambda s: torch.zeros(2, 3).scatter_add_(1, s.argmax(1, keepdim=True).T.mT, torch.ones(2, 1)) @ TABLE,
        lambda s: F.embedding(s.argmax(1), TABLE[:, None]),
        lambda s: F.embedding(s.argmax(1).int().contiguous(), TABLE[:, None]),
        lambda s: TABLE[s.argmax(1).to(torch.int32).long()],
        embedded,
        lambda s: TABLE.index_select(0, s.argmax(1)),
        lambda s: EVERY.gather(1, s.argmax(1, keepdim=True)),
        lambda s: EVERY[..., None].expand(2, 3, 4).gather(1, s.argmax(1)[:, None, None].expand(2, 1, 4)),
        lambda s: EVERY[ROWS, s.argmax(1)],
        lambda s: EVERY[..., None].repeat(1, 1, 4)[ROWS, s.argmax(1)],
        lambda s: F.one_hot(s.argmax(1), 3).float() @ TABLE,
        lambda s: F.one_hot(torch.tensor([0, 1, 4])[s.argmax(1)], 6).float() @ torch.tensor([1.0, 2, 0, 0, 5, 0]),
        lambda s: (s.argmax(1) == 2).float() * 4,
        lambda s: (s.argmax(1)[:, None] == torch.arange(3)).float() @ TABLE,
        lambda s: torch.where(s.argmax(1) == 2, 4.0, 1.0),
        lambda s: torch.zeros(2, 3).scatter(1, s.argmax(1, keepdim=True), 1.0) @ TABLE,
        lambda s: torch.zeros(2, 3).scatter(1, s.argmax(1, keepdim=True), torch.ones(2, 1)) @ TABLE,
        scattered,
        lambda s: torch.zeros(2, 3).scatter_add(1, s.argmax(1, keepdim=True), torch.ones(2, 1)) @ TABLE,
        lambda s: TABLE[s[:, None].expand(2, 3, 3).argmax(2).mode(1).values],  # a vote
        lambda s: F.one_hot(torch.mode(s[..., None].expand(2, 3, 3).argmax(1), 1, True)[0], 3).float()[:, 0] @ TABLE,
        lambda s: TABLE[s.masked_fill(torch.tensor([False, False, False]), -torch.inf).argmax(1)],
    ],
)  # fmt: skip
def test_values_stay_and_what_holds_more_is_to_be_raised(function: Callable[[Tensor], Tensor]):
    slope = gradient(function)
    assert (slope[:, 2] > 0).all()  # the third holds most, and is the best in neither row
    assert (slope.sum(1).abs() < 1e-5).all()  # an index does not change where all scores rise alike
    assert slope[0, 0] < 0
    assert slope[1, 1] < 0


def test_an_exported_program_calls_by_names_of_its_own():
    class Looks(nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return TABLE.index_select(0, s.relu().argmax(1))

    slope = gradient(torch.export.export(Looks(), (SCORES,)).module())
    assert (slope[:, 2] > 0).all()


def test_the_gradient_is_that_of_a_softmax_at_the_scores_spread():
    """By hand: scores 0 and 1 lie 1 and 0 from the best; their standard deviation is 0.5, so w = softmax(−2, 0)."""
    z = torch.tensor([[0.0, 1.0]], requires_grad=True)
    with StraightThrough(far=True):
        value = torch.tensor([3.0, 7.0])[z.argmax(1)]
    (found,) = torch.autograd.grad(value, z)
    w = torch.tensor([-2.0, 0.0]).softmax(0)
    rise = 2 * w[0] * w[1] * (7 - 3)
    assert value.item() == 7
    torch.testing.assert_close(found, torch.stack([-rise, rise])[None])


def test_a_vote_of_the_nearest_has_a_gradient_towards_the_others():
    """Each of the three nearest has one vote: those of the two classes rise as their own distances fall."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    distances = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    slope = gradient(lambda d: F.one_hot(labels[d.topk(3, largest=False).indices], 2).float().sum(1)[:, 1], distances)
    assert (slope[0, 3:] < 0).all()
    assert slope[0, :2].sum() > 0


def test_what_was_left_out_stays_out():
    scores = SCORES.clone()
    scores[:, 0] = -torch.inf
    slope = gradient(lambda s: TABLE[s.argmax(1)], scores)
    assert (slope[:, 0] == 0).all()
    assert slope.isfinite().all()
    assert slope[1, 2] > 0 > slope[1, 1]


def test_what_is_found_among_what_was_left_out_tells_nothing():
    scores = SCORES.clone()
    scores[:, 0] = -torch.inf
    slope = gradient(lambda s: torch.zeros(2, 3).scatter(1, s.topk(3).indices[:, ::2], 1.0) @ TABLE, scores)
    assert slope.isfinite().all()
    assert slope[:, 2].any()


def test_a_table_with_gradients_keeps_them():
    table = TABLE.clone().requires_grad_()
    with StraightThrough(far=True):
        value = table[SCORES.clone().requires_grad_().argmax(1)]
    assert torch.autograd.grad(value.sum(), table)[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s.max() + s.min(),
        lambda s: s.sort(1).values * torch.arange(3),
        lambda s: s[s.argmax(1) == 0],
        lambda s: s.index_put((ROWS, s.argmax(1)), torch.zeros(2)),
        lambda s: s + torch.bincount(s.argmax(1), minlength=3),
        lambda s: s.gather(1, s.argsort(1)),
        lambda s: s.flatten()[s.argmax()],
        lambda s: s.scatter_add(1, s.argmax(1, keepdim=True), torch.ones(2, 1)),
        lambda s: TABLE[: s.argmax(1)[0] + 1].sum() + s,
        lambda s: s[:, :0].sort(1).values.sum() + s,
        lambda s: TABLE.double()[s.argmax(1)] + s[:, 0],
        lambda s: s[:, :1].argmax(1) + s[:, 0],
        lambda s: s * (s.argmax(1)[:, None] == s.argmin(1)[:, None]),
        lambda s: s * (s.argmax(1)[:, None] == 1.0),
        lambda s: s * s.argmax(1).to(s.dtype)[:, None],
        lambda s: s + torch.tensor([2**40, 3, 5])[s.argmax(1)][:, None],
        lambda s: s.flatten()[torch.max(s, 1, keepdim=True).indices.squeeze()],
    ],
)  # fmt: skip
def test_whatever_else_is_made_of_an_index_is_as_before(function: Callable[[Tensor], Tensor]):
    assert gradient(function).isfinite().all()


def test_where_a_route_is_forced_its_index_has_no_gradient():
    with StraightThrough():
        value = TABLE[SCORES.clone().requires_grad_().argmax(1)]
    assert not value.requires_grad


def test_too_many_weights_are_not_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.attacks.indices.AT_MOST", 5)
    with StraightThrough(far=True):
        value = TABLE[SCORES.clone().requires_grad_().argmax(1)]
    assert not value.requires_grad


def test_no_index_is_kept_of_what_has_none():
    indices = Indices()
    indices.find(torch.max, (SCORES,), {}, SCORES.max())
    assert not indices

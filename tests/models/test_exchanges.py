"""Whether a gate compares its scores with more than one another, from answers as each is raised."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.models.exchanges import thresholded
from bench.models.foreign import Guarded
from bench.models.gates import find_gates
from bench.models.sites import selected

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """MoE layers one after the other, each beside its shortcut."""

    def __init__(self, weigh: Callable[[Tensor], Tensor], depth: int, experts: int = 4) -> None:
        super().__init__()
        self.embed, self.head, self.weigh = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 10), weigh
        self.gates = nn.ModuleList(nn.Linear(6, experts) for _ in range(depth))
        self.mlps = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(experts)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for gate, mlps in zip(self.gates, self.mlps, strict=True):
            x = x + (self.weigh(gate(x))[..., None] * torch.stack([mlp(x) for mlp in mlps], 2)).sum(2)
        return self.head(x.mean(1))


def hot(scores: Tensor, k: int) -> Tensor:
    return scores.softmax(-1) * selected(scores, k)


def renormalised(scores: Tensor) -> Tensor:
    weights = hot(scores, 2)
    return weights / weights.sum(-1, keepdim=True)


def favoured(scores: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """Top-2 with a bias for the selection alone, as against experts that are chosen too often."""
    p = made(scores)
    return p * selected(p + torch.tensor([0.3, 0.0, -0.2, 0.1]), 2)


def of_the_best_group(scores: Tensor) -> Tensor:
    """Top-1 of the better of two groups, by the sum of its two best (DeepSeek-V3)."""
    p = scores.sigmoid()
    group = selected(p.unflatten(-1, (2, 2)).sum(-1), 1)
    return p * selected(p.masked_fill(~group.repeat_interleave(2, -1), 0.0), 1)


class Masked(Layers):
    """With a class that is never given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.arange(10) == 3, -1e9)


def test_a_masked_class_hides_no_jump():
    torch.manual_seed(0)
    for k in (1, 2):
        (site,) = find_gates(Masked(lambda scores, k=k: hot(scores, k), 1).eval(), ["gates.*"], X).sites
        assert site.k == k


@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "weigh",
    [
        renormalised,
        lambda scores: hot(scores, 1),
        lambda scores: favoured(scores, lambda z: z.softmax(-1)),
        lambda scores: favoured(scores, torch.sigmoid),
        lambda scores: favoured(scores, lambda z: z),
        of_the_best_group,
    ],
)
def test_a_layer_that_chooses_otherwise_later_or_by_a_bias_has_no_threshold(
    weigh: Callable[[Tensor], Tensor], depth: int
):
    torch.manual_seed(0)
    model = Layers(weigh, depth)
    sites = find_gates(model.eval(), ["gates.*"], X).sites
    assert len(sites) == depth
    assert [thresholded(Guarded(model), site, sites, X) for site in sites] == depth * [""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_weights_of_the_selected_are_rounded_and_nothing_else_is_taken(dtype: torch.dtype):
    class Half(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype))

    torch.manual_seed(0)
    for weigh in (renormalised, lambda scores: hot(scores, 1)):
        model = Half(weigh, 2).to(dtype)
        sites = find_gates(model.eval(), ["gates.*"], X).sites
        assert [thresholded(Guarded(model), site, sites, X) for site in sites] == ["", ""]
    model = Half(lambda scores: selected(scores, 1) * (scores.amax(-1) > 1.0)[..., None], 1).to(dtype)
    (site,) = find_gates(model.eval(), ["gates.*:k=1"], X).sites
    assert "compares its scores with a threshold" in thresholded(Guarded(model), site, [site], X)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answers",
    [
        lambda scores: scores.amax(-1) > 1.0,  # of what no expert is good enough for, nothing is taken
        lambda scores: scores.amax(-1) < 1.0,
        lambda scores: scores.softmax(-1).amax(-1) > 0.4,
        lambda scores: scores.softmax(-1).amax(-1) < 0.9,
    ],
)
def test_a_gate_that_falls_back_has_one(answers: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    model = Layers(lambda scores: selected(scores, 1) * answers(scores)[..., None], 2)
    sites = find_gates(model.eval(), ["gates.*:k=1"], X).sites
    assert all("compares its scores with a threshold" in thresholded(Guarded(model), s, sites, X) for s in sites)

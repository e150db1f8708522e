"""Which operations choose by the images: each kind is noticed, what only passes values on is not."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack
from torchvision.ops import roi_align

from bench.evaluation.examine import WATCHED
from bench.models.choices import Choices, find_choices
from bench.models.dependence import BATCH_SIZES
from bench.models.sites import Site

NOTHING = Choices()


class Computes(nn.Module):
    """A linear layer, then a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x.flatten(1)))


def operations(function: Callable[[Tensor], Tensor]) -> list[str]:
    found = find_choices(Computes(function).eval(), torch.rand(4, 3, 2, 2))
    assert found.names == ()
    return [operation.removesuffix(" in Computes") for operation in found.operations]


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (lambda s: s * (s >= s.topk(2).values[:, 1:]), ["ge"]),
        (lambda s: s.gather(1, s.topk(2).indices), ["topk"]),
        (lambda s: F.one_hot(s.argmax(1), 6) * s, ["argmax"]),
        (lambda s: s.gather(1, s.sort(1).indices), ["sort"]),
        (lambda s: s.gather(1, s.max(1).indices[:, None]), ["max"]),
        (lambda s: s.masked_fill(s < 0, -1), ["lt"]),
        (lambda s: torch.where(s[:, :1] > s[:, 1:2], s, -s), ["gt"]),
        (lambda s: s.round(), ["round"]),
        (lambda s: s.sign() * s, ["sign"]),
        (lambda s: torch.zeros(4, 6).scatter(1, (3 * s.sigmoid()).long(), s), ["rounding to integers"]),
        (lambda s: s * torch.bernoulli(s.sigmoid()), ["random draw (bernoulli)"]),
        (lambda s: s if s.mean() > 0 else -s, ["gt"]),
        (lambda s: s * (s[:, :1] > 0), ["gt"]),
        (lambda s: s * (s.flip(1) > 0), ["gt"]),
        (lambda s: s * (s > 1e-9), ["gt"]),
        (lambda s: s if s.mean().item() > 0 else -s, ["values read by Python"]),
        (lambda s: s[:, s.mean(0).tolist().index(max(s.mean(0).tolist())) :], ["values read by Python"]),
        (lambda s: torch.tensor(s.numpy().round()), ["values read by Python", "a computation outside torch"]),
        (lambda s: s[s[:, 0].nonzero()[:, 0]], ["nonzero"]),
        (lambda s: s * torch.tensor([row[row > row[0]].numel() for row in s]).view(-1, 1), ["gt"]),
        (lambda s: s * torch.tensor([len(row.unique()) for row in s.relu()]).view(-1, 1), ["_unique2"]),
        (lambda s: s * torch.tensor([len(row.unique_consecutive()) for row in s]).view(-1, 1), ["unique_consecutive"]),
        (lambda s: s * torch.tensor([row.relu().to_sparse()._nnz() for row in s]).view(-1, 1), ["_to_sparse"]),
        (lambda s: s.masked_fill((z := s > 0)[:, :1] == z[:, 1:2], 0.0), ["gt"]),
        (lambda s: s * (s == s.amax(1, keepdim=True)), ["eq"]),
        (lambda s: torch.copysign(torch.ones_like(s), s) * s, ["copysign"]),
        (lambda s: s * torch.bucketize(s, torch.tensor([0.0, 1.0])), ["bucketize"]),
        (lambda s: s * (s.view(torch.int32) & 1), ["bitwise_and"]),
        (lambda s: F.one_hot((1000 * s.sum(1)).long() % 6, 6) * s, ["rounding to integers"]),
        (
            lambda s: F.grid_sample(s[:, None, None], s[:, None, None, :2], "nearest", align_corners=True)[:, 0, 0],
            ["nearest sample"],
        ),
        (lambda s: s * torch.histc(s, 6), ["histc"]),
        (
            lambda s: torch.nansum(torch.stack([s + 0 * s.sqrt(), 2 * s + 0 * (-s).sqrt()]), 0),
            ["what is finite (nansum)"],
        ),
        (lambda s: (s.log() * s).nan_to_num(), ["what is finite (nan_to_num)"]),
        (lambda s: s.nan_to_num() + s.nansum(1, keepdim=True), []),
        (
            lambda s: roi_align(s.view(4, 1, 2, 3), [2 * one[None, :4].sigmoid() for one in s], 2),
            ["where to look (roi_align)"],
        ),
    ],
)
def test_a_choice_by_the_image_is_noticed(function: Callable[[Tensor], Tensor], seen: list[str]):
    torch.manual_seed(0)
    assert operations(function) == seen


@pytest.mark.parametrize(
    "weigh",
    [
        lambda s: (1e6 * s).softmax(1),
        lambda s: (1e6 * s).sigmoid(),
        lambda s: (1e6 * s).clamp(0, 1),
        lambda s: (1e6 * s).tanh(),
        lambda s: F.hardsigmoid(1e6 * s),
        lambda s: s / s.abs(),
        lambda s: (1 - 1e6 * (s.amax(1, keepdim=True) - s)).relu(),
        lambda s: (1e3 * (s[:, :1] - 50)).sigmoid(),  # closed for each of the images
        lambda s: (1e3 * (s[:, :1] - 50)).sigmoid().expand(-1, 6),
        lambda s: (1e3 * (s[:, :1] + 50)).sigmoid(),  # open for each
    ],
)
def test_weights_that_are_never_between_two_values_are_a_choice_that_is_hidden(weigh: Callable[[Tensor], Tensor]):
    assert operations(lambda s: s * weigh(s)) == ["weights of two values (mul)"]
    assert operations(lambda s: torch.bmm(weigh(s)[:, None].expand(-1, -1, 6), s[..., None])[:, 0]) == [
        "weights of two values (bmm)"
    ]
    assert operations(lambda s: torch.lerp(s, 2 * s, weigh(s))) == ["weights of two values (lerp)"]


class ByDict(nn.Module):
    """Experts are parameters in a dict, each image goes through its own."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.ParameterDict({str(i): nn.Parameter(torch.randn(192, 10)) for i in range(3)})
        self.q = nn.Parameter(torch.randn(192, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.stack([row @ self.p[str(int(i))] for row, i in zip(x, (x @ self.q).argmax(1), strict=True)])


class ByEinsum(nn.Module):
    """Hard weights over stacked experts, of a softmax so sharp that it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.q = nn.Parameter(torch.randn(3, 192, 10)), nn.Parameter(torch.randn(192, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.einsum("be,bd,edc->bc", (1e6 * (x @ self.q)).softmax(1), x, self.t)


class ByChannel(nn.Module):
    """A grouped convolution whose channels open by the image's mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1, groups=3), nn.Conv2d(3, 12, 1)
        self.c = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        opened = (self.b(x.mean((2, 3), keepdim=True)) > 0).to(x)
        return self.c((self.a(x) * opened).mean((2, 3)))


class ByStraightThrough(nn.Module):
    """Hard forwards, soft backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 3), nn.ModuleList(nn.Linear(192, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        soft = self.a(x).softmax(1)
        w = F.one_hot(soft.argmax(1), 3) - soft.detach() + soft
        return (w[..., None] * torch.stack([layer(x) for layer in self.b], 1)).sum(1)


class ByUnpooling(nn.Module):
    """The place of the largest score, as max-pooling and its inverse have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 4), nn.ModuleList(nn.Linear(192, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        best, place = F.max_pool1d(self.a(x)[:, None], 4, return_indices=True)
        w = F.max_unpool1d(torch.ones_like(best), place, 4)[:, 0]
        return (w[..., None] * torch.stack([layer(x) for layer in self.b], 1)).sum(1)


@pytest.mark.parametrize("kind", [ByDict, ByEinsum, ByChannel, ByStraightThrough, ByUnpooling])
def test_routed_networks_of_other_styles_are_noticed_by_what_they_compute(kind: type[nn.Module]):
    torch.manual_seed(0)
    found = find_choices(kind().eval(), torch.rand(4, 3, 8, 8))
    assert found.names == ()
    assert found.operations


class Wins(nn.Module):
    """One of two networks answers, whichever has the higher score, and no index or weight shows it."""

    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 10), nn.Linear(192, 10), nn.Linear(192, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.join(torch.stack([self.a(x), self.b(x)], 1) + 1000 * self.c(x)[..., None])


@pytest.mark.parametrize(
    ("join", "operation"),
    [
        (lambda z: z.amax(1), "amax"),
        (lambda z: z.max(1).values, "max"),
        (lambda z: torch.maximum(z[:, 0], z[:, 1]), "maximum"),
        (lambda z: z.logsumexp(1), "logsumexp"),
        (lambda z: torch.logaddexp(z[:, 0], z[:, 1]), "logaddexp"),
    ],
)
def test_the_whole_output_of_the_best_of_several_is_a_choice(join: Callable[[Tensor], Tensor], operation: str):
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    seen = find_choices(Wins(join).eval(), x).operations
    assert seen == (f"one of several wins as a whole ({operation}) in Wins",)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s - s.logsumexp(1, keepdim=True),
        lambda s: s[:, None] * s[:, :, None].amax(1, keepdim=True),
        lambda s: torch.maximum(s.repeat(1, 2), s.flip(1).repeat(1, 2)),
        lambda s: torch.stack([s, s.flip(1), 2 * s.roll(1, 1)], 1).repeat(1, 1, 2).logsumexp(1),
        lambda s: s.view(4, 2, 3).repeat(1, 1, 3).amax(1),
    ],
)
def test_the_best_of_several_values_one_by_one_is_no_choice(function: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    assert operations(function) == []


def test_weights_that_leave_an_expert_out_on_every_image_are_a_choice():
    away = torch.tensor([0.0, 0.3, -0.2, 0.1, -40.0, 0.2])

    def weighted(weigh: Callable[[Tensor], Tensor]) -> list[str]:
        torch.manual_seed(0)
        return operations(lambda s: (weigh(s)[..., None] * torch.stack([s] * 6, 1)).sum(1))

    assert weighted(lambda s: (0.1 * s + away).softmax(1)) == ["weights that are nearly 0 (mul)"]
    assert weighted(lambda s: (0.1 * s + away).sigmoid()) == ["weights that are nearly 0 (mul)"]
    assert weighted(lambda s: (0.1 * s + away).relu()) == []
    assert weighted(lambda s: (0.1 * s + 0.1 * away[:4].repeat(2)[:6]).softmax(1)) == []


def test_weights_that_happen_to_be_alike_are_no_choice():
    zero = torch.zeros(6, 6)
    for function in (
        lambda s: s * s.sigmoid(),
        lambda s: s * (s @ zero + 1).sigmoid(),  # a gate that starts as a constant
        lambda s: (s @ zero) * s.sigmoid()[:, :1],  # a branch that starts at 0
        lambda s: (1e6 * s[:, :, None] * s[:, None]).softmax(-1) @ s[..., None],  # sharp attention
    ):
        assert operations(function) == []
    black_and_white = (torch.rand(4, 1, 8, 8) > 0.5).float()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert find_choices(model, black_and_white) == NOTHING


def test_a_choice_written_in_place_or_through_a_view_is_noticed():
    def function(s: Tensor) -> Tensor:
        mask = torch.zeros(4, 2, 3, dtype=torch.bool)
        mask.view(4, 6).copy_(s > 0)
        return s.view(4, 2, 3) * mask

    assert operations(function) == ["gt"]


@pytest.mark.parametrize(
    ("function", "chooses"),
    [
        (lambda x: torch.where(x > 0.5, x - 0.5, 0.1 * (x - 0.5)), False),
        (lambda x: torch.where(x - 0.5 < 0, torch.zeros_like(x), x - 0.5), False),
        (lambda x: torch.where(x > 0.5, x - 0.5, (x - 0.5).sin()), True),
        (lambda x: torch.where(x > 0.4, x - 0.5, 0.1 * (x - 0.5)), True),
        (lambda x: torch.where(x[:, :1] > 0.5, x, 0.1 * x), True),
    ],
)
def test_a_leaky_relu_by_hand_is_no_choice(function: Callable[[Tensor], Tensor], chooses: bool):
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x).mean((2, 3))

    assert bool(find_choices(Own(), torch.rand(4, 3, 8, 8))) == chooses


# --- no choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        torch.relu, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.softplus, F.relu6, torch.abs, torch.tanh,
        lambda s: s.clamp(-1, 1),
        lambda s: s.softmax(1) * s,
        lambda s: s * (0.5 + 1.3e-6 * torch.tensor([0.0, 0.1, 0.3, 0.7, 0.9, 1.0]) + 0 * s),
        lambda s: s * (s > 0) + s * (s >= 0).float() + (s > 0).to(s.dtype) * s,
        lambda s: s.amax(1, keepdim=True) + s.max(1, keepdim=True).values + s.median(1, keepdim=True).values,
        lambda s: s.topk(3).values,
        lambda s: F.dropout(s, training=False),
        lambda s: s * (torch.rand(6) > 0.5) + torch.randn_like(s),  # chance alone, which passes tell that differ
        lambda s: s + torch.randn(6, generator=torch.Generator().manual_seed(0)),
        lambda s: torch.maximum(s, -s) + torch.minimum(s, 2 * s),
        lambda s: s[:, torch.arange(5, -1, -1)] + s.flip(1),
        lambda s: s.masked_fill(torch.ones(6, 6).triu().bool()[0], 0.0),
        lambda s: s * (torch.zeros_like(s) == 0),
        lambda s: F.layer_norm(s, (6,)) / s.norm(dim=1, keepdim=True),
        lambda s: s if torch.isfinite(s).all() and not torch.isnan(s).any() else s * 0,
        lambda s: F.interpolate(s[:, None], 12, mode="linear")[:, 0],
    ],
)  # fmt: skip
def test_what_passes_values_on_is_no_choice(function: Callable[[Tensor], Tensor]):
    assert operations(function) == []


def test_pooling_attention_and_normalisation_are_no_choice():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2),
        nn.GroupNorm(2, 8), nn.Dropout(0.5), nn.Flatten(2), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    assert find_choices(model, torch.rand(4, 3, 8, 8)) == NOTHING


class Abstains(nn.Module):
    """A network that gives no number for some images, and what is done with it and another's answer then."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Linear(192, 10), nn.Linear(192, 10), join

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.join(self.a(x).acos(), self.b(x))


@pytest.mark.parametrize(
    ("join", "seen"),
    [
        (lambda a, b: torch.where(a.isnan(), b, a), ["what is finite (where)"]),
        (lambda a, b: torch.where(a.isfinite(), a, b), ["what is finite (where)"]),
        (lambda a, b: torch.stack([a, b]).nanmean(0), ["what is finite (div)"]),
        (lambda a, b: b.masked_fill(a.isnan(), 0.0), ["what is finite (masked_fill)"]),
        (lambda a, b: a.masked_fill(a.isnan() & b.isfinite(), 0.0) + b, []),
        (lambda a, b: torch.where(a.isnan(), torch.zeros_like(a), a) + b, []),
        (lambda a, b: a.nan_to_num(0.0) + b, []),
        (lambda a, b: a.masked_fill(a.isnan(), 0.0) + b, []),
    ],
)
def test_what_is_taken_where_there_is_no_number_is_a_choice(join: Callable[[Tensor, Tensor], Tensor], seen: list[str]):
    torch.manual_seed(0)
    found = find_choices(Abstains(join).eval(), torch.rand(4, 3, 8, 8)).operations
    assert [operation.removesuffix(" in Abstains") for operation in found] == seen


@pytest.mark.parametrize("read", [False, True])
def test_a_choice_behind_an_infinite_score_is_not_lost(read: bool):
    """A gate that closes all experts but the best, and an answer that asks which are closed."""

    def function(s: Tensor) -> Tensor:
        kept = s.masked_fill(s < s.topk(1).values, -torch.inf)
        if read:
            return s if kept.isinf()[0, 0] else -s
        return s + s.flip(1).masked_fill(torch.isinf(kept)[:, :1], 0)

    assert "lt" in operations(function)


def test_one_of_two_by_a_mask_that_is_the_same_everywhere_is_no_leaky_relu():
    def operations_of(function: Callable[[Tensor], Tensor]) -> list[str]:
        torch.manual_seed(0)
        return operations(function)

    found = operations_of(lambda s: (p := s.softmax(1)) + torch.where(s.amax(1, keepdim=True) > 9, -p, p))
    assert found == ["gt"]
    assert operations_of(lambda s: torch.where(s > 0, s, 0.1 * s)) == []


def test_a_softmax_of_one_alone_depends_on_nothing():
    torch.manual_seed(0)
    assert operations(lambda s: s[:, :1].softmax(1) * s) == []
    assert operations(lambda s: (1e3 * s[:, :2]).softmax(1)[:, :1] * s) == ["weights of two values (mul)"]


def _own_operation() -> Callable[[Tensor], Tensor]:
    @torch.library.custom_op("bench_tests::first", mutates_args=())
    def first(scores: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).float()

    return first


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (_own_operation(), "an operation of its own (bench_tests::first)"),
        (lambda s: s * float(np.from_dlpack(s.detach()).max()), "values read by Python"),
    ],
)
def test_what_leaves_torch_is_seen(function: Callable[[Tensor], Tensor], seen: str):
    assert operations(function) == [seen]


class Counts(nn.Module):
    """One network, and beside its answer how many images each of three scores wins, as a loss for the balance needs."""

    def __init__(self, answers: bool) -> None:
        super().__init__()
        self.a, self.b, self.answers = nn.Linear(192, 10), nn.Linear(192, 3), answers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        load = F.one_hot(self.b(x).argmax(1), 3).float().mean(0)
        return self.a(x) + (load.sum() if self.answers else 0.0), load


def test_a_choice_that_the_answer_does_not_come_of_is_no_sign():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    assert not find_choices(Counts(answers=False).eval(), x)
    assert find_choices(Counts(answers=True).eval(), x).operations == ("argmax in Counts",)


class Mixing(nn.Module):
    """One of two linear experts, by the sum of a gate's scores and those of another layer; `mix` adds them."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(192, 2), nn.Linear(192, 2), mix
        self.c = nn.ModuleList(nn.Linear(192, 10) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        chosen = F.one_hot(self.mix(self.a(x), self.b(x)).argmax(1), 2).to(x)
        return (chosen[..., None] * torch.stack([layer(x) for layer in self.c], 1)).sum(1)


@pytest.mark.parametrize("mix", [torch.add, Tensor.add_, lambda a, b: a[:].copy_(a + b)])
def test_what_is_added_to_known_scores_in_place_is_seen(mix: Callable[[Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    model, x = Mixing(mix).eval(), torch.rand(4, 3, 8, 8)
    assert find_choices(model, x, [Site("a", model, "a", 2, 1, whole=False)]).operations == ("argmax in Mixing",)


class Tabled(nn.Module):
    """Units by a table of which of them each expert has, or by weights; a choice among them follows."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.units, self.head = nn.Linear(192, 2), nn.Linear(192, 4), nn.Linear(4, 10)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        mask = F.one_hot(self.gate(x).argmax(1), 2).to(x) @ self.table
        return self.head(torch.where(mask > 0, self.units(x), 0.0))


def test_what_a_table_of_units_makes_of_a_known_choice_is_none():
    table, x = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]), torch.rand(4, 3, 8, 8)
    for weights, seen in ((table, ()), (0.5 * table, ("gt in Tabled",))):
        model = Tabled(weights).eval()
        assert find_choices(model, x, [Site("gate", model, "gate", 2, 1, whole=False)]).operations == seen
        assert find_choices(model, x).operations == ("argmax in Tabled", "gt in Tabled")


class RoutedInAThread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.which = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            weights = pool.submit(lambda: (self.which(x).amax(1, keepdim=True) > 0).float()).result()
        return weights * self.first(x) + (1 - weights) * self.second(x)


def test_what_another_thread_computes_is_a_sign_since_it_cannot_be_watched():
    assert find_choices(RoutedInAThread(), torch.rand(8, 4)).operations == ("a computation in another thread in which",)


class Capsule:
    """Gives numpy what torch's function, not the tensor's method, has made."""

    def __init__(self, tensor: Tensor) -> None:
        self.made = to_dlpack(tensor.detach())

    def __dlpack__(self, **_: Any) -> Any:
        return self.made

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def _by_capsule(scores: Tensor) -> Any:
    return np.from_dlpack(Capsule(scores))


class Two(nn.Module):
    """Two layers, and a number for each image that says which of them answers."""

    def __init__(self, which: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.which = nn.Linear(12, 6), nn.Linear(12, 6), which

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.which(x.flatten(1).mean(1) - 0.5)
        answers = torch.stack([self.first(x.flatten(1)), self.second(x.flatten(1))])
        return torch.stack([answers[int(one), row] for row, one in enumerate(chosen)])


def _is_positive(score: Tensor) -> bool:
    try:
        torch.linalg.cholesky(score.view(1, 1))
    except torch.linalg.LinAlgError:
        return False
    return True


def _in_a_thread(scores: Tensor) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: (scores > 0).tolist()).result()


@pytest.mark.parametrize(
    "which",
    [
        lambda s: _by_capsule(s) > 0,
        lambda s: [_is_positive(one) for one in s],
        _in_a_thread,
        lambda s: [ctypes.c_float.from_address(s.data_ptr() + 4 * row).value > 0 for row in range(len(s))],
    ],
    ids=["dlpack", "an error", "a thread", "memory"],
)
def test_what_python_does_by_the_image_is_seen_by_whatever_way_it_was_told(which: Callable[[Tensor], Any]):
    found = find_choices(Two(which), torch.rand(4, 3, 2, 2))
    assert found.operations == found.outside == ("values read by Python in Two",)


class Weighing(nn.Module):
    """Weighs the images with the first or the second of `weights`, by where the memory of an image begins."""

    def __init__(self, weights: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.weights = nn.ModuleList(w for w in weights if isinstance(w, nn.Module)) or weights

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).contiguous()
        return self.weights[ctypes.c_float.from_address(x.data_ptr()).value > 0.5](x)


def _sparse() -> Callable[[Tensor], Tensor]:
    weight = torch.rand(6, 12).to_sparse()
    return lambda x: torch.sparse.mm(weight, x.T).T


def _quantized() -> nn.Module:
    made = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(12, 6)), {nn.Linear})
    assert isinstance(made, nn.Module)
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("weights", [_sparse, _quantized])
def test_weights_that_are_no_plain_tensors_are_told_apart(weights: Callable[[], Callable[[Tensor], Tensor]]):
    x = torch.rand(4, 3, 2, 2)
    for _ in range(20):  # the same weights have another address in each pass
        assert find_choices(Weighing([weights()] * 2), x) == NOTHING
    assert find_choices(Weighing([weights(), weights()]), x).operations == ("values read by Python in Weighing",)


def test_weights_of_python_by_the_image_are_seen():
    def weigh(s: Tensor) -> Tensor:
        return s * torch.from_numpy(_by_capsule(s).clip(0, 1).copy())

    assert operations(weigh) == ["values read by Python"]


def test_python_that_does_the_same_for_every_image_is_no_sign():
    table = np.linspace(0, 1, 6, dtype=np.float32)
    assert operations(lambda s: s + torch.from_numpy(table.copy()) * torch.tensor([0.5] * 6)) == []
    drawn = find_choices(Computes(lambda s: s + np.random.rand()), torch.rand(4, 3, 2, 2))
    assert drawn == NOTHING  # by chance, which is told of elsewhere


def test_the_watch_has_a_size_of_batch_that_models_are_asked_for():
    assert WATCHED in BATCH_SIZES  # else a model could do in it alone as if it chose nothing


def test_a_model_that_takes_no_single_image_is_asked_for_none():
    assert operations(lambda s: s if len(s) > 1 else s[1]) == []


def _gate(s: Tensor) -> Tensor:
    return (1 + F.cosine_similarity(s[:, :1], torch.ones(len(s), 1), dim=1)) / 2  # 0 or 1


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (lambda s: (_gate(s).view(-1, 1, 1) * torch.ones(6, 6) * s[:, None]).sum(2), ["weights of two values (mul)"]),
        (
            lambda s: F.conv1d(s.view(1, -1, 1), _gate(s).view(-1, 1, 1).repeat(1, 6, 1).view(-1, 1, 1), groups=24),
            ["weights of two values (convolution)"],
        ),
        (lambda s: s.clamp(min=_gate(s)[:, None], max=_gate(s)[:, None]), ["weights of two values (clamp)"]),
        (lambda s: F.normalize(F.normalize(s)), []),
        (lambda s: s * torch.rand(6), []),
        (lambda s: F.conv1d((1e4 * s).sigmoid()[:, None], torch.rand(2, 1, 3)).flatten(1), []),  # a map of two values
    ],
)
def test_a_gate_of_two_values_is_one_whatever_it_weighs(function: Callable[[Tensor], Tensor], seen: list[str]):
    torch.manual_seed(0)
    model = Computes(function).eval()
    with torch.no_grad():
        model.linear.bias.zero_()
    found = find_choices(model, torch.rand(4, 3, 2, 2) - 0.5)
    assert [word.removesuffix(" in Computes") for word in found.operations] == seen


class Checked(nn.Module):
    """A check of the images, or a guess of their scale, before anything else."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.check = nn.Linear(12, 6), check

    def forward(self, x: Tensor) -> Tensor:
        if self.check(x):
            x = x / 255
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("check", "chooses"),
    [
        (lambda x: x.max() > 2, False),
        (lambda x: not (x.min() >= 0 and x.amax() <= 1), False),
        (lambda x: x.flatten(1).max() > 1.5, False),
        (lambda x: not (x >= 0).all() or (x > 1).any(), False),
        (lambda x: (x > 0).all(), True),
        (lambda x: x.flatten(1).max(1).indices[0] >= 5, True),  # where the brightest pixel is
        (lambda x: x.amax().sub_(0.5).mul_(20) >= 5, True),
        (lambda x: x.max() > 0.9, True),
        (lambda x: x.min() <= 0, True),  # black is in the box
        (lambda x: x.mul_(3).max() > 2, True),
        (lambda x: (3 * x).max() > 2, True),
    ],
)
def test_a_check_that_all_images_in_the_box_pass_alike_is_no_choice(check: Callable[[Tensor], Any], chooses: bool):
    found = {operation.split()[0] for operation in find_choices(Checked(check), torch.rand(4, 3, 2, 2)).operations}
    assert bool(found - {"values"}) is chooses  # "values read by Python" would be seen by what it does as well
    assert chooses or not found

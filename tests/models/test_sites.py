"""Routing sites: a gate's scores are read, and forced by the least shift, whatever class the gate is of."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import load_model
from bench.datasets.base import open_dataset
from bench.models import sites as routing
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.sites import Site, forced, gap, intercepted, lifted, opened, read, scores_of, sites, with_scores


def moe(linear_moe: Any, count: int = 3, k: int = 1, gate: str = "argmax") -> MoE:
    """Expert i answers with class i alone; the scores are those of the pixels."""
    experts = [[[float(i == c)] * count for c in range(count)] for i in range(count)]
    return linear_moe(experts, torch.eye(count).tolist(), k, gate)


X = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.6]]).view(2, 1, 1, 3)


def test_sites_are_the_routers_of_several_experts(linear_moe: Any):
    inner, outer = moe(linear_moe), moe(linear_moe, 3, 2)
    assert [(site.name, site.num_experts, site.k) for site in sites(outer)] == [("router", 3, 2)]
    dual = DualModel(inner, outer)
    assert [(site.name, site.k) for site in sites(dual)] == [("standard.router", 1), ("robust.router", 2)]
    nested = MoE([inner, nn.Identity()], outer.router, 1, "argmax")
    assert [site.name for site in sites(nested)] == ["router", "experts.0.router"]
    assert [site.name for site in sites(nn.Sequential(nn.Identity(), inner))] == ["1.router"]
    assert all(site.whole for site in (*sites(dual), *sites(nested)))
    layer = nn.Sequential(nn.Identity(), inner)  # of which only the network knows what it is given
    assert not sites(layer)[0].whole
    assert not sites(DualModel(layer, outer))[0].whole
    (mixture,) = sites(moe(linear_moe, 3, 3))
    assert mixture.soft
    assert sites(moe(linear_moe, 1)) == []


@dataclass(frozen=True)
class Output:
    aux: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "given",
    [
        lambda z: {"aux": z.mean(), "logits": z},
        lambda z: Output(z.mean(), z),
        lambda z: SimpleNamespace(logits=z),
        lambda z: (z.mean(), {"scores": [z]}),
    ],
)
def test_scores_are_read_and_changed_in_whatever_holds_them(given: Any):
    z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    output = given(z)
    assert torch.equal(scores_of(output, 2, 3)[:, 0], z)  # type: ignore[index]
    changed = with_scores(output, 10 * z[:, None], 2, 1, -1)
    assert torch.equal(scores_of(changed, 2, 3)[:, 0], 10 * z)  # type: ignore[index]
    assert torch.equal(scores_of(output, 2, 3)[:, 0], z)  # type: ignore[index]
    assert type(changed) is type(output)


def test_the_gap_of_a_path_is_that_of_its_weakest_expert_at_the_worst_token():
    scores = torch.tensor([[[3.0, 1.0, 0.5]], [[0.0, 2.0, 1.0]]])
    assert gap(scores, torch.tensor([[0], [2]])).tolist() == [2.0, -1.0]
    assert gap(scores, torch.tensor([[0, 1], [1, 2]])).tolist() == [0.5, 1.0]
    tokens = torch.tensor([[[3.0, 1.0], [0.0, 0.5]]])
    assert gap(tokens, torch.tensor([[0]])).tolist() == [-0.5]
    assert gap(scores, torch.tensor([[-1], [2]])).tolist() == [torch.inf, -1.0]


def test_the_shift_is_the_least_that_wins_and_none_where_the_path_is_natural():
    scores = torch.tensor([[[3.0, 1.0, 0.5]], [[0.0, 2.0, 1.0]], [[1.0, 0.0, 0.0]]])
    found = forced(scores, torch.tensor([[0], [0], [-1]]))
    assert torch.equal(found[0], scores[0])
    assert torch.equal(found[2], scores[2])
    assert found[1, 0].argmax() == 0
    assert found[1, 0].tolist() == pytest.approx([2.0, 2.0, 1.0], abs=1e-3)
    two = forced(scores, torch.tensor([[1, 2], [0, 2], [1, 2]]))
    assert two.topk(2, dim=-1).indices[:, 0].sort(1).values.tolist() == [[1, 2], [0, 2], [1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shift_wins_in_half_precision_too(dtype: torch.dtype):
    scores = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0)).mul(5).to(dtype)
    for expert in range(6):
        found = forced(scores, torch.full((50, 1), expert))
        others = found.masked_fill(torch.arange(6) == expert, -torch.inf).amax(-1)
        assert (found[..., expert] > others).all()
        assert (found - scores)[..., expert].max() < 40  # and no more than has to be


def test_experts_that_a_gate_closes_are_opened_and_as_many_closed():
    inf = torch.inf
    scores = torch.tensor([[[3.0, 1.0, -inf, -inf]], [[0.0, -inf, -inf, -inf]], [[2.0, 1.0, -inf, -inf]]])
    assert opened(scores)[:, 0].tolist() == [[3, 1, -2, -2], [0, -1, -1, -1], [2, 1, -1, -1]]
    one = forced(scores, torch.tensor([[2], [3], [-1]]))[:, 0]
    assert one[0].tolist() == pytest.approx([3.0, 1.0, 3.0, -inf], abs=1e-3)  # more than one are open by themselves
    assert one[1].tolist() == pytest.approx([-inf, -inf, -inf, 0.0], abs=1e-3)
    assert torch.equal(one[2], scores[2, 0])
    two = forced(scores, torch.tensor([[0, 3], [-1, -1], [0, 1]]))[:, 0]
    assert two[0].tolist() == pytest.approx([3.0, -inf, -inf, 1.0], abs=1e-3)
    assert torch.equal(two[1:], scores[1:, 0])
    one_of_two = lifted(scores, torch.tensor([False, False, True, False]).view(1, 1, 4), 2, at=-inf)[:, 0]
    assert one_of_two[0].tolist() == pytest.approx([3.0, -inf, 1.0, -inf], abs=1e-3)


def test_a_shift_leaves_the_scores_their_gradient():
    scores = torch.tensor([[[3.0, 1.0]]], requires_grad=True)
    forced(scores, torch.tensor([[1]]))[0, 0, 1].backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("gate", ["argmax", "softmax"])
def test_a_model_is_led_along_any_path(linear_moe: Any, gate: str):
    model = moe(linear_moe, gate=gate)
    (site,) = sites(model)
    for expert in range(3):
        chosen = torch.full((2, 1), expert)
        with intercepted(site, lambda scores, chosen=chosen: forced(scores, chosen)) as calls:  # type: ignore[misc]
            assert model(X).argmax(1).tolist() == [expert] * 2
        assert len(calls) == 1
        assert torch.equal(calls[0], X)
    assert model(X).argmax(1).tolist() == [0, 2]
    assert not model.router._forward_hooks


def test_reading_gives_the_scores_and_changes_nothing(linear_moe: Any):
    model = moe(linear_moe)
    logits, scores, inputs, _ = read(model, sites(model), X)
    assert torch.equal(logits, model(X))
    torch.testing.assert_close(scores["router"][:, 0], X.flatten(1))
    assert torch.equal(inputs["router"], X)


class Own(nn.Module):
    """A user's mixture of three experts that answer with their own number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Identity() for _ in range(3))
        self.linear = nn.Flatten()

    def choose(self, output: Any) -> Tensor:
        return output.argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.choose(self.router(x)), 3).float()


class Method(Own):
    def router(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Index(Method):
    """Its router gives the chosen index alone, as that of the paper's released MoE does."""

    def router(self, x: Tensor) -> Tensor:
        return x.flatten(1).argmax(1)

    def choose(self, output: Any) -> Tensor:
        return output


class Tuple(Method):
    def router(self, x: Tensor) -> Any:
        return torch.tensor(0.3), x.flatten(1), {"load": None}

    def choose(self, output: Any) -> Tensor:
        return output[1].argmax(1)


@pytest.mark.parametrize("kind", [Method, Index, Tuple])
def test_routers_of_other_shapes_are_read_and_forced(kind: type[Own]):
    model = kind()
    (site,) = sites(model)
    scores = read(model, [site], X).scores
    assert scores["router"].argmax(-1).flatten().tolist() == [0, 2]
    chosen = torch.tensor([[1], [0]])
    with intercepted(site, lambda found: forced(found, chosen)):
        assert model(X).argmax(1).tolist() == [1, 0]
    assert model(X).argmax(1).tolist() == [0, 2]
    assert "router" not in vars(model)


def test_a_gate_that_is_not_called_is_not_read():
    class Silent(Own):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    model = Silent()
    assert read(model, sites(model), X)[1] == {}


def test_tokens_are_mapped_to_images():
    tokens = torch.arange(12.0).view(6, 2)  # two images of three tokens
    found = scores_of(tokens, 2, 2)
    assert found is not None
    assert found.shape == (2, 3, 2)
    assert scores_of(torch.zeros(5, 2), 2, 2) is None
    assert scores_of("nothing", 2, 2) is None


def test_a_gate_that_fails_leaves_no_hook_and_no_context_behind(linear_moe: Any):
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("planted")

    model = MoE(moe(linear_moe).experts, Failing(), 1, "argmax")
    site: Site = routing.sites(model)[0]
    with pytest.raises(RuntimeError, match="planted"), intercepted(site, lambda scores: scores):
        model(X)
    assert not model.router._forward_hooks
    assert not model.router._forward_pre_hooks


@pytest.mark.parametrize(("name", "tokens"), [("blockmoe-at", 1), ("vmoe-at", 5)])
def test_gates_inside_a_network_are_read_and_forced(name: str, tokens: int):
    model = load_model(name, dataset="digits")
    x = open_dataset("digits").evaluation_set(Path(), 5).x
    found = sites(model)
    assert found
    assert not any(site.whole for site in found)
    logits, scores, *_ = read(model, found, x)
    assert torch.equal(logits, model(x))
    for site in found:
        assert scores[site.name].shape == (5, tokens, site.num_experts)
        asked = set[nn.Module]()
        hooks = [e.register_forward_hook(lambda module, *_, asked=asked: asked.add(module)) for e in site.owner.experts]
        chosen = torch.arange(1, 1 + site.k).expand(5, -1)
        with intercepted(site, lambda seen, chosen=chosen: forced(seen, chosen)):  # type: ignore[misc]
            model(x)
        assert asked == {site.owner.experts[number] for number in chosen[0]}
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("experts", [nn.ModuleList, lambda parts: nn.ModuleDict(dict(zip("ab", parts, strict=True)))])
def test_the_expert_that_a_gate_lies_in_is_found_by_its_place(experts: Any):
    outer = nn.Module()
    outer.experts = experts([nn.Module(), nn.Module()])
    name = [*outer.experts._modules][1]
    around, inside = (
        Site("layer.gate", outer, "gate", 2, 1),
        Site(f"layer.experts.{name}.gate", outer.experts._modules[name], "gate", 3, 1),
    )
    assert routing.host(inside, [inside, around]) == (around, 1)
    assert routing.host(around, [inside, around]) is None
    shared = Site("layer.gate", outer, "gate", 8, 1)  # its experts are not the modules below `experts` one by one
    assert routing.host(inside, [inside, shared]) is None

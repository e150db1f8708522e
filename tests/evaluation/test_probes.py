"""Signs that an attack may find less than there is: planted in models that have exactly one, and absent elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import PassCounter
from bench.evaluation.probes import passes, probe
from bench.models.deployed import eval_frozen
from bench.models.foreign import Guarded
from bench.models.gates import find_gates
from bench.models.layers import SparseMoE
from bench.models.moe import MoE
from bench.randomness import seeded
from bench.results.flags import MASKED, ROUTES_INSIDE
from bench.spec import ThreatModel

LINF = ThreatModel(norm="Linf", eps=0.05)
#: A class a half of the pixels: the brighter one wins.
HALVES = [[10.0, 10, 0, 0], [0, 0, 10, 10]]


@pytest.fixture(autouse=True)
def short_probes() -> None:
    """The probes' own number of steps."""


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Twenty images (20, 1, 1, 4), each with one bright half, and which it is."""
    y = torch.arange(20) % 2
    x = torch.full((20, 4), 0.3)
    x[y == 0, :2], x[y == 1, 2:] = 0.7, 0.7
    return x.view(20, 1, 1, 4), y


@pytest.fixture
def signs(images: tuple[Tensor, Tensor]) -> Callable[..., list[str]]:
    """signs(model): its flags."""

    def run(model: nn.Module, threat: ThreatModel = LINF, attacked: bool = True) -> list[str]:
        with eval_frozen(model), seeded(0):
            return probe(model, *images, threat, attacked=attacked)

    return run


class Changed(nn.Module):
    """A model whose logits are changed by a function of them."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


@pytest.mark.parametrize("threat", [LINF, ThreatModel(norm="L2", eps=0.1), ThreatModel(norm="L1", eps=0.1)])
def test_an_honest_model_has_none(threat: ThreatModel, signs: Callable[..., list[str]], linear_net: Any):
    assert signs(linear_net(HALVES), threat) == []


def test_probabilities_are_told(signs: Callable[..., list[str]], linear_net: Any):
    found = signs(Changed(linear_net(HALVES), lambda z: z.softmax(1)), attacked=False)
    assert found == ["outputs are probabilities"]


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda z: z.round(), 0),
        (lambda z: z + (z.round() - z).detach(), 0),
        (lambda z: (60 * z).softmax(1), 0),
        (lambda z: z.detach(), 0),
        (lambda z: 2 * z.detach() - z, 0),
        (lambda z: z.bfloat16().float(), None),
        (lambda z: z.half().float(), None),
        (lambda z: z.softmax(1), None),
        (lambda z: (60 * z).log_softmax(1), None),
    ],
)
def test_gradients_that_do_not_lower_the_margin_are_told(
    change: Callable[[Tensor], Tensor], share: int | None, signs: Callable[..., list[str]], linear_net: Any
):
    found = [flag for flag in signs(Changed(linear_net(HALVES), change)) if "lower the margin" in flag]
    words = f"gradients do not lower the margin: a step of ε/16 along them does for {share}% of images"
    assert found == ([] if share is None else [words])
    assert words.startswith(MASKED)


@pytest.mark.parametrize("gate", ["argmax", "softmax"])
def test_of_a_routed_model_gradients_are_those_at_the_gates_scores(
    gate: str, signs: Callable[..., list[str]], linear_moe: Any
):
    """A gate's weight scales the logits, which is no way to another class; and a gate excuses none of its experts'."""
    moe = routed(linear_moe, gate)
    assert not any("lower the margin" in flag for flag in signs(moe))
    moe.experts[0] = moe.experts[1] = Changed(moe.experts[0], torch.round)
    assert any("lower the margin" in flag for flag in signs(moe))


def test_gradients_that_are_not_finite_are_told(signs: Callable[..., list[str]], linear_net: Any):
    class Root(nn.Module):
        """How far pixels are from 0.3, as a root of a square, which is not differentiable there."""

        def __init__(self) -> None:
            super().__init__()
            self.net = linear_net(HALVES)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + (x - 0.3).square().sqrt().sum((1, 2, 3))[:, None]

    found = [flag for flag in signs(Root()) if flag.startswith(MASKED)]
    assert any(flag.startswith("gradients not finite at pixels of 100% of images") for flag in found)


def test_logits_far_from_zero_are_told(signs: Callable[..., list[str]], linear_net: Any):
    for offset, told in ((0.0, False), (1e3, False), (1e6, True)):
        found = signs(Changed(linear_net(HALVES), lambda z, by=offset: z + by))
        assert any("logits so far from 0" in flag for flag in found) is told


def test_log_probabilities_are_none(signs: Callable[..., list[str]], linear_net: Any):
    assert signs(Changed(linear_net(HALVES), lambda z: z.log_softmax(1))) == []


def routed(linear_moe: Any, gate: str) -> MoE:
    """Two experts that agree but for a factor, and a router that looks at the last pixel: 0.3 or 0.7, its edge 0.5."""
    double = [[2 * weight for weight in row] for row in HALVES]
    moe = linear_moe([HALVES, double], [[0, 0, 0, 1.0], [0, 0, 0, -1.0]], 1, gate)
    linear = moe.router[1]
    linear.bias = nn.Parameter(torch.tensor([-0.5, 0.5]))
    return moe


def test_a_hard_gate_has_no_router_gradient_and_a_soft_one_has(signs: Callable[..., list[str]], linear_moe: Any):
    assert signs(routed(linear_moe, "softmax"), attacked=False) == []
    assert signs(routed(linear_moe, "argmax"), attacked=False) == ["router gradient zero on 100% of images"]


def test_the_mean_of_all_experts_has_no_route_to_look_at(signs: Callable[..., list[str]], linear_moe: Any):
    moe = routed(linear_moe, "argmax")
    ensemble = MoE(moe.experts, moe.router, 2, "argmax", moe.combine)
    assert signs(ensemble, attacked=False) == []


def test_experts_that_are_not_selected_need_no_gradient(signs: Callable[..., list[str]], linear_moe: Any):
    """Two of three, with the weights renormalised over the two: the third score changes nothing, and need not."""
    half = [[weight / 2 for weight in row] for row in HALVES]
    moe = linear_moe([HALVES, half, HALVES], [[0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, -1.0]], 2, "softmax")
    assert signs(moe, attacked=False) == []


class Blocks(nn.Module):
    """Two blocks of two experts, each with a gate; of those in `hard` the weight is 1 whatever the scores."""

    def __init__(self, hard: tuple[int, ...], one_by_one: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            SparseMoE(nn.Linear(4, 2), [nn.Linear(4, 4), nn.Linear(4, 4)], num_selected_experts=1) for _ in range(2)
        )
        for number in hard:
            self.blocks[number].gate = nn.Sequential(nn.Linear(4, 2), Certain())
        self.head = nn.Linear(4, 2)
        self.one_by_one = one_by_one

    def forward(self, x: Tensor) -> Tensor:
        if self.one_by_one and len(x) > 1:
            return torch.cat([self(one) for one in x.split(1)])
        z = x.flatten(1)
        for block in self.blocks:
            z = z + block(z)
        return self.head(z)


class Certain(nn.Module):
    """Scores whose softmax is 1 for the first and 0 for the others, exactly."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores * 1e6


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("hard", [(), (1,), (0, 1)])
def test_gates_inside_a_network_need_a_gradient_as_well(
    hard: tuple[int, ...], one_by_one: bool, signs: Callable[..., list[str]]
):
    flags = [flag for flag in signs(Blocks(hard, one_by_one), attacked=False) if "router gradient" in flag]
    assert flags == [f"router gradient zero on 100% of images at {len(hard)} of 2 gates inside"] * bool(hard)


class Biased(nn.Module):
    """A gate that chooses one of two experts by scores with a bias, and weighs it by the scores without (N, 1)."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.linear, self.detached = nn.Linear(4, 2), detached
        self.register_buffer("bias", torch.tensor([0.1, 0.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.linear(x).sigmoid()
        chosen = (scores + self.bias).topk(1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights.detach() if self.detached else weights, x * 1.0  # what is no weight is not asked


class BiasedLayer(nn.Module):
    def __init__(self, detached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = Biased(detached), nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights, z = self.gate(x.flatten(1))
        every = torch.stack([expert(z) for expert in self.experts], 1)
        return weights * every[torch.arange(len(x)), chosen[:, 0]]


@pytest.mark.parametrize("detached", [False, True])
def test_a_gate_may_weigh_by_other_scores_than_it_has_chosen_by(
    detached: bool, signs: Callable[..., list[str]], images: tuple[Tensor, Tensor]
):
    guard = Guarded(BiasedLayer(detached).eval())
    guard.gates = find_gates(guard.model, ["gate"], images[0]).sites
    flags = [flag for flag in signs(guard, attacked=False) if "router gradient" in flag]
    assert flags == ["router gradient zero on 100% of images at 1 of 1 gates inside"] * detached


def test_gates_of_a_network_whose_logits_have_no_gradient_have_none(signs: Callable[..., list[str]]):
    flags = signs(Changed(Blocks(()), Tensor.detach), attacked=False)
    assert "router gradient zero on 100% of images at 2 of 2 gates inside" in flags


def test_logits_without_a_gradient_have_none_for_the_router(signs: Callable[..., list[str]], linear_moe: Any):
    moe = routed(linear_moe, "softmax")
    mix = moe.mix
    moe.mix = lambda *given: mix(*given).detach()  # type: ignore[method-assign]
    assert signs(moe, attacked=False) == ["router gradient zero on 100% of images"]


def test_of_a_dual_each_branch_is_looked_at(signs: Callable[..., list[str]], linear_moe: Any):
    from bench.models.dual import DualModel

    dual = DualModel(routed(linear_moe, "argmax"), routed(linear_moe, "softmax"))
    assert signs(dual, attacked=False) == ["S: router gradient zero on 100% of images"]


def test_a_router_gradient_that_is_not_finite_is_seen(signs: Callable[..., list[str]], linear_moe: Any):
    moe = routed(linear_moe, "softmax")
    mix = moe.mix
    moe.mix = lambda *given: mix(*given) + (mix(*given) * 0).sqrt()  # type: ignore[method-assign]
    assert signs(moe, attacked=False) == ["router gradient not finite"]


def test_a_router_that_is_passed_by_is_said(signs: Callable[..., list[str]], linear_moe: Any):
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            moe = routed(linear_moe, "softmax")
            self.router, self.experts = moe.router, moe.experts

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    assert signs(Foreign(), attacked=False) == ["router gradient cannot be seen"]


class Detached(nn.Module):
    """A router without a gradient by the pixels; as deep inside as one may write it."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x).detach()


def test_a_router_without_a_gradient_by_the_pixels_is_probed_all_the_same(
    signs: Callable[..., list[str]], linear_moe: Any
):
    moe = routed(linear_moe, "softmax")
    moe.router = Detached(moe.router)
    assert signs(moe, ThreatModel(norm="Linf", eps=0.21)) == [
        "router gradient zero on 100% of images",
        "router has no gradient by the pixels",
        "routes flip within the ball for 100% of images",
    ]


def test_a_router_that_is_no_module_is_probed_all_the_same(signs: Callable[..., list[str]], linear_moe: Any):
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            moe = routed(linear_moe, "softmax")
            self.experts, self._router = moe.experts, moe.router

        def router(self, x: Tensor) -> Tensor:
            return self._router(x)

        def forward(self, x: Tensor) -> Tensor:
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            return outputs[torch.arange(len(x)), self.router(x).argmax(1)]

    assert signs(Foreign(), ThreatModel(norm="Linf", eps=0.21)) == [
        "router gradient cannot be seen", "routes flip within the ball for 100% of images",
    ]  # fmt: skip


class Gives(nn.Module):
    """A router that gives something made of its scores."""

    def __init__(self, router: nn.Module, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.router, self.what = router, what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.router(x))


@pytest.mark.parametrize(
    ("what", "chosen", "flags"),
    [
        (lambda scores: (scores.argmax(1), scores), lambda given: given[0], ["routes flip within the ball for 100%"]),
        (lambda scores: scores.argmax(1), lambda given: given, []),
    ],
)
def test_scores_in_a_tuple_are_probed_and_where_there_are_none_nothing_fails(
    what: Callable[[Tensor], Any], chosen: Callable[[Any], Tensor], flags: list[str], signs: Any, linear_moe: Any
):
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            moe = routed(linear_moe, "softmax")
            self.router, self.experts = Gives(moe.router, what), moe.experts

        def forward(self, x: Tensor) -> Tensor:
            outputs = torch.stack([expert(x) for expert in self.experts], 1)
            return outputs[torch.arange(len(x)), chosen(self.router(x))]

    found = signs(Foreign(), ThreatModel(norm="Linf", eps=0.21))
    assert [flag for flag in found if "gradient zero" not in flag] == [f"{flag} of images" for flag in flags]


def test_a_probe_that_fails_is_said_and_leaves_the_others(signs: Callable[..., list[str]], linear_moe: Any):
    class Whole(nn.Module):
        """Answers only where a gradient is asked for."""

        def __init__(self) -> None:
            super().__init__()
            moe = routed(linear_moe, "argmax")
            self.router, self.experts, self._moe = moe.router, moe.experts, [moe]

        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_grad_enabled(), "a gradient, please"
            return self._moe[0](x)

    assert signs(Whole(), attacked=False) == [
        "probe of outputs failed: AssertionError", "router gradient zero on 100% of images",
    ]  # fmt: skip


@pytest.mark.parametrize(("eps", "flags"), [(0.19, []), (0.21, ["routes flip within the ball for 100% of images"])])
def test_routes_flip_from_the_distance_of_the_edge_on(
    eps: float, flags: list[str], signs: Callable[..., list[str]], linear_moe: Any
):
    assert signs(routed(linear_moe, "softmax"), ThreatModel(norm="Linf", eps=eps)) == flags


def test_saturated_logits_mask_the_gradient(signs: Callable[..., list[str]], linear_net: Any):
    # at a gap of 400 the softmax is 1 in float32, and the gradient 0: PGD stays where it started
    saturated = linear_net([[1e4 * weight for weight in row] for row in HALVES])
    (flag,) = signs(saturated)
    assert flag.startswith("gradients masked: PGD breaks ")
    assert flag.startswith(MASKED)
    assert flag.endswith(" of 20 in a ball that holds every image")


def test_success_that_falls_as_the_ball_grows_is_masking(signs: Callable[..., list[str]], linear_net: Any):
    class Trapped(nn.Module):
        """Wrong at a distance of about 0.05 from the images, and their gradient leads nowhere farther away."""

        def __init__(self) -> None:
            super().__init__()
            self.net = linear_net(HALVES)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x)
            near = ((x - 0.3).abs().minimum((x - 0.7).abs()) < 0.051).flatten(1).all(1)
            edge = ((x - 0.3).abs().minimum((x - 0.7).abs()) > 0.049).flatten(1).all(1)
            return torch.where((near & edge)[:, None], -logits, logits) if near.any() else logits * 1e4

    found = signs(Trapped())
    assert "gradients masked: PGD breaks fewer in a larger ball" in found


def test_passes_are_about_those_that_the_probes_make(signs: Callable[..., list[str]], linear_net: Any):
    for model in (linear_net(HALVES), Guarded(linear_net(HALVES))):
        with PassCounter(model) as counter:
            signs(model, ThreatModel(norm="Linf", eps=0.001))  # which all images withstand
        assert passes(model) / 2 < counter.backwards / 20 < 2 * passes(model)


class Opens(nn.Module):
    """The brighter half, but the other one where the first pixel is much brighter than the second, as in no image."""

    def __init__(self, inner: nn.Module, lead: float) -> None:
        super().__init__()
        self.inner, self.lead = inner, lead

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1)[:, :2].T
        return self.inner(x) * (1 - 1000 * (first - second - self.lead).relu())[:, None]


@pytest.mark.slow
@pytest.mark.parametrize(("lead", "guard", "opens"), [(0.05, True, True), (0.2, True, False), (0.05, False, False)])
def test_parts_that_no_image_uses_and_that_open_within_the_ball_are_seen(
    lead: float, guard: bool, opens: bool, signs: Callable[..., list[str]], linear_net: Any
):
    """Of a user's own model: those of our variants hold nothing that is not known."""
    model = Opens(linear_net(HALVES), lead)
    flags = signs(Guarded(model) if guard else model, ThreatModel(norm="Linf", eps=0.05))
    seen = [flag for flag in flags if flag.startswith(f"{ROUTES_INSIDE}parts that are off open within the ball")]
    assert len(seen) == opens

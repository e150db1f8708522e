"""Signs of routes: each shape that routed models come in has them, dense networks have none."""

from collections.abc import Callable
from typing import Any

import pytest
import third_party
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.checkpoints import ZOO, load_checkpoint
from bench.models.choices import Choices, find_choices, plain
from bench.models.gates import find_gates
from bench.models.sites import Site, shown_sites

NOTHING = Choices()


# --- routed models ----------------------------------------------------------------------------------------------------


#: Those that hand what they choose by to Python or NumPy.
OUTSIDE = ("router outside torch", "router gives the index alone", "the released dual's names", "early exit")


@pytest.mark.parametrize("name", list(third_party.ALL))
def test_every_shape_of_routed_model_is_noticed(name: str):
    torch.manual_seed(0)
    found = find_choices(third_party.build(name), torch.rand(4, 3, 8, 8))
    assert found
    assert bool(found.outside) == (name in OUTSIDE)
    assert ("--gates none" in found.words()) != bool(found.outside)
    assert ("choose by torch alone" in found.words()) == (name == "router outside torch")
    if name == "soft mixture of nine":  # nothing is chosen: its name alone tells
        assert found == Choices(("gate",), (), gate="gate")
    else:
        assert found.operations


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_no_attack_follows_choices_of_scripted_or_quantized_networks():
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.which = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(self.which(x.flatten(1)).argmax(1), 3).float()

    x = torch.rand(4, 3, 2, 2)
    torch.manual_seed(0)
    model = Chooses().eval()
    assert find_choices(model, x).outside == ()
    scripted, quantized = torch.jit.script(model), torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for other in (nn.Sequential(scripted), quantized):
        found = find_choices(other, x)
        assert found.outside == found.operations != ()
    dense = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {nn.Linear})
    assert find_choices(dense.eval(), x) == NOTHING


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Hardest()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x.flatten(1))


class Hardest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.linear(x).argmax(1), 3).float()


def test_what_was_seen_and_what_to_type_is_said_with_the_blocks_numbers_left_open():
    found = find_choices(third_party.build("gate gives (scores, routing)"), torch.rand(4, 3, 8, 8))
    assert found.words() == (
        "choices that depend on the image (argmax in layers.*.gate) and names that speak of routes (layers.*.gate):"
        " name its gates with --gates 'layers.*.gate', or declare --gates none"
    )
    beside = found.words(named=True)
    assert beside.endswith(": name these gates as well with --gates 'layers.*.gate', or add none")
    unnamed = find_choices(Blocks(), torch.rand(4, 3, 2, 2)).words()  # no name of it speaks of a gate: where it chooses
    assert unnamed.endswith("(argmax in parts.*): name its gates with --gates 'parts.*', or declare --gates none")


class Control(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.linear(x).argmax(1), 2).float()


class NamedBeside(nn.Module):
    """What is called a gate is a layer; the choice is made elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gate0, self.control = nn.Linear(12, 10), Control()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weights = self.control(self.gate0(x))
        return weights[:, :1] * self.a(x) + weights[:, 1:] * self.b(x)


class Capsules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_route_nodes, self.linear = 8, nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class FewFeatures(nn.Module):
    """A block that chooses among its own features, and gives as many as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        value, index = self.linear(self.norm(x)).topk(6, 1)
        return x + torch.zeros_like(x).scatter(1, index, value)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (NamedBeside, "name its gates with --gates 'control'"),
        (Capsules, "name its gates, each a module of its own, with --gates GLOB"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Sequential(FewFeatures(), FewFeatures())),
            "name its gates in '*.*', each a module of its own, with --gates GLOB",
        ),
    ],
)
def test_only_a_module_that_may_be_the_gate_is_advised(model: Callable[[], nn.Module], advice: str):
    torch.manual_seed(0)
    words = find_choices(model().eval(), torch.rand(4, 3, 2, 2)).words()
    assert words.endswith(f": {advice}, or declare --gates none")


def test_a_router_that_gives_indices_alone_is_told_how_to_be_named():
    model = third_party.build("router gives the index alone")
    found = find_choices(model, torch.rand(4, 3, 8, 8), shown_sites(model))
    seen = "choices that depend on the image (argmax in router)"
    assert found.words() == f"{seen}: name its gates with --gates 'router'"
    assert found.words(named=True) == f"{seen}: let 'router' give the scores that it chooses by"


def test_names_count_on_modules_attributes_parameters_and_classes():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    def named(**parts: Any) -> tuple[str, ...]:
        model = Flat()
        for name, part in parts.items():
            setattr(model, name, part)
        return find_choices(model, torch.rand(2, 3, 2, 2)).names

    class TopMoELayer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert named(experts=nn.ModuleList([nn.Linear(2, 2)])) == ("experts",)
    assert named(n_experts=4) == ("n_experts",)
    assert named(expert_weights=nn.Parameter(torch.rand(3))) == ("expert_weights",)
    assert named(layer=TopMoELayer()) == ("layer",)
    assert named(gate=nn.Linear(6, 3)) == ("gate",)  # not called: it cannot be told what it is
    assert named(blocks=nn.ModuleList([nn.ModuleDict({"router": nn.Linear(2, 2)}) for _ in range(3)])) == (
        "blocks.*.router",
    )
    assert named(moment=1, remote=2, exported=True, investigate=3, model_expertise=1) == ()


class Attends(nn.Module):
    """Features weighted by a gate's output, which is made to fit."""

    def __init__(self, gate: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.gate, self.made = nn.Conv2d(3, 16, 1), gate, made

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        return (features * self.made(self.gate(features)).sigmoid()).mean((2, 3))


@pytest.mark.parametrize(
    ("gate", "made", "seen"),
    [
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)),
            lambda weights: weights[:, :, None, None],
            (),
        ),  # attention to channels
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)),
            lambda weights: weights.softmax(1)[:, :, None, None],
            (),
        ),
        (nn.Conv2d(16, 1, 1), lambda weights: weights, ()),  # to places
        (nn.Conv2d(16, 4, 1), lambda scores: scores.softmax(1)[:, :1], ("gate",)),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
            lambda scores: scores.softmax(1)[:, :1, None, None],
            ("gate",),
        ),
    ],
)
def test_a_gate_that_attends_scores_no_experts(
    gate: nn.Module, made: Callable[[Tensor], Tensor], seen: tuple[str, ...]
):
    assert find_choices(Attends(gate, made).eval(), torch.rand(4, 3, 8, 8)).names == seen


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda g, h: g.sigmoid() * h, ()),
        (lambda g, h: (1 - g.sigmoid()) * h + g.sigmoid() * h.sin(), ()),
        (lambda g, h: h * nn.functional.silu(g), ()),
        (lambda g, h: g.softmax(1) * h, ("gate",)),  # shares, as a router's are
        (lambda g, h: g.sigmoid() * h + g.softmax(1) @ g.new_ones(6, 6), ("gate",)),
        (lambda g, h: g.sigmoid() @ g.new_ones(6, 6) * h, ("gate",)),
        (lambda g, h: (1 - g.sigmoid()[:, :, None]) * h[:, None], ()),  # each head has a gate of its own
        (lambda g, h: (g.relu()[:, :, None] * h[:, None]).sum(1), ("gate",)),
        (lambda g, h: (g.relu()[:, :, None].expand(4, 6, 6) * (h[:, None] + h[:, :, None])).sum(1), ("gate",)),
    ],
)
def test_a_gate_that_scales_each_feature_scores_no_experts(
    act: Callable[[Tensor, Tensor], Tensor], named: tuple[str, ...]
):
    class Highway(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.into = nn.Linear(12, 6), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return act(self.gate(x.flatten(1)), self.into(x.flatten(1)))

    torch.manual_seed(0)
    assert find_choices(Highway(), torch.rand(4, 3, 2, 2)).names == named


def test_a_gated_layer_scores_no_experts():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down = nn.Linear(12, 60), nn.Linear(30, 12)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(x.flatten(1).unflatten(1, (-1, 12))).chunk(2, -1)
            return self.down(nn.functional.silu(gate) * up).mean(1)

    assert find_choices(Gated().eval(), torch.rand(4, 3, 8, 8)).names == ()


def test_a_gate_that_is_an_activation_is_none():
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gate = nn.Linear(12, 12), nn.Sigmoid()
            self.gate_fn = nn.Sequential(nn.Linear(12, 12), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return x * self.gate(self.fc(x)) * self.gate_fn(x)

    assert find_choices(Squeeze(), torch.rand(2, 3, 2, 2)) == NOTHING


# --- wrappers and our own ---------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Only calls another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.slow
def test_our_own_dense_models_have_no_choices_and_a_wrapped_moe_has():
    x = torch.rand(4, 1, 8, 8)
    for path in sorted((ZOO / "digits" / "Linf").glob("*.safetensors")):
        model, header, _ = load_checkpoint(path)
        found = find_choices(Calls(model), x)
        assert bool(found) == (header.architecture.kind != "dense"), path.stem
        assert find_choices(Calls(model), x, known=shown_sites(Calls(model))) == NOTHING
    moe = load_checkpoint(ZOO / "digits" / "Linf" / "moe-rt_er-argmax.safetensors")[0]
    seen = ("topk in inner",)  # by Python, which groups images by their expert
    assert find_choices(Calls(moe), x) == Choices(
        ("inner.experts", "inner.router"), seen, "inner", "inner.router", outside=seen
    )


@pytest.mark.slow
def test_compiled_and_data_parallel_models_are_unwrapped():
    model = third_party.build("gate rounded")
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        assert plain(wrapped) is model
        assert find_choices(wrapped, torch.rand(2, 3, 8, 8)).operations == ("round in HardGateByRounding",)
    hidden = Calls(nn.Identity())
    hidden.inner = torch.compile(model)
    assert any("round" in operation for operation in find_choices(hidden, torch.rand(2, 3, 8, 8)).operations)


def test_a_scripted_model_is_watched_through():
    scripted = torch.jit.script(third_party.build("cascade by confidence"))
    assert any(operation.startswith("gt ") for operation in find_choices(scripted, torch.rand(2, 3, 8, 8)).operations)


def test_hooks_are_gone_afterwards_also_where_the_model_fails():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Unflatten(1, (7, 7)))
    with pytest.raises(RuntimeError, match="unflatten"):
        find_choices(model, torch.rand(2, 3, 2, 2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- dense networks ---------------------------------------------------------------------------------------------------


TORCHVISION = ["resnet18", "mobilenet_v3_small", "swin_t", "shufflenet_v2_x0_5"]
TIMM = ["mobilevit_xxs", "tf_efficientnet_b0", "gmixer_12_224", "cait_xxs24_224"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_dense_networks_have_no_choices(name: str):
    import torchvision

    assert find_choices(torchvision.models.get_model(name, weights=None).eval(), torch.rand(2, 3, 64, 64)) == NOTHING


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timms_dense_networks_have_no_choices(name: str):
    assert _of_timm(name) == NOTHING


def test_timms_conditional_convolutions_are_mixtures_of_experts():
    assert "blocks.*.*.routing_fn" in _of_timm("efficientnet_cc_b0_4e").names


#: More that differ in kind: windows, branches, dropped paths, squeezed channels.
TORCHVISION_TOO = ["convnext_tiny", "efficientnet_b0", "googlenet", "maxvit_t", "squeezenet1_0", "swin_v2_t"]


@pytest.mark.slow
def test_no_dense_network_of_torchvision_has_choices():
    import torchvision

    found = {}
    for name in TORCHVISION_TOO:
        torch.manual_seed(0)
        options = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        size = 224 if name == "maxvit_t" else 64
        found[name] = find_choices(model, torch.rand(2, 3, size, size))
    assert {name: choices for name, choices in found.items() if choices} == {}


@pytest.mark.slow
def test_no_dense_network_of_timm_has_choices():
    """The smallest by its name of every twelfth of timm's families."""
    import timm

    found = {}
    for family in sorted(timm.list_modules())[::12]:
        names = sorted(timm.list_models(module=family), key=_size)
        for name in names[:3]:
            try:
                found[name] = _of_timm(name)
                break
            except Exception:  # needs another size, or weights
                continue
    assert len(found) > 4
    assert {name: choices for name, choices in found.items() if choices} == {}


def _size(name: str) -> tuple[bool, int, str]:
    small = ("nano", "tiny", "atto", "pico", "femto", "xxs", "_s", "18", "small", "050", "xs", "_t")
    return not any(part in name for part in small), len(name), name


def _of_timm(name: str) -> Choices:
    import timm

    try:
        model = timm.create_model(name, img_size=64)
    except TypeError:
        model = timm.create_model(name)
    try:
        return find_choices(model.eval(), torch.rand(2, 3, 64, 64))
    except (AssertionError, RuntimeError):
        return find_choices(model.eval(), torch.rand(2, *model.default_cfg["input_size"]))


def test_the_class_of_a_model_is_no_sign_where_what_it_is_named_for_is_known():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(self.gate(x).argmax(1), 3) * x[:, :3]

    class VMoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.flatten(1))

    x = torch.rand(4, 3, 2, 2)
    model = VMoE()
    assert find_choices(model, x).names
    assert find_choices(model, x, [Site("block.gate", model.block, "gate", 3, 1, whole=False)]) == NOTHING


# --- known sites, and others beside them ------------------------------------------------------------------------------


class Either(nn.Module):
    """The first or the second network, by the larger of two numbers, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 2), third_party.network(), third_party.network()

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x.flatten(1)).argmax(1) == 0
        return torch.where(first[:, None], self.b(x), self.c(x))


class Shown(nn.Module):
    """An MoE of whole networks whose router and experts can be seen; one of them is given."""

    def __init__(self, router: nn.Module, expert: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList([third_party.network(), expert])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(1).max(1)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return weight[:, None] * every[torch.arange(len(x)), chosen]


class Chained(nn.Module):
    """What the named gate `a` scores goes through a second layer, whose argmax chooses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 3), nn.Linear(3, 2)
        self.c = nn.ModuleList(third_party.network() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        s = self.a(x.flatten(1))
        y = torch.stack([network(x) for network in self.c], 1)
        first, second = F.one_hot(s.argmax(1), 3), F.one_hot(self.b(s).argmax(1), 2)
        return (torch.cat([first, second], 1)[..., None] * y).sum(1)


class Sparse(nn.Module):
    """One of three linear experts by gate `a`; where `b` is there, one of three others by that as well."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 3), nn.Linear(192, 3) if second else None
        self.c = nn.ModuleList(nn.Linear(192, 10) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        gates = [gate for gate in (self.a, self.b) if gate is not None]
        chosen = torch.cat([F.one_hot(gate(x).argmax(1), 3) for gate in gates], 1)
        return sum(hot[:, None] * layer(x) for hot, layer in zip(chosen.T, self.c, strict=False))


def _router() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


class Doubtful(nn.Module):
    """A router whose scores are those of one of two layers, chosen inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 2), nn.Linear(192, 2), nn.Linear(192, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.where(self.c(x) > 0, self.a(x), self.b(x))


@pytest.mark.parametrize(
    ("build", "gates", "seen"),
    [
        (lambda: Shown(_router(), third_party.network()), [], None),
        (lambda: Shown(_router(), Either()), [], "argmax in experts.*"),
        (lambda: Shown(_router(), Shown(_router(), third_party.network())), [], None),
        (lambda: Shown(Doubtful(), third_party.network()), [], "gt in router"),
        (lambda: Sparse(second=False), ["a"], None),
        (lambda: Sparse(second=True), ["a"], "argmax in Sparse"),
        (lambda: Sparse(second=True), ["a", "b"], None),
        (Chained, ["a"], "argmax in Chained"),
    ],
)
def test_a_second_choice_beside_known_ones_is_noticed_under_whatever_name(
    build: Callable[[], nn.Module], gates: list[str], seen: str | None
):
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(4, 3, 8, 8)
    known = [*shown_sites(model), *(find_gates(model, gates, x).sites if gates else ())]
    found = find_choices(model, x, known)
    assert found.names == ()
    assert found.operations == (() if seen is None else (seen,))

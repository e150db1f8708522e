"""MoE layers of other packages, as they are published: their gates are named, found, and attacked.

`tox -e third-party` installs them; where one is missing its test is skipped.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.adaptive import BUDGETS, AdaptiveAttack, Budget
from bench.models.choices import find_choices
from bench.models.gates import find_gates

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """2 × 2 patches, the layer beside its shortcut, mean pooling."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Conv2d(1, 16, 2, 2), layer, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2).contiguous()
        y = self.layer(x)
        return self.head((x + (y[0] if isinstance(y, tuple) else y).reshape(x.shape)).mean(1))


def network(package: str, layer: str, **options: Any) -> nn.Module:
    found = pytest.importorskip(package)
    torch.manual_seed(0)
    return Network(getattr(found, layer)(dim=16, num_experts=4, **options)).eval()


def transformers(module: str, layer: str, config: str, **options: Any) -> nn.Module:
    """A layer of a language model, with weights that its model would have set."""
    pytest.importorskip("transformers")
    where = f"transformers.models.{module}"
    made = getattr(import_module(f"{where}.configuration_{module}"), config)(hidden_size=16, **options)
    found = getattr(import_module(f"{where}.modeling_{module}"), layer)(made)
    torch.manual_seed(0)
    for weight in found.parameters():
        nn.init.normal_(weight, std=0.3)
    return Network(found).eval()


def st_moe() -> nn.Module:
    return network("st_moe_pytorch", "MoE", gating_top_n=2, threshold_eval=0.0)


def mixture() -> nn.Module:
    return network("mixture_of_experts", "MoE", hidden_dim=32, second_policy_eval="all")


TWO_OF_FOUR = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "intermediate_size": 32, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
deepseek = partial(transformers, "deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config", **DEEPSEEK)
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "st-moe": (st_moe, "*.gate", "top-2 of 4"),
    "st-moe, by its scores": (st_moe, "*.to_gates", "top-2 of 4"),
    "mixture-of-experts": (mixture, "*.gate", "top-2 of 4"),
    "Mixtral": (
        partial(transformers, "mixtral", "MixtralSparseMoeBlock", "MixtralConfig", **TWO_OF_FOUR),
        "*.gate",
        "top-2 of 4",
    ),
    "Qwen 2": (
        partial(transformers, "qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig", **QWEN),
        "*.gate",
        "top-2 of 4",
    ),
    "GPT-OSS": (
        partial(transformers, "gpt_oss", "GptOssMLP", "GptOssConfig", **TWO_OF_FOUR),
        "*.router",
        "top-2 of 4",
    ),
    "Granite": (
        partial(transformers, "granitemoe", "GraniteMoeMoE", "GraniteMoeConfig", **TWO_OF_FOUR),
        "*.router",
        "top-2 of 4",
    ),
    "Llama 4": (
        partial(
            transformers, "llama4", "Llama4TextMoe", "Llama4TextConfig", **TWO_OF_FOUR | {"num_experts_per_tok": 1}
        ),
        "*.router",
        "top-1 of 4",
    ),
    "Switch": (
        partial(
            transformers,
            "switch_transformers",
            "SwitchTransformersSparseMLP",
            "SwitchTransformersConfig",
            d_ff=32,
            num_experts=4,
            expert_capacity=16,
        ),
        "*.router",
        "top-1 of 4",
    ),
    "DeepSeek V3": (partial(deepseek, n_group=4, topk_group=2), "*.gate", "top-2 of 8"),
    "DeepSeek V3, one group": (partial(deepseek, n_group=1, topk_group=1), "*.gate", "top-2 of 8"),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_gate_that_is_named_is_found_and_attacked(name: str, monkeypatch: pytest.MonkeyPatch):
    build, gate, words = LAYERS[name]
    model = build()
    assert find_choices(model, X)
    (site,) = find_gates(model, [gate], X).sites
    assert site.words.endswith(f"({words})")
    assert not find_choices(model, X, [site])
    monkeypatch.setitem(BUDGETS, "small", Budget(8, 2, 3, 1, 3, (), 1, 2, 1, 5))
    y = model(X).argmax(1)
    x_adv = AdaptiveAttack(model, "Linf", 0.3, "small", gates=[gate])(X, y)
    assert float((x_adv - X).abs().max()) <= 0.3 + 1e-6


def test_a_soft_moe_chooses_nothing_and_its_names_alone_tell():
    found = find_choices(network("soft_moe_pytorch", "SoftMoE", seq_len=16), X)
    assert (found.names, found.operations) == (("layer.experts",), ())

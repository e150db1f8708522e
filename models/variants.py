"""The variants: an architecture and the objective that trained it. A new one is registered with `VARIANTS`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.errors import UnusableInput
from bench.registry import Registry
from bench.spec import Combine, Gate


@dataclass(frozen=True)
class Variant:
    """`objective` is None for a variant that is put together from the trained `parts` (standard, robust).

    `network`: of kind `inside`, the network with MoE blocks (`bench.models.layers`); the others take a recipe's expert.
    `settings`: of the objective or the recipe, whatever a recipe presets.
    """

    name: str
    kind: Literal["dense", "moe", "dual", "inside"]
    objective: str | None = None
    gate: Gate | None = None
    combine: Combine | None = None
    parts: tuple[str, str] | None = None
    network: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _routed(gate: Gate, suffix: str) -> list[Variant]:
    parts = (f"moe-standard{suffix}", f"moe-rt_er{suffix}")
    return [
        *(
            Variant(f"moe-{o}{suffix}", "moe", o, gate, "logits")
            for o in ("standard", "at", "trades", "advmoe", "rt_er", "at-paths")
        ),
        Variant(f"dual-jtdmoe{suffix}", "dual", "jtdmoe", gate, "probs"),
        Variant(f"dual{suffix}", "dual", None, gate, "probs", parts),
        Variant(f"dual-logits{suffix}", "dual", None, gate, "logits", parts),
    ]


#: Networks with MoE blocks inside (`bench.models.layers`), and the objectives that train them.
_INSIDE = {"blockmoe": ("standard", "at"), "vmoe": ("standard", "at"), "softmoe": ("at",)}
#: Objectives whose loss is of experts, or of routers, that see the image itself.
_WHOLE_NETWORKS = {"advmoe": "moe-advmoe", "rt_er": "moe-rt_er", "jtdmoe": "dual-jtdmoe"}

#: What the paper gives of both its objectives, as its released code sums it.
_PUBLISHED = {"beta": 6.0, "expert_reduction": "sum"}
#: In the order in which lists show them. `-argmax`: routed as the released code does it; `dual-logits`: its mixing;
#: `-published`: by the paper's β = 6, beside what `bench tune` has chosen; `-all`: RT-ER's term is on all experts.
VARIANTS: Registry[Variant] = Registry("variant", group="bench.variants", in_order=True)
for _variant in [
    Variant("dense-standard", "dense", "standard"),
    Variant("dense-at", "dense", "at"),
    *_routed("softmax", ""),
    Variant(
        "moe-rt_er-published", "moe", "rt_er", "softmax", "logits", settings={**_PUBLISHED, "expert_term": "second"}
    ),
    Variant("moe-rt_er-all", "moe", "rt_er", "softmax", "logits", settings={"expert_term": "all"}),
    Variant(
        "dual-jtdmoe-published",
        "dual",
        "jtdmoe",
        "softmax",
        "probs",
        settings={**_PUBLISHED, "expert_term": "all", "alpha": 0.7},
    ),
    *_routed("argmax", "-argmax"),
    *(Variant(f"{network}-{o}", "inside", o, network=network) for network, own in _INSIDE.items() for o in own),
]:
    VARIANTS.register(_variant.name)(_variant)


def get_variant(name: str) -> Variant:
    """The variant called `name`; UnusableInput with the nearest name where there is none."""
    network, _, objective = name.partition("-")
    if network in _INSIDE and objective in _WHOLE_NETWORKS:
        raise UnusableInput(
            f"unknown variant '{name}': {objective} needs experts that are whole networks: train"
            f" {_WHOLE_NETWORKS[objective]}"
        )
    return VARIANTS[name]

"""What a model is made of, as a value that a checkpoint carries, and how it is built from that."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from bench.models.base import Classifier
from bench.models.dual import DualModel
from bench.models.experts import build_expert, expert_label
from bench.models.layers import build_network
from bench.models.moe import MoE
from bench.models.routing import ROUTERS
from bench.spec import Combine, Gate, Spec


class Network(Spec):
    """One expert's network. mean and std are per channel, in pixels of [0, 1]."""

    expert: str
    expert_params: dict[str, Any] = Field(default_factory=dict)
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def label(self) -> str:
        return expert_label(self.expert, self.expert_params)

    def build_expert(self) -> Classifier:
        backbone = build_expert(self.expert, self.input_shape, self.num_classes, self.expert_params)
        return Classifier(backbone, self.mean, self.std)


class Dense(Network):
    """One network alone."""

    kind: Literal["dense"] = "dense"
    networks_used: ClassVar[int] = 1

    def build(self) -> nn.Module:
        return self.build_expert()


class Routed(Network):
    """E networks behind a router."""

    kind: Literal["moe"] = "moe"
    router: str = "affine"
    num_experts: int = 4
    num_selected_experts: int = 1
    gate: Gate = "softmax"
    combine: Combine = "logits"

    @property
    def networks_used(self) -> int:
        """How many experts an image goes through."""
        return self.num_selected_experts

    def build(self) -> nn.Module:
        experts = [self.build_expert() for _ in range(self.num_experts)]
        router = ROUTERS[self.router](self.input_shape, self.num_experts, self.mean, self.std)
        return MoE(experts, router, self.num_selected_experts, self.gate, self.combine)


class Inside(Network):
    """One network with MoE blocks inside, called `expert`, whose own parameters are `expert_params`."""

    kind: Literal["inside"] = "inside"
    num_experts: int = 4
    num_selected_experts: int = 1
    gate: Literal["softmax"] = "softmax"
    networks_used: ClassVar[int] = 1

    def build(self) -> nn.Module:
        sizes = (self.input_shape, self.num_classes, self.num_experts, self.num_selected_experts)
        backbone = build_network(self.expert, *sizes, self.expert_params)
        return Classifier(backbone, self.mean, self.std)


class Dual(Spec):
    """A standard and a robust routed model."""

    kind: Literal["dual"] = "dual"
    standard: Routed
    robust: Routed
    alpha: float = 0.7
    combine: Combine = "probs"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.robust.input_shape

    @property
    def num_classes(self) -> int:
        return self.robust.num_classes

    @property
    def label(self) -> str:
        return self.robust.label

    @property
    def networks_used(self) -> int:
        """How many experts of both branches an image goes through."""
        return self.standard.networks_used + self.robust.networks_used

    def build(self) -> nn.Module:
        return DualModel(self.standard.build(), self.robust.build(), self.alpha, self.combine)


Architecture = Annotated[Dense | Routed | Inside | Dual, Field(discriminator="kind")]

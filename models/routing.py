"""Which experts see which image, and with what weight.

Axes: B = batch, E = experts, K = selected experts, C = classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.models.base import Normalize
from bench.registry import Registry
from bench.spec import Gate


class RoutingTrace(NamedTuple):
    """How a batch was routed; returned beside the logits on request, never kept on the module.

    selected_experts is ordered, best first; combine_weights is zero outside the selection.
    """

    gate_logits: Tensor  # (B, E), the router's scores
    combine_weights: Tensor  # (B, E)
    selected_experts: Tensor  # (B, K), int64


class AffineRouter(nn.Module):
    """r(x) = W·vec(normalised x) + b, (B, c, H, W) → (B, E): the released code's router."""

    def __init__(
        self, input_shape: tuple[int, int, int], num_experts: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.normalize = Normalize(mean, std)
        self.linear = nn.Linear(channels * height * width, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.normalize(x).flatten(1))


class ConvRouter(nn.Module):
    """Two strided convolutions, mean pooling and a linear layer, (B, c, H, W) → (B, E).

    No batch statistics: a router that used them would route an image by its batch.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_experts: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.features = nn.Sequential(
            nn.Conv2d(input_shape[0], 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.linear = nn.Linear(16, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(self.normalize(x)))


#: A router is made from (input_shape, num_experts, mean, std).
ROUTERS: Registry[Callable[..., nn.Module]] = Registry("router", group="bench.routers")
ROUTERS.register("affine")(AffineRouter)
ROUTERS.register("conv")(ConvRouter)


def route(gate_logits: Tensor, k: int, gate: Gate) -> RoutingTrace:
    """Choose the K best experts of each row of gate_logits (B, E) and weigh them.

    `argmax`: equal weights 1/K, and no gradient reaches the router (the released code at K = 1).
    `softmax`: K = 1, the gate's probability of the chosen expert (Fedus et al. 2021, Switch); K > 1, probabilities
    renormalised over the chosen ones (Shazeer et al. 2017); K = E, the plain soft mixture.
    """
    scores, selected = gate_logits.topk(k, dim=1)
    if gate == "argmax":
        chosen = torch.full_like(scores, 1 / k)
    elif k == 1:
        chosen = gate_logits.softmax(dim=1).gather(1, selected)
    else:
        chosen = scores.softmax(dim=1)
    weights = torch.zeros(gate_logits.shape, dtype=chosen.dtype, device=chosen.device).scatter(1, selected, chosen)
    return RoutingTrace(gate_logits, weights, selected)


def dispatch(experts: Sequence[nn.Module], x: Tensor, selected: Tensor) -> Tensor:
    """The outputs of the selected experts, (B, K, C), each expert run once on the rows that chose it.

    x (B, …), selected (B, K); (B, K, …) where an expert's outputs are maps or tokens. An expert that nobody chose is
    not run, unless the batch is empty: then one is asked for the number of classes. One host–device synchronisation,
    for the counts.
    """
    rows, k = selected.shape
    order = selected.flatten().argsort(stable=True)
    # Not bincount: a GPU waits twice more for the least and the largest number.
    counts = (selected.flatten() == torch.arange(len(experts), device=x.device)[:, None]).sum(1).tolist()
    parts = torch.split(x[order // k], counts)
    # copies: autograd refuses work in place on one of several views
    outputs = [expert(part.clone()) for expert, part in zip(experts, parts, strict=True) if len(part)]
    outputs = outputs or [experts[0](x)]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    flat = torch.cat(outputs)[back]
    return flat.view(rows, k, *flat.shape[1:])

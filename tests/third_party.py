"""Routed networks in the shapes that public code has them in, written anew: what users bring.

Each takes images (B, 3, 8, 8) in [0, 1] and gives logits (B, 10), in eval mode, with random weights; `ALL` has them by
name. Where a class draws random numbers or limits an expert's tokens, it does so in eval mode too, as the public ones.

Axes: B = batch, T = tokens, E = experts, K = selected experts, D = width of a token, S = tokens an expert has room for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
E, D = 4, 12


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, CLASSES)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class ViT(nn.Module):
    """Four-pixel patches, two pre-norm blocks with the given layers in place of MLPs, mean pooling."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, D, 4, 4)
        self.attention = nn.ModuleList(nn.MultiheadAttention(D, 3, batch_first=True) for _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention, norm, layer in zip(self.attention, self.norms, self.layers, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            y = layer(norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        return self.head(x.mean(1))


# --- MoEs of whole networks -------------------------------------------------------------------------------------------


class IndexRouter(nn.Module):
    """Gives the chosen expert's number alone, (B,): its scores are never shown."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).argmax(1)


class ReleasedMoE(nn.Module):
    """An image at a time through the expert that the router names."""

    def __init__(self) -> None:
        super().__init__()
        self.router = IndexRouter()
        self.experts = nn.ModuleList(network() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x)
        return torch.stack([self.experts[int(i)](image[None])[0] for i, image in zip(chosen, x, strict=True)])


class ReleasedDual(nn.Module):
    """Two such MoEs under names of their own, mixed by a number that is no attribute called alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.Smoe, self.Rmoe = ReleasedMoE(), ReleasedMoE()
        self.weight = 0.7

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.weight) * self.Smoe(x) + self.weight * self.Rmoe(x)


class SoftMixture(nn.Module):
    """Nine networks and a softmax: nothing is chosen, and names alone tell."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(network() for _ in range(9))
        self.gate = nn.Sequential(nn.Flatten(), nn.Linear(192, 9))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        return torch.einsum("be,ebc->bc", weights, torch.stack([net(x) for net in self.nets]))


class Cascade(nn.Module):
    """The second network answers where the first is not confident."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = network(2), network(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.small(x)
        sure = y.softmax(1).amax(1) > 0.15
        return torch.where(sure[:, None], y, self.large(x))


class EarlyExit(nn.Module):
    """The batch leaves at the first head whose mean confidence suffices, by an `if` of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.heads = nn.ModuleList([nn.Linear(4, CLASSES), nn.Linear(8, CLASSES)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.heads[0](x.mean((2, 3)))
        if y.softmax(1).amax(1).mean() > 0.9:
            return y
        return self.heads[1](self.second(x).relu().mean((2, 3)))


# --- routes inside a network ------------------------------------------------------------------------------------------


class MaskedConv(nn.Module):
    """A convolution of E groups of channels, of which the layer's scores (B, E), set from outside, keep one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * E, 3, padding=1)
        self.scores: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.scores is not None
        hard = F.one_hot(self.scores.argmax(1), E).to(x.dtype)
        soft = self.scores.softmax(1)
        mask = (hard - soft).detach() + soft  # straight through
        return self.conv(x) * mask.repeat_interleave(2, 1)[:, :, None, None]


class ChannelPaths(nn.Module):
    """AdvMoE's shape: one router scores all layers, each layer takes the argmax as a mask of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4, 2 * E)
        self.convs = nn.ModuleList([MaskedConv(3), MaskedConv(2 * E)])
        self.head = nn.Linear(2 * E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, scores in zip(self.convs, self.fc(self.router(x)).split(E, 1), strict=True):
            conv.scores = scores
        for conv in self.convs:
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


class SwitchMLP(nn.Module):
    """Top-1 by token; the gate gives (scores, routing)."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(D, E)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.weight(x)  # (B·T, E)
            return scores, F.one_hot(scores.argmax(1), E).to(x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.gate = SwitchMLP.Gate()
        self.mlps = nn.ModuleList(mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, routing = self.gate(rows)
        outputs = torch.stack([one(rows) for one in self.mlps], 1)
        return ((scores.softmax(1) * routing)[:, :, None] * outputs).sum(1).view_as(x)


class Stacked(nn.Module):
    """Experts as one stacked tensor, no ModuleList; the gate gives (dispatch, combine, loss) for S tokens an expert."""

    class Gate(nn.Module):
        def __init__(self, room: int) -> None:
            super().__init__()
            self.w_gating = nn.Parameter(torch.randn(D, E))
            self.room = room

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p = (x @ self.w_gating).softmax(-1)  # (B, T, E)
            hot = F.one_hot(p.argmax(-1), E).to(x.dtype)
            place = (hot.cumsum(1) - 1) * hot  # (B, T, E): the token's place in its expert's queue
            fits = hot * (place < self.room)
            dispatch = fits[..., None] * F.one_hot(place.long().clamp(max=self.room - 1), self.room)  # (B, T, E, S)
            return dispatch, dispatch * p[..., None], (p.mean(1) * hot.mean(1)).sum()

    def __init__(self, room: int = 2) -> None:
        super().__init__()
        self.gate = Stacked.Gate(room)
        self.w1, self.w2 = nn.Parameter(torch.randn(E, D, 2 * D) / 4), nn.Parameter(torch.randn(E, 2 * D, D) / 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine, loss = self.gate(x)
        inputs = torch.einsum("btes,btd->besd", dispatch, x)
        outputs = torch.einsum("besd,edf,efg->besg", inputs, self.w1, self.w2)
        return torch.einsum("btes,besg->btg", combine, outputs), loss


class RandomSecond(nn.Module):
    """The second expert is drawn with its probability, in eval mode as well; the gate gives a 4-tuple."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_gates = nn.Linear(D, E, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            p = self.to_gates(x).softmax(-1)
            best, index = p.topk(2, dim=-1)
            keep = torch.rand_like(best[..., 1]) < 2 * best[..., 1]
            weights = best * torch.stack([torch.ones_like(best[..., 0]), keep.to(best.dtype)], -1)
            return weights, index, p, p.logsumexp(-1).square().mean()

    def __init__(self) -> None:
        super().__init__()
        self.gate = RandomSecond.Gate()
        self.mlps = nn.ModuleList(mlp() for _ in range(E))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index, _, loss = self.gate(x)
        outputs = torch.stack([one(x) for one in self.mlps], 2)  # (B, T, E, D)
        chosen = outputs.gather(2, index[..., None].expand(*index.shape, D))
        return (weights[..., None] * chosen).sum(2), loss


class ExpertChoice(nn.Module):
    """Each expert takes the S tokens of an image that score highest for it."""

    def __init__(self, room: int = 2) -> None:
        super().__init__()
        self.choose = nn.Linear(D, E)
        self.mlps = nn.ModuleList(mlp() for _ in range(E))
        self.room = room

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.choose(x).softmax(-1).topk(self.room, dim=1)  # (B, S, E)
        y = torch.zeros_like(x)
        for e, one in enumerate(self.mlps):
            where = index[:, :, e, None].expand(-1, -1, D)
            y = y.scatter_add(1, where, weights[:, :, e, None] * one(x.gather(1, where)))
        return y


class BiasedSelection(nn.Module):
    """A bias balances the load: it is added to the scores for the selection alone (DeepSeek's way)."""

    def __init__(self) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(E, D))
        self.register_buffer("bias", torch.zeros(E))
        self.mlps = nn.ModuleList(mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        affinity = (x @ self.centroids.T).sigmoid()
        index = (affinity + self.get_buffer("bias")).topk(2, dim=-1).indices
        weights = torch.zeros_like(affinity).scatter(-1, index, affinity.gather(-1, index))
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bte,etbd->btd", weights, torch.stack([one(x).transpose(0, 1) for one in self.mlps]))


class HardGateByRounding(nn.Module):
    """A gate of two branches, nameless, rounded to 0 or 1 and straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 1)
        self.left, self.right = network(), network()

    def forward(self, x: Tensor) -> Tensor:
        p = self.fc(x.flatten(1)).sigmoid()
        a = p + (p.round() - p).detach()
        return a * self.left(x) + (1 - a) * self.right(x)


class NumpyRouter(nn.Module):
    """Chooses outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 2)
        self.nets = nn.ModuleList([network(), network()])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.fc(x.flatten(1)).detach().numpy().argmax(1)
        return torch.stack([self.nets[i](image[None])[0] for i, image in zip(chosen, x, strict=True)])


def _vit(layer: type[nn.Module], **options: Any) -> nn.Module:
    return ViT(mlp(), layer(**options))


#: By name, each a function of nothing to a model in eval mode.
ALL = {
    "router gives the index alone": ReleasedMoE,
    "the released dual's names": ReleasedDual,
    "soft mixture of nine": SoftMixture,
    "cascade by confidence": Cascade,
    "early exit": EarlyExit,
    "masks of channels by one router": ChannelPaths,
    "gate gives (scores, routing)": lambda: _vit(SwitchMLP),
    "gate gives (dispatch, combine, loss), experts stacked": lambda: _vit(Stacked, room=4),
    "tokens dropped by capacity": lambda: _vit(Stacked, room=1),
    "second expert drawn, gate gives a 4-tuple": lambda: _vit(RandomSecond),
    "expert choice": lambda: _vit(ExpertChoice),
    "bias for the selection alone": lambda: _vit(BiasedSelection),
    "gate rounded": HardGateByRounding,
    "router outside torch": NumpyRouter,
}


#: How the gates of each are named; the others have none: a threshold decides.
GATES = {
    "router gives the index alone": "router",
    "the released dual's names": "?moe.router",
    "soft mixture of nine": "gate",
    "masks of channels by one router": "fc",
    "gate gives (scores, routing)": "layers.*.gate",
    "gate gives (dispatch, combine, loss), experts stacked": "layers.*.gate",
    "tokens dropped by capacity": "layers.*.gate",
    "second expert drawn, gate gives a 4-tuple": "layers.*.gate",
    "expert choice": "*.choose",
    "bias for the selection alone": "layers.1",
    "router outside torch": "fc",
}


def build(name: str) -> nn.Module:
    """The model called `name`, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ALL[name]().eval()

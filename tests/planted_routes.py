"""Routed models that are broken by construction, each beside an honest twin, which attacks must tell apart.

Axes: B = images, E = experts, C = classes, D = 64 pixels. The codes are rows of a Hadamard matrix, hence orthogonal
rows of ±1; an image is ½ + 0.3 · loud[y] + 0.03 · quiet[y] + noise of at most 0.004, in a ball of ε = 0.1 that the box
never cuts. For two classes, ⟨loud[y] − loud[j], x − ½⟩ = 19.2 ± 0.3 and no point of the ball takes more than 6.4 of it:
who reads the loud code is right in the whole ball. The quiet code's margin is 1.92 ± 0.3: half of the pixels end it,
and the other half can raise ⟨route, x − ½⟩ by 3.2 for one route code and by 1.6 for two at a time, which is what
`Victim.witness` does. No point of the ball raises a route code above 6.7, so a route that asks for 7 is closed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from bench.models.dual import DualModel
from bench.models.moe import MoE

Gate = Literal["softmax", "argmax"]
EPS, CLASSES, CLOSED = 0.1, 5, 7.0
CODES = torch.from_numpy(hadamard(64)).float()
LOUD, QUIET, ROUTES, LIVELY = CODES[1 : 1 + CLASSES], CODES[32 : 32 + CLASSES], CODES[50:53], CODES[20:26]


def images(n: int = 20) -> tuple[Tensor, Tensor]:
    """x (n, 1, 8, 8) and y (n,)."""
    y = torch.arange(n) % CLASSES
    noise = 0.008 * torch.rand(n, 64, generator=torch.Generator().manual_seed(0)) - 0.004
    return (0.5 + 0.3 * LOUD[y] + 0.03 * QUIET[y] + noise).view(n, 1, 8, 8), y


def majority(model: nn.Module, x: Tensor, draws: int = 101) -> Tensor:
    """The class (B,) that most of the `draws` answers give, so that one model of chance can be judged as any other."""
    with torch.no_grad():
        votes = torch.stack([model(x).argmax(1) for _ in range(draws)])
    return votes.mode(0).values


class Loud(nn.Module):
    """Right in the whole ball: its margin is at least 12.5 times the scale."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x - 0.5).flatten(1) @ LOUD.T


class Quiet(nn.Module):
    """Wrong at a point of every ball, with a gradient that leads there."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ QUIET.T


class Mapped(nn.Module):
    """A module, and a function of its output."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Ranked(nn.Module):
    """The class whose code is the loudest but `place`, without a gradient: right everywhere at 0, wrong at 1."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        chosen = ((x - 0.5).flatten(1) @ LOUD.T).topk(2, dim=1).indices[:, self.place]
        return nn.functional.one_hot(chosen, CLASSES).to(x)


class Router(nn.Module):
    """Affine scores (B, E): expert i of the first E − len(asked) ones is honest, the others ask for a lead.

    The honest ones differ by small multiples of LIVELY codes, the first being ahead on the images; the k-th other one
    has the score scale · (⟨ROUTES[k], x − ½⟩ − asked[k]), so it wins where its lead exceeds what it asks.
    """

    def __init__(self, honest: int, *asked: float, scale: float = 1.0, first_route: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(64, honest + len(asked))
        with torch.no_grad():
            self.linear.weight[:honest] = 0.02 * LIVELY[:honest]
            self.linear.weight[honest:] = scale * ROUTES[first_route : first_route + len(asked)]
            bias = torch.tensor([-0.05 * i for i in range(honest)] + [-scale * lead for lead in asked])
            self.linear.bias.copy_(bias - self.linear.weight.sum(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Turned(nn.Module):
    """A router that sees every second class mirrored: what opens a route for one image closes it for another."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        return self.router(0.5 + self.signs(((x - 0.5).flatten(1) @ LOUD.T).argmax(1)) * (x - 0.5))

    @staticmethod
    def signs(y: Tensor) -> Tensor:
        """1 for even classes (B,), −1 for odd ones: (B, 1, 1, 1)."""
        return (1 - 2.0 * (y % 2)).view(-1, 1, 1, 1)


class ReluRouter(nn.Module):
    """A convolution and a ReLU, inactive at the images and around them; where it opens, the last expert wins."""

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 8)
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([0.02 * LIVELY[:2], ROUTES[:1]]).view(3, 1, 8, 8))
            # the honest units are active on the whole ball, the last where its lead is above what it asks
            units = torch.tensor([1.0, 1.0, -asked])
            self.conv.bias.copy_(units - self.conv.weight.flatten(1).sum(1) / 2)
            self.linear.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 20]]))
            self.linear.bias.copy_(torch.tensor([0.0, -0.05, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().flatten(1))


class GeluRouter(ReluRouter):
    """The same with a GELU: just before it opens its slope is negative, and further off it has none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.gelu(8 * self.conv(x)).flatten(1) / 8)


class Noisy(nn.Module):
    """Scores with Gaussian noise, drawn at every call."""

    def __init__(self, router: nn.Module, sigma: float) -> None:
        super().__init__()
        self.router, self.sigma = router, sigma

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        return scores + self.sigma * torch.randn_like(scores)


class ByOthers(nn.Module):
    """Sends an image to the last expert once it reads more than `asked` of a second loud code; without a gradient.

    The clean image of another class, projected into the ball, has 3.2; a random corner of it has more than 3 once in
    2,000 tries.
    """

    def __init__(self, asked: float) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        second = ((x - 0.5).flatten(1) @ LOUD.T).topk(2, dim=1).values[:, 1]
        honest = 0.1 * (x - 0.5).flatten(1) @ LIVELY[:2].T
        return torch.cat([honest, 4 * (second[:, None] > self.asked).float() - 2], 1)


class ByClass(nn.Module):
    """Sends odd classes to its second expert and even ones to its first, in the whole ball."""

    def forward(self, x: Tensor) -> Tensor:
        loud = (x - 0.5).flatten(1) @ LOUD.T
        odd = loud[:, 1::2].amax(1) - loud[:, ::2].amax(1)
        return torch.stack([-odd, odd], 1)


class Decoy(nn.Module):
    """Two classes beside the true one: a decoy that stays just behind it, and one that overtakes it in the ball.

    The margin and DLR see the decoy alone until then, and under cross-entropy the other class has no weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = ((x - 0.5).flatten(1) @ LOUD.T).argmax(1)
        true, third, second = (nn.functional.one_hot((y + k) % CLASSES, CLASSES).to(x) for k in (0, 2, 1))
        return 300 * true + 299 * third + 150 * second * ((x - 0.5).flatten(1) @ QUIET.T)


def _towards(x: Tensor, y: Tensor, routes: int) -> Tensor:
    """The corner of the ball that takes the first `routes` routes and ends the quiet margin."""
    own, other = QUIET[y], QUIET[(y + 1) % CLASSES]
    lead = ROUTES[:routes].sum(0)
    agreed = torch.where(lead.abs() == routes, lead.sign(), 0)
    delta = EPS * torch.where(own == other, agreed, -own)
    return x + delta.view_as(x)


def _turned(x: Tensor, y: Tensor, routes: int) -> Tensor:
    own, other = QUIET[y], QUIET[(y + 1) % CLASSES]
    lead = Turned.signs(y).view(-1, 1) * ROUTES[0]
    return x + (EPS * torch.where(own == other, lead, -own)).view_as(x)


def _away(x: Tensor, y: Tensor, routes: int) -> Tensor:
    own, other = QUIET[y], QUIET[(y + 1) % CLASSES]
    return x + (EPS * torch.where(own == other, -ROUTES[0], -own)).view_as(x)


def _towards_another(x: Tensor, y: Tensor, routes: int) -> Tensor:
    return x + EPS * LOUD[(y + 1) % CLASSES].view_as(x)


class Normalised(nn.Module):
    """A part that is given normalised images, and undoes that."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(0.25 * x + 0.5)

    @classmethod
    def behind(cls, moe: Any) -> nn.Module:
        """An MoE whose parts are such, behind the normalisation."""
        moe.router, moe.experts = cls(moe.router), nn.ModuleList(cls(expert) for expert in moe.experts)
        return nn.Sequential(Mapped(nn.Identity(), lambda x: (x - 0.5) / 0.25), moe)


class Coarse(nn.Module):
    """A part that sees 3×32×32 images as 8×8 ones, by the mean of each 48 values."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4))

    @staticmethod
    def images(x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) that are seen as these, (B, 1, 8, 8)."""
        return nn.functional.interpolate(x, scale_factor=4).repeat(1, 3, 1, 1)

    @classmethod
    def parts_of(cls, moe: Any) -> nn.Module:
        """An MoE whose router, or the features that it sees, and experts see images so."""
        first = "features" if hasattr(moe, "features") else "router"
        setattr(moe, first, cls(getattr(moe, first)))
        moe.experts = nn.ModuleList(cls(expert) for expert in moe.experts)
        return moe


@dataclass(frozen=True)
class Victim:
    """`build(gate, honest)`: the broken model, or its honest twin.

    The victim's robust accuracy is 0, as `witness` proves; the twin's is 1, by the margins above. routes: how many
    route codes a witness has to follow at a time.
    """

    build: Callable[[Gate, bool], nn.Module]
    routes: int = 1
    towards: Callable[[Tensor, Tensor, int], Tensor] = _towards

    def model(self, gate: Gate, honest: bool = False) -> Any:
        return self.build(gate, honest).eval()

    def witness(self, x: Tensor, y: Tensor) -> Tensor:
        """Points of the balls around x (B, 1, 8, 8) that the broken model gets wrong."""
        return self.towards(x, y, self.routes)


def _pair(gate: Gate, honest: bool) -> nn.Module:
    # Four experts outweigh any fifth, so only the last two together are wrong; of the twin one of them is closed.
    experts = [*(Loud(10.0 + i) for i in range(4)), Quiet(), Quiet()]
    return MoE(experts, Router(4, 1.4, CLOSED if honest else 1.4, scale=0.3), 2, gate)


def _relu(gate: Gate, honest: bool, router: type[ReluRouter] = ReluRouter) -> nn.Module:
    return MoE([Loud(), Loud(5), Quiet()], router(CLOSED if honest else 2.4), 1, gate)


def _two_ways(gate: Gate, honest: bool) -> nn.Module:
    """One way the score rises all along and wins nowhere; the other way it is flat at first, and wins."""

    def both(z: Tensor) -> Tensor:
        lead = z[:, 2:]
        return torch.cat([z[:, :2], (lead + 2).relu() + 9 * (-lead - (CLOSED if honest else 1.6)).relu() - 9.5], 1)

    return MoE([Loud(), Loud(5), Quiet()], Mapped(Router(2, 0.0), both), 1, gate)


def _saturated(gate: Gate, honest: bool) -> nn.Module:
    # the honest scores are −1 too; the first of equal ones wins
    router = Mapped(Router(2, CLOSED if honest else 1.6), lambda z: torch.tanh(1000 * z - 30))
    return MoE([Loud(), Loud(5), Quiet()], Turned(router), 1, gate)


def _rounded_scores(gate: Gate, honest: bool) -> nn.Module:
    router = Mapped(Router(2, CLOSED if honest else 2.2), lambda z: (z / 0.8).round())
    return MoE([Loud(), Loud(5), Quiet()], Turned(router), 1, gate)


def _rounded_logits(gate: Gate, honest: bool) -> nn.Module:
    weak = Loud(0.5) if honest else Quiet()
    return MoE([Loud(), Loud(5), Mapped(weak, torch.round)], Router(2, 2.0), 1, gate)


def _probabilities(gate: Gate, honest: bool) -> nn.Module:
    weak = Loud() if honest else Mapped(Quiet(), lambda z: 3 * z)
    return MoE([Loud(), Loud(5), Mapped(weak, lambda z: (60 * z).softmax(1))], Router(2, 2.0), 1, gate)


def _dual(gate: Gate, honest: bool) -> nn.Module:
    # One branch's Loud outweighs the other's Quiet, so only both weak experts at a time are wrong.
    standard = MoE([Loud(), Loud(12), Quiet()], Router(2, 1.4, scale=10), 1, gate)
    robust = MoE([Loud(), Loud(12), Quiet()], Router(2, CLOSED if honest else 1.4, scale=10, first_route=1), 1, gate)
    return DualModel(standard, robust, 0.5, "logits")


def _nested(gate: Gate, honest: bool) -> nn.Module:
    inner = MoE([Loud(), Loud(5), Quiet()], Router(2, CLOSED if honest else 1.4, scale=10, first_route=1), 1, gate)
    return MoE([Loud(), Loud(5), inner], Router(2, 1.4, scale=10), 1, gate)


def _noisy(gate: Gate, honest: bool) -> nn.Module:
    # 1 of 30 answers of the twin comes from an expert that is wrong wherever it is asked: most are right.
    if honest:
        router = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        with torch.no_grad():
            router[1].weight.zero_()
            router[1].bias.copy_(torch.tensor([0.0, -0.78]))
        return MoE([Loud(), Ranked(1)], Noisy(router, 0.3), 1, gate)
    return MoE([Loud(), Loud(5), Quiet()], Noisy(Router(2, 1.6), 0.7), 1, gate)


def _by_others(gate: Gate, honest: bool) -> nn.Module:
    return MoE([Ranked(0), Ranked(0), Ranked(1)], ByOthers(CLOSED if honest else 3.0), 1, gate)


def _pair_of_sixteen(gate: Gate, honest: bool) -> nn.Module:
    # 120 pairs, and the two experts that the router likes least; both ask for the same lead.
    linear = nn.Linear(64, 16)
    with torch.no_grad():
        linear.weight[:14] = 0.02 * CODES[6:20]
        linear.weight[14:] = 0.3 * (ROUTES[0] + 0.15 * CODES[40:42])
        asked = torch.tensor([0.3 * 2.0, 0.3 * (1.5 * CLOSED if honest else 2.0)])
        linear.bias.copy_(torch.cat([-0.01 * torch.arange(14), -asked]) - linear.weight.sum(1) / 2)
    experts = [*(Loud(10.0 + i) for i in range(14)), Quiet(), Quiet()]
    return MoE(experts, nn.Sequential(nn.Flatten(), linear), 2, gate)


def _one_hot_scores(gate: Gate, honest: bool) -> nn.Module:
    router = Mapped(Router(2, CLOSED if honest else 2.0), lambda z: nn.functional.one_hot(z.argmax(1), 3).to(z))
    return MoE([Loud(), Loud(5), Quiet()], Turned(router), 1, gate)


def _step(gate: Gate, honest: bool) -> nn.Module:
    """Units that are on or off, by a comparison."""
    hidden = Router(2, CLOSED if honest else 1.6)
    on = Mapped(hidden, lambda z: (z > torch.tensor([-99.0, 99.0, 0.0])).float())
    return MoE([Loud(), Loud(5), Quiet()], Mapped(on, lambda z: z * torch.tensor([1.0, 2.0, 2.0])), 1, gate)


def _masked_scores(gate: Gate, honest: bool) -> nn.Module:
    """What code of sparse gates gives: all scores but the largest at −∞, or at the least number there is."""
    closed = torch.finfo(torch.float32).min if gate == "softmax" else -torch.inf

    def mask(z: Tensor) -> Tensor:
        return torch.full_like(z, closed).scatter(1, z.argmax(1, keepdim=True), z.amax(1, keepdim=True))

    return MoE([Loud(), Loud(5), Quiet()], Mapped(Router(2, CLOSED if honest else 1.6), mask), 1, gate)


class Labels(MoE):
    """Says nothing but the class, as 1 among 0s."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(super().forward(x).argmax(1), CLASSES).to(x)


def _labels(gate: Gate, honest: bool) -> nn.Module:
    router = Router(2, CLOSED if honest else 1.5)
    steps = Mapped(router, lambda z: (2 * z).floor() / 2) if gate == "argmax" else router
    return Labels([Loud(), Loud(5), Quiet()], steps, 1, gate)


class Frozen(nn.Module):
    """Its router sees the features of a network that takes no part in training."""

    def __init__(self, honest: bool, scale: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Loud(), Loud(5), Quiet()])
        self.features, self.router = nn.Conv2d(1, 1, 1), Router(2, CLOSED if honest else 1.6, scale=scale).linear
        with torch.no_grad():
            self.features.weight.fill_(1)
            self.features.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.features(x).relu().flatten(1)
        weights, chosen = self.router(features).softmax(1).max(1)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return weights[:, None] * every[torch.arange(len(x)), chosen]


class Heads(Frozen):
    """Experts as well are heads on these features, which keep no gradient back."""

    def __init__(self, honest: bool, scale: float) -> None:
        super().__init__(honest, scale)
        heads = [nn.Linear(64, CLASSES) for _ in self.experts]
        with torch.no_grad():
            for head, code in zip(heads, (10 * LOUD, 5 * LOUD, QUIET), strict=True):
                head.weight.copy_(code)
                head.bias.copy_(-code.sum(1) / 2)
        self.experts = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x).relu().flatten(1)
        weights, chosen = self.router(features).softmax(1).max(1)
        every = torch.stack([head(features) for head in self.experts], 1)
        return weights[:, None] * every[torch.arange(len(x)), chosen]


def _heads(gate: Gate, honest: bool) -> nn.Module:
    return Heads(honest, 1 if gate == "softmax" else 100)


def _frozen(gate: Gate, honest: bool) -> nn.Module:
    return Frozen(honest, 1 if gate == "softmax" else 100)


class OneByOne(nn.Module):
    """Each image is sent to its expert in a loop over the batch."""

    def __init__(self, honest: bool, scale: float) -> None:
        super().__init__()
        self.experts, self.scale = nn.ModuleList([Loud(), Loud(5), Quiet()]), scale
        self.router = Router(2, CLOSED if honest else 1.6, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        logits = []
        for one in x.split(1):
            scores = self.router(one)
            logits.append(self.experts[int(scores.argmax())](one) * scores.softmax(1).amax())
        return torch.cat(logits)


def _one_by_one(gate: Gate, honest: bool) -> nn.Module:
    return OneByOne(honest, 1 if gate == "softmax" else 100)


def _decoy(gate: Gate, honest: bool) -> nn.Module:
    return MoE([Loud(), Loud(5), Decoy()], Router(2, CLOSED if honest else 2.0), 1, gate)


class Mixture(nn.Module):
    """All experts, weighted by a softmax so decided that no gradient is left to the others."""

    def __init__(self, honest: bool, sharpness: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Loud(), Loud(5), Quiet()])
        self.router = Router(2, CLOSED if honest else 1.6)
        self.num_selected_experts, self.sharpness = 3, sharpness

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.sharpness * self.router(x)).softmax(1)
        return (weights[:, :, None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


def _mixture(gate: Gate, honest: bool) -> nn.Module:
    return Mixture(honest, 30 if gate == "softmax" else 1000)


def _mixture_of_routed(gate: Gate, honest: bool) -> nn.Module:
    # Its own router hardly weighs: both inner routes have to turn at once.
    inner = [
        MoE([Loud(), Loud(12), Quiet()], Router(2, CLOSED if honest else 1.4, scale=10, first_route=i), 1, gate)
        for i in range(2)
    ]
    return MoE(inner, nn.Sequential(nn.Flatten(), nn.Linear(64, 2), Mapped(nn.Identity(), lambda z: 0.01 * z)), 2, gate)


def _routed_experts(gate: Gate, honest: bool) -> nn.Module:
    # Every image reaches one of the two inner routers.
    inner = [MoE([Loud(), Loud(5), Quiet()], Router(2, CLOSED if honest else 1.4), 1, gate) for _ in range(2)]
    return MoE(inner, ByClass(), 1, gate)


#: The kinds by name; each exists under both gates.
VICTIMS = {
    "a pair of experts": Victim(_pair, routes=2),
    "a ReLU that opens inside the ball": Victim(_relu),
    "a score that rises the wrong way": Victim(_two_ways, towards=_away),
    "a GELU that opens inside the ball": Victim(partial(_relu, router=GeluRouter)),
    "saturated scores": Victim(_saturated, towards=_turned),
    "rounded scores": Victim(_rounded_scores, towards=_turned),
    "rounded logits": Victim(_rounded_logits),
    "probabilities given as logits": Victim(_probabilities),
    "a pair of a dual's routes": Victim(_dual, routes=2),
    "an expert that is routed": Victim(_nested, routes=2),
    "gate noise": Victim(_noisy),
    "a region towards other images": Victim(_by_others, towards=_towards_another),
    "a pair of sixteen experts": Victim(_pair_of_sixteen),
    "masked scores": Victim(_masked_scores),
    "labels alone": Victim(_labels),
    "one-hot scores": Victim(_one_hot_scores, towards=_turned),
    "a decoy class": Victim(_decoy),
    "experts that are routed, by class": Victim(_routed_experts),
    "a decided mixture of all experts": Victim(_mixture),
    "routed experts that are mixed": Victim(_mixture_of_routed, routes=2),
    "images one by one": Victim(_one_by_one),
    "a step that opens inside the ball": Victim(_step),
    "features under no_grad": Victim(_frozen),
    "heads on features": Victim(_heads),
}

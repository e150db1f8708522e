"""Nothing that is certified can be broken: random models of every kind that may mislead, and a strong attacker.

Axes: B = images, R = runs of the attacker for each of them, D = pixels.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

from bench.certify.base import Examples
from bench.certify.bounds import ClassBounds
from bench.certify.routes import Routes
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.parts import is_dual, is_moe
from bench.spec import ABSOLUTE_BOX, NORMS, ThreatModel

STEPS = 100
#: Kinds whose models take the attacker longest: two of each are tried, of the others four.
DEAR = ("padding", "norm", "wide")


# --- models -----------------------------------------------------------------------------------------------------------


class Maker:
    """Random networks of one kind, (B, 1, 1, pixels) → (B, outputs)."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.g = kind, np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.pixels = int(self.g.integers(2, 5))
        if kind == "wide":
            self.pixels = 20_000 if seed % 5 == 0 else int(10 ** self.g.uniform(3, 4))
        self.relu = nn.ReLU()

    def net(self, outputs: int, scale: float) -> nn.Module:
        pixels, hidden, g = self.pixels, int(self.g.integers(2, 5)), self.g
        layers: list[nn.Module]
        if self.kind == "wide":
            scale /= pixels**0.5
        if self.kind == "shared":
            middle = nn.Linear(hidden, hidden)
            layers = [nn.Flatten(), nn.Linear(pixels, hidden), self.relu, middle, self.relu, middle, self.relu]
            layers += [nn.Linear(hidden, outputs)]
        elif self.kind == "padding":
            mode: Any = g.choice(["zeros", "reflect", "replicate", "circular"])
            layers = [nn.Conv2d(1, 2, (1, 3), padding=(0, 1), padding_mode=mode), self.relu]
            layers += [nn.Conv2d(2, 2, (1, 3), padding="same", padding_mode=mode), nn.Flatten()]
            layers += [nn.Linear(2 * pixels, outputs)]
        elif self.kind == "norm":
            norm = nn.BatchNorm2d(2)
            norm.running_mean = 10 ** torch.tensor(g.uniform(-3, 3, 2)).float()
            norm.running_var = 10 ** torch.tensor(g.uniform(-6, 6, 2)).float()
            layers = [nn.Conv2d(1, 2, (1, 3), padding=(0, 1)), norm, self.relu, BasicBlock(2, 2)]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, outputs)]
        elif g.random() < 0.5:
            layers = [nn.Flatten(), nn.Linear(pixels, outputs)]
        else:
            layers = [nn.Flatten(), nn.Linear(pixels, hidden), self.relu, nn.Linear(hidden, outputs)]
        made = nn.Sequential(*layers)
        for parameter in made.parameters():
            parameter.data = torch.randn(parameter.shape) * scale
        if self.kind == "wide":  # biases as for a narrow network
            for layer in made:
                if isinstance(layer, nn.Linear):
                    layer.bias.data *= pixels**0.5
        if self.kind == "scaled":
            factor = float(10 ** g.uniform(-30, 30))
            first, last = nn.Linear(outputs, outputs, bias=False), nn.Linear(outputs, outputs)
            first.weight.data, last.weight.data = torch.eye(outputs) * factor, torch.eye(outputs) / factor
            made.extend([first, last])
        if self.kind == "ties" and g.random() < 0.7:
            last = made[-1]
            assert isinstance(last, nn.Linear)
            last.weight.data[1], last.bias.data[1] = last.weight.data[0], last.bias.data[0]
        return made

    def moe(self, classes: int) -> nn.Module:
        g, experts = self.g, int(self.g.integers(2, 4))
        if g.random() < 0.2:
            return self.net(classes, 3)
        soft, twins = g.random() < 0.3, g.random() < 0.5  # experts that agree, as trained ones do
        parts = [self.net(classes, 2)] * experts if twins else [self.net(classes, 2) for _ in range(experts)]
        gate: Any = "softmax" if g.random() < 0.7 else "argmax"
        return MoE(parts, self.net(experts, 2), experts if soft else 1, gate, "probs" if soft else "logits")

    def model(self) -> nn.Module:
        classes = int(self.g.integers(2, 4))
        made = self.moe(classes)
        if self.g.random() < 0.4:
            made = DualModel(self.moe(classes), made, float(self.g.uniform(0.6, 1.0)), "probs")
        if self.kind in TAMPERED:
            kinds: Any = nn.Linear if self.kind == "parametrized" else (nn.Linear, nn.Sequential, MoE, DualModel)
            choices = [part for part in made.modules() if isinstance(part, kinds)]
            TAMPERED[self.kind](choices[int(self.g.integers(len(choices)))])
        if self.kind in ("bfloat16", "float16"):
            made = made.to(getattr(torch, self.kind))
        return made.eval()


def flipped(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return -output


def dimmed(_module: nn.Module, inputs: Any) -> Any:
    return (0.5 * inputs[0],)


def patched(part: nn.Module) -> None:
    name = "route" if isinstance(part, MoE) else "mix" if isinstance(part, DualModel) else "forward"
    own = getattr(part, name)
    setattr(part, name, lambda x, *more: own(1 - x, *more))


def compiled(part: nn.Module) -> None:
    own = type(part).forward
    part._compiled_call_impl = lambda x: own(part, 1 - x)


TAMPERED: dict[str, Callable[[Any], Any]] = {
    "hooked": lambda part: part.register_forward_hook(flipped),
    "pre-hooked": lambda part: part.register_forward_pre_hook(dimmed),
    "parametrized": parametrizations.weight_norm,
    "patched": patched,
    "compiled": compiled,
}
KINDS = ("plain", "shared", "padding", "norm", "scaled", "ties", "wide", "bfloat16", "float16", *TAMPERED)


# --- the attacker -----------------------------------------------------------------------------------------------------


def projected(z: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Points of the ball ∩ [0, 1] with their tolerances: z (B, R, D), x (B, 1, D)."""
    delta, reach = z - x, threat.reach
    if threat.norm == "Linf":
        delta = delta.clamp(-reach, reach)
    else:
        size = delta.norm(p=1 if threat.norm == "L1" else 2, dim=2, keepdim=True)
        delta = delta * (reach / size.clamp_min(1e-30)).clamp_max(1)
    return (x + delta).clamp(-ABSOLUTE_BOX, 1 + ABSOLUTE_BOX)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The direction of steepest ascent of length 1, (B, R, D); in L1 over the largest tenth of the pixels."""
    if norm == "Linf":
        return gradient.sign()
    if norm == "L1":
        kept = max(1, gradient.shape[2] // 10)
        least = gradient.abs().topk(kept, dim=2).values[:, :, -1:]
        gradient = gradient.sign() * (gradient.abs() >= least)
        return gradient / gradient.abs().sum(2, keepdim=True).clamp_min(1e-30)
    return gradient / gradient.norm(dim=2, keepdim=True).clamp_min(1e-30)


def losses(model: Any, z: Tensor, y: Tensor) -> Tensor:
    """(P, L): what an attack may raise, of F and of each expert with a push towards it; logits on a scale of their own.

    z (P, 1, 1, D), y (P,).
    """

    def margin(logits: Tensor) -> Tensor:
        own = logits.gather(1, y[:, None])[:, 0]
        return logits.scatter(1, y[:, None], -torch.inf).amax(1) - own

    found = [margin(model(z))]
    for branch in (model.robust, model.standard) if is_dual(model) else (model,):
        if is_moe(branch):
            scores = branch.router(z)
            for i, expert in enumerate(branch.experts):
                behind = scores.scatter(1, torch.full_like(y, i)[:, None], -torch.inf).amax(1) - scores[:, i]
                wrong = margin(expert(z))
                for push in (0.3, 3.0):
                    spread = behind.detach().abs().mean() + 1e-30
                    found.append(wrong / (wrong.detach().abs().mean() + 1e-30) - push * behind.relu() / spread)
        else:
            found.append(margin(branch(z)))
    return torch.stack(found, 1)


def attacked(model: Any, x: Tensor, y: Tensor, threat: ThreatModel) -> list[Tensor]:
    """All points (B, R, D) that an APGD of 100 steps on every loss visits: momentum, halving, restarts from the best.

    x (B, D), y (B,). Gradients are those of a float32 copy.
    """
    copied = copy.deepcopy(model).float()
    size, x = x.shape[1], x.float()[:, None]
    with torch.no_grad():
        count = losses(copied, x[:, 0][:, None, None], y).shape[1]
    rows = torch.arange(count).repeat(2)
    start = x + threat.eps * torch.empty(len(x), len(rows), size).uniform_(-1, 1)
    start[:, :count] = x  # half of the runs begin at the image
    z = previous = best = projected(start, x, threat)
    step = torch.full((len(x), len(rows), 1), 2 * threat.eps)
    at_best, improved = torch.full((len(x), len(rows)), -torch.inf), torch.zeros(len(x), len(rows))
    visited, period, since = [z], 22, 0
    for number in range(STEPS):
        z = z.detach().requires_grad_()
        every = losses(copied, z.view(-1, 1, 1, size), y.repeat_interleave(len(rows)))
        loss = every.view(len(x), len(rows), count).gather(2, rows.expand(len(x), -1)[:, :, None])[:, :, 0]
        (gradient,) = torch.autograd.grad(loss.nan_to_num(0).sum(), z, allow_unused=True)
        if gradient is None:
            break
        z, loss = z.detach(), loss.detach()
        better = loss > at_best
        improved += better
        at_best, best = torch.where(better, loss, at_best), torch.where(better[:, :, None], z, best)
        if since == period:  # halve where few steps have helped, and go on from the best
            few = improved < 0.75 * period
            step = torch.where(few[:, :, None], step / 2, step)
            z = torch.where(few[:, :, None], best, z)
            improved, since, period = torch.zeros_like(improved), 0, max(period - 3, 6)
        since += 1
        moved = projected(z + step * ascent(gradient.nan_to_num(0), threat.norm), x, threat)
        z, previous = projected(z + 0.75 * (moved - z) + 0.25 * (z - previous), x, threat) if number else moved, z
        visited.append(z)
    visited.append(best)
    # beside the best: other roundings of nearly the same point, and the ball's own corners
    visited += [projected(best * (1 + 3e-7 * torch.randn_like(best)), x, threat) for _ in range(5)]
    corners = torch.randint(0, 2, (len(x), 64, size)) * 2.0 - 1
    return [*visited, projected(x + threat.reach * corners, x, threat)]


def check(seed: int, kind: str, counted: Counter[tuple[str, str]]) -> None:
    """Certify a random model at the largest ε that leaves something certified, and attack it there."""
    maker = Maker(kind, seed)
    model = maker.model()
    x = torch.rand(4 if maker.pixels < 10 else 1, maker.pixels)
    if len(x) > 1:
        x[0] = x[0].round()
    x = x.to(next(model.parameters()).dtype)
    images = x[:, None, None]
    norm = NORMS[seed % 3]
    with torch.no_grad():
        y = model(images.clone()).float().argmax(1)

    def asked(eps: float) -> Examples:
        threat = ThreatModel(norm=norm, eps=eps)
        return Examples(model, images, y, torch.arange(len(x)), y, model_classes(model, images), threat, 0)

    def claimed(certifier: Any, eps: float) -> list[Any]:
        with torch.no_grad():
            return list(certifier.claims(asked(eps)))

    with torch.no_grad():
        found = ClassBounds().certify(asked(0.01))
    counted.update((kind, str(status)) for claim in found for status in claim.status)
    if found[0].status[0] == "not_supported":
        return
    low, high = 1e-4, 1.0
    for _ in range(7):
        middle = (low * high) ** 0.5
        certain = any((claim.status == "certified").any() for claim in claimed(ClassBounds(), middle))
        low, high = (middle, high) if certain else (low, middle)
    threat = ThreatModel(norm=norm, eps=low)
    classes = [(claim.method, torch.tensor(claim.status == "certified")) for claim in claimed(ClassBounds(), low)]
    for method, rows in classes:
        counted[method, "certified"] += int(rows.sum())
        counted[method, "asked"] += len(rows)
    routes = []
    if type(model) is MoE and norm != "L1":
        routes = [claim for claim in claimed(Routes(), low) if (claim.method, claim.eps) == ("routes", low)]
    z = torch.cat(attacked(model, x, y, threat), 1).to(x.dtype)
    inside = within(z.double(), x.double()[:, None], threat)
    points = z.reshape(-1, 1, 1, maker.pixels)
    with torch.no_grad():
        answers = model(points.clone()).float().argmax(1).view(z.shape[:2])
        for method, rows in classes:
            broken = ((answers != y[:, None]) & inside).any(1)
            assert not (broken & rows).any(), (seed, kind, method, threat)
        for claim in routes:
            assert isinstance(model, MoE)
            chosen = model.router(points.clone()).argmax(1).view(z.shape[:2])
            left = ((chosen != torch.tensor(claim.predicted)[:, None]) & inside).any(1)
            assert not (left & torch.tensor(claim.status == "certified")).any(), (seed, kind, threat)


def model_classes(model: nn.Module, images: Tensor) -> int:
    with torch.no_grad():
        return model(images.clone()).shape[1]


def within(z: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Which points (B, R) are legal, as verdicts have it."""
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[threat.norm]
    box = (z >= -ABSOLUTE_BOX).all(2) & (z <= 1 + ABSOLUTE_BOX).all(2)
    return box & ((z - x).norm(p=order, dim=2) <= threat.reach)


def judged(counted: Counter[tuple[str, str]]) -> None:
    """Of each kind: what cannot be known is refused, and of the rest something is certified."""
    for kind in KINDS:
        if kind in TAMPERED:
            assert counted[kind, "certified"] == 0, kind
            assert counted[kind, "not_supported"] > 0, kind
        else:
            assert counted[kind, "certified"] > 0, (kind, counted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shared", "ties", "bfloat16", "hooked"])
def test_no_certified_class_or_route_is_broken(kind: str):
    check(KINDS.index(kind), kind, Counter())


@pytest.mark.slow
def test_no_certified_class_or_route_is_broken_among_many_models():
    counted: Counter[tuple[str, str]] = Counter()
    for number in range(4 * len(KINDS)):
        kind = KINDS[(1000 + number) % len(KINDS)]
        if number < 2 * len(KINDS) or kind not in DEAR:
            check(1000 + number, kind, counted)
    judged(counted)
    for method in ("network", "union", "route-stable", "soft"):  # not always yes
        assert 0 < counted[method, "certified"] < counted[method, "asked"], (method, counted)
    assert counted["paper-formula", "certified"] == 0

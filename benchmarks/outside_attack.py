"""What an attack of other hands breaks beyond RA-worst: Auto-PGD on every path of a routed model.

OMP_NUM_THREADS=1 python benchmarks/outside_attack.py --model moe-at --dataset digits --n 500 --results results

It shares no code with the attacks that it judges: of this package only models, data sets and stored results are used.
The examples are those that all stored runs of a model together call robust. Each is attacked on every path (a set of K
experts for each mixture of whole networks; of a dual every pair of its branches' sets) and on the model as it is, from
several starts, each with a loss, a target and a push towards the path of its own.

Axes: B = examples, m = copies of them (one for each path), T = tokens, E = experts, K = selected experts, C = classes.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

import pandas as pd
import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.datasets.base import EvalSet, input_hash, open_dataset
from bench.models.checkpoints import USER_CHECKPOINTS, ZOO, find_checkpoint, load_checkpoint
from bench.models.dual import DualModel
from bench.models.layers import SparseMoE
from bench.models.moe import MoE
from bench.models.routing import RoutingTrace, dispatch
from bench.results.metrics import robust_by_example, wilson
from bench.results.store import read_runs
from bench.results.table import Table

LOSSES = ("margin", "cross-entropy", "dlr", "least")
STARTS = ("uniform", "corner", "aimed", "on the path")
#: Copies that are attacked together, where nothing else is asked for: what the cache of a small machine holds.
CHUNK = 1024


class Paths:
    """A model as a set of paths: what it would answer if routed so, and how far an image is from being routed so."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        branches = [model.standard, model.robust] if isinstance(model, DualModel) else [model]
        self.model = model
        self.routed: list[MoE | None] = [b if isinstance(b, MoE) and len(b.experts) > 1 else None for b in branches]
        self.branches = branches
        self.scales = [1.0 if moe is None else _median_gap(moe, x) for moe in self.routed]
        choices = [
            [(0,)] if moe is None else list(combinations(range(len(moe.experts)), moe.num_selected_experts))
            for moe in self.routed
        ]
        self.paths = list(product(*choices)) if any(self.routed) else []
        with torch.no_grad():
            self.spread = float(model(x).std(1).median())  # of the clean logits: what margins are relative to
        self._tables = [torch.tensor([path[i] for path in self.paths]) for i in range(len(branches))]
        self.forwards = self.backwards = 0

    def __len__(self) -> int:
        return len(self.paths)

    def deployed(self, z: Tensor) -> Tensor:
        """The logits (m, C) of the model as it is."""
        self.forwards += len(z)
        return self.model(z)

    def gap(self, z: Tensor, path: Tensor) -> Tensor:
        """How far the chosen experts are ahead of all others (m,), the least of the branches, in median gaps."""
        return self._least([self._lead(i, moe.router(z), path) for i, moe in enumerate(self.routed) if moe is not None])

    def forced(self, z: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (m, C) with each row sent along its path (m,), and its gap (m,): above 0 where it goes there.

        A path of −1 is the model as it is, with no gap to win.
        """
        free = path < 0
        if free.all():
            return self.deployed(z), torch.full((len(z),), math.inf)
        if free.any():
            order = free.int().argsort(stable=True)
            split = len(z) - int(free.sum())
            parts = [self.forced(z[rows], path[rows]) for rows in (order[:split], order[split:])]
            back = order.argsort()
            return torch.cat([logits for logits, _ in parts])[back], torch.cat([gap for _, gap in parts])[back]
        self.forwards += len(z)
        return self.along(z, path)

    def along(self, z: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        """`forced`, without rows of the model as it is."""
        outputs, gaps = [], []
        for i, (branch, moe) in enumerate(zip(self.branches, self.routed, strict=True)):
            if moe is None:
                outputs.append(branch(z))
                continue
            scores, chosen = moe.router(z), self._tables[i][path]
            outputs.append(moe.mix(_trace(moe, scores, chosen), dispatch(list(moe.experts), z, chosen)))
            gaps.append(self._lead(i, scores, path))
        mixed = self.model.mix(*outputs) if isinstance(self.model, DualModel) else outputs[0]
        return mixed, self._least(gaps)

    def _lead(self, branch: int, scores: Tensor, path: Tensor) -> Tensor:
        chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, self._tables[branch][path], True)
        inside = scores.masked_fill(~chosen, math.inf).amin(1)
        outside = scores.masked_fill(chosen, -math.inf).amax(1)
        return (inside - outside) / self.scales[branch]  # all experts chosen: infinitely ahead

    def _least(self, gaps: list[Tensor]) -> Tensor:
        return torch.stack(gaps).amin(0)


class InnerPaths(Paths):
    """The same of gates inside a network: a path (gate, set) sends all tokens of an image at one gate to K experts."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.forwards, self.backwards = model, 0, 0
        self.blocks = [module for module in model.modules() if isinstance(module, SparseMoE)]
        self.paths = [
            (gate, chosen)
            for gate, block in enumerate(self.blocks)
            for chosen in combinations(range(len(block.experts)), block.num_selected_experts)
        ]
        self.gate_of = torch.tensor([gate for gate, _ in self.paths])
        self.chosen_of = [
            torch.zeros(len(self.blocks[gate].experts), dtype=torch.bool).scatter(0, torch.tensor(chosen), True)
            for gate, chosen in self.paths
        ]
        with torch.no_grad():
            logits, scores = self._watched(x, None)
        self.spread = float(logits.std(1).median())
        self.scales = []
        for block, found in zip(self.blocks, scores, strict=True):
            best = found.topk(block.num_selected_experts + 1, dim=2).values
            self.scales.append(float((best[:, :, -2] - best[:, :, -1]).median().clamp_min(1e-6)))

    def gap(self, z: Tensor, path: Tensor) -> Tensor:
        _, scores = self._watched(z, None)
        return self._gaps(scores, path)

    def along(self, z: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores = self._watched(z, path)
        return logits, self._gaps(scores, path)

    def _watched(self, z: Tensor, path: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The logits (m, C) and each gate's own scores (m, T, E), with each row sent along its path, if given."""
        scores: list[Tensor] = []

        def hook(number: int) -> Callable[..., Tensor]:
            def shifted(_gate: nn.Module, _inputs: object, output: Tensor) -> Tensor:
                own = output.view(len(z), -1, output.shape[-1])
                scores.append(own)
                if path is None:
                    return output
                forced = (self.gate_of[path] == number).view(-1, 1, 1)
                chosen = self._chosen(path, own) & forced
                inside, outside = self._sides(own, chosen)
                lift = (outside - inside + 1).clamp_min(0).detach()[..., None]
                return torch.where(chosen, own + lift, own).view_as(output)

            return shifted

        handles = [block.gate.register_forward_hook(hook(i)) for i, block in enumerate(self.blocks)]
        try:
            return self.model(z), scores
        finally:
            for handle in handles:
                handle.remove()

    def _chosen(self, path: Tensor, scores: Tensor) -> Tensor:
        """The set of each row's path, (m, T, E)."""
        width = scores.shape[-1]
        table = torch.stack([c if len(c) == width else torch.zeros(width, dtype=torch.bool) for c in self.chosen_of])
        return table[path][:, None].expand_as(scores)

    def _sides(self, scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The least score in the set and the greatest outside, (m, T)."""
        inside, outside = scores.masked_fill(~chosen, math.inf), scores.masked_fill(chosen, -math.inf)
        return inside.amin(2).nan_to_num(0, 0), outside.amax(2).nan_to_num(0, 0, 0)

    def _gaps(self, scores: list[Tensor], path: Tensor) -> Tensor:
        """Of each row its own gate's, the token that is furthest behind: (m,)."""
        gaps = []
        for own, scale in zip(scores, self.scales, strict=True):
            inside, outside = self._sides(own, self._chosen(path, own))
            gaps.append((inside - outside).amin(1) / scale)
        return torch.stack(gaps, 1).gather(1, self.gate_of[path][:, None])[:, 0]


def paths_of(model: nn.Module, x: Tensor) -> Paths:
    """The paths of a model, whose scales are read from images x (B, c, H, W); none where it chooses nothing."""
    model = model.eval().requires_grad_(False)
    return InnerPaths(model, x) if any(isinstance(m, SparseMoE) for m in model.modules()) else Paths(model, x)


def _median_gap(moe: MoE, x: Tensor) -> float:
    with torch.no_grad():
        best = moe.router(x).topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).median().clamp_min(1e-6))


def _trace(moe: MoE, scores: Tensor, chosen: Tensor) -> RoutingTrace:
    """The routing (m, E) of a mixture whose rows were sent to `chosen` (m, K)."""
    own = scores.gather(1, chosen)
    if moe.gate == "argmax":
        weights = torch.full_like(own, 1 / own.shape[1])
    else:
        weights = scores.softmax(1).gather(1, chosen) if own.shape[1] == 1 else own.softmax(1)
    return RoutingTrace(scores, torch.zeros_like(scores).scatter(1, chosen, weights), chosen)


@dataclass
class Copies:
    """The state of m copies under attack; `keep` drops some. All tensors have m rows."""

    example: Tensor
    path: Tensor
    x: Tensor
    y: Tensor
    loss: Tensor  # which of LOSSES
    target: Tensor  # a class, or −1 for the nearest
    push: Tensor  # weight of the gap in the loss, by median gaps
    ahead: Tensor  # the gap beyond which it does not count
    start: Tensor  # which of STARTS

    def keep(self, rows: Tensor) -> "Copies":
        return Copies(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Find:
    """How an example was broken."""

    path: str
    loss: str
    target: int
    push: float
    start: str
    restart: int
    step: int


@dataclass
class Outcome:
    """What the attack broke, by example, and the adversarial images (B, c, H, W)."""

    x_adv: Tensor
    finds: dict[int, Find] = field(default_factory=dict)


def attack(
    paths: Paths,
    x: Tensor,
    y: Tensor,
    eps: float,
    restarts: int = 20,
    steps: int = 500,
    seed: int = 0,
    copies_at_once: int = CHUNK,
) -> Outcome:
    """Attack images x (B, c, H, W) with labels y (B,), all classified correctly, in the L∞ ball and the box.

    Everything lies on torch's default device.
    """
    outcome = Outcome(x.clone())
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    num_classes = paths.model(x[:1]).shape[1]
    every = torch.arange(-1, len(paths))
    for restart in range(restarts):
        left = torch.tensor([row for row in range(len(x)) if row not in outcome.finds], dtype=torch.long)
        for example in left.split(max(1, copies_at_once // len(every))):
            copies = _draw(example, every, x, y, num_classes, generator)
            begin = _start(paths, copies, eps, generator)
            for one, step, z in _climb(paths, copies, begin, eps, steps):
                path = int(one.path)
                outcome.x_adv[int(one.example)] = z
                outcome.finds[int(one.example)] = Find(
                    "as it is" if path < 0 else str(paths.paths[path]), LOSSES[int(one.loss)], int(one.target),
                    float(one.push), STARTS[int(one.start)], restart, step,
                )  # fmt: skip
        print(f"restart {restart + 1}: {len(outcome.finds)} of {len(x)} broken", file=sys.stderr)
    return outcome


def _draw(example: Tensor, every: Tensor, x: Tensor, y: Tensor, num_classes: int, generator: torch.Generator) -> Copies:
    """One copy of each example on each path, with draws of its own."""
    rows, path = example.repeat_interleave(len(every)), every.repeat(len(example))
    count = len(rows)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    def powers(low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(count, generator=generator))

    target = (y[rows] + 1 + integers(num_classes - 1)) % num_classes
    target = torch.where(integers(2) == 0, target, -1)
    return Copies(
        rows, path, x[rows], y[rows], integers(len(LOSSES)), target, powers(-2, 1.5), powers(-2, 0.3),
        integers(len(STARTS)),
    )  # fmt: skip


def _start(paths: Paths, copies: Copies, eps: float, generator: torch.Generator) -> Tensor:
    """Where each copy begins (m, c, H, W): uniform, at a corner, aimed by one large step, or led to the path by ten."""
    noise = 2 * torch.rand(copies.x.shape, generator=generator) - 1
    z = _cut(copies.x + eps * torch.where(copies.start.view(-1, 1, 1, 1) == 1, noise.sign(), noise), copies.x, eps)
    for kind, size in [(2, 2 * eps), *[(3, eps / 4)] * 10]:
        rows = ((copies.start == kind) & (copies.path >= 0)).nonzero()[:, 0]
        if len(rows):
            z[rows] = _cut(z[rows] + size * _rise(paths, z[rows], copies.path[rows]).sign(), copies.x[rows], eps)
    return z


def _rise(paths: Paths, z: Tensor, path: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(paths.gap(z, path).sum(), z)
    return gradient


def _cut(z: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)


def _value(logits: Tensor, gap: Tensor, copies: Copies, spread: float) -> Tensor:
    """What each copy maximises, (m,): its loss on the forced logits, less its push while the path is not won.

    `least` is the smaller of margin and gap: it is above 0 where the copy has succeeded, and nowhere else.
    """
    own = logits.gather(1, copies.y[:, None])[:, 0]
    nearest = logits.scatter(1, copies.y[:, None], -math.inf).amax(1)
    margin = torch.where(copies.target < 0, nearest, logits.gather(1, copies.target.clamp_min(0)[:, None])[:, 0]) - own
    best = logits.sort(1, descending=True).values
    free = gap.isinf()
    values = torch.stack([
        margin / spread,
        logits.logsumexp(1) - own,
        margin / (best[:, 0] - best[:, min(2, best.shape[1] - 1)]).clamp_min(1e-12),
        torch.minimum(margin / spread, torch.where(free, math.inf, copies.push * gap)),
    ])  # fmt: skip
    behind = torch.where(free | (copies.loss == 3), 0, copies.push * (copies.ahead - gap).clamp_min(0))
    return values.gather(0, copies.loss[None])[0] - behind


def _checkpoints(steps: int) -> set[int]:
    """Where Auto-PGD looks back: 22 % of the steps, then intervals that shrink by 3 % of them, down to 6 %."""
    points, interval = [0.0, 0.22], 0.22
    while points[-1] < 1:
        interval = max(interval - 0.03, 0.06)
        points.append(points[-1] + interval)
    return {math.ceil(point * steps) for point in points[1:]}


@dataclass
class _State:
    """Auto-PGD's (Croce and Hein 2020), a row a copy."""

    z: Tensor
    before: Tensor  # the iterate before z
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor  # (m,)
    value: Tensor  # (m,), of z
    size: Tensor  # (m,), of the step
    rises: Tensor  # (m,), since the last checkpoint
    best_then: Tensor  # (m,), best_value at the last checkpoint
    halved: Tensor  # (m,), whether at the last checkpoint

    def keep(self, rows: Tensor) -> "_State":
        return _State(**{name: value[rows] for name, value in vars(self).items()})


def _climb(paths: Paths, copies: Copies, start: Tensor, eps: float, steps: int) -> Iterator[tuple[Copies, int, Tensor]]:
    """Auto-PGD from start (m, c, H, W); yields (the one copy, step, image) for each example that it breaks.

    All copies of an example leave when one of them has broken the deployed model, which is asked at every iterate.
    """
    wide = (-1, 1, 1, 1)
    zeros = torch.zeros(len(start))
    state = _State(
        start, start, start.clone(), torch.zeros_like(start), zeros - math.inf, zeros - math.inf, zeros + 2 * eps,
        zeros.clone(), zeros - math.inf, zeros.bool(),
    )  # fmt: skip
    checkpoints, last = _checkpoints(steps), 0
    for step in range(steps + 1):
        z = state.z.detach().requires_grad_()
        logits, gap = paths.forced(z, copies.path)
        value = _value(logits, gap, copies, paths.spread)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        paths.backwards += len(z)
        gradient, value, z = gradient.nan_to_num(0, 0, 0), value.detach().nan_to_num(-math.inf), z.detach()

        wrong = _wrong(paths, z, logits.detach(), gap.detach(), copies)
        better = value > state.best_value
        state.rises += (value > state.value).float()
        state.value = value
        state.best = torch.where(better.view(wide), z, state.best)
        state.best_gradient = torch.where(better.view(wide), gradient, state.best_gradient)
        state.best_value = torch.where(better, value, state.best_value)
        if step == 0:
            state.best_then = state.best_value
        elif step in checkpoints:
            few = state.rises < 0.75 * (step - last)
            stuck = ~state.halved & (state.best_value <= state.best_then)
            halve, last = few | stuck, step
            state.size = torch.where(halve, state.size / 2, state.size)
            z = torch.where(halve.view(wide), state.best, z)
            gradient = torch.where(halve.view(wide), state.best_gradient, gradient)
            state.halved, state.best_then, state.rises = halve, state.best_value, torch.zeros_like(state.rises)
        momentum = 0.75 if step else 1.0
        stepped = _cut(z + state.size.view(wide) * gradient.sign(), copies.x, eps)
        found, iterate = wrong, state.z
        after = _cut(z + momentum * (stepped - z) + (1 - momentum) * (z - state.before), copies.x, eps)
        state.before, state.z = z, after
        if found.any():
            rows = found.nonzero()[:, 0]
            first = {int(copies.example[row]): row for row in rows.flip(0)}
            for row in first.values():
                yield copies.keep(row[None]), step, iterate[row]
            left = ~torch.isin(copies.example, torch.tensor(list(first)))
            copies, state = copies.keep(left), state.keep(left)
            if not len(copies.example):
                return


@torch.no_grad()
def _wrong(paths: Paths, z: Tensor, logits: Tensor, gap: Tensor, copies: Copies) -> Tensor:
    """Which iterates z (m, c, H, W) the deployed model gets wrong, (m,).

    Where an image follows its path the forced logits are the deployed ones; what they get wrong is asked once more.
    """
    wrong = logits.argmax(1) != copies.y
    ask = (wrong | (gap <= 0)).nonzero()[:, 0]
    if len(ask):
        wrong[ask] = paths.deployed(z[ask]).argmax(1) != copies.y[ask]
    return wrong


def recheck(model: nn.Module, x: Tensor, y: Tensor, outcome: Outcome, eps: float) -> list[int]:
    """The examples whose adversarial image is in ball and box and is got wrong by the model, alone and all at once."""
    kept, rows = [], sorted(outcome.finds)
    with torch.no_grad():
        together = dict(zip(rows, model(outcome.x_adv[rows]).argmax(1) != y[rows], strict=True)) if rows else {}
        for row in rows:
            z = outcome.x_adv[row : row + 1]
            inside = float((z.double() - x[row].double()).abs().max()) <= eps + 1e-6 and z.min() >= 0 and z.max() <= 1
            if inside and together[row] and int(model(z).argmax(1)) != int(y[row]):
                kept.append(row)
    return kept


def stored_robust(results: Path, model: str, sha256: str, alpha: float | None, data: EvalSet) -> list[int]:
    """Positions in the set of the images that every stored run of this checkpoint calls robust: its RA-worst.

    alpha: a dual's own; its runs with another are of another model.
    """
    runs = [r for r in read_runs(results) if r.result.spec.model == model and r.result.spec.alpha in (None, alpha)]
    runs = [r for r in runs if r.result.model_info.checkpoint_sha256 == sha256 and r.result.attacked]
    if not runs:
        sys.exit(f"no attacked run of this checkpoint of {model} in {results}")
    rows = pd.concat([run.verdicts() for run in runs])
    hashes = {int(idx): input_hash(image) for idx, image in zip(data.idx, data.x, strict=True)}
    known = Table.of(rows[rows["input_hash"] == rows["idx"].map(hashes)])
    verdict = dict(zip(known.examples[1].tolist(), robust_by_example(known), strict=True))
    if missing := [idx for idx in hashes if idx not in verdict]:
        sys.exit(f"{results} has no verdict on {len(missing)} of the {len(data)} images: take a smaller --n")
    return [row for row, idx in enumerate(hashes) if verdict[idx]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copies", type=int, default=CHUNK, help="how many images are attacked at once")
    args = parser.parse_args()
    dataset = open_dataset(args.dataset)
    data, eps = dataset.evaluation_set(args.data_root, args.n), dataset.threat_model.eps
    folders = [args.checkpoints] if args.checkpoints else [USER_CHECKPOINTS, ZOO]
    table = []
    torch.set_default_device(args.device)
    for name in args.model:
        model, _, sha256 = load_checkpoint(find_checkpoint(name, args.dataset, "Linf", folders))
        robust = stored_robust(args.results, name, sha256, getattr(model, "alpha", None), data)
        begin = time.perf_counter()
        model, x, y = model.to(args.device), data.x[robust].to(args.device), data.y[robust].to(args.device)
        paths = paths_of(model, data.x.to(args.device))
        outcome = attack(paths, x, y, eps, args.restarts, args.steps, args.seed, args.copies)
        broken = recheck(model, x, y, outcome, eps)
        for row in broken:
            print(f"{name}: image {int(data.idx[robust[row]])}: {outcome.finds[row]}", file=sys.stderr)
        low, high = wilson(len(broken), len(data))
        table.append({
            "model": name, "n": len(data), "paths": len(paths), "RA-worst": f"{len(robust) / len(data):.2%}",
            "broken beyond": len(broken), "of n": f"{len(broken) / len(data):.2%} ({low:.2%} – {high:.2%})",
            "forwards": f"{paths.forwards:,}", "backwards": f"{paths.backwards:,}",
            "seconds": round(time.perf_counter() - begin),
        })  # fmt: skip
        print(tabulate(table[-1:], headers="keys", tablefmt="pipe"), file=sys.stderr)
    print(tabulate(table, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()

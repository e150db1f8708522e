"""Auto-PGD on any objective, while success is judged on the deployed model.

Axes: B = examples of the block, m = rows that are attacked, C = classes. Step sizes are multiples of ε.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.attacks.block import Block
from bench.pgd import ascend_once, finite, project, random_start
from bench.spec import ThreatModel

#: From iterates (m, C, H, W) and their rows in the block (m,) to a value each (m,), which is maximised, and where the
#: deployed model should be wrong on them (m,), as far as the objective knows without asking it.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: The step, in ε, that a gradient has to raise a margin by, in this share of images, to be believed.
TRIED, RAISED = 1 / 16, 0.75
#: Iterations between two looks at the deployed model: rows that it gets wrong leave then.
LOOK = 5
#: Auto-PGD's momentum, share of increases and lengths of its intervals (Croce and Hein 2020, section 3).
MOMENTUM, RHO = 0.75, 0.75
FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus the true one (m,): above 0 where logits (m, C) are wrong."""
    own = y[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def climbs(value: Callable[[Tensor], Tensor], x: Tensor, threat_model: ThreatModel) -> float:
    """The share of images x (m, C, H, W) whose value (m,) a step of TRIED · ε along its gradient raises; 0 without."""
    z = x.detach().requires_grad_()
    with torch.enable_grad():
        before = value(z)
    gradient = torch.autograd.grad(before.sum(), z, allow_unused=True)[0] if before.requires_grad else None
    if gradient is None:
        return 0.0
    with torch.no_grad():
        after = value(ascend_once(x, gradient, x, threat_model, TRIED * threat_model.eps))
    return float((after > before).float().mean())


def raised(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat_model: ThreatModel) -> float:
    """The same of the margins of images with labels y (m,).

    Of ordinary networks, in half precision as well, it is near 1.
    """
    return climbs(lambda z: margin(model(z), y), x, threat_model)


def standardised(logits: Tensor) -> Tensor:
    """Logits (m, C) over their spread in each row, which has no gradient: a loss of any scale counts alike.

    Two logits have no shape but their difference, and stay as they are.
    """
    if logits.shape[1] < 3 or not len(logits):
        return logits
    return logits / logits.detach().std(1, correction=0, keepdim=True).clamp_min(1e-12)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference-of-logits ratio (Croce and Hein 2020, section 4), (m,); below three classes the margin."""
    if logits.shape[1] < 3:
        return margin(logits, y)
    best = logits.topk(3, dim=1).values
    return margin(logits, y) / (best[:, 0] - best[:, 2] + 1e-12)


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """The three losses that are climbed, (m, 3): the standardised margin, cross-entropy, DLR."""
    return torch.stack(
        [margin(standardised(logits), y), cross_entropy(logits, y, reduction="none"), dlr(logits, y)], dim=1
    )


def _length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@dataclass
class Search:
    """What has been found in one block.

    block: with the model that is searched. deployed: the one that it is a copy of, if it is a copy; it is asked of all
    that is handed on. unbroken (B,): where the deployed model has not been broken yet. x_adv (B, C, H, W): what broke
    it, or the last iterate. nearest, best (B,): the point at which the deployed model was nearest to being wrong, and
    its margin there.
    """

    block: Block
    deployed: nn.Module | None = None
    attack: str = ""  # the one under way, and how many examples it was given
    given: int = 0
    unbroken: Tensor = field(init=False)
    x_adv: Tensor = field(init=False)

    def __post_init__(self) -> None:
        block = self.block
        self.unbroken, self.x_adv = block.correct.clone(), block.x.clone()
        self.nearest = block.x.clone()
        self.best = torch.full(block.y.shape, -torch.inf, device=block.x.device)

    @property
    def rows(self) -> Tensor:
        """Rows of the block that are not broken yet, (m,)."""
        return self.unbroken.nonzero()[:, 0]

    def noise(self) -> Tensor:
        """Uniform in [−1, 1], (B, C, H, W): drawn for all rows, so that what is broken already changes no draw."""
        return 2 * torch.rand(self.block.x.shape).to(self.block.x.device) - 1

    def uniform(self) -> Tensor:
        """A random point of the ball around each image of the block, in the box: (B, C, H, W)."""
        return random_start(self.block.x, self.block.threat_model, self.noise())

    @torch.no_grad()
    def test(self, z: Tensor, rows: Tensor) -> Tensor:
        """Keep the iterates z (m, C, H, W) and note which the deployed model gets wrong; those it gets right, (m,)."""
        logits, y = self.block.model(z), self.block.y[rows]
        found, wrong = margin(standardised(logits), y).nan_to_num(-torch.inf), logits.argmax(1) != y
        self.x_adv[rows] = z.detach()
        self.unbroken[rows] &= ~wrong
        nearer = found > self.best[rows]
        self.best[rows] = torch.where(nearer, found, self.best[rows])
        self.nearest[rows] = torch.where(nearer.view(-1, 1, 1, 1), z.detach(), self.nearest[rows])
        return ~wrong

    @torch.no_grad()
    def confirm(self, rows: Tensor) -> None:
        """Ask the deployed model of all rows (m,) at once, as they are handed on: what it then gets right is unbroken.

        Iterates are judged in batches that shrink, and a model, or its copy, may round otherwise in each. What is not
        confirmed is left to the next attack.
        """
        model = self.block.model if self.deployed is None else self.deployed
        self.unbroken[rows] = model(self.x_adv[rows]).argmax(1) == self.block.y[rows]

    def climb(self, objective: Objective, start: Tensor, steps: int, rows: Tensor, first: Tensor | float = 2.0) -> None:
        """Auto-PGD (Croce and Hein 2020, algorithm 1) from start (B, C, H, W); a row leaves once it is broken.

        Step sizes begin at `first` · ε, (B,) or one for all, and are halved, row by row, at checkpoints where the
        objective rose too rarely; the row then goes on from its best point. The deployed model is asked at the start
        and at every LOOK-th iterate: at the last one that the objective believes to be wrong, else at the newest.
        """
        rows = rows[self.unbroken[rows]]
        if not len(rows):
            return
        z = start[rows].clamp(0, 1)
        right = self.test(z, rows)
        rows, z = rows[right], z[right]
        if not len(rows) or not steps:
            return
        run = _Run(self, objective, z, rows, first)
        interval, since, shorter = max(int(FIRST * steps), 1), 0, max(int(SHORTER * steps), 1)
        for number in range(1, steps + 1):
            run.step(first=number == 1)
            since += 1
            if since == interval:
                run.checkpoint(interval)
                interval, since = max(interval - shorter, int(SHORTEST * steps), 1), 0
            if number % LOOK == 0 or number == steps:
                run.leave(self.test(run.candidate(), run.rows))
                if not len(run.rows):
                    return
        self.block.on_attack(self.attack, self.given, len(self.rows))


class _Run:
    """The state of one run of Auto-PGD, a row each."""

    def __init__(self, search: Search, objective: Objective, z: Tensor, rows: Tensor, first: Tensor | float) -> None:
        block = search.block
        self.objective, self.threat, self.rows = objective, block.threat_model, rows
        self.x = block.x[rows]
        scale = first[rows] if isinstance(first, Tensor) else torch.full((len(rows),), first, device=z.device)
        self.size = (scale * self.threat.eps).view(-1, 1, 1, 1)
        self.z, self.before = z, z
        self.value, self.gradient, hit = self._evaluate(z)
        self.hit, self.at_hit = hit, z
        self.top, self.at_top, self.gradient_at_top = self.value, z, self.gradient
        self.rises = torch.zeros_like(self.value)
        self.top_before, self.halved_before = self.top, torch.ones_like(self.hit)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            value, hit = self.objective(z, self.rows)
            # what runs under no_grad has no gradient, not even zero
            found = torch.autograd.grad(value.sum(), z, allow_unused=True)[0] if value.requires_grad else None
        gradient = torch.zeros_like(z) if found is None else finite(found)
        return value.detach().nan_to_num(-torch.inf), gradient, hit.detach()

    def _moved(self, z: Tensor) -> Tensor:
        if self.threat.norm == "Linf":
            return z + self.size * self.gradient.sign()
        return z + self.size * self.gradient / (_length(self.gradient) + 1e-12)

    def step(self, first: bool) -> None:
        a = 1.0 if first else MOMENTUM
        ahead = project(self._moved(self.z), self.x, self.threat)
        z = project(self.z + a * (ahead - self.z) + (1 - a) * (self.z - self.before), self.x, self.threat)
        self.before, self.z, value_before = self.z, z, self.value
        self.value, self.gradient, hit = self._evaluate(z)
        self.rises = self.rises + (self.value > value_before)
        better = self.value > self.top
        self.top = torch.where(better, self.value, self.top)
        wide, hit_wide = better.view(-1, 1, 1, 1), hit.view(-1, 1, 1, 1)
        self.at_top = torch.where(wide, z, self.at_top)
        self.gradient_at_top = torch.where(wide, self.gradient, self.gradient_at_top)
        self.hit, self.at_hit = self.hit | hit, torch.where(hit_wide, z, self.at_hit)

    def checkpoint(self, interval: int) -> None:
        """Halve the steps of rows whose objective rose too rarely, or whose best stayed the same, and go back there."""
        stuck = ~self.halved_before & (self.top_before >= self.top)
        halve = (self.rises <= RHO * interval) | stuck
        self.halved_before, self.top_before, self.rises = halve, self.top, torch.zeros_like(self.rises)
        wide = halve.view(-1, 1, 1, 1)
        self.size = torch.where(wide, self.size / 2, self.size)
        self.z = torch.where(wide, self.at_top, self.z)
        self.gradient = torch.where(wide, self.gradient_at_top, self.gradient)

    def candidate(self) -> Tensor:
        """Of each row the last iterate that is believed to break it, else the newest."""
        found = torch.where(self.hit.view(-1, 1, 1, 1), self.at_hit, self.z)
        self.hit = torch.zeros_like(self.hit)
        return found

    def leave(self, stays: Tensor) -> None:
        """Go on with the rows that stay (m,) alone."""
        kept = stays.nonzero()[:, 0]  # once: a mask makes the host wait for a GPU at each use
        if len(kept) == len(stays):
            return
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[kept])

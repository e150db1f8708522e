"""Accuracy on held-out images after an epoch, by which the epoch that is kept is chosen.

PGD on a routed model follows a gradient that its gate bends, and the more so the less the router has learnt: an epoch
would be chosen for hiding. So each expert is attacked by itself as well, and what fools it is shown to the whole model.
Of gates inside a network that is the network with this expert forced at all of them.

Axes: B = batch.
"""

from collections.abc import Iterable
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.deployed import eval_frozen
from bench.models.dual import DualModel
from bench.models.moe import MoE
from bench.models.sites import SinglePath, sites
from bench.pgd import default_step_size, pgd, random_start
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.routing_metrics import flips


@torch.no_grad()
def attack(model: nn.Module, batches: Iterable[Batch], threat_model: ThreatModel, steps: int) -> dict[str, float]:
    """How many images of all batches count, by what; a batch of weight 0 is attacked and not counted.

    sa: the model is right. ra: it is right on the result of PGD on itself and, if it routes, on that of PGD on each
    expert alone (of a dual, on a mixture of one expert of each branch; of gates inside a network, with the same expert
    forced at all). val_ra_pgd, where this is another number: by PGD on itself alone. route_flip_rate: of how many
    images PGD on the model changes the best expert.
    """
    counts: dict[str, float] = {}
    step_size = default_step_size(threat_model.eps, steps)
    alone = _experts(model)
    with eval_frozen(model):
        for batch in batches:
            start = random_start(batch.x, threat_model, batch.noise("validation"))
            x_adv = pgd(partial(_cross_entropy, model, batch.y), batch.x, threat_model, steps, step_size, start)
            sa, robust = (model(x).argmax(1) == batch.y for x in (batch.x, x_adv))
            counted: dict[str, float] = {"sa": int(sa.sum())}
            if alone:
                counted["val_ra_pgd"] = int(robust.sum())
            for expert in alone:  # on what is left, since it costs as much as the attack on the model
                if not len(rows := robust.nonzero()[:, 0]):
                    break
                x, y = batch.x[rows], batch.y[rows]
                loss = partial(_cross_entropy, expert, y)
                robust[rows] = model(pgd(loss, x, threat_model, steps, step_size, start[rows])).argmax(1) == y
            counted |= {"ra": int(robust.sum()), **flips(model, batch.x, x_adv)}
            for name, count in counted.items():
                counts[name] = counts.get(name, 0) + (count if batch.weight else 0)
    return counts


def _experts(model: nn.Module) -> list[nn.Module]:
    """The experts of an MoE; of a dual, mixtures of one expert of each branch, so that each is in one at least.

    Of a network with gates inside, itself with the first expert forced at all of them, with the second, …
    """
    if isinstance(model, MoE):
        return list(model.experts)
    if not isinstance(model, DualModel):
        inside = [site for site in sites(model) if not site.soft]
        return [
            reduce(lambda network, site: SinglePath(network, site, expert % site.num_experts), inside, model)
            for expert in range(max((site.num_experts for site in inside), default=0))
        ]
    ours, theirs = (_experts(branch) or [branch] for branch in (model.standard, model.robust))
    pairs = ((ours[i % len(ours)], theirs[i % len(theirs)]) for i in range(max(len(ours), len(theirs))))
    return [DualModel(one, other, model.alpha, model.combine) for one, other in pairs]


def _cross_entropy(model: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")

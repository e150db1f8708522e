"""Metrics of how a router distributes images, recorded during training.

Axes: B = batch, E = experts. Loads, rates and entropies are fractions.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench.models.moe import MoE
from bench.models.parts import routed_branches

#: An expert with less than this share of the load is dead: it sees too few images to learn anything.
DEAD = 0.01


def routed(model: nn.Module) -> dict[str, MoE]:
    """The MoEs in a model by a prefix for their metrics: '' for an MoE itself, 'robust_' and 'standard_' in a dual."""
    prefixes = {"": "", "R": "robust_", "S": "standard_"}
    branches = routed_branches(model).items()
    return {prefixes[name]: branch for name, branch in branches if isinstance(branch, MoE)}


@torch.no_grad()
def routing(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """How each MoE in the model distributes the images (B, c, H, W) of all batches.

    load_i: the share of the selected experts that is i; load_entropy: its entropy over ln E, 1 when all are used alike;
    router_margin: the median difference of a row's two best scores.
    """
    counts = {prefix: torch.zeros(len(moe.experts)) for prefix, moe in routed(model).items()}
    margins: dict[str, list[Tensor]] = {prefix: [] for prefix in counts}
    for x in batches:
        for prefix, moe in routed(model).items():
            scores = moe.router(x)
            selected = scores.topk(moe.num_selected_experts, dim=1).indices.flatten()
            counts[prefix] += selected.bincount(minlength=len(moe.experts)).cpu()
            margins[prefix].append(scores.topk(2, dim=1).values.diff().abs().flatten().cpu())
    metrics: dict[str, float] = {}
    for prefix, count in counts.items():
        load = count / count.sum()
        metrics |= {f"{prefix}load_{i}": share for i, share in enumerate(load.tolist())}
        metrics[f"{prefix}load_entropy"] = torch.special.entr(load).sum().item() / math.log(len(load))
        metrics[f"{prefix}router_margin"] = torch.cat(margins[prefix]).median().item()
    return metrics


@torch.no_grad()
def flips(model: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, int]:
    """For each MoE in the model, of how many images the best expert changes from x to x_adv, (B, c, H, W) both."""
    return {
        f"{prefix}route_flip_rate": int((moe.router(x).argmax(1) != moe.router(x_adv).argmax(1)).sum())
        for prefix, moe in routed(model).items()
    }


def dead_experts(metrics: dict[str, float]) -> list[str]:
    """A message for each dead expert, from the metrics of `routing`."""
    return [
        f"expert {name.rpartition('_')[2]}{f' of the {branch} branch' if branch else ''} has {share:.1%} of the load"
        for name, share in metrics.items()
        for branch in [name.partition("load_")[0].rstrip("_")]
        if "load_" in name and name.rpartition("_")[2].isdigit() and share < DEAD
    ]

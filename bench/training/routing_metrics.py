"""Metrics of how a router distributes images, recorded during training.

Axes: B = batch, E = experts. Loads, rates and entropies are fractions.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bench.models.layers import SparseMoE, watched
from bench.models.moe import MoE
from bench.models.parts import routed_branches

#: An expert with less than this share of the load is dead: it sees too few images to learn anything.
DEAD = 0.01


def routed(model: nn.Module) -> dict[str, MoE]:
    """The MoEs in a model by a prefix for their metrics: '' for an MoE itself, 'robust_' and 'standard_' in a dual."""
    prefixes = {"": "", "R": "robust_", "S": "standard_"}
    branches = routed_branches(model).items()
    return {prefixes[name]: branch for name, branch in branches if isinstance(branch, MoE)}


def _gates(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Each gate's module and K, by its prefix: of MoEs as in `routed`, of blocks inside a network by their names."""
    whole = {prefix: (moe.router, moe.num_selected_experts) for prefix, moe in routed(model).items()}
    blocks = {
        f"{name}_": (block.gate, block.num_selected_experts)
        for name, block in model.named_modules()
        if isinstance(block, SparseMoE)
    }
    return whole | blocks


def _scores(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The scores of each gate (N, E) for images x (B, c, H, W); N is B, or B times the tokens of an image."""
    gates = {prefix: gate for prefix, (gate, _) in _gates(model).items()}
    with watched(gates.values()) as seen:
        if whole := routed(model):
            for moe in whole.values():
                moe.router(x)
        elif gates:
            model(x)
    return {prefix: seen[gate] for prefix, gate in gates.items()}


@torch.no_grad()
def routing(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """How each gate in the model distributes the images (B, c, H, W) of all batches, or their tokens.

    load_i: the share of the selected experts that is i; load_entropy: its entropy over ln E, 1 when all are used alike;
    router_margin: the median difference of a row's two best scores.
    """
    counts: dict[str, Tensor] = {}
    margins: dict[str, list[Tensor]] = {}
    gates = _gates(model)
    for x in batches if gates else ():
        for prefix, scores in _scores(model, x).items():
            selected = scores.topk(gates[prefix][1], dim=1).indices.flatten()
            count = selected.bincount(minlength=scores.shape[1]).float().cpu()
            counts[prefix] = counts.get(prefix, torch.zeros_like(count)) + count
            margins.setdefault(prefix, []).append(scores.topk(2, dim=1).values.diff().abs().flatten().cpu())
    metrics: dict[str, float] = {}
    for prefix, count in counts.items():
        load = count / count.sum()
        metrics |= {f"{prefix}load_{i}": share for i, share in enumerate(load.tolist())}
        metrics[f"{prefix}load_entropy"] = torch.special.entr(load).sum().item() / math.log(len(load))
        metrics[f"{prefix}router_margin"] = torch.cat(margins[prefix]).median().item()
    return metrics


@torch.no_grad()
def flips(model: nn.Module, x: Tensor, x_adv: Tensor) -> dict[str, float]:
    """For each gate in the model, of how many images the best expert changes from x to x_adv, (B, c, H, W) both.

    Where a gate routes tokens, an image counts by the share of its tokens.
    """
    before, after = _scores(model, x), _scores(model, x_adv)
    return {
        f"{prefix}route_flip_rate": int((scores.argmax(1) != after[prefix].argmax(1)).sum()) * len(x) / len(scores)
        for prefix, scores in before.items()
    }


def dead_experts(metrics: dict[str, float]) -> list[str]:
    """A message for each dead expert, from the metrics of `routing`."""
    return [
        f"expert {name.rpartition('_')[2]}{_whose(branch)} has {share:.1%} of the load"
        for name, share in metrics.items()
        for branch in [name.partition("load_")[0].rstrip("_")]
        if "load_" in name and name.rpartition("_")[2].isdigit() and share < DEAD
    ]


def _whose(branch: str) -> str:
    if not branch:
        return ""
    return f" of {branch}" if "." in branch else f" of the {branch} branch"

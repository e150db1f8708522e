"""Optimisers with a learning rate of the router's own, and the schedules of their rates."""

import torch
from torch import nn

from bench.models.layers import SoftMoE, SparseMoE
from bench.models.moe import MoE
from bench.spec import Recipe


def router_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all routers and gates inside a model."""
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    gates = [module.gate for module in model.modules() if isinstance(module, SparseMoE | SoftMoE)]
    return {parameter for module in (*routers, *gates) for parameter in module.parameters()}


def make_optimizer(part: nn.Module, routers: set[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW on the parameters of `part`; those of `routers` are a group with a peak rate of their own."""
    rates = {False: recipe.lr, True: recipe.lr * recipe.router_lr}
    groups = [{"params": [p for p in part.parameters() if (p in routers) is of], "lr": lr} for of, lr in rates.items()]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    adam = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return adam(groups, weight_decay=recipe.weight_decay)


def make_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The recipe's schedule of the learning rate alone, over `total_steps` optimiser steps; momentum is constant."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    if recipe.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps, cycle_momentum=False)
    if recipe.schedule == "cyclic":
        # The released code's: from half the peak to the peak in 500 steps, and back.
        base = [peak / 2 for peak in peaks]
        return torch.optim.lr_scheduler.CyclicLR(optimizer, base, peaks, step_size_up=500, cycle_momentum=False)
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

"""`precision=auto`: which of float32 and bfloat16 takes less time for a step of a training on this machine."""

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from bench.datasets.base import Dataset
from bench.models.variants import get_variant
from bench.spec import TrainSpec
from bench.training.objectives.base import Batch
from bench.training.recipes import architecture, objective_class

logger = logging.getLogger("bench")

Chosen = Literal["32", "bf16-mixed"]

#: Steps timed of each, in turn, after one that is not.
TIMED = 3
#: bfloat16 is coarser, and less than this is what other programs make of a timing.
AT_LEAST_FASTER = 1.1


def faster(seconds: Callable[[Chosen], float]) -> Chosen:
    """bfloat16 where its fastest step takes at most 1 / 1.1 of float32's fastest; otherwise float32.

    seconds: takes one step in a precision, and says how long it took.
    """
    taken: dict[Chosen, list[float]] = {"32": [], "bf16-mixed": []}
    for _ in range(1 + TIMED):
        for precision, own in taken.items():
            own.append(seconds(precision))
    single, half = (min(own[1:]) for own in taken.values())
    chosen: Chosen = "bf16-mixed" if half * AT_LEAST_FASTER <= single else "32"
    logger.warning("precision=auto: a step takes %.3g s in 32 and %.3g s in bf16-mixed: %s", single, half, chosen)
    return chosen


def steps_of(spec: TrainSpec, dataset: Dataset, device: torch.device) -> Callable[[Chosen], float]:
    """What `faster` times: forward and backward of all steps of one batch, of random weights and random images."""
    recipe = spec.recipe
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    shape, generator = (recipe.batch_size, *dataset.input_shape), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = architecture(spec, dataset).build().train()
    model.to(device).to(memory_format=memory_format)
    x = torch.rand(shape, generator=generator).to(device, memory_format=memory_format)
    y = torch.randint(dataset.num_classes, shape[:1], generator=generator).to(device)
    noise = (2 * torch.rand(shape, generator=generator) - 1).to(device)
    objective = objective_class(get_variant(spec.variant)).model_validate(spec.objective_params)

    def seconds(precision: Chosen) -> float:
        _wait_for(device)
        started = time.perf_counter()
        steps = objective.steps(model, Batch(x, y, spec.threat_model, lambda _: noise))
        while True:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
                step = next(steps, None)
                terms = step.loss(model) if step else {}
            if step is None:
                break
            torch.autograd.backward(list(terms.values()))
            model.zero_grad(set_to_none=True)
        _wait_for(device)
        return time.perf_counter() - started

    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

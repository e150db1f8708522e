"""What the exact route radii of a test set cost, and how near the boundaries of an untrained router are.

python benchmarks/certify_routes.py [--data-root data]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import machine, medians
from tabulate import tabulate

from bench.certify.layers import affine_map
from bench.certify.routes import pair_distances, route_radius
from bench.datasets.base import open_dataset
from bench.models.routing import AffineRouter

#: Share of CIFAR-10's 10,000 test images with a boundary within ε, %, mean of 20 initialisations, as published.
PUBLISHED = {0.5: 47.6, 1: 75.2, 2: 95.0, 4: 99.8, 8: 99.9985}


def seconds() -> str:
    """10,000 images of CIFAR-10's shape, of which a third of the pixels is black or white, and four experts."""
    g = torch.Generator().manual_seed(0)
    x = (3 * torch.rand(10_000, 3072, generator=g, dtype=torch.double) - 1).clamp(0, 1)
    torch.manual_seed(0)
    weight, bias = affine_map(AffineRouter((3, 32, 32), 4, (0.5,) * 3, (0.25,) * 3), torch.Size((3, 32, 32)))
    norms: tuple[Any, ...] = ("Linf", "L2")
    cases: dict[str, Callable[[], object]] = {
        f"{norm}, {'ball ∩ [0, 1]' if box else 'ball'}": partial(pair_distances, weight, bias, x, norm, box)
        for norm in norms
        for box in (True, False)
    }
    rows = list(medians(cases, rounds=3).items())
    return tabulate(rows, headers=["10,000 × 3,072, E = 4", "seconds"], tablefmt="pipe", floatfmt=".2f")


def boundaries(data_root: Path, initialisations: int = 20) -> str:
    """The published row, and the same on the test images at hand."""
    dataset = open_dataset("cifar10")
    images = dataset.evaluation_set(data_root, None).x
    flat, rows = images.double().flatten(1), []
    for seed in range(initialisations):
        torch.manual_seed(seed)
        router = AffineRouter(dataset.input_shape, 4, dataset.mean, dataset.std)
        weight, bias = affine_map(router, images.shape[1:])
        radius = route_radius(pair_distances(weight, bias, flat, "Linf", box=False), router(images).argmax(1))
        rows.append([100 * float((radius <= eps / 255).double().mean()) for eps in PUBLISHED])
    found = torch.tensor(rows)
    return tabulate(
        [
            ["published, n = 10,000", *PUBLISHED.values()],
            [f"here, n = {len(images):,}", *(f"{share:.2f}" for share in found.mean(0).tolist())],
            ["standard deviation over initialisations", *(f"{share:.2f}" for share in found.std(0).tolist())],
        ],
        headers=["boundary within ε, %", *(f"{eps:g}/255" for eps in PUBLISHED)],
        tablefmt="pipe",
        disable_numparse=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    print(f"{machine()}\n\n{seconds()}\n\n{boundaries(parser.parse_args().data_root)}")

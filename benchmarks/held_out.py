"""Trained models side by side on the training images that their recipe holds out: SA, and RA under PGD-50.

python benchmarks/held_out.py CHECKPOINTS [DATA_ROOT]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from bench.datasets.base import open_dataset
from bench.models.checkpoints import load_checkpoint
from bench.models.deployed import eval_frozen
from bench.pgd import default_step_size, pgd, random_start
from bench.results.witnesses import FILE
from bench.spec import TrainSpec
from bench.training.data import read_training_data

STEPS = 50


def accuracies(checkpoint: Path, data_root: Path) -> tuple[float, float, int]:
    """SA and RA (fractions), and the number of held-out images, on which the best epoch was chosen as well."""
    model, header, _ = load_checkpoint(checkpoint)
    spec = TrainSpec.model_validate(header.training)
    data = read_training_data(spec, open_dataset(header.dataset), data_root)
    threat, clean, robust = spec.threat_model, 0, 0
    generator = torch.Generator().manual_seed(0)
    with eval_frozen(model):
        for chunk in data.held_out.split(250):
            x, y = data.images.floats(chunk), data.images.y[chunk]

            def loss(z: Tensor, y: Tensor = y) -> Tensor:
                return F.cross_entropy(model(z), y, reduction="none")

            start = random_start(x, threat, 2 * torch.rand(x.shape, generator=generator) - 1)
            x_adv = pgd(loss, x, threat, STEPS, default_step_size(threat.eps, STEPS), start)
            with torch.no_grad():
                clean += int((model(x).argmax(1) == y).sum())
                robust += int((model(x_adv).argmax(1) == y).sum())
    return clean / len(data.held_out), robust / len(data.held_out), len(data.held_out)


def table(folder: Path, data_root: Path) -> str:
    rows = []
    for path in sorted(set(folder.rglob("*.safetensors")) - set(folder.rglob(FILE))):  # a trial has results as well
        _, header, _ = load_checkpoint(path)
        sa, ra, n = accuracies(path, data_root)
        rows.append({
            "checkpoint": path.relative_to(folder).parts[0], "model": header.name, "trained": header.info("").trained,
            "best epoch": f"{header.validation['epoch']:.0f}", "SA": f"{sa:.1%}", "PGD-50": f"{ra:.1%}", "n": n,
        })  # fmt: skip
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data")))

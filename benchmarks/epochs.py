"""Which epoch withstands most, and which one a training keeps: every epoch of one training, scored.

OMP_NUM_THREADS=1 python benchmarks/epochs.py VARIANT [--dataset digits] [--data-root DIR] [--recipe NAME] [--every 1]

SA and both RA are those of the training's own validation; AutoAttack and `adaptive`, with its small budget, are on
the first of the held-out images.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from bench import benchmark
from bench.datasets.base import open_dataset
from bench.models.checkpoints import load_checkpoint
from bench.settings import parse_settings
from bench.training.data import read_training_data
from bench.training.loop import Epoch, Trainer, train
from bench.training.recipes import train_spec


def main() -> None:
    """Train, score every so many epochs, the last one among them, and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="K=V")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--n-examples", type=int, default=200, help="held-out training images to score on")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints/epochs"))
    given = parser.parse_args()
    dataset = open_dataset(given.dataset)
    spec = train_spec(given.variant, dataset, dataset.threat_model, given.recipe, parse_settings(given.settings), 0)
    weights: list[dict[str, Tensor]] = []
    epochs: list[Epoch] = []
    validate = Trainer.validate

    def watched(trainer: Trainer) -> tuple[float, float, dict[str, float]]:
        weights.append({key: value.detach().cpu().clone() for key, value in trainer.deployed.state_dict().items()})
        return validate(trainer)

    with patch.object(Trainer, "validate", watched):
        path = train(spec, given.data_root, given.checkpoints, "cpu", restart=True, on_epoch=epochs.append)
    model, header, _ = load_checkpoint(path)
    data = read_training_data(spec, dataset, given.data_root)
    rows = data.held_out[: given.n_examples]
    print("| epoch | kept | SA | PGD | RA | AutoAttack | adaptive |\n|---:|:--|---:|---:|---:|---:|---:|")
    for epoch, own in zip(epochs, weights, strict=True):
        if epoch.epoch % given.every and epoch.epoch not in (len(epochs), header.validation["epoch"]):
            continue
        model.load_state_dict(own)
        scored = benchmark(
            model, given.dataset, x=data.images.floats(rows), y=data.images.y[rows],
            threat_model=spec.threat_model.norm, eps=spec.threat_model.eps, suites=["autoattack", "adaptive"],
            settings={"budget": "small"}, progress=False,
        )  # fmt: skip
        shares = [epoch.sa, epoch.routing.get("val_ra_pgd", epoch.ra), epoch.ra]
        shares += [result.robust_accuracy.value for result in scored.results.values()]
        kept = "yes" if epoch.epoch == header.validation["epoch"] else ""
        print(f"| {epoch.epoch} | {kept} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()

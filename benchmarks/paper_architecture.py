"""The paper's own CIFAR-10 architecture, as far as a CPU takes it: four ResNet18 of width 64, trained by RT-ER.

OMP_NUM_THREADS=2 python benchmarks/paper_architecture.py OUT DATA_ROOT [--epochs 2] [--images 10000]

From random weights such an MoE needs a GPU and hours. Here every expert starts as the ResNet18 that pyautoattack
carries (standard training on all 50,000 images, RA 0), and RT-ER goes on from there, with one FGSM step as its inner
maximisation; a stopped training goes on when the command is given again. The checkpoint is called
moe-rt_er-resnet18: 90 MB in half precision, more than the zoo has room for. docs/training.md tells what came of it.
"""

import argparse
import hashlib
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from bench.datasets.base import open_dataset
from bench.models.architecture import Dense
from bench.models.checkpoints import Origin, checkpoint_path
from bench.models.variants import VARIANTS, Variant
from bench.training.data import read_training_data
from bench.training.initial_weights import Start, start_from
from bench.training.loop import Epoch, Trainer
from bench.training.recipes import train_spec

SOURCE = files("pyautoattack") / "examples" / "model_test.pt"
NAME = "moe-rt_er-resnet18"
EXPERT = {"expert": "resnet18", "width": 64}
SETTINGS = EXPERT | {
    "optimizer": "sgd", "weight_decay": 5e-4, "lr": 0.02, "ema_decay": 0.0, "precision": "bf16-mixed",
    "inner_steps": 1, "start_radius": 2, "beta": 6.0, "balance": 0.5, "n_val": 500, "val_steps": 10,
}  # fmt: skip


def pretrained(dataset: str) -> dict[str, Tensor]:
    """The weights of pyautoattack's ResNet18, which takes pixels, for our classifier, which normalises them first.

    Both list the same layers in the same order. With x = std·z + mean the first convolution is W·std of z plus a
    constant, which its batch norm takes off its mean; at the border, where z is padded by 0, the two differ.
    """
    shape = open_dataset(dataset)
    theirs = torch.load(str(SOURCE), map_location="cpu", weights_only=True)
    model = Dense(
        expert="resnet18", expert_params={"width": 64}, input_shape=shape.input_shape, num_classes=shape.num_classes,
        mean=shape.mean, std=shape.std,
    ).build()  # fmt: skip
    own = model.state_dict()
    layers = [key for key in own if key.startswith("backbone.")]
    assert len(layers) == len(theirs)
    for key, value in zip(layers, theirs.values(), strict=True):
        own[key] = value.clone().reshape(own[key].shape)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (shape.mean, shape.std))
    first, average = layers[0], layers[3]
    own[average] -= (own[first] * mean).sum((1, 2, 3))
    own[first] *= std
    return own


def line(epoch: Epoch) -> None:
    print(f"epoch {epoch.epoch}: loss {epoch.loss:.2f}, SA {epoch.sa:.1%}, RA {epoch.ra:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    args = parser.parse_args()
    dataset = open_dataset("cifar10")
    VARIANTS.register(NAME)(Variant(NAME, "moe", "rt_er", "softmax", "logits", settings=EXPERT))
    more = {**SETTINGS, "n_train": args.images, "epochs": args.epochs}
    spec = train_spec(NAME, dataset, dataset.threat_model, "cpu-cifar10", more)
    path = checkpoint_path(args.out, "cifar10", "Linf", NAME)
    trainer = Trainer(spec, dataset, read_training_data(spec, dataset, args.data_root), path, "cpu")
    sha256 = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    origin = Origin(name="pyautoattack's ResNet18", sha256=sha256, trained="50,000 images, standard")
    trainer.starts = {"init": Start(pretrained("cifar10"), origin, additional_data=False)}
    start_from(trainer.model, trainer.starts)
    print(trainer.train(resume=True, on_epoch=line))


if __name__ == "__main__":
    main()

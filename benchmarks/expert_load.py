"""How a trained router spreads its training images: each expert's share of the load, for every checkpoint in a folder.

python benchmarks/expert_load.py CHECKPOINTS [DATA_ROOT]
"""

import sys
from pathlib import Path

from tabulate import tabulate

from bench.datasets.base import open_dataset
from bench.models.checkpoints import load_checkpoint
from bench.spec import TrainSpec
from bench.training.routing_metrics import routing
from bench.training.sampling import hold_out


def loads(checkpoint: Path, data_root: Path) -> dict[str, float]:
    """The shares, fractions, over the images that the checkpoint was trained on; none for a dense model.

    Keys are `load_0` …, in a dual with `robust_` and `standard_` before them.
    """
    model, header, _ = load_checkpoint(checkpoint)
    recipe = TrainSpec.model_validate(header.training).recipe
    wanted = None if recipe.n_train is None else recipe.n_train + recipe.n_val
    images = open_dataset(header.dataset).read("train", data_root, wanted)
    train, _ = hold_out(len(images.y), recipe.n_train, recipe.n_val)
    metrics = routing(model, (images.floats(chunk) for chunk in train.split(500)))
    return {name: share for name, share in metrics.items() if "load_" in name and name[-1].isdigit()}


def table(folder: Path, data_root: Path) -> str:
    rows = []
    for path in sorted(folder.glob("*/*/*.safetensors")):
        _, header, _ = load_checkpoint(path)
        shares = loads(path, data_root)
        for branch in dict.fromkeys(name.partition("load_")[0] for name in shares):
            own = [share for name, share in shares.items() if name.startswith(f"{branch}load_")]
            model = f"{header.name} {branch.rstrip('_')}".strip()
            percents = ", ".join(f"{share:.1%}" for share in own)
            rows.append({"data set": header.dataset, "model": model, "load": percents, "least": f"{min(own):.1%}"})
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data")))

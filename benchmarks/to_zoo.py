"""Put trained models into the zoo: python benchmarks/to_zoo.py CHECKPOINTS DATASET MODEL …

Weights are stored in half precision, which halves the files; a model is built in float32 from what is stored, and is
scored so. A checkpoint that experts were started from is told by its name: where it lay on one machine means nothing on
another. A `dual` is put together afterwards, from the parts as they are stored: bench train dual --checkpoints
models/zoo.
"""

import sys
from pathlib import Path

from bench.models.checkpoints import ZOO, checkpoint_path, load_checkpoint, save_checkpoint
from bench.spec import Norm, TrainSpec


def store(checkpoints: Path, dataset: str, name: str, norm: Norm = "Linf", zoo: Path = ZOO) -> Path:
    """The path of the model's file in the zoo."""
    model, header, _ = load_checkpoint(checkpoint_path(checkpoints, dataset, norm, name))
    if starts := {role: origin.name for role, origin in header.init.items()}:
        spec = TrainSpec.model_validate(header.training)
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update=starts)})
        header = header.model_copy(update={"training": spec.model_dump(mode="json"), "training_key": spec.key})
    path = checkpoint_path(zoo, dataset, norm, name)
    save_checkpoint(path, model.half(), header)
    return path


if __name__ == "__main__":
    folder, dataset, *names = sys.argv[1:]
    for name in names:
        path = store(Path(folder), dataset, name)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

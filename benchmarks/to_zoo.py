"""Put trained models into the zoo: python benchmarks/to_zoo.py CHECKPOINTS DATASET MODEL …

Weights are stored in half precision, which halves the files; a model is built in float32 from what is stored, and is
scored so. A checkpoint that experts were started from is told by its name: where it lay on one machine means nothing on
another. A jointly trained dual whose file would be above 3 MB is stored as two parts, NAME-S and NAME-R, and a small
file that names them. A `dual` is put together afterwards, from the parts as they are stored: bench train dual
--checkpoints models/zoo.
"""

import sys
from pathlib import Path

from bench.models.architecture import Dual
from bench.models.checkpoints import ZOO, Part, checkpoint_path, load_checkpoint, save_checkpoint
from bench.spec import Norm, TrainSpec

#: Bytes of a file of the zoo.
LARGEST = 3_000_000


def store(
    checkpoints: Path, dataset: str, name: str, norm: Norm = "Linf", zoo: Path = ZOO, largest: int = LARGEST
) -> Path:
    """The path of the model's file in the zoo."""
    model, header, _ = load_checkpoint(checkpoint_path(checkpoints, dataset, norm, name))
    if starts := {role: origin.name for role, origin in header.init.items()}:
        spec = TrainSpec.model_validate(header.training)
        spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update=starts)})
        header = header.model_copy(update={"training": spec.model_dump(mode="json"), "training_key": spec.key})
    path = checkpoint_path(zoo, dataset, norm, name)
    save_checkpoint(path, model.half(), header)
    if isinstance(arch := header.architecture, Dual) and path.stat().st_size > largest:
        parts = {}
        for role, short in (("standard", "S"), ("robust", "R")):
            part = checkpoint_path(zoo, dataset, norm, f"{name}-{short}")
            own = {"variant": f"{header.variant}-{short}", "architecture": getattr(arch, role), "validation": {}}
            save_checkpoint(part, getattr(model, role), header.model_copy(update=own))
            parts[role] = Part(file=part.name, sha256=load_checkpoint(part)[2])
        save_checkpoint(path, None, header.model_copy(update={"parts": parts}))
    return path


if __name__ == "__main__":
    folder, dataset, *names = sys.argv[1:]
    for name in names:
        path = store(Path(folder), dataset, name)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")

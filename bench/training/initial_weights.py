"""Where a model's weights come from, other than from random numbers: timm's, or a dense checkpoint of our own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.architecture import Architecture, Dense, Dual, Network
from bench.models.base import Classifier
from bench.models.checkpoints import Header, Origin, find_checkpoint, load_checkpoint, without_seed
from bench.models.variants import VARIANTS, get_variant
from bench.spec import Recipe, TrainSpec, model_name
from bench.training.data import TrainingData, split


def load_pretrained(model: nn.Module, recipe: Recipe) -> None:
    """Load timm's weights into each expert of the model; all experts are then alike, except for their heads."""
    from bench.models.vit import pretrained_weights  # here, because timm is slow to import

    backbones = [part.backbone for part in model.modules() if isinstance(part, Classifier)]
    source = recipe.pretrained if isinstance(recipe.pretrained, str) else None
    weights = pretrained_weights(recipe.expert, backbones[0], source)
    for backbone in backbones:
        backbone.load_state_dict(weights, strict=False)  # the head's are not among them


@dataclass(frozen=True)
class Start:
    """A dense checkpoint that experts start from. `additional_data`: it has seen more than the data set's images."""

    weights: dict[str, Tensor]
    origin: Origin
    additional_data: bool


def read_starts(spec: TrainSpec, arch: Architecture, data: TrainingData, folders: Sequence[Path]) -> dict[str, Start]:
    """The checkpoints that the recipe's `init` and `init_standard` name, by these keys; variants' lie in `folders`.

    Raises:
        UnusableInput: there is none, it is not dense or of another network, or it was trained on images that this
            training holds out, which would flatter the choice of the best epoch.
    """
    found = {}
    for key, name in spec.recipe.starts.items():
        try:
            found[key] = _read_start(start_file(name, spec, folders), spec, arch, data)
        except UnusableInput as error:
            raise UnusableInput(f"{key}={name}: {error}; or begin with random weights: --set {key}=null") from None
    return found


def checkpoint_named(init: str, seed: int) -> str | None:
    """The name of the checkpoint that a training of this seed starts from; None where `init` is a file."""
    variant, own = without_seed(init)
    if variant not in VARIANTS:
        return None
    return model_name(variant, int(own) if own else seed)


def start_file(name: str, spec: TrainSpec, folders: Sequence[Path]) -> Path:
    """Where what the recipe's `init` or `init_standard` names lies: a file, or a variant's checkpoint in a folder.

    Raises:
        UnusableInput: there is none of that name, with how to get one; it is the training's own.
    """
    if (own := checkpoint_named(name, spec.seed)) is None:
        if "/" not in name and not name.endswith(".safetensors"):
            get_variant(without_seed(name)[0])  # raises, with the nearest name
        return Path(name).expanduser()
    if own == spec.checkpoint_name:
        raise UnusableInput("it would start from itself: name another model, or a file")
    try:
        return find_checkpoint(own, spec.dataset, spec.threat_model.norm, folders)
    except UnusableInput as error:
        raise UnusableInput(f"{error}, with the same --checkpoints, n_train and n_val") from None


def _read_start(file: Path, spec: TrainSpec, arch: Architecture, data: TrainingData) -> Start:
    model, header, sha256 = load_checkpoint(file)
    if not isinstance(header.architecture, Dense) or header.training is None:
        raise UnusableInput(f"'{header.name}' is not a dense model trained by `bench train`: name one")
    network = arch.robust if isinstance(arch, Dual) else arch
    for field in Network.model_fields:
        theirs, ours = getattr(header.architecture, field), getattr(network, field)
        if theirs != ours:
            raise UnusableInput(f"its {field} is {theirs}, and that of the experts of '{spec.variant}' {ours}")
    if header.dataset == spec.dataset and (shared := _trained_on_held_out(header, data)):
        raise UnusableInput(
            f"it was trained on {shared:,} of the images that are held out here: train both with the same n_train and"
            " n_val"
        )
    info = header.info(sha256)
    origin = Origin(name=header.name, sha256=sha256, trained=info.trained)
    return Start(model.state_dict(), origin, header.additional_data or header.dataset != spec.dataset)


def _trained_on_held_out(header: Header, data: TrainingData) -> int:
    """How many of the images that `data` holds out the checkpoint was trained on."""
    recipe = TrainSpec.model_validate(header.training).recipe
    train, _ = split(data.images.available, recipe)
    return len(set(train.tolist()) & set(data.held_out.tolist()))


def start_from(model: nn.Module, starts: Mapping[str, Start]) -> None:
    """Load each start's weights into every expert of its branch, or into a dense model; routers stay as they are.

    An MoE whose experts are copies of a dense model is "upcycled" (Komatsuzaki et al. 2023).
    """
    for key, start in starts.items():
        branch = "standard" if key == "init_standard" else "robust"
        for part in getattr(model, branch, model).modules():
            if isinstance(part, Classifier):
                part.load_state_dict(start.weights)

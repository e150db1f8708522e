"""Checkpoints: safetensors with a JSON header that rebuilds the model by itself. Nothing is ever unpickled."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from bench.errors import UnusableInput
from bench.files import write_atomically
from bench.models.architecture import Architecture, Dual, Routed
from bench.models.variants import VARIANTS, get_variant
from bench.spec import ModelInfo, Spec, ThreatModel, dataset_folder, dataset_name, model_name, path_safe

ZOO = Path(__file__).parent / "zoo"
USER_CHECKPOINTS = Path("checkpoints")
_METADATA_KEY = "bench"


class Part(Spec):
    """A checkpoint in the same folder, and the SHA-256 that it must have."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    sha256: str


class Origin(Spec):
    """The checkpoint that experts started from: its name, its SHA-256, and what it was trained on, in words."""

    name: str
    sha256: str
    trained: str


class Header(Spec):
    """The metadata that a checkpoint carries.

    `training` is the whole TrainSpec that made it and `training_key` its key;
    `train_fingerprint` the hash of the training images and labels; `parts`, of a model that is put together, the file
    name and SHA-256 of each part, which lie in the same folder; `additional_data`, whether anything but the data set's
    own images went into the weights, such as those of a pretrained network; `precision`, what the recipe's came to,
    "" in headers of earlier versions.
    """

    format: Literal[1] = 1
    variant: str
    architecture: Architecture
    dataset: str
    threat_model: ThreatModel
    objective: str | None = None
    seed: int = 0
    training: dict[str, Any] | None = None
    training_key: str | None = None
    train_fingerprint: str | None = None
    train_images: int = 0
    epochs: int = 0
    validation: dict[str, float] = Field(
        default_factory=dict, description="of the epoch that is kept; as `val_…` in the CSV"
    )
    experts: list[dict[str, float]] = Field(
        default_factory=list, description="sa and ra of each expert of an MoE alone, on the held-out images"
    )
    additional_data: bool = False
    processes: int = 1
    precision: str = ""
    seconds: float = 0.0
    device: str = Field(default="", description="that it was trained on; '' in headers of earlier versions")
    bench_version: str = ""
    git_hash: str | None = None
    parts: dict[str, Part] = Field(default_factory=dict)
    init: dict[str, Origin] = Field(default_factory=dict, description="by the recipe's key, `init` or `init_standard`")

    @model_validator(mode="before")
    @classmethod
    def _drop_examples_seen(cls, header: Any) -> Any:
        """Headers of earlier versions have `examples_seen`, the product of train_images and epochs."""
        return {k: v for k, v in header.items() if k != "examples_seen"} if isinstance(header, dict) else header

    @property
    def name(self) -> str:
        """The variant, and its training seed unless that is 0: how a model is called and how its file is named."""
        return model_name(self.variant, self.seed)

    def info(self, sha256: str) -> ModelInfo:
        """The model info of this checkpoint, whose file has the given SHA-256."""
        arch = self.architecture
        routed = arch.robust if isinstance(arch, Dual) else None if arch.kind == "dense" else arch
        trained = (
            f"{self.train_images:,} images × {self.epochs} epochs"
            if self.train_images or not self.parts  # parts that were trained together are one training
            else ", ".join(f"{part}: {entry.file.removesuffix('.safetensors')}" for part, entry in self.parts.items())
        )
        if plugin := VARIANTS.origin(self.variant) if self.variant in VARIANTS else "":
            trained += f", a variant of {plugin}"
        if sigma := (self.training or {}).get("recipe", {}).get("noise_sigma"):
            trained += f", noise σ {sigma:g}"
        recipe = (self.training or {}).get("recipe", {})
        if recipe.get("ema_decay") or recipe.get("swa_start") is not None:
            trained += ", averaged weights"
        for role, origin in self.init.items():
            whose = "S's experts" if role == "init_standard" else "R's experts" if arch.kind == "dual" else "experts"
            trained += f", {'' if arch.kind == 'dense' else f'{whose} '}started from {origin.name} ({origin.trained})"
        return ModelInfo(
            name=self.name,
            architecture=arch.label,
            objective=self.objective,
            gate=routed.gate if routed else None,
            combine=arch.combine if isinstance(arch, Routed | Dual) else None,
            num_experts=routed.num_experts if routed else None,
            num_selected_experts=routed.num_selected_experts if routed else None,
            alpha=arch.alpha if isinstance(arch, Dual) else None,
            dataset=self.dataset,
            threat_model=self.threat_model,
            checkpoint_sha256=sha256,
            number_forward_passes=arch.networks_used,
            additional_data=self.additional_data,
            seed=self.seed,
            trained=trained,
            routing_visible=routed is not None,
        )  # fmt: skip


def checkpoint_path(folder: Path, dataset: str, norm: str, name: str) -> Path:
    """`folder/<dataset>/<norm>/<name>.safetensors`; of a data set with an argument, with that in the folder's name."""
    return folder / dataset_folder(dataset) / norm / f"{path_safe(name)}.safetensors"


def save_checkpoint(path: Path, model: nn.Module | None, header: Header) -> None:
    """Write atomically; `model` is None for a header that names its parts."""
    tensors = {} if model is None else {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={_METADATA_KEY: header.model_dump_json()}))


def read_header(path: Path) -> Header:
    """The header alone; UnusableInput, naming the file, if it is missing, truncated or not one of ours."""
    if not path.is_file():
        raise UnusableInput(f"no checkpoint at '{path}': train one with `bench train`, or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UnusableInput(f"'{path}' is truncated or no safetensors file ({error}): train it again") from None
    if text is None:
        raise UnusableInput(
            f"'{path}' has no bench header: it was not written by `bench train`; pass a function that builds your own"
            " network and loads it, as --model package.module:function (docs/your-own-model.md has one)"
        )
    try:
        return Header.model_validate(json.loads(text))
    except (ValidationError, json.JSONDecodeError) as error:
        raise UnusableInput(
            f"'{path}' has a header that this version does not read: {str(error).splitlines()[0]}"
        ) from None


def load_checkpoint(path: Path) -> tuple[nn.Module, Header, str]:
    """The model in eval mode on the CPU, its header, and the SHA-256 of the file (and of its parts').

    UnusableInput, naming the file, if it is missing, truncated, foreign, or a part is not the one that it names.
    """
    header = read_header(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    # Weights come from the file: the random initialisation must not move the caller's random state.
    try:
        with torch.random.fork_rng(devices=[]):
            model = header.architecture.build()
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UnusableInput(f"'{path}' describes a model that this version cannot build: {error}") from None
    if header.parts:
        for part, entry in header.parts.items():
            part_path = path.with_name(entry.file)
            module, _, part_sha256 = load_checkpoint(part_path)
            if part_sha256 != entry.sha256:
                raise UnusableInput(
                    f"'{part_path}' is not the file that '{path}' was put together from: remove '{path}', and make it"
                    " again with `bench train`"
                )
            setattr(model, part, module)
    else:
        try:
            with safe_open(path, framework="pt") as file:
                model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UnusableInput(f"'{path}' does not hold the weights its header describes: {reason}") from None
    return model.eval(), header, sha256


def find_checkpoint(name: str, dataset: str, norm: str, folders: Sequence[Path]) -> Path:
    """The first of `folders` that has it.

    Raises:
        UnusableInput: none has, with the command that makes it; or it is no variant's name, with the nearest.
    """
    candidates = [checkpoint_path(folder, dataset, norm, name) for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    variant, seed = without_seed(name)
    get_variant(variant)
    looked = " and ".join(f"'{path}'" for path in candidates)
    make = f"bench train {variant} --dataset {dataset}" + (f" --seed {seed}" if seed else "")
    make += "" if norm == "Linf" else f" --norm {norm} --eps EPS"
    raise UnusableInput(f"no {norm} checkpoint of '{name}' for {dataset}: looked for {looked}; make one with `{make}`")


def without_seed(name: str) -> tuple[str, str]:
    """The variant of a model's name, and its training seed, "" where the name has none."""
    variant, _, seed = name.rpartition("-s")
    return (variant, seed) if seed.isdigit() else (name, "")


def available(dataset: str, norm: str, folders: list[Path]) -> list[str]:
    """Names of the models with a checkpoint in any of `folders`: in the variants' order, further seeds after."""
    stems = {
        path.stem
        for folder in folders
        for path in checkpoint_path(folder, dataset, norm, "*").parent.glob("*.safetensors")
    }
    order = list(VARIANTS)
    variants = {stem: without_seed(stem)[0] for stem in stems}
    known = [stem for stem in stems if variants[stem] in VARIANTS]
    return sorted(known, key=lambda stem: (order.index(variants[stem]), stem))


def load_model(
    model_name: str,
    dataset: str = "digits",
    threat_model: str = "Linf",
    model_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A trained model, as RobustBench's function of this name gives it: eval mode, pixels in [0, 1] in, logits out.

    Args:
        model_name: a variant, such as `moe-rt_er`; `<variant>-s<seed>` for another training seed than 0.
        dataset: the data set it was trained on.
        threat_model: the norm it was trained for.
        model_dir: the folder that holds `<dataset>/<norm>/<name>.safetensors`; without it, the user's `checkpoints`,
            then the weights that ship with the package.

    Raises:
        UnusableInput: there is no such checkpoint, or it is damaged.

    Examples:
        >>> import torch
        >>> from bench import load_model
        >>> model = load_model("moe-rt_er", dataset="digits")
        >>> logits, routing = model.trace(torch.rand(2, 1, 8, 8))
        >>> logits.shape, routing.selected_experts.shape
        (torch.Size([2, 10]), torch.Size([2, 1]))
    """
    folders = [USER_CHECKPOINTS, ZOO] if model_dir is None else [Path(model_dir)]
    return load_checkpoint(find_checkpoint(model_name, dataset_name(dataset), threat_model, folders))[0]

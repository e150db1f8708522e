"""What a command asks for, as frozen and hashable values: the threat model, a run, a training.

A spec goes from the command line to the function that does the work; nothing restates its fields. The device is in none
of them: where something is computed does not change what is asked for.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench.errors import UnusableInput, did_you_mean
from bench.registry import command_words
from bench.settings import parse_number, setting

Norm = Literal["Linf", "L2", "L1"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
#: How a router's scores become weights, and what these mix (`bench.models.routing`, `bench.models.moe`); here, since
#: the variants are listed without torch.
Gate = Literal["softmax", "argmax"]
Combine = Literal["logits", "probs"]
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")
#: What RobustBench has boards of, by its own names; here, since importing robustbench imports torch.
ROBUSTBENCH_DATASETS = ("cifar10", "cifar100", "imagenet")
ROBUSTBENCH_NORMS: tuple[Norm, ...] = ("Linf", "L2")
#: The attacks of torchattacks, without VANILA, which gives the images back; here for the same reason.
TORCHATTACKS = (
    "APGD", "APGDT", "AutoAttack", "BIM", "CW", "DIFGSM", "DeepFool", "EADEN", "EADL1", "EOTPGD", "FAB",
    "FFGSM", "FGSM", "GN", "JSMA", "Jitter", "MIFGSM", "NIFGSM", "OnePixel", "PGD", "PGDL2", "PGDRS", "PGDRSL2",
    "PIFGSM", "PIFGSMPP", "Pixle", "RFGSM", "SINIFGSM", "SPSA", "SparseFool", "Square", "TIFGSM", "TPGD",
    "UPGD", "VMIFGSM", "VNIFGSM",
)  # fmt: skip
#: The flag of a model that no attack by gradients can follow but `adaptive`, which replaces them.
NO_GRADIENT = "logits have no gradient"
#: What suite `adaptive` reports of a gate whose routes it could not attack; its run then earns no rank.
NOT_FORCED = "its scores cannot be forced"


#: How far outside the ball an example may lie and still be in it: attacks compute in float32.
ABSOLUTE_LINF = 1e-6
RELATIVE_L1_L2 = 1e-5
#: The same for the box [0, 1].
ABSOLUTE_BOX = 1e-6


def digest(*parts: Any) -> str:
    """The first 16 hex digits of a SHA-256 over the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_safe(name: str) -> str:
    """`name` as a folder or file name: what is outside [A-Za-z0-9._-] becomes `_`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def dataset_name(word: str) -> str:
    """A data set's one name: a folder of images is its absolute path, without links, however a user writes it.

    A size to which its images are brought stays behind it. UnusableInput for a path that cannot be resolved.
    """
    kind, colon, rest = word.partition(":")
    if not colon or not kind.startswith("imagefolder"):
        return word
    path, size = folder_and_size(rest)
    try:
        return f"{kind}:{Path(path).expanduser().resolve()}" + (f":size={size}" if size else "")
    except (OSError, RuntimeError, ValueError) as error:  # a home folder of nobody's, a link to itself, no text
        raise UnusableInput(f"data set '{word}': {error}") from None


def folder_and_size(argument: str) -> tuple[str, int | None]:
    """What `PATH:size=224` names, or `PATH` alone: the folder, and the side in pixels that images are brought to."""
    sized = re.fullmatch(r"(.*):size=([1-9][0-9]*)", argument)
    return (sized[1], int(sized[2])) if sized else (argument, None)


def dataset_folder(name: str) -> str:
    """The folder of a data set's checkpoints and results: `digits`, `imagefolder_flowers-1a2b3c4d`.

    The digest is of the argument, so that no two data sets share a folder.
    """
    kind, colon, argument = name.partition(":")
    return path_safe(f"{kind}_{Path(argument).name}-{digest(argument)[:8]}" if colon else name)


class Spec(BaseModel):
    """Frozen, hashable by content, and strict about unknown fields."""

    # pydantic builds a class when it is first used: a command needs few of them
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    def __hash__(self) -> int:
        return hash(digest(self.model_dump(mode="json")))


S = TypeVar("S", bound=Spec)


def build(kind: type[S], what: str, values: Mapping[str, Any]) -> S:
    """`kind(**values)`, with pydantic's complaint turned into one line of UnusableInput.

    An unknown key is answered with the nearest field of `kind`; `what` names in the message what was being read.
    """
    for key in values:
        if key not in kind.model_fields:
            known = sorted(kind.model_fields)
            hint = did_you_mean(key, known) if known else "it takes none"
            raise UnusableInput(f"{what} has no parameter '{key}': {hint}")
    for key, value in values.items():  # pydantic takes `yes`, which YAML makes true, for the number 1
        annotation = kind.model_fields[key].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise UnusableInput(f"{what}: {key}: Input should not be yes or no (got {value})")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        got = f" (got {first['input']!r})" if where else ""
        said = first["msg"].split(", unable to")[0]
        message = f"{where}: {said}" if where else said
        raise UnusableInput(f"{what}: {message.removeprefix('Value error, ')}{got}") from None


#: Half of the distance between 1 and the next smaller float32.
SMALLEST = 2.0**-25


class ThreatModel(Spec):
    """An Lp ball of radius `eps`, in pixel units of [0, 1], cut with the box [0, 1]."""

    norm: Norm
    eps: float = Field(gt=0, allow_inf_nan=False)

    @classmethod
    def parse(cls, norm: str, eps: str | float) -> Self:
        """From a command line's words.

        Raises:
            UnusableInput: an unknown norm; an ε that is not a number above 0, or too small to change a pixel; an L∞
                ball that holds every image.
        """
        by_lower = {known.lower(): known for known in NORMS}
        if norm.lower() not in by_lower:
            raise UnusableInput(f"unknown norm '{norm}': {did_you_mean(norm, NORMS)}")
        value = parse_number(eps, "ε") if isinstance(eps, str) else eps
        if not 0 < value < float("inf"):
            raise UnusableInput(f"ε '{eps}' must be above 0 and finite: write it as 8/255 or 0.03, in pixels of [0, 1]")
        if value < SMALLEST:
            raise UnusableInput(
                f"ε '{eps}' changes no pixel, which is a float32 in [0, 1]: it must be above {SMALLEST:g}"
            )
        if norm.lower() == "linf" and value >= 1:
            raise UnusableInput(
                f"ε '{eps}' holds every image, since pixels lie in [0, 1]: {value:g} of 255 steps is {value:g}/255"
            )
        return cls(norm=by_lower[norm.lower()], eps=value)

    @property
    def eps_text(self) -> str:
        """ε as people write it: '0.2', '8/255'."""
        pixels = round(self.eps * 255, 6)
        if len(repr(self.eps)) > 6 and math.isclose(float(f"{pixels:g}") / 255, self.eps, rel_tol=1e-12):
            return f"{pixels:g}/255"
        return f"{self.eps:g}" if float(f"{self.eps:g}") == self.eps else repr(self.eps)

    @property
    def reach(self) -> float:
        """The distance up to which an example counts as inside the ball: ε and the tolerance of its norm."""
        return self.eps + ABSOLUTE_LINF if self.norm == "Linf" else self.eps * (1 + RELATIVE_L1_L2)

    @property
    def folder(self) -> str:
        """The folder that holds this threat's results and boards, such as `Linf-8_255`."""
        return path_safe(f"{self.norm}-{self.eps_text}")

    def __str__(self) -> str:
        return f"{self.norm} {self.eps_text}"


class Method(Spec):
    """What is run on a model: a suite, or a way to certify. Fields are the parameters that `--set` takes.

    A change that can change a row raises `version`; unlike versions are never compared.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    version: ClassVar[int] = 1
    norms: ClassVar[tuple[Norm, ...]] = NORMS  # those that it knows

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that differ from the defaults: what a run's spec records."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def check(self, name: str, dataset: str, threat_model: ThreatModel) -> None:
        """UnusableInput if it cannot be run on this data set, or inside this ball."""
        raise NotImplementedError


class RunSpec(Spec):
    """One suite, or way to certify, on one model: all that its rows depend on, but for the weights and the pixels."""

    model: str
    alpha: float | None = None
    combine: Combine | None = None
    dataset: str
    threat_model: ThreatModel
    suite: str
    suite_version: int
    suite_params: dict[str, Any] = Field(default_factory=dict)
    n_examples: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=128, gt=0)
    warm_start: bool = Field(default=False, description="the adversarial examples of earlier runs are tried first")
    gates: tuple[str, ...] = Field(default=(), description="modules that a user named as gates, or `none`")

    def _keyed(self) -> dict[str, Any]:
        """What the keys are made of: runs from before `warm_start` and `gates` were fields keep theirs.

        Of a data set with an argument only the kind: where the images lie is no part of what they are, which the
        fingerprint says.
        """
        unused = {name for name in ("warm_start", "gates") if not getattr(self, name)}
        fields = self.model_dump(mode="json", exclude=unused)
        return fields | {"dataset": self.dataset.partition(":")[0]}

    def run_key(self, checkpoint_sha256: str, fingerprint: str) -> str:
        """Identifies a run: what resumes, and what is reported and not repeated once it is finished."""
        return digest("run", self._keyed(), checkpoint_sha256, fingerprint)

    def work_key(self, fingerprint: str) -> str:
        """A run without its checkpoint and seed: what a baseline is paired over."""
        return digest("work", {key: value for key, value in self._keyed().items() if key != "seed"}, fingerprint)

    def subject_key(self, checkpoint_sha256: str, fingerprint: str) -> str:
        """Who was attacked, with which pixels, inside which ball: what the worst case is taken over."""
        names = ("model", "alpha", "combine", "dataset", "threat_model", "gates")
        fields = self._keyed()
        known = {name: fields[name] for name in names if name in fields}
        return digest("subject", known, checkpoint_sha256, fingerprint)

    def command(
        self,
        results: Path | None = None,
        model: str | None = None,
        data_root: Path | None = None,
        checkpoints: Path | None = None,
    ) -> str:
        """The `bench run` or `bench certify` that makes this run, as a shell takes it.

        `model` is the word that names the model, where the run's own name for it finds another or none. Folders that
        are not given are left to the command's defaults.
        """
        kind, _, method = self.suite.partition("certify-")
        words = command_words()
        words += ["run", "--suite", kind] if kind else ["certify", "--method", method]
        words += ["--dataset", self.dataset, "--model", model or self.model]
        words += [word for gate in self.gates for word in ("--gates", gate)]
        words += [] if self.alpha is None else ["--alpha", repr(self.alpha)]
        words += ["--n-examples", str(self.n_examples), "--norm", self.threat_model.norm]
        words += ["--eps", self.threat_model.eps_text, "--seed", str(self.seed), "--batch-size", str(self.batch_size)]
        words += [word for item in self.suite_params.items() for word in ("--set", setting(*item))]
        words += ["--warm-start"] if self.warm_start else []
        folders = {"--data-root": data_root, "--checkpoints": checkpoints, "--results": results}
        words += [word for option, path in folders.items() if path is not None for word in (option, str(path))]
        return shlex.join(words)


class Recipe(Spec):
    """How to train, whatever the objective: the model's size, the data, the optimiser and its schedule.

    Parameters of the objectives themselves (inner steps, β …) are fields of the objectives. `objective` presets them:
    a field's name for every objective that has it, or an objective's name with fields of its own, which go over those,
    and may be the recipe's too: AdvMoE has a schedule of its own.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    # model
    expert: str = "small_cnn"
    width: int | None = Field(default=None, gt=0, description="the expert's width; None: its own default")
    image_size: int | None = Field(default=None, gt=0, description="a ViT's, the resize is inside the model")
    patch_size: int | None = Field(default=None, gt=0)
    norm: Literal["batch", "group"] | None = Field(
        default=None, description="a CNN's normalisation; group has no statistics of the batch; None: its own default"
    )
    init: str | None = Field(
        default=None,
        description="a dense model of the same network, whose weights every expert starts from; of a dual, R's. A"
        " variant's name is its checkpoint of the same training seed; or a file",
    )
    init_standard: str | None = Field(default=None, description="the same for the experts of a dual's S")
    pretrained: bool | str = Field(default=False, description="timm's ImageNet weights of a ViT, or a file of weights")
    gate: Gate | None = Field(
        default=None, description="the gate that the recipe is made for, which the variant's name decides; None: any"
    )
    num_experts: int = Field(default=4, ge=2)
    num_selected_experts: int = Field(default=1, ge=1)
    router: str = Field(default="affine", description="affine, conv, or a plugin's")
    combine: Combine | None = Field(default=None, description="None: the variant's own")
    balance_loss: Literal["switch", "entropy"] = Field(default="switch", description="of MoE blocks inside a network")
    route_by: Literal["image", "position"] = Field(default="image", description="what a blockmoe's gate routes")
    alpha: float = Field(default=0.7, ge=0, le=1, description="a dual's weight of its robust branch")
    # data
    n_train: int | None = Field(default=None, gt=0, description="training images used; None: all")
    n_val: int = Field(default=500, gt=0, description="held out of the training data to choose the checkpoint")
    flip: bool = Field(default=False, description="horizontally, every other time")
    translate: int = Field(default=0, ge=0, description="up to so many pixels each way, black outside")
    cutout: int = Field(default=0, ge=0, description="a black square of so many pixels a side")
    noise_sigma: float = Field(
        default=0.0, ge=0, description="of Gaussian noise on each image, in pixels of [0, 1]: what smoothing certifies"
    )
    eps_warmup: int = Field(
        default=0, ge=0, description="epochs over which training's ε grows to the threat model's: a ViT may need it"
    )
    # optimisation
    epochs: int = Field(default=10, gt=0)
    batch_size: int = Field(default=128, gt=1, description="of each process, where there are several")
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0, description="the schedule's peak")
    router_lr: float = Field(default=0.1, ge=0, description="the router's learning rate, as a fraction of lr")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["one_cycle", "cyclic", "cosine", "constant"] = "one_cycle"
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="per step, of averaged weights, which are then validated and kept; 0: none"
    )
    swa_start: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="part of the training after which weights are averaged, all alike (SWA); kept as of ema_decay",
    )
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal[Precision, "auto"] = Field(
        default="32", description="auto: 32 or bf16-mixed, by a timing at the start"
    )
    channels_last: bool = Field(default=False, description="images and convolutions in memory as (B, H, W, C)")
    val_steps: int = Field(default=10, gt=0, description="PGD steps of the validation's robust accuracy")
    # presets by objective, and by the network of a variant with MoE blocks inside
    objective: dict[str, Any] = Field(default_factory=dict)
    network: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def starts(self) -> dict[str, str]:
        """What experts start from, `init` and `init_standard`, as far as they are set."""
        return {key: name for key in ("init", "init_standard") if (name := getattr(self, key))}

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_as_text(cls, value: Any) -> Any:
        return str(value)  # `--set precision=32` is a number to YAML

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema_decay and self.swa_start is not None:
            raise ValueError(
                "ema_decay and swa_start are two ways to average weights: set ema_decay=0 or swa_start=null"
            )
        return self

    @model_validator(mode="after")
    def _experts_suffice(self) -> Self:
        if self.num_selected_experts > self.num_experts:
            raise ValueError(
                f"num_selected_experts {self.num_selected_experts} is more than num_experts {self.num_experts}"
            )
        return self


#: Parameters that came after the first checkpoints, with the values that change nothing: such a value is left out of a
#: training's key, so that earlier checkpoints keep theirs.
ADDED_PARAMETERS: dict[str, dict[str, Any]] = {
    "recipe": {
        "noise_sigma": 0.0,
        "init": None,
        "init_standard": None,
        "ema_decay": 0.0,
        "swa_start": None,
        "eps_warmup": 0,
        "balance_loss": "switch",
        "route_by": "image",
        "network": {},
    },
    "objective_params": {"start_radius": 1.0, "expert_reduction": "sum"},
}


def model_name(variant: str, seed: int) -> str:
    """How a trained model is called, and its file named: `<variant>` for seed 0, `<variant>-s<seed>` otherwise."""
    return f"{variant}-s{seed}" if seed else variant


class TrainSpec(Spec):
    """One training: a variant on a data set, by a recipe, with a seed."""

    variant: str
    dataset: str
    threat_model: ThreatModel
    recipe_name: str
    recipe: Recipe
    objective_params: dict[str, Any] = Field(default_factory=dict, description="all of them, defaults included")
    seed: int = Field(default=0, ge=0)

    @property
    def key(self) -> str:
        """Identifies the training: a checkpoint made by another spec is never overwritten."""
        asked = self.model_dump(mode="json")
        for part, added in ADDED_PARAMETERS.items():
            for name, default in added.items():
                if asked[part].get(name, default) == default:
                    asked[part].pop(name, None)
        return digest("train", asked)

    @property
    def checkpoint_name(self) -> str:
        """`<variant>` for seed 0, `<variant>-s<seed>` otherwise."""
        return model_name(self.variant, self.seed)


class ModelInfo(Spec):
    """What is known of a model, beside its weights: RobustBench's JSON fields and what a routed model adds.

    A field that is not known is None, never a guess; `trained`: in words, on what and for how long.
    """

    name: str
    architecture: str
    objective: str | None = None
    gate: Gate | None = None
    combine: Combine | None = None
    num_experts: int | None = None
    num_selected_experts: int | None = None
    alpha: float | None = None
    dataset: str | None = None
    threat_model: ThreatModel | None = None
    checkpoint_sha256: str
    number_forward_passes: int = 1
    additional_data: bool | None = None
    seed: int | None = None
    trained: str = ""
    routing_visible: bool = False
    link: str = ""
    authors: str = ""
    venue: str = ""
    word: str = Field(default="", description="how --model named it, where that is not its name, such as a file")

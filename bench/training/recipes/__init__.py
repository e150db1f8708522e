"""The presets of training, `*.yaml` in this folder, and how a recipe with settings becomes a TrainSpec."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.datasets.base import Dataset
from bench.errors import UnusableInput, did_you_mean
from bench.models.architecture import Dense, Dual, Inside, Network, Routed
from bench.models.layers import parameters_of
from bench.models.variants import Variant, get_variant
from bench.registry import OBJECTIVES, RECIPES, command_words
from bench.settings import parse_value
from bench.spec import Recipe, ThreatModel, TrainSpec, build
from bench.training.objectives.base import Objective

#: The recipe's fields that are parameters of MoE blocks inside a network, and of networks, where they have them.
_INSIDE = ("route_by", "balance_loss")
_SIZES = ("width", "image_size", "patch_size", "norm", *_INSIDE)


#: How long one variant takes by the recipes that are made for two CPU cores.
TAKES = {
    "digits": "under 90 seconds",
    "cpu-cifar10": "under 90 minutes",
    "cpu-tinyimagenet": "under 90 minutes",
    "cpu-vit-tinyimagenet": "under an hour",
}


def first_training(dataset: Dataset, data_root: Path, checkpoints: Path) -> str:
    """The command that trains a first model on a data set, with no more images than it has, and how long it takes."""
    words = command_words()
    words += ["train", "moe-at", "--dataset", dataset.name, "--data-root", str(data_root)]
    words += ["--checkpoints", str(checkpoints)]
    recipe = read_recipe(dataset.recipe)
    try:
        available = dataset.read("train", data_root, 1).available
    except UnusableInput:
        available = 0  # the command itself says what is missing
    if 0 < available < (recipe.n_train or 1) + recipe.n_val:
        held_out = min(recipe.n_val, max(1, available // 5))
        words += ["--set", f"n_train={available - held_out}", "--set", f"n_val={held_out}"]
    takes = f" ({TAKES[dataset.recipe]} on two cores)" if dataset.recipe in TAKES else ""
    return f"`{shlex.join(words)}`{takes}"


def read_recipe(name: str) -> Recipe:
    """The preset called `name`; UnusableInput with the nearest name where there is none."""
    text = RECIPES[name].read_text(encoding="utf-8")
    return build(Recipe, f"recipe '{name}'", _numbers(yaml.safe_load(text)))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with fractions such as 2/255 as numbers."""
    return {
        key: _numbers(value) if isinstance(value, dict) else parse_value(value, key) for key, value in values.items()
    }


def train_spec(
    variant: str,
    dataset: Dataset,
    threat_model: ThreatModel,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> TrainSpec:
    """The spec of a training: the recipe (default: the data set's own), overridden by `settings`.

    A setting is a field of the recipe or of the objective; UnusableInput, with the nearest name, for any other, and for
    one that has no effect on this variant. A dual that is put together is not trained and accepts all of them. The
    variant's own settings override the recipe's.
    """
    about = get_variant(variant)
    objective, network = objective_class(about), about.network
    name = recipe or dataset.recipe
    preset = read_recipe(name)
    if preset.init and (network or about.kind == "dense"):
        other = f"those of '{variant}' are no whole networks" if network else f"'{variant}' is one"
        raise UnusableInput(
            f"recipe '{name}' starts experts from a dense model, and {other}: train it with --recipe {dataset.recipe}"
        )
    of_network = {"pretrained": False, **preset.network.get(network, {})} if network else {}
    special = of_network | preset.objective.get(about.objective or "", {}) | dict(about.settings)
    for key in set(special) - {*objective.model_fields, *Recipe.model_fields}:
        raise UnusableInput(f"recipe '{name}' presets '{key}' of '{variant}', which has no such parameter")
    own = {key: value for key, value in (preset.objective | special).items() if key in objective.model_fields}
    changed = {key: value for key, value in special.items() if key in Recipe.model_fields}
    given = settings or {}
    for key, value in given.items():
        if key in _idle(about):
            raise UnusableInput(f"--set {key}: nothing of '{variant}' depends on it: drop it")
        if key in objective.model_fields:
            own[key] = value
        elif key in Recipe.model_fields and key not in ("objective", "network"):
            changed[key] = value
        else:
            known = sorted({*objective.model_fields, *Recipe.model_fields} - {"objective", "network"})
            raise UnusableInput(f"--set {key}: '{variant}' has no such parameter: {did_you_mean(key, known)}")
    if given.get("inner_steps", 1) != 1 and "start_radius" not in given:
        own.pop("start_radius", None)  # above 1 a preset of it is for one step
    if "init" in given and given["init"] is None and "init_standard" not in given:
        changed["init_standard"] = None
    params = build(objective, f"objective of '{variant}'", own)
    merged = build(Recipe, f"recipe '{name}'", {**preset.model_dump(exclude={"objective", "network"}), **changed})
    gate = about.gate
    if gate and merged.gate not in (None, gate):
        other = f"{variant}-argmax" if merged.gate == "argmax" else variant.removesuffix("-argmax")
        raise UnusableInput(f"recipe '{name}' is for gate={merged.gate}, and '{variant}' has {gate}: train {other}")
    if about.kind == "dual" and about.objective and merged.alpha == 1:
        raise UnusableInput("alpha=1: of such a dual nothing is left of its standard branch: train an moe-rt_er")
    if merged.noise_sigma and objective.adversarial:
        raise UnusableInput(
            f"--set noise_sigma={merged.noise_sigma:g}: '{variant}' trains on adversarial examples, which stay in"
            " [0, 1] and near the image: train a -standard variant with noise"
        )
    if merged.pretrained and merged.starts:
        raise UnusableInput("--set init=… and --set pretrained=… both say where the weights start: drop one of them")
    if threat_model.norm == "L1":
        raise UnusableInput("no training inside an L1 ball: take --norm Linf or L2, and evaluate the file under L1")
    return TrainSpec(
        variant=variant,
        dataset=dataset.name,
        threat_model=threat_model,
        recipe_name=name,
        recipe=merged,
        objective_params=params.model_dump(mode="json"),
        seed=seed,
    )


def train_specs(
    variants: Sequence[str],
    dataset: Dataset,
    threat_model: ThreatModel,
    recipe: str | None,
    settings: Mapping[str, Any],
    seeds: Sequence[int],
) -> list[TrainSpec]:
    """Each variant with each seed, and with those of the settings that it has.

    Dense ones come first, since others may start from them: `init` is then of those others. Duals that are put together
    come last, since others may be their parts.

    Raises:
        UnusableInput: as `train_spec` does, for a setting where no variant has it.
    """
    kinds = {name: get_variant(name) for name in variants}
    variants = sorted(variants, key=lambda name: (kinds[name].parts is not None, kinds[name].kind != "dense"))
    taken = {variant: {key for key in settings if _takes(get_variant(variant), key)} for variant in variants}
    if any(variant.kind != "dense" for variant in kinds.values()):
        taken = {name: keys - {"init"} if kinds[name].kind == "dense" else keys for name, keys in taken.items()}
    nobodys = set(settings).difference(*taken.values())
    return [
        train_spec(variant, dataset, threat_model, recipe, {key: settings[key] for key in settings if key in own}, seed)
        for variant in variants
        for own in [taken[variant] | nobodys]
        for seed in seeds
    ]


def _takes(variant: Variant, key: str) -> bool:
    """Whether something of a variant depends on a setting."""
    return key in {*objective_class(variant).model_fields, *Recipe.model_fields} - _idle(variant)


def _idle(variant: Variant) -> set[str]:
    """The settings that have no effect on a variant; accepting them would suggest otherwise."""
    if variant.network is not None:
        idle = set(_SIZES) - set(parameters_of(variant.network))
        idle |= {"expert", "pretrained", "router", "combine", "alpha", "init", "init_standard"}
        return idle | {"balance", "num_selected_experts"} if "balance_loss" in idle else idle
    if variant.kind == "dense":
        routed = {"num_experts", "num_selected_experts", "router", "router_lr", "balance", "combine", "alpha"}
        return {*routed, *_INSIDE, "init_standard"}
    idle = {*_INSIDE} if variant.kind == "dual" else {*_INSIDE, "alpha", "init_standard"}
    if variant.gate == "argmax":  # the router is never trained, but by AdvMoE's own steps
        idle |= {"balance"} if variant.objective == "advmoe" else {"balance", "router_lr"}
    return idle


def objective_class(variant: Variant) -> type[Objective]:
    """The class of a variant's objective; a variant that is put together has the base class's, which has no steps."""
    return Objective if variant.objective is None else OBJECTIVES[variant.objective]


def architecture(spec: TrainSpec, dataset: Dataset) -> Dense | Routed | Inside | Dual:
    """The architecture of the spec's variant, for the given data set."""
    variant, recipe = get_variant(spec.variant), spec.recipe
    values = {name: getattr(recipe, name) for name in _SIZES}
    sizes = {name: value for name, value in values.items() if value != Recipe.model_fields[name].default}
    own = parameters_of(variant.network) if variant.network else set(_SIZES) - set(_INSIDE)
    network = Network(
        expert=variant.network or recipe.expert,
        expert_params={key: value for key, value in sizes.items() if key in own},
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
    )
    if variant.kind == "dense":
        return Dense(**dict(network))
    if variant.network:
        every = "balance_loss" not in own  # a Soft MoE has no selection to balance
        k = recipe.num_experts if every else recipe.num_selected_experts
        return Inside(**dict(network), num_experts=recipe.num_experts, num_selected_experts=k)
    assert variant.gate is not None
    routed = Routed(
        **dict(network),
        router=recipe.router,
        num_experts=recipe.num_experts,
        num_selected_experts=recipe.num_selected_experts,
        gate=variant.gate,
        combine="logits" if variant.kind == "dual" else recipe.combine or "logits",
    )
    if variant.kind == "moe":
        return routed
    combine = recipe.combine or variant.combine or "probs"
    return Dual(standard=routed, robust=routed, alpha=recipe.alpha, combine=combine)

"""Who is scored: from the words of `--model` to a model that can be attacked."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bench.datasets.base import Dataset
from bench.errors import UnusableInput, did_you_mean, users_code
from bench.job import Subject
from bench.models.checkpoints import available, checkpoint_path, find_checkpoint, load_checkpoint
from bench.models.choices import plain
from bench.models.foreign import settings_kept, switch_mode
from bench.models.gates import Gates, declared, find_gates, look_at_shown
from bench.models.parts import is_dual, is_moe, is_traced
from bench.randomness import seeded
from bench.registry import working_folder_first
from bench.spec import ModelInfo, ThreatModel

#: Endings of files that a model is saved in, which are not read: pickles run code, and none says what network it is of.
_WEIGHTS = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar", ".h5", ".onnx", ".npz"}


def routing_visible(model: object) -> bool:
    """Whether a model shows its routing: `router`, `experts` (a ModuleList) and `trace`, or a dual's branches and α."""
    return is_dual(model) or (is_moe(model) and is_traced(model))


def find_models(
    dataset: Dataset, threat_model: ThreatModel, folders: Sequence[Path], data_root: Path = Path("data")
) -> list[str]:
    """Every variant with a checkpoint for the data set; UnusableInput, with how to get one, if there is none."""
    names = [name for norm in _norms(dataset, threat_model) for name in available(dataset.name, norm, list(folders))]
    if not names:
        places = " nor ".join(f"'{folder}'" for folder in folders)
        from bench.training.recipes import first_training

        raise UnusableInput(
            f"no {threat_model.norm} checkpoint for {dataset.name} in {places}: name a model with --model, or train one"
            f" with {first_training(dataset, data_root, folders[0])}"
        )
    return list(dict.fromkeys(names))


def load_subject(word: str, dataset: Dataset, threat_model: ThreatModel, folders: Sequence[Path]) -> Subject:
    """The model that `word` names: a variant, a checkpoint file, `robustbench:NAME` or `package.module:callable`.

    UnusableInput if there is none, if it is damaged, or if it is for other images or another number of classes.
    """
    if word.startswith("robustbench:"):
        from bench.compat import zoo_model

        model = zoo_model(word.partition(":")[2], dataset.name, threat_model.norm, folders[0])
        return Subject(model, _foreign_info(word, model, dataset.name), foreign=True)
    if word.endswith(".safetensors"):
        return _from_checkpoint(Path(word), dataset, threat_model)
    if Path(word).suffix.lower() in _WEIGHTS:
        raise UnusableInput(
            f"--model '{word}' holds weights, not the network that they are for: write a function that builds it and"
            " loads them, and pass --model package.module:function (docs/your-own-model.md has one)"
        )
    if ":" in word:
        file, _, function = word.partition(":")
        if file.endswith(".py"):
            raise UnusableInput(
                f"--model '{word}' names a file: name the module, as Python imports it in its folder: --model"
                f" {Path(file).stem}:{function}"
            )
        with users_code(f"--model '{word}' cannot be made"):
            return foreign_subject(_call_factory(word, dataset), word)
    places = [(norm, folder) for norm in _norms(dataset, threat_model) for folder in folders]
    there = [norm for norm, folder in places if checkpoint_path(folder, dataset.name, norm, word).is_file()]
    module = word.partition(".")[0]
    if not there and (Path(f"{module}.py").is_file() or Path(module, "__init__.py").is_file()):
        raise UnusableInput(f"--model '{word}' names no function: write --model {word}:FUNCTION for your own network")
    norm = there[0] if there else threat_model.norm
    return _from_checkpoint(find_checkpoint(word, dataset.name, norm, list(folders)), dataset, threat_model)


def _norms(dataset: Dataset, threat_model: ThreatModel) -> list[str]:
    """Where checkpoints are looked for: the norm of the attack, then the data set's own, which most are trained for."""
    return list(dict.fromkeys((threat_model.norm, dataset.threat_model.norm)))


def _from_checkpoint(path: Path, dataset: Dataset, threat_model: ThreatModel) -> Subject:
    model, header, sha256 = load_checkpoint(path)
    found = (header.architecture.input_shape, header.architecture.num_classes)
    if found != (dataset.input_shape, dataset.num_classes):
        (shape, classes), (want, num_classes) = found, (dataset.input_shape, dataset.num_classes)
        raise UnusableInput(
            f"'{path}' takes {'×'.join(map(str, shape))} images of {classes} classes, but {dataset.name} has"
            f" {'×'.join(map(str, want))} images of {num_classes}: it was trained on {header.dataset}"
        )
    other = header.threat_model.norm != threat_model.norm
    flags = (f"trained for {header.threat_model}",) if other else ()
    return Subject(model, header.info(sha256), flags, tuple(header.experts))


def foreign_subject(model: nn.Module, name: str) -> Subject:
    """A model of the user's own as it is called on the boards; its identity is still open (`identified`).

    A compiled one is scored uncompiled: hooks inside see nothing of what a compiler has fused.
    """
    inner = plain(model)
    compiled, model = inner is not model and not isinstance(model, nn.DataParallel), inner
    flags = ("compiled, scored uncompiled",) * compiled
    return Subject(model, _foreign_info(name, model, None), flags, foreign=True)


def with_gates(subject: Subject, words: Sequence[str], x: Tensor) -> Subject:
    """The subject with the gates that `words` name (`--gates`), or else those that its model's attribute `gates` names,
    and what is to be seen of the MoE or dual that it wraps.

    x (m, C, H, W): images to look at them with. UnusableInput for words that name no gate, or for a model of ours.
    """
    if not subject.foreign:
        if words:
            raise UnusableInput(f"--gates names gates of a model of your own, and {subject.info.name} is none: drop it")
        return subject
    words = words or declared(subject.model)
    found = find_gates(subject.model, words, x) if words else Gates((), ())
    seen = replace(subject, gates=found.words, sites=found.sites, shown=look_at_shown(subject.model, x))
    if is_dual(seen.routed):  # or what the model wraps is one
        shows = {"alpha": float(seen.routed.alpha), "routing_visible": True}
        seen = replace(seen, info=seen.info.model_copy(update=shows))
    return seen


def _call_factory(word: str, dataset: Dataset) -> nn.Module:
    """The model in eval mode; what its factory draws is the same every time, and in every process."""
    module_name, _, attribute = word.partition(":")
    with working_folder_first(), seeded(0), settings_kept():
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            hint = did_you_mean(attribute, [name for name in vars(module) if not name.startswith("_")])
            near = f": {hint}" if hint.endswith("?") else ""
            raise AttributeError(f"module '{module_name}' has no attribute '{attribute}'{near}")
        made = getattr(module, attribute)
        model = made if isinstance(made, nn.Module) else _called(made)
    if not isinstance(model, nn.Module):
        raise UnusableInput(f"--model '{word}' gave a {type(model).__name__}: it must return a torch.nn.Module")
    switch_mode(model, training=False)
    if any(
        isinstance(p, UninitializedParameter | UninitializedBuffer) for p in [*model.parameters(), *model.buffers()]
    ):
        with (
            seeded(0),
            torch.no_grad(),
            suppress(Exception),
        ):  # LazyLinear; what fails is refused with the data's images
            model(torch.zeros(2, *dataset.input_shape))
    return model


def _called(factory: Callable[[], Any]) -> Any:
    """What it returns; TypeError for one that needs arguments, with what to do about it."""
    with suppress(ValueError):  # of a builtin no signature is known
        if callable(factory):
            try:
                inspect.signature(factory).bind()
            except TypeError as error:
                raise TypeError(f"{error}: it is called without any, so name a function that passes them") from None
    return factory()


def _foreign_info(word: str, model: Any, dataset: str | None) -> ModelInfo:
    routed: Any = model.robust if is_dual(model) else model
    return ModelInfo(
        name=word,
        architecture=type(model).__name__,
        num_experts=len(routed.experts) if is_moe(routed) else None,  # whether or not it shows its routes
        alpha=float(model.alpha) if is_dual(model) else None,
        dataset=dataset,
        checkpoint_sha256="",
        routing_visible=routing_visible(model),
    )

"""What there is, by name, and what is to be known of it: `bench list` and `bench show`."""

import inspect
import itertools
import sys
from typing import Any, Literal, get_args, get_origin

from bench.errors import UnusableInput
from bench.registry import DATASETS, OBJECTIVES, RECIPES, SUITES
from bench.settings import setting
from bench.spec import TORCHATTACKS, Recipe

#: Kinds of things that have parameters, so that there is something to show.
SHOWN = ("suite", "objective", "recipe")


def names(what: str) -> list[str]:
    """The names of all `variants`, `suites`, `datasets`, `objectives` or `recipes`."""
    if what == "variants":
        from bench.models.variants import VARIANTS

        return list(VARIANTS)
    if what == "suites":
        return [name for name in SUITES if name != "torchattacks"] + [f"torchattacks:{name}" for name in TORCHATTACKS]
    if what == "datasets":
        return [f"{name}:{DATASETS.argument(name)}".rstrip(":") for name in DATASETS]
    if what == "objectives":
        return list(OBJECTIVES)
    return list(RECIPES)


def sentence(what: str, name: str) -> str:
    """What one of them is, in a sentence; of a variant, how it is made."""
    if what == "variants":
        from bench.models.variants import VARIANTS

        made = VARIANTS[name]
        words = [made.kind, f"trained by {made.objective}" if made.objective else "put together", made.gate or ""]
        return ", ".join(word for word in words if word)
    if what == "recipes":
        from bench.training.recipes import read_recipe

        recipe = read_recipe(name)
        images = "all images" if recipe.n_train is None else f"{recipe.n_train:,} images"
        words = [recipe.expert, f"{recipe.epochs} epochs", images, recipe.optimizer, f"batches of {recipe.batch_size}"]
        return ", ".join([*words, *([f"experts start from {recipe.init}"] if recipe.init else [])])
    if name.startswith("torchattacks:"):
        from bench.suites.torchattacks import about

        return _first_sentence(about(name.partition(":")[2])[0])
    if what == "datasets":
        return _first_sentence(DATASETS[name.partition(":")[0]].__doc__)
    kind = _kind({"suites": "suite", "objectives": "objective"}[what], name)
    return _first_sentence(sys.modules[kind.__module__].__doc__)


def details(what: str, name: str) -> dict[str, Any]:
    """Of a suite or an objective: what it is, its version and norms, and its parameters with type, default and meaning.

    Of a recipe, its settings with value and meaning, and what it presets of single objectives and networks.

    Raises:
        UnusableInput: there is none of that name; the message has the nearest.
    """
    if what == "recipe":
        return _of_recipe(name)
    kind = _kind(what, name)
    found: dict[str, Any] = {"name": name, "what": sentence(f"{what}s", name)}
    if what == "suite":
        found["version"] = kind.version
        found |= {} if name.startswith("torchattacks:") else {"norms": list(kind.norms)}
        found |= {"datasets": list(kind.datasets)} if kind.datasets else {}
        found |= {"needs": list(kind.needs)} if kind.needs else {}
        found["cost"] = _cost(kind.open(name.partition(":")[2] or None, {}))
    found["notes"] = " ".join((inspect.getdoc(kind) or "").split())
    found["parameters"] = _of_torchattacks(name) if name.startswith("torchattacks:") else _fields(kind)
    return found


def _kind(what: str, name: str) -> Any:
    if what == "suite":
        kind = SUITES[name.partition(":")[0]]
        kind.parameters(name.partition(":")[2] or None)  # refuses an argument that there is not
        return kind
    if what == "objective":
        return OBJECTIVES[name]
    raise UnusableInput(f"there is nothing to show of a {what}: there are {', '.join(SHOWN)}")


def _cost(suite: Any) -> str:
    """In passes through the model, for ten classes and for all that has no other number."""
    if (cost := suite.cost(num_classes=10)) is None:
        return "not known"
    return (
        f"about {cost.forwards:,} forward and {cost.backwards:,} backward passes for each example that withstands it"
        " (of 10 classes)"
    )


def _fields(kind: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": _written(field.annotation),
            "default": field.get_default(call_default_factory=True),
            "meaning": field.description or "",
        }
        for name, field in kind.model_fields.items()
    ]


def _of_recipe(name: str) -> dict[str, Any]:
    from bench.training.recipes import read_recipe

    recipe = read_recipe(name)
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.strip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    found: dict[str, Any] = {"name": name, "what": sentence("recipes", name), "notes": comment}
    presets = recipe.objective | recipe.network
    own = {key: value for key, value in presets.items() if isinstance(value, dict)}
    of_all = {key: value for key, value in presets.items() if key not in own}
    for whose, values in (("all objectives", of_all), *own.items()):
        if values:
            found[f"of {whose}"] = [setting(*item) for item in values.items()]
    found["parameters"] = [
        {"name": field["name"], "value": getattr(recipe, field["name"]), "meaning": field["meaning"]}
        for field in _fields(Recipe)
        if field["name"] not in ("objective", "network")
    ]
    return found


def _of_torchattacks(name: str) -> list[dict[str, Any]]:
    from bench.suites.torchattacks import about

    _, defaults = about(name.partition(":")[2])
    return [
        {"name": key, "type": type(default).__name__, "default": default, "meaning": ""}
        for key, default in defaults.items()
    ]


def _written(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    alternatives = [part for part in get_args(annotation) if part is not annotation]
    if alternatives and get_origin(annotation) not in (dict, list, tuple):
        return " | ".join(map(_written, alternatives))
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _first_sentence(text: str | None) -> str:
    """The first sentence of a docstring: up to its first full stop at the end of a word, or its first paragraph."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return f"{head}." if stop and not head.endswith(("al", "e.g", "i.e", "vs")) else paragraph

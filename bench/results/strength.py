"""Whether a run attacked with less effort than its suite does by default. No torch, so the defaults are named again."""

from collections.abc import Mapping
from typing import Any

from bench.spec import RunSpec

#: Settings that buy effort, and the default of each, by suite: numbers where less is weaker, or words by strength.
EFFORT: Mapping[str, Mapping[str, float | tuple[str, ...]]] = {
    "pgd": {"steps": 50},
    "components": {"steps": 50},
    "adaptive": {"budget": ("small", "standard", "large"), "recipe": ("trial", "full")},
}
#: In the words above, what is the default.
DEFAULT_WORDS = ("standard", "full")


def weakened(spec: RunSpec) -> list[str]:
    """The settings, as `key=value`, by which a run attacked less than its suite does by default."""
    known = EFFORT.get(spec.suite, {})
    return [f"{key}={value}" for key, value in sorted(spec.suite_params.items()) if _less(value, known.get(key))]


def _less(value: Any, default: float | tuple[str, ...] | None) -> bool:
    if isinstance(default, tuple):
        own = next(word for word in default if word in DEFAULT_WORDS)
        return value not in default[default.index(own) :]
    return default is not None and isinstance(value, int | float) and value < default

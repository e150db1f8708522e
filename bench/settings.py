"""Values as a user writes them: numbers, fractions such as 8/255, and `--set key=value`."""

import json
import re
from collections.abc import Iterable
from typing import Any

from bench.errors import UnusableInput


def parse_number(text: str, name: str) -> float:
    """A number as a user writes it: '0.2', '8/255'. UnusableInput, naming the value, for anything else."""
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UnusableInput(f"{name} '{text}' is not a number: write it as 8/255 or 0.03") from None


def parse_value(value: Any, name: str) -> Any:
    """A YAML value; a text such as 2/255 or 1e-3, which YAML leaves a text, becomes the number that it means."""
    if isinstance(value, list):
        return [parse_value(item, name) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[0-9.]+/[0-9.]+|[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return parse_number(value, name)
    return value


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`--set k=v` options as a dict; values are YAML scalars, and fractions such as 2/255 become numbers."""
    import yaml  # here: commands that only read results start sooner

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UnusableInput(f"--set '{pair}' is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        settings[key.strip()] = parse_value(value, f"--set {key}")
    return settings


def parse_grid(items: Iterable[str]) -> dict[str, list[Any]]:
    """`--grid k=v,v` options as a dict of the values to try, each read as `parse_settings` reads it."""
    grid: dict[str, list[Any]] = {}
    for item in items:
        key, _, values = item.partition("=")
        grid[key.strip()] = [parse_settings([f"{key}={value}"])[key.strip()] for value in values.split(",")]
        if not values or None in grid[key.strip()]:
            raise UnusableInput(f"--grid '{item}' is not of the form key=value,value")
    return grid


def setting(key: str, value: Any) -> str:
    """`key=value` such that `parse_settings` gives this value; a text is quoted only where it has to be."""
    plain = f"{key}={value}"
    return plain if isinstance(value, str) and parse_settings([plain])[key] == value else f"{key}={json.dumps(value)}"

"""What a command has written, for comparing it with what the undisturbed one writes."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import load_file

_OF_THE_MOMENT = ("seconds", "finished", "git_hash", "environment")


def settled(folder: Path) -> dict[str, Any]:
    """What a folder holds, without what is of the moment: times, and files that were never finished."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).to_csv()
        elif path.suffix == ".safetensors":
            found[name] = {key: value.tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".json":
            result = json.loads(path.read_text())
            found[name] = {key: value for key, value in result.items() if key not in _OF_THE_MOMENT}
        elif path.suffix == ".csv" and "checkpoints" in name:
            found[name] = pd.read_csv(path).drop(columns=["seconds", "data_seconds", "images_per_second"]).to_csv()
        else:
            found[name] = path.read_bytes()
    return found

"""Finished runs made by hand, one letter an example, and the boards of them."""

from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from bench.boards import views
from bench.boards.leaderboard import boards
from bench.results.schema import VERDICT_COLUMNS, Result
from bench.results.store import RunFolder, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

MOE = {"architecture": "resnet10", "num_experts": 4, "num_selected_experts": 1, "gate": "softmax"}
STATUS = {"1": "ok", "0": "ok", "e": "error"}
REST = (0.0, 0.0, -1, -1)  # distances and experts


def save(
    root: Path,
    suite: str,
    attacks: dict[str, str],
    *,
    info: dict[str, Any] | None = None,
    fingerprint: str = "f" * 16,
    target: str = "F",
    order: list[str] | None = None,
    flags: tuple[str, ...] = (),
    model_flags: tuple[str, ...] = (),
    **fields: Any,
) -> Result:
    """A finished run whose rows come from one letter an example: 1 robust, 0 broken, e error, `.` no row."""
    clean = attacks["clean"]
    rows = pd.DataFrame(
        [
            (i, f"{i:016x}", 0, attack, part, 0, 0, clean[i] == "1", mark == "1", *REST, STATUS[mark])
            for attack, marks in attacks.items()
            for part in [target if attack != "clean" else "F"]
            for i, mark in enumerate(marks)
            if mark != "."
        ],
        columns=list(VERDICT_COLUMNS),
    ).astype(VERDICT_COLUMNS)
    given = {"model": "dense-at", "dataset": "digits", "suite": suite, "n_examples": len(clean)}
    given["suite_version"] = 3 if suite == "adaptive" else 1  # the first that ranks
    spec = RunSpec(**{**given, "threat_model": ThreatModel(norm="Linf", eps=0.2), **fields})
    header = {"name": spec.model, "architecture": "cnn", "checkpoint_sha256": "c" * 64, **(info or {})}
    provenance = {
        "flags": flags,
        "model_flags": model_flags,
        "environment": {},
        "git_hash": None,
        "seconds": 1.0,
        "finished": "2030-01-01",
    }
    result = Result.from_rows(spec, ModelInfo(**header), fingerprint, rows, order, **provenance)
    RunFolder(run_folder(root, spec, result.run)).finish(result, rows)
    return result


def table(root: Path) -> pd.DataFrame:
    """The one board's CSV, as text, by model."""
    (board,) = boards(root)
    return pd.read_csv(StringIO(views.csv(board)), dtype="str", keep_default_na=False).set_index("model", drop=False)


def markdown(root: Path) -> str:
    return "\n".join(map(views.markdown, boards(root)))

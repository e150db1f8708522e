"""Verdict rows made by hand, and results of them."""

from typing import Any

import pandas as pd

from bench.results.schema import VERDICT_COLUMNS, Result
from bench.spec import ModelInfo, RunSpec, ThreatModel

INFO = ModelInfo(name="m", architecture="tiny", checkpoint_sha256="c" * 64)
PROVENANCE: dict[str, Any] = {"environment": {"torch": "2"}, "git_hash": None, "seconds": 1.5, "finished": "2030-01-01"}

STATUS = {"1": "ok", "0": "ok", "e": "error"}


def frame(first: int = 0, **attacks: str) -> pd.DataFrame:
    """Rows from one letter an example: 1 robust, 0 broken, e error, `.` no row."""
    clean = attacks["clean"]
    rows = [
        (i, f"{i:016x}", 0, attack, "F", 0, 0, clean[i - first] == "1", mark == "1", 0.0, 0.0, -1, -1, STATUS[mark])
        for attack, marks in attacks.items()
        for i, mark in enumerate(marks, start=first)
        if mark != "."
    ]
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)).astype(VERDICT_COLUMNS)


def spec(**fields: Any) -> RunSpec:
    given = {"model": "m", "dataset": "digits", "threat_model": ThreatModel(norm="Linf", eps=8 / 255), "suite": "pgd"}
    return RunSpec(**{**given, "suite_version": 1, "n_examples": 4, **fields})


def result(rows: pd.DataFrame, **fields: Any) -> Result:
    return Result.from_rows(spec(**fields), INFO, "f" * 16, rows, **PROVENANCE)


ROWS = frame(clean="1110", pgd="100.")

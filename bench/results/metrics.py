"""What is computed from verdict rows: accuracies, their intervals, and tests of a difference. Never imports torch.

Verdict rows are those of `bench.results.store.VERDICT_COLUMNS`; accuracies are fractions in [0, 1].
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (low, high) of `successes` out of `n`, as fractions (Wilson, JASA 1927)."""
    from scipy.stats import binomtest  # here, because scipy takes longer to import than a board takes to make

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(lost: int, gained: int, alternative: Literal["greater", "two-sided"] = "greater") -> float:
    """Exact McNemar test that more was lost than gained: P(Bin(lost + gained, ½) ≥ lost); 1 for no change.

    `two-sided`: that the two differ, where nobody said beforehand which is the better.
    """
    from scipy.stats import binomtest

    if lost + gained == 0:
        return 1.0
    return float(binomtest(lost, lost + gained, 0.5, alternative=alternative).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (Scand. J. Statist. 1979), in the order given."""
    p = np.asarray(pvalues, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def clean_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether the unattacked image is classified correctly, indexed by idx."""
    return verdicts[verdicts["attack"] == "clean"].groupby("idx")["clean_correct"].all()


def robust_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether an example stands against every attack on F in the rows, indexed by idx.

    The clean row is one of them, so what is misclassified without an attack is not robust. The rows may come from
    several runs: the mean is then RA-worst, which is at most the smallest of the runs' averages.
    """
    return verdicts[verdicts["target"] == "F"].groupby("idx")["robust"].all()


def unique_kills(verdicts: pd.DataFrame) -> dict[str, int]:
    """How many examples each attack on F broke that no other in the rows did; attacks without any are left out."""
    broken = verdicts[(verdicts["target"] == "F") & verdicts["clean_correct"] & (verdicts["attack"] != "clean")]
    broken = broken[~broken["robust"] & (broken["status"] == "ok")].drop_duplicates(["idx", "attack"])
    alone = broken[~broken["idx"].duplicated(keep=False)]
    return {str(attack): int(count) for attack, count in alone["attack"].value_counts(sort=False).items()}


def accuracy_after(verdicts: pd.DataFrame, attacks: Iterable[str] | None = None) -> dict[str, float]:
    """The fraction that stands after each attack on F and all before it, `clean` first.

    `attacks` is the order they ran in; without it, the order of their first rows. An example without a row for an
    attack keeps its state, so an attack that found nobody left standing changes nothing.
    """
    rows = verdicts[verdicts["target"] == "F"]
    names = list(dict.fromkeys(["clean", *(rows["attack"].unique() if attacks is None else attacks)]))
    table = rows.groupby(["idx", "attack"])["robust"].all().unstack(fill_value=True)
    standing = np.logical_and.accumulate(table.reindex(columns=names, fill_value=True).to_numpy(dtype=bool), axis=1)
    return dict(zip(names, standing.mean(axis=0).tolist(), strict=True))


def component_rates(verdicts: pd.DataFrame) -> dict[str, "pd.Series[bool]"]:
    """What the rows of suite `components` tell, each as one truth value per example, indexed by idx.

    RA-E-fixed, RA-E-any, RA-R and `route-flip rate` (whether the route was changed), then `<part> SA` and `<part> RA`
    of each part. What the rows have no attack for is not there.
    """
    found: dict[str, pd.Series[bool]] = {}
    whole = verdicts[verdicts["target"] == "F"]
    kinds = whole["attack"].str.partition(":")[0]
    for name, kind in {"RA-E-fixed": "expert-fixed", "RA-E-any": "expert-any", "RA-R": "route"}.items():
        rows = whole[kinds == kind]
        if len(rows):
            found[name] = rows.groupby("idx")["robust"].all()
    route = whole[whole["attack"] == "route"].set_index("idx")
    if (route["clean_expert"] >= 0).any():  # -1: the model does not show its routes
        found["route-flip rate"] = (route["clean_expert"] != route["adv_expert"]) & (route["status"] == "ok")
    for part, rows in verdicts[verdicts["target"] != "F"].groupby("target", sort=False):
        found[f"{part} SA"] = rows.groupby("idx")["clean_correct"].all()
        found[f"{part} RA"] = rows.groupby("idx")["robust"].all()
    return found

"""What is computed from verdict rows: accuracies, their intervals, and tests of a difference. Never imports torch.

Verdict rows are those of `bench.results.store.VERDICT_COLUMNS`; accuracies are fractions in [0, 1].
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@cache
def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (low, high) of `successes` out of `n`, as fractions (Wilson, JASA 1927)."""
    from scipy.stats import binomtest  # here, because scipy takes longer to import than a board takes to make

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(lost: int, gained: int, alternative: Literal["greater", "two-sided"] = "greater") -> float:
    """Exact McNemar test that more was lost than gained: P(Bin(lost + gained, ½) ≥ lost); 1 for no change.

    `two-sided`: that the two differ, where the data decide which one is called the better.
    """
    from scipy.stats import binomtest

    if lost + gained == 0:
        return 1.0
    return float(binomtest(lost, lost + gained, 0.5, alternative=alternative).pvalue)


def sign_flip(changes: NDArray[np.int64]) -> float:
    """Exact one-sided test that changes (n,) sum to more than 0: the share of all sign patterns with no smaller a sum.

    One change an example, over all runs that it is in: +1 for each run that lost it, −1 for each that gained it. Runs
    on the same images are not independent, but under the null hypothesis the sign of an example's sum is a fair coin.
    Where each change is −1, 0 or 1 it is McNemar's test (Fisher, Design of Experiments 1935, §21).
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(changes[changes != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) == 1:
        positive = int((changes > 0).sum())
        return float(binom.sf(positive - 1, counts[0], 0.5))
    chances = np.ones(1)  # of the sum of the sizes whose sign is +
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(size * count + 1)
        own[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.maximum(fftconvolve(chances, own), 0)
    return float(min(1.0, chances[int(changes[changes > 0].sum()) :].sum()))


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (Scand. J. Statist. 1979), in the order given."""
    p = np.asarray(pvalues, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def tarone(discordant: Sequence[int], alpha: float) -> int:
    """How many of several exact tests, on so many changed examples each, share alpha (Tarone, Biometrics 1990).

    m changes have no p-value below ½^m. The least k such that at most k tests can get below alpha / k: the others can
    never be significant and need no part of alpha. k depends on how much changed, never on which way.
    """
    k = 1
    while sum(0.5**m < alpha / k for m in discordant) > k:
        k += 1
    return k


def adjusted(pvalues: Sequence[float], discordant: Sequence[int], alpha: float) -> list[float]:
    """p-values of one family of exact tests, to be compared with alpha: Holm's over those that Tarone's k leaves.

    Of the others it is p · k, which is at least alpha.
    """
    k = tarone(discordant, alpha)
    can = [0.5**m < alpha / k for m in discordant]
    held = iter(holm([p for p, yes in zip(pvalues, can, strict=True) if yes]))
    return [next(held) if yes else min(1.0, p * k) for p, yes in zip(pvalues, can, strict=True)]


def clean_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether the unattacked image is classified correctly, indexed by idx."""
    return verdicts[verdicts["attack"] == "clean"].groupby("idx")["clean_correct"].all()


def robust_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether an example is robust against every attack on F in the rows, indexed by idx.

    The clean row is one of them, so what is misclassified without an attack is not robust. The rows may come from
    several runs: the mean is then RA-worst, which is at most the smallest of the runs' averages.
    """
    return verdicts[verdicts["target"] == "F"].groupby("idx")["robust"].all()


def first_broken_by(runs: Iterable[tuple[pd.DataFrame, Sequence[str]]]) -> dict[str, int]:
    """How many examples each attack on F was the first to break, over runs of one suite: rows, attacks in their order.

    What a later run broke counts where no run before it did. Of an example that an attack has broken, no attack that
    comes later and skips it is known to fail.
    """
    seen: set[int] = set()
    found: dict[str, int] = {}
    for verdicts, attacks in runs:
        rows = broken(verdicts)
        for attack in attacks:
            own = set(rows.loc[rows["attack"] == attack, "idx"].tolist()) - seen
            found[attack] = found.get(attack, 0) + len(own)
            seen |= own
    return {attack: count for attack, count in found.items() if count}


def unique_kills(verdicts: pd.DataFrame, attacks: Iterable[str]) -> dict[str, int] | None:
    """How many examples each of the `attacks` on F broke and no other did; those without any are left out.

    None where one of them has not met every example that F gets right: it might have broken it as well.
    """
    whole = verdicts[verdicts["target"] == "F"]
    right = set(whole.loc[(whole["attack"] == "clean") & whole["clean_correct"], "idx"].tolist())
    met = {name: set(rows["idx"].tolist()) for name, rows in whole.groupby("attack")}
    if not all(right <= met.get(attack, set()) for attack in attacks):
        return None
    pairs = broken(verdicts).drop_duplicates(["idx", "attack"])
    alone = pairs[~pairs["idx"].duplicated(keep=False)]
    return {str(attack): int(count) for attack, count in alone["attack"].value_counts(sort=False).items()}


def broken(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The rows in which an attack on F has broken an example that F gets right."""
    attacked = (verdicts["target"] == "F") & verdicts["clean_correct"] & (verdicts["attack"] != "clean")
    return verdicts[attacked & ~verdicts["robust"] & (verdicts["status"] == "ok")]


def accuracy_after(verdicts: pd.DataFrame, attacks: Iterable[str] | None = None) -> dict[str, float]:
    """The fraction that is robust after each attack on F and all before it, `clean` first.

    `attacks` is the order they ran in; without it, the order of their first rows. An example without a row for an
    attack keeps its state, so an attack that found all examples broken changes nothing.
    """
    rows = verdicts[verdicts["target"] == "F"]
    names = list(dict.fromkeys(["clean", *(rows["attack"].unique() if attacks is None else attacks)]))
    table = rows.groupby(["idx", "attack"])["robust"].all().unstack(fill_value=True)
    robust = np.logical_and.accumulate(table.reindex(columns=names, fill_value=True).to_numpy(dtype=bool), axis=1)
    return dict(zip(names, robust.mean(axis=0).tolist(), strict=True))


def component_rates(verdicts: pd.DataFrame) -> dict[str, "pd.Series[bool]"]:
    """What the rows of suite `components` tell, each as one truth value per example, indexed by idx.

    RA-E-fixed, RA-E-any, RA-R and `route-flip rate` (whether the route was changed), `RA-R <gate>` of each gate inside
    a network, then `<part> SA` and `<part> RA` of each part. What the rows have no attack for is not there.
    """
    found: dict[str, pd.Series[bool]] = {}
    whole = verdicts[verdicts["target"] == "F"]
    of_kind: dict[str, list[str]] = {}
    for attack in whole["attack"].unique():
        of_kind.setdefault(attack.partition(":")[0], []).append(attack)
    for name, kind in {"RA-E-fixed": "expert-fixed", "RA-E-any": "expert-any", "RA-R": "route"}.items():
        if kind in of_kind:
            found[name] = whole[whole["attack"].isin(of_kind[kind])].groupby("idx")["robust"].all()
    routes = of_kind.get("route", [])
    if "route" in routes:
        route = whole[whole["attack"] == "route"].set_index("idx")
        if (route["clean_expert"] >= 0).any():  # -1: the model does not show its routes
            found["route-flip rate"] = (route["clean_expert"] != route["adv_expert"]) & (route["status"] == "ok")
    for attack in routes:
        if gate := attack.partition(":")[2]:
            found[f"RA-R {gate}"] = whole[whole["attack"] == attack].groupby("idx")["robust"].all()
    parts = verdicts[verdicts["target"] != "F"]
    for part in parts["target"].unique():
        rows = parts[parts["target"] == part].groupby("idx")
        found[f"{part} SA"], found[f"{part} RA"] = rows["clean_correct"].all(), rows["robust"].all()
    return found

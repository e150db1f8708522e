"""What is computed from verdict rows: accuracies, their intervals, and tests of a difference. Never imports torch.

Verdict rows are those of `bench.results.store.VERDICT_COLUMNS`; accuracies are fractions in [0, 1].
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: The standard normal's 97.5 % quantile.
_Z = 1.959963984540054
#: An array over all of a data set's positions is made where they are at most so many times the rows.
_DENSE = 8


@cache
def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (low, high) of `successes` out of `n`, as fractions (Wilson, JASA 1927).

    In the form of Newcombe (Stat. Med. 1998), as scipy.stats computes it, which takes longer to import than all boards
    to make; the same to the last bit, since stored results have it.
    """
    p, denominator = successes / n, 2 * (n + _Z**2)
    middle, half = (2 * n * p + _Z**2) / denominator, _Z / denominator * math.sqrt(4 * n * p * (1 - p) + _Z**2)
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def mcnemar(lost: int, gained: int, alternative: Literal["greater", "two-sided"] = "greater") -> float:
    """Exact McNemar test that more was lost than gained: P(Bin(lost + gained, ½) ≥ lost); 1 for no change.

    `two-sided`: that the two differ, where the data decide which one is called the better.
    """
    if alternative == "two-sided":  # of a fair coin the two tails are the same
        return min(1.0, 2 * mcnemar(max(lost, gained), min(lost, gained)))
    return _tail(lost, lost + gained)


def _tail(least: int, n: int) -> float:
    """P(Bin(n, ½) ≥ least)."""
    from scipy.special import bdtrc  # here: not every board needs it

    return float(bdtrc(least - 1, n, 0.5)) if least else 1.0


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
        return _tail(positive, int(counts[0]))
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
    smallest = np.sort(0.5 ** np.asarray(discordant, dtype=float))

    def suffices(k: int) -> bool:  # of all larger ones as well
        return int(np.searchsorted(smallest, alpha / k)) <= k

    return bisect_left(range(len(smallest)), True, lo=1, key=suffices) if len(smallest) > 1 else 1


def adjusted(pvalues: Sequence[float], discordant: Sequence[int], alpha: float) -> list[float]:
    """p-values of one family of exact tests, to be compared with alpha: Holm's over those that Tarone's k leaves.

    Of the others it is p · k, which is at least alpha.
    """
    k = tarone(discordant, alpha)
    can = [0.5**m < alpha / k for m in discordant]
    held = iter(holm([p for p, yes in zip(pvalues, can, strict=True) if yes]))
    return [next(held) if yes else min(1.0, p * k) for p, yes in zip(pvalues, can, strict=True)]


def all_by_example(verdicts: pd.DataFrame, rows: NDArray[np.bool_], column: str) -> "pd.Series[bool]":
    """Whether `column` holds in all of the chosen rows of an example, indexed by idx; rows: a truth value for each."""
    number, idx = numbered(verdicts["idx"].to_numpy()[rows])
    every: NDArray[np.bool_] = np.ones(len(idx), dtype=bool)
    every[number[~verdicts[column].to_numpy()[rows]]] = False
    return pd.Series(every.astype(bool), index=pd.Index(idx, name="idx"), name=column)


def numbered(idx: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row the number of its example, and the examples' sorted idx."""
    if not len(idx) or idx.min() < 0 or idx.max() >= _DENSE * len(idx):
        return pd.factorize(idx, sort=True)
    there = np.zeros(int(idx.max()) + 1, dtype=bool)  # positions in a data set: an array is faster than a hash table
    there[idx] = True
    return (np.cumsum(there) - 1)[idx], np.flatnonzero(there)


def _is(verdicts: pd.DataFrame, column: str, value: str) -> NDArray[np.bool_]:
    """Of each row whether its text in this column is `value`."""
    return (verdicts[column] == value).to_numpy(dtype=bool)


def clean_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether the unattacked image is classified correctly, indexed by idx."""
    return all_by_example(verdicts, _is(verdicts, "attack", "clean"), "clean_correct")


def robust_by_example(verdicts: pd.DataFrame) -> "pd.Series[bool]":
    """Whether an example is robust against every attack on F in the rows, indexed by idx.

    The clean row is one of them, so what is misclassified without an attack is not robust. The rows may come from
    several runs: the mean is then RA-worst, which is at most the smallest of the runs' averages.
    """
    return all_by_example(verdicts, _is(verdicts, "target", "F"), "robust")


def first_broken_by(runs: Iterable[tuple[pd.DataFrame, Sequence[str]]]) -> dict[str, int]:
    """How many examples each attack on F was the first to break, over runs of one suite: rows, attacks in their order.

    What a later run broke counts where no run before it did. Of an example that an attack has broken, no attack that
    comes later and skips it is known to fail.
    """
    seen = np.empty(0, dtype=np.int64)
    found: dict[str, int] = {}
    for verdicts, attacks in runs:
        lost = _broken(verdicts)
        idx, by = verdicts["idx"].to_numpy()[lost], verdicts["attack"][lost]
        for attack in attacks:
            own = np.setdiff1d(idx[(by == attack).to_numpy(dtype=bool)], seen)
            found[attack] = found.get(attack, 0) + len(own)
            seen = np.concatenate([seen, own])
    return {attack: count for attack, count in found.items() if count}


def unique_kills(verdicts: pd.DataFrame, attacks: Iterable[str]) -> dict[str, int] | None:
    """How many examples each of the `attacks` on F broke and no other did; those without any are left out.

    None where one of them has not met every example that F gets right: it might have broken it as well.
    """
    whole, (number, idx) = _is(verdicts, "target", "F"), numbered(verdicts["idx"].to_numpy())
    right = np.zeros(len(idx), dtype=bool)
    right[number[whole & _is(verdicts, "attack", "clean") & verdicts["clean_correct"].to_numpy()]] = True
    for attack in attacks:
        missed = right.copy()
        missed[number[whole & _is(verdicts, "attack", attack)]] = False
        if missed.any():
            return None
    pairs = verdicts.loc[_broken(verdicts), ["idx", "attack"]].drop_duplicates()
    alone = pairs[~pairs["idx"].duplicated(keep=False)]
    return {str(attack): int(count) for attack, count in alone["attack"].astype("str").value_counts(sort=False).items()}


def broken(verdicts: pd.DataFrame) -> pd.DataFrame:
    """The rows in which an attack on F has broken an example that F gets right."""
    return verdicts[_broken(verdicts)]


def _broken(verdicts: pd.DataFrame) -> NDArray[np.bool_]:
    attacked = _is(verdicts, "target", "F") & ~_is(verdicts, "attack", "clean") & verdicts["clean_correct"].to_numpy()
    return attacked & ~verdicts["robust"].to_numpy() & _is(verdicts, "status", "ok")


def accuracy_after(verdicts: pd.DataFrame, attacks: Iterable[str] | None = None) -> dict[str, float]:
    """The fraction that is robust after each attack on F and all before it, `clean` first.

    `attacks` is the order they ran in; without it, the order of their first rows. An example without a row for an
    attack keeps its state, so an attack that found all examples broken changes nothing.
    """
    whole = _is(verdicts, "target", "F")
    number, idx = numbered(verdicts["idx"].to_numpy()[whole])
    lost, ran = ~verdicts["robust"].to_numpy(), verdicts["attack"]
    robust, after = np.ones(len(idx), dtype=bool), dict[str, float]()
    for name in dict.fromkeys(["clean", *(ran[whole].unique() if attacks is None else attacks)]):
        robust[number[(lost & _is(verdicts, "attack", name))[whole]]] = False
        after[name] = float(robust.mean())
    return after


def component_rates(verdicts: pd.DataFrame) -> dict[str, "pd.Series[bool]"]:
    """What the rows of suite `components` tell, each as one truth value per example, indexed by idx.

    RA-E-fixed, RA-E-any, RA-R and `route-flip rate` (whether the route was changed), `RA-R <gate>` of each gate inside
    a network, then `<part> SA` and `<part> RA` of each part. What the rows have no attack for is not there.
    """
    found: dict[str, pd.Series[bool]] = {}
    whole = _is(verdicts, "target", "F")
    names = [str(name) for name in verdicts.loc[whole, "attack"].unique()]
    for label, kind in {"RA-E-fixed": "expert-fixed", "RA-E-any": "expert-any", "RA-R": "route"}.items():
        if own := [name for name in names if name.partition(":")[0] == kind]:
            rows = whole & verdicts["attack"].isin(own).to_numpy(dtype=bool)
            found[label] = all_by_example(verdicts, rows, "robust")
    if "route" in names:
        route = verdicts[whole & _is(verdicts, "attack", "route")].set_index("idx")
        if (route["clean_expert"] >= 0).any():  # -1: the model does not show its routes
            found["route-flip rate"] = (route["clean_expert"] != route["adv_expert"]) & (route["status"] == "ok")
    for name in names:
        if name.startswith("route:"):
            rows = whole & _is(verdicts, "attack", name)
            found[f"RA-R {name.removeprefix('route:')}"] = all_by_example(verdicts, rows, "robust")
    for part in verdicts.loc[~whole, "target"].unique():
        rows = _is(verdicts, "target", str(part))
        found[f"{part} SA"] = all_by_example(verdicts, rows, "clean_correct")
        found[f"{part} RA"] = all_by_example(verdicts, rows, "robust")
    return found

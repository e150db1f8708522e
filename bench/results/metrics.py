"""What is computed from verdict rows: accuracies, their intervals, and tests of a difference. Never imports torch.

Verdict rows have the columns of `bench.results.schema.VERDICT_COLUMNS`. Truth values of examples (n,) are in the order
of their idx. Accuracies are fractions in [0, 1].
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.results.table import Table, Text, firsts

#: The standard normal's 97.5 % quantile.
_Z = 1.959963984540054
#: Up to so many coins, binomial coefficients are whole numbers.
_EXACT = 1000


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
    """P(Bin(n, ½) ≥ least) to nine digits, from the largest term on; to import scipy's takes long."""
    if 2 * least <= n:
        return 1.0 - _tail(n - least + 1, n)
    total, term = 0.0, _chance(least, n)
    while term > 1e-17 * total:
        total += term
        term *= (n - least) / (least + 1)
        least += 1
    return total


def _chance(successes: int, n: int) -> float:
    """P(Bin(n, ½) = successes); of many, whose whole numbers take long, by logarithms."""
    if n <= _EXACT:
        return math.comb(n, successes) / 2**n
    ways = math.lgamma(n + 1) - math.lgamma(successes + 1) - math.lgamma(n - successes + 1)
    return math.exp(ways - n * math.log(2))


def sign_flip(changes: NDArray[np.int64]) -> float:
    """Exact one-sided test that changes (n,) sum to more than 0: the share of all sign patterns with no smaller a sum.

    One change an example, over all runs that it is in: +1 for each run that lost it, −1 for each that gained it. Runs
    on the same images are not independent, but under the null hypothesis the sign of an example's sum is a fair coin.
    Where each change is −1, 0 or 1 it is McNemar's test (Fisher, Design of Experiments 1935, §21).
    """
    sizes, counts = np.unique(np.abs(changes[changes != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    if len(sizes) == 1:
        positive = int((changes > 0).sum())
        return _tail(positive, int(counts[0]))
    from scipy.signal import fftconvolve
    from scipy.stats import binom

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


def all_by_example(verdicts: Table, rows: NDArray[np.bool_], column: str) -> NDArray[np.bool_]:
    """Whether `column` holds in all of the chosen rows (m,) of an example, of those that have one."""
    number, idx = verdicts.examples
    there, every = np.zeros(len(idx), dtype=bool), np.ones(len(idx), dtype=bool)
    there[number[rows]] = True
    every[number[rows & ~verdicts[column]]] = False
    return every[there]


def clean_by_example(verdicts: Table) -> NDArray[np.bool_]:
    """Whether the unattacked image is classified correctly (n,)."""
    return all_by_example(verdicts, verdicts.are("attack", "clean"), "clean_correct")


def robust_by_example(verdicts: Table) -> NDArray[np.bool_]:
    """Whether an example is robust against every attack on F in the rows (n,).

    The clean row is one of them, so what is misclassified without an attack is not robust. The rows may come from
    several runs: the mean is then RA-worst, which is at most the smallest of the runs' averages.
    """
    return all_by_example(verdicts, verdicts.are("target", "F"), "robust")


def first_broken_by(runs: Iterable[tuple[Table, Sequence[str]]]) -> dict[str, int]:
    """How many examples each attack on F was the first to break, over runs of one suite on the same examples.

    runs: rows, and the attacks in the order they ran. What a later run broke counts where no run before it did. Of an
    example that an attack has broken, no attack that comes later and skips it is known to fail.
    """
    seen: NDArray[np.bool_] | None = None
    found: dict[str, int] = {}
    for verdicts, attacks in runs:
        lost, (number, idx) = broken(verdicts), verdicts.examples
        seen = np.zeros(len(idx), dtype=bool) if seen is None else seen
        for attack in attacks:
            before = int(seen.sum())
            seen[number[lost & verdicts.are("attack", attack)]] = True
            found[attack] = found.get(attack, 0) + int(seen.sum()) - before
    return {attack: count for attack, count in found.items() if count}


def unique_kills(verdicts: Table, attacks: Iterable[str]) -> dict[str, int] | None:
    """How many examples each of the `attacks` on F broke and no other did; those without any are left out.

    None where one of them has not met every example that F gets right: it might have broken it as well.
    """
    whole, (number, idx) = verdicts.are("target", "F"), verdicts.examples
    right = np.zeros(len(idx), dtype=bool)
    right[number[whole & verdicts.are("attack", "clean") & verdicts["clean_correct"]]] = True
    for attack in attacks:
        missed = right.copy()
        missed[number[whole & verdicts.are("attack", attack)]] = False
        if missed.any():
            return None
    lost, text = np.flatnonzero(broken(verdicts)), verdicts.texts["attack"]
    # a row for each example and attack that broke it
    pairs = lost[firsts(number[lost] * len(text.values) + text.codes[lost])]
    alone = pairs[np.bincount(number[pairs], minlength=len(idx))[number[pairs]] == 1]
    kills = Text(text.values, text.codes[alone])
    counts = kills.counts()
    return {attack: counts[attack] for attack in kills.distinct()}


def broken(verdicts: Table) -> NDArray[np.bool_]:
    """Of each row whether an attack on F has broken an example in it that F gets right."""
    attacked = verdicts.are("target", "F") & ~verdicts.are("attack", "clean") & verdicts["clean_correct"]
    return attacked & ~verdicts["robust"] & verdicts.are("status", "ok")


def accuracy_after(verdicts: Table, attacks: Iterable[str] | None = None) -> dict[str, float]:
    """The fraction that is robust after each attack on F and all before it, `clean` first.

    `attacks` is the order they ran in; without it, the order of their first rows. An example without a row for an
    attack keeps its state, so an attack that found all examples broken changes nothing.
    """
    own = verdicts.where(verdicts.are("target", "F"))
    number, idx = own.examples
    lost, ran = ~own["robust"], own.texts["attack"]
    robust, after = np.ones(len(idx), dtype=bool), dict[str, float]()
    for name in dict.fromkeys(["clean", *(ran.distinct() if attacks is None else attacks)]):
        robust[number[lost & ran.are([name])]] = False
        after[name] = float(robust.mean())
    return after


def component_rates(verdicts: Table) -> dict[str, NDArray[np.bool_]]:
    """What the rows of suite `components` tell, each as one truth value per example that has such a row.

    RA-E-fixed, RA-E-any, RA-R and `route-flip rate` (whether the route was changed), `RA-R <gate>` of each gate inside
    a network, then `<part> SA` and `<part> RA` of each part. What the rows have no attack for is not there.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    whole = verdicts.are("target", "F")
    own, parts = verdicts.where(whole), verdicts.where(~whole)
    names = own.texts["attack"].distinct()
    for label, kind in {"RA-E-fixed": "expert-fixed", "RA-E-any": "expert-any", "RA-R": "route"}.items():
        if attacks := [name for name in names if name.partition(":")[0] == kind]:
            found[label] = all_by_example(own, own.are("attack", *attacks), "robust")
    if "route" in names:
        route = own.where(own.are("attack", "route"))
        if (route["clean_expert"] >= 0).any():  # -1: the model does not show its routes
            found["route-flip rate"] = (route["clean_expert"] != route["adv_expert"]) & route.are("status", "ok")
    for name in names:
        if name.startswith("route:"):
            rows = own.are("attack", name)
            found[f"RA-R {name.removeprefix('route:')}"] = all_by_example(own, rows, "robust")
    for part in parts.texts["target"].distinct():
        rows = parts.are("target", part)
        found[f"{part} SA"] = all_by_example(parts, rows, "clean_correct")
        found[f"{part} RA"] = all_by_example(parts, rows, "robust")
    return found

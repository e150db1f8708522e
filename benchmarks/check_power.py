"""How often `bench check` fails where nothing changed, and how often it finds a real drop in one run of many.

python benchmarks/check_power.py [CHECKS]     # by default 400 simulated checks a row

Every run has n examples, half of them robust. Between two evaluations an example changes with probability `noise` in
each direction, as it does where an attack draws otherwise. In the run that got worse more examples are lost, as many as
the drop. A check compares the robust accuracies of all runs of one suite, and clean accuracies, in which nothing
changes.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng

from bench.boards.check import Change, Report, compared
from bench.results.metrics import wilson
from bench.spec import ModelInfo, RunSpec, ThreatModel

THREAT = ThreatModel(norm="Linf", eps=0.2)


def change(draw: Generator, number: int, n: int, measure: Any, lost: float, gained: float) -> Change:
    """One run of n examples before and after; lost and gained are shares of all examples."""
    half = np.arange(n) % 2 == 0 if measure == "robust" else np.ones(n, dtype=bool)
    share = np.where(half, lost, gained) / half.mean() if measure == "robust" else np.where(half, lost, 0.0)
    flipped = draw.random(n) < share
    spec = RunSpec(
        model=f"m{number}", dataset="digits", threat_model=THREAT, suite="pgd", suite_version=1, n_examples=n
    )
    info = ModelInfo(name=spec.model, architecture="cnn", checkpoint_sha256=f"{number:064x}")
    side: Any = SimpleNamespace(spec=spec, model_info=info, run="run")
    return Change(spec.model, "pgd", "pgd", measure, np.arange(n), half, half ^ flipped, side, side)


def failures(
    draw: Generator, checks: int, runs: int, n: int, noise: float, drop: float, max_drop: float
) -> tuple[int, int]:
    """How many of the checks fail by default, and with --strict, if one of the runs falls by `drop`."""
    plain = strict = 0
    for _ in range(checks):
        changes = []
        for number in range(runs):
            worse = drop if number == 0 else 0.0
            changes += [
                change(draw, number, n, "robust", noise + worse, noise),
                change(draw, number, n, "clean_correct", 0.0, 0.0),
            ]
        rows = compared(changes, max_drop, 0.05)
        plain += Report(rows, [], [], 0.05, max_drop, False).failed
        strict += Report(rows, [], [], 0.05, max_drop, True).failed
    return plain, strict


def main() -> None:
    """Print a row for each number of runs, examples and share of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="?", type=int, default=400)
    parser.add_argument("--drop", type=float, default=0.03, help="of the run that got worse, a fraction")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.005, 0.02])
    given = parser.parse_args()
    draw = default_rng(0)

    def cell(count: int) -> str:
        low, high = wilson(count, given.checks)
        return f"{100 * count / given.checks:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    print("| runs | n | noise | no change: fails | with `--strict` | one run drops: fails | with `--strict` |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for runs in (1, 10, 40):
        for n in (500, 1000):
            for noise in given.noise:
                counts = [
                    count
                    for drop in (0.0, given.drop)
                    for count in failures(draw, given.checks, runs, n, noise, drop, given.max_drop)
                ]
                print(f"| {runs} | {n:,} | {100 * noise:g} % | {' | '.join(map(cell, counts))} |", flush=True)


if __name__ == "__main__":
    main()

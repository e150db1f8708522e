"""How long boards of many large runs take, and how much memory: the runs are made, not attacked.

    python benchmarks/boards.py [RUNS] [EXAMPLES] [FOLDER]
    python benchmarks/boards.py --committed

Four suites on each made model, with rows as an attack leaves them: an attack has one for each example that is right and
not yet broken. Each command runs in a process of its own, whose CPU seconds and peak memory are shown. FOLDER keeps the
runs for the next time. --committed: what reads the committed results instead, and lists; the fastest of five calls by
CPU seconds, of the report the faster of two.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from bench.results.schema import VERDICT_COLUMNS, Result
from bench.results.store import RunFolder, run_folder
from bench.spec import ModelInfo, RunSpec, ThreatModel

#: By suite its version and its attacks, each with the share of what is left that it breaks.
SUITES = {
    "clean": (1, {}),
    "pgd": (1, {"pgd": 0.45}),
    "autoattack": (2, {"apgd-ce": 0.48, "apgd-t": 0.04, "fab-t": 0.0, "square": 0.0}),
    "adaptive": (3, {"paths": 0.55, "deployed": 0.0, "targeted": 0.01, "averaged": 0.0, "square-paths": 0.0}),
}
THREAT = ThreatModel(norm="Linf", eps=8 / 255)


def rows_of(attacks: dict[str, float], n: int, rng: np.random.Generator) -> pd.DataFrame:
    idx, label, expert = np.arange(n), rng.integers(10, size=n), rng.integers(4, size=n)
    correct = rng.random(n) < 0.85
    frames, left = [], correct.copy()
    for attack in ("clean", *attacks):
        met = np.ones(n, dtype=bool) if attack == "clean" else left.copy()
        broken = met & left & (rng.random(n) < attacks.get(attack, 0.0))
        left &= ~broken
        rows = idx[met]
        distance = np.where(broken[met], THREAT.eps, 0.0)
        frames.append(
            pd.DataFrame({
                "idx": rows, "input_hash": [f"{i:016x}" for i in rows], "label": label[met], "attack": attack,
                "target": "F", "clean_pred": label[met], "adv_pred": (label[met] + broken[met]) % 10,
                "clean_correct": correct[met], "robust": left[met], "linf": distance,
                "l2": distance * rng.uniform(20, 55, size=len(rows)), "clean_expert": expert[met],
                "adv_expert": expert[met], "status": "ok",
            })
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True).astype(VERDICT_COLUMNS)


def make(root: Path, runs: int, n: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(runs):
        suite, (version, attacks) = list(SUITES.items())[number % len(SUITES)]
        name = f"made-{number // len(SUITES)}"
        rows = rows_of(attacks, n, rng)
        spec = RunSpec(
            model=name, dataset="cifar10", threat_model=THREAT, suite=suite, suite_version=version, n_examples=n
        )
        info = ModelInfo(name=name, architecture="resnet10", num_experts=4, checkpoint_sha256=f"{number // 4:064x}")
        result = Result.from_rows(
            spec, info, "f" * 64, rows, list(attacks), environment={}, git_hash=None, seconds=1.0, finished="2030-01-01"
        )
        RunFolder(run_folder(root, spec, result.run)).finish(result, rows)


def measured(*words: str | Path) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak GB of a command."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, words
    return used.ru_utime + used.ru_stime, time.perf_counter() - started, used.ru_maxrss / 2**20


def committed() -> None:
    print("| command | CPU s | wall s | peak GB |\n|---|---:|---:|---:|")
    with TemporaryDirectory() as scratch:
        reading: list[list[str]] = [
            ["leaderboard", "--out", f"{scratch}/boards"],
            ["check", "--baseline", "results"],
            ["report", "--out", f"{scratch}/report"],
        ]
        for words in [*reading, *(["list", what] for what in ("variants", "suites", "datasets", "objectives"))]:
            calls = [measured(*words) for _ in range(2 if words[0] == "report" else 5)]
            cpu, wall, peak = min(calls)
            shown = " ".join(words)
            print(f"| `bench {shown.partition(' --out')[0]}` | {cpu:.2f} | {wall:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    if "--committed" in sys.argv:
        committed()
        return
    runs, n = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (1000, 10000)
    with TemporaryDirectory() as scratch:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(scratch) / "results"
        if not folder.exists():
            make(folder, runs, n)
        print(f"{runs} runs × {n:,} examples\n\n| command | CPU s | wall s | peak GB |\n|---|---:|---:|---:|")
        for words in (["leaderboard", "--out", Path(scratch) / "boards"], ["check", "--baseline", folder]):
            cpu, wall, peak = measured(*words, "--results", folder)
            print(f"| `bench {words[0]}` | {cpu:.1f} | {wall:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()

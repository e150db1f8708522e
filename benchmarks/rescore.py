"""Do rows of the committed boards come out again? Ten are picked at random, and scored anew from the zoo.

python benchmarks/rescore.py FOLDER [--rows 10] [--seed 0] [--data-root DIR]

Every run on a row's own images is made again with its spec, into FOLDER, where a stopped run goes on. A verdict is that
of an image under a run: robust, or not. Another device rounds otherwise, so there an image near a decision may change.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

from bench.boards.leaderboard import Stored, boards_of
from bench.boards.rows import Row
from bench.results.metrics import robust_by_example
from bench.results.schema import suite_label
from bench.results.store import Run, read_run, run_folder

ROOT = Path(__file__).parents[1]
#: What tells one row of verdicts from another, and what it says.
SAID = ["idx", "attack", "target", "adv_pred", "robust"]


def again(run: Run, folder: Path, data_root: Path) -> Run:
    """The same run, made here."""
    spec = run.result.spec
    words = ["run", "--suite", spec.suite, "--dataset", spec.dataset, "--model", spec.model]
    words += [
        "--n-examples",
        str(spec.n_examples),
        "--norm",
        spec.threat_model.norm,
        "--eps",
        repr(spec.threat_model.eps),
    ]
    words += ["--seed", str(spec.seed), "--batch-size", str(spec.batch_size)]
    words += ["--alpha", str(spec.alpha)] if spec.alpha is not None else []
    words += [word for key, value in spec.suite_params.items() for word in ("--set", f"{key}={value}")]
    words += ["--results", str(folder), "--data-root", str(data_root), "--checkpoints", str(folder / "none")]
    subprocess.run([sys.executable, "-m", "bench", *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return read_run(run_folder(folder, spec, run.result.run))


def compared(row: Row, folder: Path, data_root: Path) -> list[dict[str, object]]:
    found = []
    for run in row.runs:
        if run.result.fingerprint != row.result.fingerprint or run.result.spec.warm_start:
            continue  # of a larger set, which counts in this row
        new = again(run, folder, data_root)
        before, after = (robust_by_example(one.rows()) for one in (run, new))
        rows = [set(map(tuple, one.verdicts()[SAID].itertuples(index=False))) for one in (run, new)]
        found.append({
            "data set": f"{run.result.spec.dataset} {run.result.spec.threat_model}",
            "model": row.spec.model if row.spec.alpha is None else f"{row.spec.model}, α {row.spec.alpha:g}",
            "suite": suite_label(run.result.spec),
            "made on": run.result.environment["device"],
            "images": len(before),
            "other verdict": int((before != after).sum()),
            "robust": f"{before.sum()} → {after.sum()}",
            "other rows": f"{len(rows[0] ^ rows[1]) // 2} of {len(rows[0])}",
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    args = parser.parse_args()
    every = [row for board in boards_of(Stored.read(ROOT / "results")) for row in board.rows]
    picked = random.Random(args.seed).sample(every, args.rows)
    found = []
    for row in picked:
        found += compared(row, args.folder, args.data_root)
        print(tabulate(found, headers="keys", tablefmt="pipe", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()

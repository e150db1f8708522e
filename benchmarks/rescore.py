"""Do rows of the committed boards come out again? Ten are picked at random, and scored anew from the zoo.

python benchmarks/rescore.py FOLDER [--rows 10] [--seed 0] [--data-root DIR]

Every run on a row's own images is made again with its spec, into FOLDER, where a stopped run goes on. A verdict is that
of an image under a run: robust, or not. Another device rounds otherwise, so there an image near a decision may change.
"""

import argparse
import random
import shlex
import subprocess
from pathlib import Path

from tabulate import tabulate

from bench.boards.leaderboard import Stored, boards_of
from bench.boards.rows import Row
from bench.models.checkpoints import ZOO, checkpoint_path
from bench.results.metrics import robust_by_example
from bench.results.schema import suite_label
from bench.results.store import Run, read_run, run_folder

ROOT = Path(__file__).parents[1]
#: What tells one row of verdicts from another, and what it says.
SAID = ["idx", "attack", "target", "adv_pred", "robust"]


def again(run: Run, folder: Path, data_root: Path) -> Run:
    """The same run, made here."""
    spec = run.result.spec
    command = spec.command(folder, data_root=data_root, checkpoints=folder / "none")
    subprocess.run([*shlex.split(command), "--quiet"], check=True, stdout=subprocess.DEVNULL)
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
    every = [
        row
        for board in boards_of(Stored.read(ROOT / "results"))
        for row in board.rows
        if checkpoint_path(ZOO, row.spec.dataset, row.spec.threat_model.norm, row.spec.model).is_file()
    ]
    picked = random.Random(args.seed).sample(every, args.rows)
    found = []
    for row in picked:
        found += compared(row, args.folder, args.data_root)
        print(tabulate(found, headers="keys", tablefmt="pipe", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()

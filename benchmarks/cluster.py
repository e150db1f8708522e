"""How close two Ray workers come to half of what one takes, on the blocks of a board, beside blocks dealt by number.

    OMP_NUM_THREADS=1 python benchmarks/cluster.py [N_EXAMPLES] [ROUNDS]

The shipped digits models under pgd, autoattack and adaptive (small budget), in blocks of 16 images: a block that is
broken at once takes a fraction of a second, a robust one a hundred times as long. Every figure is from the seconds of
one run's own blocks. Total: from the first block's start to the last one's end. Ideal: the sum of all seconds, halved.
By number: what torchrun's dealing would take for blocks of just these seconds, its first process waiting at the end of
each run, as it does.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.cluster import Blocks, on_ray
from bench.evaluation.evaluate import evaluate, run_of
from bench.evaluation.plan import RunRequest, plan
from bench.models.checkpoints import ZOO
from bench.suites.base import Suite

MODELS = ("dense-standard", "moe-standard", "dense-at", "moe-at", "moe-rt_er-argmax", "dual-jtdmoe")
SUITES = ("pgd", "autoattack", "adaptive")


class Timed(Blocks[Suite]):
    """Blocks of which each leaves a line: model, run, block, seconds since 1970 at its start and its end."""

    def do(self, what: tuple[str, int, int], device: str, again: bool) -> None:
        started = time.time()
        super().do(what, device, again)
        with (self.results / f"times-{os.getpid()}").open("a") as file:
            print(*what, started, time.time(), file=file)


Block = tuple[tuple[str, int], int, float, float]  # run, number, start, end


def dealt(blocks: Iterable[Block], runs: list[tuple[str, int]], first: dict[tuple[str, int], int]) -> float:
    """Seconds until two processes are done with these blocks, if each takes every other one of each run."""
    shares: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for run, number, start, end in blocks:
        shares[run][(number + first[run]) % 2] += end - start
    one = other = 0.0
    for run in runs:
        other += shares[run][1]
        one = max(one + shares[run][0], other)
    return one


def measured(n: int) -> tuple[list[Block], float]:
    """One round's blocks, and what they take if dealt by number."""
    with TemporaryDirectory() as folder:
        results = Path(folder)
        settings: dict[str, Any] = {"budget": "small"}
        request = RunRequest(
            suites=SUITES, named=False, dataset="digits", models=MODELS, n_examples=n, batch_size=16, settings=settings
        )
        asked = plan(request, Path("data"), [ZOO], results)
        on_ray("ray", Timed(asked, results, run_of, evaluate), "cpu", lambda _: None)
        blocks = []
        for file in results.glob("times-*"):
            for line in file.read_text().splitlines():
                model, run, number, start, end = line.split()
                blocks.append(((model, int(run)), int(number), float(start), float(end)))
        keys = {
            (model, number): int(run_of(results, job).path.name, 16) % 2
            for model in MODELS
            for number, job in enumerate(asked.jobs(model))
        }
        return blocks, dealt(blocks, list(keys), keys)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 96
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    os.environ.setdefault("RAY_worker_niceness", "0")
    print("| blocks | seconds of a block, least – most | total, s | over the ideal | by number, over the ideal |")
    print("|---:|---:|---:|---:|---:|")
    for _ in range(rounds):
        blocks, by_number = measured(n)
        seconds = [end - start for _, _, start, end in blocks]
        total = max(end for *_, end in blocks) - min(start for *_, start, _ in blocks)
        ideal = sum(seconds) / 2
        print(
            f"| {len(blocks)} | {min(seconds):.2f} – {max(seconds):.1f} | {total:.1f} | {total / ideal:.2f} |"
            f" {by_number / ideal:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

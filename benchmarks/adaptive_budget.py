"""Suite `adaptive` of two trees of this code on shipped models: robust accuracy, forwards and seconds.

OMP_NUM_THREADS=1 python benchmarks/adaptive_budget.py --old ../base --new . --n 200

Each tree runs in processes of its own, with its own shipped weights; the trees take turns, model by model, so that what
slows the machine slows both. Forwards are examples that went through the model or a part of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

MODELS = (
    "moe-standard", "moe-at", "moe-trades", "moe-advmoe", "moe-rt_er", "moe-rt_er-argmax", "dual", "dual-jtdmoe",
)  # fmt: skip


def measure(tree: Path, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """The `result.json` of suite `adaptive` by the code in `tree`, as plain JSON: neither tree reads the other's."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", "--suite", "adaptive", "--dataset", args.dataset, "--model", model, "--n-examples", str(args.n)]
        words += ["--set", f"budget={args.budget}", "--results", "results", "--device", "cpu"]
        words += ["--data-root", str(args.data_root.resolve())]
        done = subprocess.run(
            [sys.executable, "-m", "bench", *words],
            cwd=folder,  # so that no checkpoints but the shipped ones are found
            env={**os.environ, "PYTHONPATH": str(tree.resolve())},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{tree}: bench {' '.join(words)}\n{done.stderr}")
        (file,) = Path(folder, "results").rglob("result.json")
        return json.loads(file.read_text(encoding="utf-8"))


def forwards(result: dict[str, Any]) -> int:
    return sum(counts["forwards"] for counts in result["passes"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, required=True)
    parser.add_argument("--model", action="append")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--budget", default="standard")
    args = parser.parse_args()
    table = []
    for model in args.model or MODELS:
        old, new = (measure(tree, model, args) for tree in (args.old, args.new))
        versions = [result["spec"]["suite_version"] for result in (old, new)]
        ra = [f"{result['robust_accuracy']['value']:.2%}" for result in (old, new)]
        cost, seconds = [forwards(old), forwards(new)], [old["seconds"], new["seconds"]]
        table.append({
            "model": model, "n": args.n, "version": f"{versions[0]} → {versions[1]}", "RA": f"{ra[0]} → {ra[1]}",
            "forwards": f"{cost[0]:,} → {cost[1]:,}", "new / old": f"{cost[1] / max(cost[0], 1):.2f}",
            "seconds": f"{seconds[0]:.0f} → {seconds[1]:.0f}",
        })  # fmt: skip
        print(tabulate(table[-1:], headers="keys", tablefmt="pipe"), file=sys.stderr)
    print(tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()

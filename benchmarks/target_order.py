"""In which order should the wrong classes be attacked: by logit, as before, or by MALT's linearised distance?

python benchmarks/target_order.py DATASET MODEL … [--data-root DIR] [--n-examples N]

For each shipped model the attack `targeted` is made on the images that it has right, class by class in either order,
from the same starts. The table has the robust accuracy that is left after so many classes, percent, and the forward
passes an image.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bench import load_model
from bench.attacks.block import Block, PassCounter
from bench.attacks.deployed import nearest, targeted
from bench.attacks.search import Search
from bench.datasets.base import open_dataset
from bench.models.deployed import eval_frozen, full_float32

STEPS, SHOWN = 100, (1, 2, 4, 9)


def by_logit(search: Search, count: int) -> Tensor:
    """The first `count` wrong classes (B, T), the highest logit first."""
    block = search.block
    with torch.no_grad():
        logits = block.model(block.x)
    return logits.scatter(1, block.y[:, None], -torch.inf).topk(count, 1).indices


def main() -> None:
    """Print two rows for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--n-examples", type=int, default=200)
    given = parser.parse_args()
    dataset = open_dataset(given.dataset)
    images = dataset.evaluation_set(given.data_root, given.n_examples)
    print(f"| model | order | clean | {' | '.join(f'T = {t}' for t in SHOWN)} | forwards at T = {SHOWN[-1]} |")
    print(f"|---|---|---:|{'---:|' * (len(SHOWN) + 1)}")
    for name in given.models:
        model = load_model(name, given.dataset)
        with eval_frozen(model), full_float32(), PassCounter(model) as passes:
            with torch.no_grad():
                correct = model(images.x).argmax(1) == images.y
            for title, order in (("MALT", nearest), ("logit", by_logit)):
                block = Block(
                    model, images.x, images.y, correct, dataset.num_classes, given.dataset,
                    dataset.threat_model, 0, passes,
                )  # fmt: skip
                search = Search(block)
                passes.lap()
                targets, left = order(search, SHOWN[-1]), {}
                for number, column in enumerate(targets.T, start=1):
                    torch.manual_seed(number)
                    targeted(search, column[:, None], STEPS)
                    left[number] = 100 * search.unbroken.float().mean().item()
                forwards = passes.lap()[0] / len(images.y)
                shown = " | ".join(f"{left[t]:.1f}" for t in SHOWN)
                print(
                    f"| `{name}` | {title} | {100 * correct.float().mean().item():.1f} | {shown} | {forwards:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

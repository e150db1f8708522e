"""Attacks on a dual by its branches: each alone, transferred to the whole, and both reweighed.

Axes: m = rows that are attacked, C = classes.
"""

from typing import Any

from torch import Tensor

from bench.attacks.search import Search, halved, margin


def transfer(search: Search, branch: str, steps: int) -> None:
    """PGD on one branch (`standard` or `robust`), then on F from where that ended."""
    block, dual = search.block, _dual(search)
    part = getattr(dual, branch)
    sizes = halved(block.threat_model.eps, steps)
    rows = search.rows
    search.climb(lambda z, rows: margin(part(z), block.y[rows]), search.uniform(), sizes, rows)
    search.climb(lambda z, rows: margin(block.model(z), block.y[rows]), search.x_adv.clone(), sizes, rows)


def reweighed(search: Search, weight: float, steps: int) -> None:
    """PGD on (1 − w) log p_S + w log p_R, whatever α is, as MORA (Yu and Gao 2022) reweighs an ensemble's members."""
    block, dual = search.block, _dual(search)

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        mixed = (1 - weight) * dual.standard(z).log_softmax(1) + weight * dual.robust(z).log_softmax(1)
        return margin(mixed, block.y[rows])

    search.climb(loss, search.uniform(), halved(block.threat_model.eps, steps), search.rows)


def _dual(search: Search) -> Any:
    return search.block.model

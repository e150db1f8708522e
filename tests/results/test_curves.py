"""Certificates as curves, by hand."""

import numpy as np
import pandas as pd
import pytest

from bench.results.curves import last_radius, shares, sizes

RADII, RIGHT = [0.1, 0.3, 0.3, 0.0, np.inf], [True, True, False, True, True]


def rows(method: str, eps: float = 0.2, status: str = "certified") -> pd.DataFrame:
    reachable = [1 + (radius <= eps) for radius in RADII]
    own = {"idx": range(5), "method": method, "eps": eps, "radius": RADII, "correct": RIGHT, "reachable": reachable}
    return pd.DataFrame({**own, "status": status})


def test_the_share_at_each_radius():
    unread = rows("routes-ball", status="not_supported")
    found = shares(pd.concat([rows("smoothing"), rows("routes"), rows("union"), unread]))
    assert set(found) == {"smoothing", "routes"}  # of bounds there is one radius
    # a wrong class never counts, an example without a radius does not even at 0
    x, y = found["smoothing"]
    assert x.tolist() == [0, 0.1, 0.3]
    assert y.tolist() == pytest.approx([3 / 5, 2 / 5, 1 / 5])
    x, y = found["routes"]
    assert x.tolist() == [0, 0.1, 0.3, 0.3]
    assert y.tolist() == pytest.approx([4 / 5, 3 / 5, 2 / 5, 1 / 5])


def test_sizes_at_each_eps():
    found = sizes(pd.concat([rows("routes", 0.05), rows("routes"), rows("union")]))
    assert found.to_dict("index") == {0.05: {1: 0.8, 2: 0.2}, 0.2: {1: 0.6, 2: 0.4}}


def test_a_figure_ends_behind_the_last_step_and_one_of_routes_at_twice_eps():
    lines = shares(rows("routes"))
    assert last_radius(lines, 0.2, False) == 0.3
    assert last_radius(lines, 0.1, True) == 0.2
    assert last_radius({}, 0.1, True) == 0.1

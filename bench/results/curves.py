"""Certificates as curves: what share of images still counts at which radius. No torch."""

from collections.abc import Mapping
from math import isfinite

import numpy as np
import pandas as pd

from bench.results.certificates import ANSWERED, ROUTES, SMOOTHED


def shares(rows: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By method, the share of images (≥ 2,) that still count at each radius, as a step curve from radius 0.

    A route counts at all radii below its own; a class as well, where it is right. A method with one ε is a point, and
    one that could not be applied has no share.
    """
    found = {}
    for method, own in rows.groupby("method", sort=False):
        first = own.drop_duplicates("idx")
        if method in (*ROUTES[:2], *SMOOTHED) and own["status"].isin(ANSWERED).all():
            counts = first["radius"].notna() & (first["correct"] | first["method"].isin(ROUTES)) & (first["radius"] > 0)
            radii = np.sort(first.loc[counts, "radius"].to_numpy())
            finite = radii[np.isfinite(radii)]
            x = np.concatenate([[0.0], finite])
            found[str(method)] = (x, (len(radii) - np.arange(len(x))) / len(first))
    return found


def sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of images with each |S(ε)| (columns) at each ε (index) that the route's radius was asked for at."""
    own = rows[(rows["method"] == ROUTES[0]) & (rows["reachable"] >= 0)]
    return pd.crosstab(own["eps"], own["reachable"], normalize="index")


def last_radius(lines: Mapping[str, tuple[np.ndarray, np.ndarray]], eps: float, of_routes: bool) -> float:
    """Where a figure of `shares` ends: behind the last step; of routes at most at twice ε, where it is still of use."""
    right = max([eps, *(end for x, _ in lines.values() if len(x) > 1 and isfinite(end := float(x[-1])))])
    return min(right, 2 * eps) if of_routes else right

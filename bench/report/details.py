"""What the runs and certificates of one model tell example by example, as the numbers that figures draw. No torch.

Shares are fractions in [0, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.boards.leaderboard import Stored, boards_of
from bench.boards.rows import Board, Row, grouped
from bench.results.certificates import ROUTES, SMOOTHED, Certificates, model_key
from bench.results.metrics import accuracy_after, broken
from bench.results.schema import suite_label
from bench.results.store import Run
from bench.results.table import Table

#: The suite that is called PGD in the chain certified ≤ true ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA.
PGD = "pgd"


@dataclass(frozen=True)
class Model:
    """A row of a board, with the verdict rows and certificates behind it."""

    board: Board
    row: Row
    verdicts: Mapping[Path, Table]  # of each of the row's runs, those of the row's examples
    certificates: tuple[Certificates, ...]  # of this model on these examples, in any ball
    in_balls: tuple[Row, ...]  # this model on these examples in all balls of this norm, by ε
    history: pd.DataFrame | None = None  # the epochs of its training, where they lie beside its checkpoint

    @property
    def key(self) -> str:
        """Whose row it is, whatever the images and the ball."""
        return model_key(self.row.spec, self.row.info)


def boards_with_models(
    stored: Stored, histories: Mapping[str, pd.DataFrame] | None = None
) -> list[tuple[Board, list[Model]]]:
    """The boards of what is stored, each with its models in the order of its rows.

    `histories` are trainings by their checkpoint's SHA-256. UnusableInput as for boards.
    """
    made = boards_of(stored)
    in_balls = grouped((row for board in made for row in board.rows), _in_any_ball)
    found = []
    for board in made:
        models = []
        for row in board.rows:
            key = model_key(row.spec, row.info)
            own = [one for one in stored.certificates if one.result.model_key == key]
            models.append(
                Model(
                    board,
                    row,
                    {run.path: _of_row(run, row) for run in row.runs},
                    tuple(one for one in own if one.result.fingerprint == row.result.fingerprint),
                    tuple(sorted(in_balls[_in_any_ball(row)], key=lambda one: one.spec.threat_model.eps)),
                    (histories or {}).get(row.info.checkpoint_sha256),
                )
            )
        found.append((board, models))
    return found


def _in_any_ball(row: Row) -> tuple[str, ...]:
    spec = row.spec
    return model_key(spec, row.info), spec.dataset, spec.threat_model.norm, row.result.fingerprint


def _of_row(run: Run, row: Row) -> Table:
    rows = run.rows()
    return rows.where(np.isin(rows["idx"], row.idx))


@dataclass(frozen=True)
class Step:
    """One attack of a suite: the share not yet broken before and after it, and how many examples it broke.

    `alone`: those that no other attack of any suite broke, where that is known.
    """

    suite: str
    attack: str
    before: float
    after: float
    broke: int
    alone: int | None


def waterfall(model: Model) -> list[Step]:
    """The attacks on F of each suite in its newest version and with its lowest seed, the suite that breaks least first.

    Each suite begins with all examples.
    """
    suites = []
    for label, runs in grouped(model.row.runs, lambda run: suite_label(run.result.spec)).items():
        run = min(runs, key=lambda run: (-run.result.spec.suite_version, run.result.spec.seed))
        if run.result.attacked:
            attacks = list(run.result.accuracy_after)
            after = accuracy_after(model.verdicts[run.path], attacks)
            alone = model.row.unique_kills
            steps = [
                Step(
                    label,
                    attack,
                    after[before],
                    after[attack],
                    round((after[before] - after[attack]) * model.row.n),
                    None if alone is None else alone.get(f"{label}/{attack}", 0),
                )
                for before, attack in pairwise(attacks)
            ]
            suites.append(steps)
    return [step for steps in sorted(suites, key=lambda steps: (-steps[-1].after, steps[0].suite)) for step in steps]


@dataclass(frozen=True)
class Flow:
    """Of the examples that a suite broke, how many went from which clean to which attacked expert: counts (E, E)."""

    suite: str
    counts: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Broken examples."""
        return int(self.counts.sum())

    @property
    def moved(self) -> int:
        """Those whose expert changed."""
        return self.total - int(self.counts.trace())


def flow(model: Model) -> Flow | None:
    """Of the suite that broke most, by the attack that broke each example first; None where no route is visible."""
    found: list[tuple[int, str, pd.DataFrame]] = []
    for run in model.row.runs:
        order = {attack: at for at, attack in enumerate(run.result.accuracy_after)}
        verdicts = model.verdicts[run.path]
        rows = verdicts.where(broken(verdicts)).frame()
        rows = rows.assign(order=rows["attack"].map(order)).sort_values(["order", "idx"]).drop_duplicates("idx")
        rows = rows[(rows["clean_expert"] >= 0) & (rows["adv_expert"] >= 0)]
        if len(rows):
            found.append((-len(rows), suite_label(run.result.spec), rows))
    if not found:
        return None
    _, suite, rows = min(found, key=lambda one: one[:2])
    counts = np.zeros((_experts(model, rows),) * 2, dtype=np.int64)
    np.add.at(counts, (rows["clean_expert"].to_numpy(), rows["adv_expert"].to_numpy()), 1)
    return Flow(suite, counts)


def _experts(model: Model, rows: pd.DataFrame) -> int:
    return max(model.row.info.num_experts or 0, 1 + int(rows[["clean_expert", "adv_expert"]].to_numpy().max()))


def by_expert(model: Model) -> pd.DataFrame | None:
    """For each expert, by whom the clean image is routed to: `images`, `load`, `SA` and `RA-worst` (where attacked).

    None where no route is visible.
    """
    clean = _clean(model)
    clean = clean[clean["clean_expert"] >= 0]
    if not len(clean):
        return None
    table = _rates(model, clean, "clean_expert").reindex(range(_experts(model, clean)))
    table["images"] = table["images"].fillna(0).astype(int)
    table.insert(1, "load", table["images"] / table["images"].sum())
    return table


def by_class(model: Model) -> pd.DataFrame:
    """For each class of the label: `images`, `SA` and `RA-worst` (where attacked)."""
    return _rates(model, _clean(model), "label")


def _clean(model: Model) -> pd.DataFrame:
    rows = model.verdicts[model.row.runs[0].path]
    return rows.where(rows.are("attack", "clean") & rows.are("target", "F")).frame()


def _rates(model: Model, clean: pd.DataFrame, by: str) -> pd.DataFrame:
    right = clean.set_index("idx")["clean_correct"]
    of = {"images": right | True, "SA": right}
    if model.row.worst is not None:
        of["RA-worst"] = pd.Series(model.row.robust, index=model.row.idx).reindex(right.index)
    grouped_by = pd.DataFrame(of).groupby(clean.set_index("idx")[by])
    rates = grouped_by.mean()
    rates["images"] = grouped_by.size()
    return rates


def chain(row: Row) -> dict[str, float]:
    """certified ≤ RA-worst ≤ AutoAttack ≤ PGD ≤ SA, of these what is known."""
    known = {
        "certified": row.certified.accuracy,
        "RA-worst": None if row.worst is None else row.worst.value,
        "AutoAttack": None if row.scores.ra is None else row.scores.ra.value,
        "PGD": row.scores.under.get(PGD),
        "SA": row.scores.clean.value,
    }
    return {label: share for label, share in known.items() if share is not None}


def by_label(chains: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, list[tuple[float, float]]]:
    """For each label of the chains, which lie at these values of something, its points."""
    labels = dict.fromkeys(label for _, known in chains for label in known)
    return {label: [(x, known[label]) for x, known in chains if label in known] for label in labels}


def by_eps(model: Model) -> dict[str, list[tuple[float, float]]]:
    """The chain at each ε where the model was run; nothing where there is one ε alone."""
    if len({row.spec.threat_model.eps for row in model.in_balls}) < 2:
        return {}
    lines = by_label([(row.spec.threat_model.eps, chain(row)) for row in model.in_balls])
    # in a ball of radius 0 all are the clean accuracy
    return {label: [(0.0, model.row.scores.clean.value), *line] for label, line in lines.items() if label != "SA"}


def sweeps(table: Sequence[Row]) -> dict[str, list[Row]]:
    """The duals of a table that were run at several α, each in the order of α."""
    duals = grouped(
        (row for row in table if row.alpha is not None),
        lambda row: (row.spec.model, row.combine, row.info.checkpoint_sha256),
    )
    return {
        f"{model} ({combine})" if sum(other[0] == model for other in duals) > 1 else model: sorted(
            rows, key=lambda row: row.alpha or 0
        )
        for (model, combine, _), rows in duals.items()
        if len({row.alpha for row in rows}) > 1
    }


def certificate_of(model: Model, kind: str) -> list[Certificates]:
    """Of its routes, in the ball's norm and the one of the nearest ε first; or of the smoothed model, by σ."""
    threat = model.row.spec.threat_model
    methods = ROUTES if kind == "routes" else SMOOTHED
    own = [one for one in model.certificates if set(one.result.certified) & set(methods)]
    if kind == "routes":
        own = [one for one in own if one.result.spec.threat_model.norm == threat.norm]
        return sorted(own, key=lambda one: (abs(one.result.spec.threat_model.eps - threat.eps), str(one.path)))
    return sorted(own, key=lambda one: (float(one.result.params["sigma"]), str(one.path)))

"""Certificates as the store keeps them, beside the runs of suites; and what contradicts them. Never imports torch.

A folder `<dataset>/<norm>-<eps>/certify-<method>-v<N>/<model>/<run>/` has `certificates.parquet`, one row for each
(example, method, ε), `result.json`, `table.md` and `curve.svg`.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field

from bench.results.schema import Accuracy
from bench.results.store import CERTIFICATES, Folder, Run, finished_folders, read_result
from bench.spec import ModelInfo, RunSpec, Spec, ThreatModel

#: The columns of `certificates.parquet` and their pandas types.
CERTIFICATE_COLUMNS: dict[str, str] = {
    "idx": "int64",
    "input_hash": "str",  # of the clean image, 16 hex digits, as in verdict rows
    "label": "int64",
    "method": "str",
    "norm": "str",
    "eps": "float64",  # the radius that `status` is about, in pixels of [0, 1]
    "status": "str",
    "radius": "float64",  # strictly inside it nothing changes; of a deterministic class certificate ε; NaN: unknown
    "predicted": "int64",  # the class that is certified, the expert of a route; -1 where there is none
    "correct": "bool",  # predicted is the label; of a route, that the model is right on the clean image
    "reachable": "int64",  # |S(ε)|, how many experts the ball can lead to, at most; -1 where nobody asked
    "reason": "str",  # of a status that is none of the method's own, such as a layer's name; or what is assumed
}
STATUSES = ("certified", "not_certified", "abstain", "not_applicable", "not_supported")
#: Those of a method that could be applied: only then there is a share of certified rows.
ANSWERED = STATUSES[:3]
#: What is certified: that the route stays, with the box and without, and by a linear program; …
ROUTES = ("routes", "routes-ball", "routes-lp")
#: … that F's class stays, at every point of the ball; …
DETERMINISTIC = ("network", "union", "route-stable", "soft")
#: … that the class of the smoothed model stays, but for the failure probability; its mere prediction is no certificate.
SMOOTHED = ("smoothing", "smoothing-dual", "smoothing-dual-tight")
#: Shown, and never certified.
OTHERS = ("paper-formula", "smoothing-predict")
#: The first versions that are believed; what an older one certified may be untrue.
BELIEVED = {"certify-routes": 3, "certify-bounds": 3, "certify-smoothing": 2}
METHODS = (*ROUTES, *DETERMINISTIC, *SMOOTHED, *OTHERS)


class Certification(Spec):
    """A finished certification. Accuracies are fractions in [0, 1], at the spec's ε."""

    kind: Literal["certificate"] = "certificate"
    schema_version: Literal[1] = 1
    spec: RunSpec
    model_info: ModelInfo
    fingerprint: str
    run: str
    clean_accuracy: Accuracy = Field(description="of F; of the smoothed model see `certified`")
    params: dict[str, Any] = Field(description="the method's, defaults included")
    certified: dict[str, Accuracy] = Field(
        description="by method that could be applied: of a route, the share that keeps it; of a class, the share "
        "certified and right; smoothing-predict: the share that the smoothed model gets right"
    )
    statuses: dict[str, dict[str, int]] = Field(description="by method: rows of each status")
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    data_note: str = ""
    environment: dict[str, str]
    git_hash: str | None
    seconds: float
    finished: str = Field(description="UTC, ISO 8601")

    @classmethod
    def from_rows(
        cls, spec: RunSpec, info: ModelInfo, fingerprint: str, clean: Accuracy, rows: pd.DataFrame, **provenance: Any
    ) -> Self:
        """The result that the rows amount to; ValueError for rows of another number of examples than the spec's."""
        known = {"spec": spec, "model_info": info, "fingerprint": fingerprint, "clean_accuracy": clean}
        return cls(**known, **_derived(spec, info, fingerprint, rows), **provenance)

    @property
    def model_key(self) -> str:
        """Who was certified, whatever the ball: certificates of one norm hold for attacks of another."""
        return model_key(self.spec, self.model_info)


def model_key(spec: RunSpec, info: ModelInfo) -> str:
    """Who was scored: name (a baseline shares its model's file), checkpoint, α and combine."""
    return repr((spec.model, info.checkpoint_sha256, spec.alpha, spec.combine))


def _derived(spec: RunSpec, info: ModelInfo, fingerprint: str, rows: pd.DataFrame) -> dict[str, Any]:
    if rows["idx"].nunique() != spec.n_examples:
        raise ValueError(f"there are rows of {rows['idx'].nunique()} examples, not of {spec.n_examples}")
    asked = rows[rows["eps"] == spec.threat_model.eps]
    certified, statuses = {}, {}
    for method, own in asked.groupby("method", sort=False):
        if own["status"].isin(ANSWERED).all():
            certified[str(method)] = Accuracy.of(succeeded(own))
        counts = own["status"].value_counts()
        statuses[str(method)] = {status: int(counts[status]) for status in STATUSES if status in counts}
    return {
        "run": spec.run_key(info.checkpoint_sha256, fingerprint),
        "certified": certified,
        "statuses": statuses,
        "reasons": tuple(dict.fromkeys(reason for reason in rows["reason"] if reason)),
    }


def succeeded(rows: pd.DataFrame) -> "pd.Series[bool]":
    """What counts of each row: a route that is certified; a class that is certified and right; a right prediction."""
    certified = rows["status"] == "certified"
    predicted = (rows["method"] == "smoothing-predict") & (rows["predicted"] >= 0)
    return (certified & (rows["correct"] | rows["method"].isin(ROUTES))) | (predicted & rows["correct"])


def check_certificates(rows: pd.DataFrame, /) -> None:
    """ValueError, saying which rule, for rows that no certification can have."""
    types = {str(column): str(dtype) for column, dtype in rows.dtypes.items()}
    if list(types.items()) != list(CERTIFICATE_COLUMNS.items()):
        wrong = sorted(set(types.items()) ^ set(CERTIFICATE_COLUMNS.items()))
        raise ValueError(f"columns or their types are not the certificates': {wrong or 'another order'}")
    if not len(rows) or rows.duplicated(["idx", "method", "eps"]).any():
        raise ValueError("an example has several rows of one method and ε, or there is none")
    for column, known in (("status", STATUSES), ("method", METHODS)):
        if not rows[column].isin(known).all():
            raise ValueError(f"{column} is none of {', '.join(known)} in a row")
    certified = rows[rows["status"] == "certified"]
    if certified["method"].isin(OTHERS).any():
        raise ValueError(f"a row of {' or '.join(OTHERS)} is certified, which they never are")
    if not (certified["radius"] >= certified["eps"]).all() or (certified["predicted"] < 0).any():
        raise ValueError("a certified row has a radius below its ε, or predicts nothing")


class CertificateFolder(Folder[Certification]):
    """The folder of one certification."""

    file = CERTIFICATES
    check = staticmethod(check_certificates)

    @staticmethod
    def fit(result: Certification, rows: pd.DataFrame) -> None:
        follows = _derived(result.spec, result.model_info, result.fingerprint, rows)
        for name, value in follows.items():
            if (found := getattr(result, name)) != value:
                raise ValueError(f"the result says {name} {found}, its spec and rows give {value}")

    def read(self) -> Certification:
        result = read_result(self.path, Certification)
        self.rows(result)
        return result


@dataclass(frozen=True)
class Certificates:
    """A finished certification and its rows."""

    result: Certification
    path: Path
    rows: pd.DataFrame


def read_certificates(root: Path) -> list[Certificates]:
    """Every finished certification below `root` of a version that is believed, sorted by path.

    UnusableInput for files that do not fit.
    """
    found = []
    for path in finished_folders(root):
        if (path / CERTIFICATES).exists():
            folder = CertificateFolder(path)
            result = read_result(path, Certification)
            if result.spec.suite_version >= BELIEVED.get(result.spec.suite, 1):
                found.append(Certificates(result, path, folder.rows(result)))
    return found


@dataclass(frozen=True)
class CertifiedShares:
    """What is certified of a subject on one evaluation set, as fractions; None where nobody asked."""

    accuracy: float | None = None
    route_stable: float | None = None
    smoothed: tuple[tuple[str, float], ...] = ()  # of each run: method, σ and radius in words, and the share


def certified_shares(
    certificates: Iterable[Certificates], spec: RunSpec, info: ModelInfo, fingerprint: str
) -> CertifiedShares:
    """What the certificates of this subject on this evaluation set amount to, inside the spec's ball.

    accuracy: in the ball's norm, at no less than its ε, by whichever deterministic method does best on each example.
    route_stable: the share whose route stays, there as well. smoothed: of the smoothed model, at the L2 radius of each
    of its runs.
    """
    threat, subject = spec.threat_model, model_key(spec, info)
    mine = [one for one in certificates if one.result.model_key == subject and one.result.fingerprint == fingerprint]
    shares: dict[str, float] = {}
    rows = pd.concat([one.rows for one in mine]) if mine else pd.DataFrame(columns=list(CERTIFICATE_COLUMNS))
    here = rows[(rows["norm"] == threat.norm) & rows["status"].isin(ANSWERED)]
    for name, methods, reach in (
        ("accuracy", DETERMINISTIC, threat.eps),
        ("route_stable", ROUTES[:1], threat.reach),
    ):
        own = here[here["method"].isin(methods)]
        firm = (own["radius"] >= reach) & (own["correct"] | own["method"].isin(ROUTES))
        # a radius that was asked for at a smaller ε alone does not hold for this one, unless it is larger
        if len(own) and (name == "route_stable" or (own["eps"] >= threat.eps).any()):
            shares[name] = float(firm.groupby(own["idx"]).any().mean())
    smoothed = tuple(
        (
            f"{method.replace('smoothing', 'smoothed')}, σ {one.result.params['sigma']:g}, "
            f"{one.result.spec.threat_model}",
            share.value,
        )
        for one in mine
        for method, share in one.result.certified.items()
        if method in SMOOTHED
    )
    return CertifiedShares(**shares, smoothed=smoothed)


@dataclass(frozen=True)
class Conflict:
    """A certificate and a prediction inside its radius that is not what it certifies; both as they are stored."""

    certificate: dict[Hashable, Any]
    witness: dict[Hashable, Any]
    certification: str
    run: str

    def __str__(self) -> str:
        pairs = ((self.certification, self.certificate), (self.run, self.witness))
        return "\n".join(
            f"{where}: {', '.join(f'{key}={value}' for key, value in row.items())}" for where, row in pairs
        )


def conflicts(runs: Iterable[Run], certificates: Iterable[Certificates]) -> list[Conflict]:
    """Where a deterministic certificate and a verdict row of one model contradict each other: one of them is wrong.

    The same model is the same checkpoint, α and combine. A row contradicts where it is of the same image, lies within
    the radius in the certificate's norm, and F's class (of a route certificate, the first expert) is another. A verdict
    has its L∞ and L2 distance; its L1 distance is at most the ε of an L1 run. Its answer has to be known to lie in
    [0, 1], but for `routes-ball`, which needs no box.
    """
    of_model: dict[str, list[pd.DataFrame]] = {}
    for one in certificates:
        of_model.setdefault(one.result.model_key, []).append(_firm(one))
    by_model = {model: pd.concat(firm, ignore_index=True) for model, firm in of_model.items()}
    found = []
    for run in runs:
        firm = by_model.get(model_key(run.result.spec, run.result.model_info))
        if firm is not None and len(firm):
            verdicts = run.verdicts()
            seen = verdicts[(verdicts["target"] == "F") & (verdicts["status"] == "ok")]
            threat = run.result.spec.threat_model
            # torchattacks has attacks that know no ε, whose answers may lie anywhere: a broken one is known to be legal
            broken = seen["clean_correct"] & ~seen["robust"]
            boxed = (seen["linf"] == 0) | broken | (not run.result.spec.suite.startswith("torchattacks"))
            seen = seen.assign(l1=threat.eps if threat.norm == "L1" else np.nan, boxed=boxed)
            found += _contradicted(run, seen, firm)
    return found


def _firm(one: Certificates) -> pd.DataFrame:
    """What is certified for sure, of each image and method at the largest ε.

    Further columns: within, how far a prediction may be for the certificate to hold of it; distance, in which of a
    verdict's columns; where the certificate lies.
    """
    norm = one.result.spec.threat_model.norm
    firm = one.rows[(one.rows["status"] == "certified") & one.rows["method"].isin((*ROUTES, *DETERMINISTIC))]
    firm = firm.sort_values("eps").drop_duplicates(["idx", "method"], keep="last")
    # a class is certified up to the tolerance of the ball; a route's radius is the exact one
    reach = firm["eps"].map({eps: ThreatModel(norm=norm, eps=eps).reach for eps in firm["eps"].unique()})
    within = firm["radius"].where(firm["method"].isin(ROUTES), reach)
    return firm.assign(within=within, distance=norm.lower(), path=str(one.path))


def _contradicted(run: Run, seen: pd.DataFrame, firm: pd.DataFrame) -> list[Conflict]:
    answers = seen[["idx", "input_hash", "adv_pred", "adv_expert", "linf", "l2", "l1", "boxed"]]
    numbered = answers.reset_index(drop=True).reset_index(names="verdict")
    pairs = firm.reset_index(drop=True).merge(numbered, on=["idx", "input_hash"])
    route = pairs["method"].isin(ROUTES)
    answer = pairs["adv_pred"].where(~route, pairs["adv_expert"])
    pairs = pairs[(answer != pairs["predicted"]) & (~route | (answer >= 0))]
    legal = pairs["boxed"] | (pairs["method"] == "routes-ball")
    far = pd.Series(np.nan, index=pairs.index)
    for column in ("linf", "l2", "l1"):
        far = far.where(pairs["distance"] != column, pairs[column])
    wrong = pairs[legal & (far <= pairs["within"])]
    stored, columns = seen.drop(columns=["l1", "boxed"]), list(CERTIFICATE_COLUMNS)
    return [
        Conflict(row[columns].to_dict(), stored.iloc[int(row["verdict"])].to_dict(), row["path"], str(run.path))
        for _, row in wrong.iterrows()
    ]

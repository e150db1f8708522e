"""Certificates as the store keeps them, beside the runs of suites; and what contradicts them. Never imports torch.

A folder `<dataset>/<norm>-<eps>/certify-<method>-v<N>/<model>/<run>/` has `certificates.parquet`, one row for each
(example, method, ε), `result.json`, `table.md` and `curve.svg`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bench.results.schema import Accuracy
from bench.results.store import CERTIFICATES, Folder, Run, finished_folders, read_result
from bench.results.table import Table, firsts
from bench.spec import ModelInfo, RunSpec, Spec, ThreatModel

if TYPE_CHECKING:
    import pandas as pd

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
#: With which probability a smoothed model's certificate may be wrong, where nothing else is asked for.
FAILURE_PROBABILITY = 0.001


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
        cls, spec: RunSpec, info: ModelInfo, fingerprint: str, clean: Accuracy, rows: "pd.DataFrame", **provenance: Any
    ) -> Self:
        """The result that the rows amount to; ValueError for rows of another number of examples than the spec's."""
        known = {"spec": spec, "model_info": info, "fingerprint": fingerprint, "clean_accuracy": clean}
        return cls(**known, **_derived(spec, info, fingerprint, Table.of(rows)), **provenance)

    @property
    def model_key(self) -> str:
        """Who was certified, whatever the ball: certificates of one norm hold for attacks of another."""
        return model_key(self.spec, self.model_info)


def model_key(spec: RunSpec, info: ModelInfo) -> str:
    """Who was scored: name (a baseline shares its model's file), checkpoint, α and combine."""
    return repr((spec.model, info.checkpoint_sha256, spec.alpha, spec.combine))


def _derived(spec: RunSpec, info: ModelInfo, fingerprint: str, rows: Table) -> dict[str, Any]:
    if (n := len(rows.examples[1])) != spec.n_examples:
        raise ValueError(f"there are rows of {n} examples, not of {spec.n_examples}")
    asked = rows.where(rows["eps"] == spec.threat_model.eps)
    certified, statuses = {}, {}
    for method in asked.texts["method"].distinct():
        own = asked.where(asked.are("method", method))
        counts = own.texts["status"].counts()
        if set(counts) <= set(ANSWERED):
            certified[method] = Accuracy.of(succeeded(own))
        statuses[method] = {status: counts[status] for status in STATUSES if status in counts}
    return {
        "run": spec.run_key(info.checkpoint_sha256, fingerprint),
        "certified": certified,
        "statuses": statuses,
        "reasons": tuple(reason for reason in rows.texts["reason"].distinct() if reason),
    }


def succeeded(rows: Table) -> NDArray[np.bool_]:
    """What counts of each row: a route that is certified; a class that is certified and right; a right prediction."""
    predicted = rows.are("method", "smoothing-predict") & (rows["predicted"] >= 0)
    routes = rows.are("method", *ROUTES)
    return (rows.are("status", "certified") & (rows["correct"] | routes)) | (predicted & rows["correct"])


def check_certificates(rows: Table, /) -> None:
    """ValueError, saying which rule, for rows that no certification can have."""
    if list(rows.types.items()) != list(CERTIFICATE_COLUMNS.items()):
        wrong = sorted(set(rows.types.items()) ^ set(CERTIFICATE_COLUMNS.items()))
        raise ValueError(f"columns or their types are not the certificates': {wrong or 'another order'}")
    if gaps := rows.gaps:
        raise ValueError(f"{', '.join(gaps)} is missing in a row")
    (example, idx), method = rows.examples, rows.texts["method"]
    eps = np.searchsorted(np.sort(rows["eps"]), rows["eps"])  # a number for each value
    if not len(rows) or len(firsts((eps * len(method.values) + method.codes) * len(idx) + example)) < len(rows):
        raise ValueError("an example has several rows of one method and ε, or there is none")
    for column, known in (("status", STATUSES), ("method", METHODS)):
        if not rows.are(column, *known).all():
            raise ValueError(f"{column} is none of {', '.join(known)} in a row")
    certified = rows.where(rows.are("status", "certified"))
    if certified.are("method", *OTHERS).any():
        raise ValueError(f"a row of {' or '.join(OTHERS)} is certified, which they never are")
    if not (certified["radius"] >= certified["eps"]).all() or (certified["predicted"] < 0).any():
        raise ValueError("a certified row has a radius below its ε, or predicts nothing")
    _ = rows.hashes  # one for each example


class CertificateFolder(Folder[Certification]):
    """The folder of one certification."""

    file, columns = CERTIFICATES, CERTIFICATE_COLUMNS
    check = staticmethod(check_certificates)

    @staticmethod
    def fit(result: Certification, rows: Table) -> None:
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
    rows: Table


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
    answered = [one.rows.where(one.rows.are("norm", threat.norm) & one.rows.are("status", *ANSWERED)) for one in mine]
    for name, methods, reach in (
        ("accuracy", DETERMINISTIC, threat.eps),
        ("route_stable", ROUTES[:1], threat.reach),
    ):
        here = [rows.where(rows.are("method", *methods)) for rows in answered]
        if not any(map(len, here)):
            continue
        own = Table.joined(here, ["idx", "eps", "method", "radius", "correct"])
        # a radius that was asked for at a smaller ε alone does not hold for this one, unless it is larger
        if name == "route_stable" or (own["eps"] >= threat.eps).any():
            number, idx = own.examples
            firm = np.zeros(len(idx), dtype=bool)
            firm[number[(own["radius"] >= reach) & (own["correct"] | own.are("method", *ROUTES))]] = True
            shares[name] = float(firm.mean())
    smoothed = tuple(
        (
            f"{method.replace('smoothing', 'smoothed')}, σ {one.result.params['sigma']:g}, "
            f"{one.result.spec.threat_model}{_may_fail(one.result.params)}",
            share.value,
        )
        for one in mine
        for method, share in one.result.certified.items()
        if method in SMOOTHED
    )
    return CertifiedShares(**shares, smoothed=smoothed)


def _may_fail(params: Mapping[str, Any]) -> str:
    """The failure probability of a smoothed model's certificates, where it is not the usual one."""
    chance = float(params.get("failure_probability", FAILURE_PROBABILITY))
    return "" if chance == FAILURE_PROBABILITY else f", wrong with probability {chance:g}"


@dataclass(frozen=True)
class Conflict:
    """A certificate and a prediction inside its radius that is not what it certifies; both as they are stored."""

    certificate: dict[str, Any]
    witness: dict[str, Any]
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
    of_model: dict[str, list[_Firm]] = defaultdict(list)
    for one in certificates:
        if len((firm := _firm(one)).rows):
            of_model[one.result.model_key].append(firm)
    found = []
    for run in runs:
        if own := of_model.get(model_key(run.result.spec, run.result.model_info)):
            answers = _answers(run)
            found += [conflict for firm in own for conflict in _contradicted(answers, firm)]
    return found


@dataclass(frozen=True)
class _Firm:
    """What one certification certifies for sure, of each image and method at the largest ε.

    within (m,): how far a prediction may be, in this norm, for the certificate to hold of it.
    """

    rows: Table
    within: NDArray[np.float64]
    norm: str
    path: str


@dataclass(frozen=True)
class _Answers:
    """What F predicts in a run, by ascending idx.

    distances: by norm, where they are known. boxed (m,): the image that was predicted is known to lie in [0, 1].
    """

    rows: Table
    distances: Mapping[str, NDArray[np.float64]]
    boxed: NDArray[np.bool_]
    path: str


def _firm(one: Certificates) -> _Firm:
    threat = one.result.spec.threat_model
    firm = one.rows.where(one.rows.are("status", "certified") & one.rows.are("method", *ROUTES, *DETERMINISTIC))
    firm = firm.where(np.argsort(-firm["eps"], kind="stable"))
    pairs = firm.examples[0] * len(firm.texts["method"].values) + firm.texts["method"].codes
    firm = firm.where(firsts(pairs))
    # a class is certified up to the tolerance of the ball; a route's radius is the exact one
    reach = {eps: ThreatModel(norm=threat.norm, eps=eps).reach for eps in set(firm["eps"].tolist())}
    within = np.where(firm.are("method", *ROUTES), firm["radius"], [reach[eps] for eps in firm["eps"].tolist()])
    return _Firm(firm, within, threat.norm, str(one.path))


def _answers(run: Run) -> _Answers:
    rows, threat = run.rows(), run.result.spec.threat_model
    rows = rows.where(rows.are("target", "F") & rows.are("status", "ok"))
    rows = rows.where(np.argsort(rows["idx"], kind="stable"))
    # torchattacks has attacks that know no ε, whose answers may lie anywhere: a broken one is known to be legal
    broken = rows["clean_correct"] & ~rows["robust"]
    boxed = (rows["linf"] == 0) | broken | (not run.result.spec.suite.startswith("torchattacks"))
    distances = {"Linf": rows["linf"], "L2": rows["l2"]}
    if threat.norm == "L1":
        distances["L1"] = np.full(len(rows), threat.eps)
    return _Answers(rows, distances, boxed, str(run.path))


def _contradicted(answers: _Answers, firm: _Firm) -> list[Conflict]:
    if firm.norm not in answers.distances:
        return []
    # each certificate with each answer for its image: all combinations of equal idx
    first, end = (np.searchsorted(answers.rows["idx"], firm.rows["idx"], side) for side in ("left", "right"))
    of = np.repeat(np.arange(len(firm.rows)), end - first)
    to = np.arange(len(of)) - np.repeat(np.cumsum(end - first) - end, end - first)
    route, predicted = firm.rows.are("method", *ROUTES)[of], firm.rows["predicted"][of]
    answer = np.where(route, answers.rows["adv_expert"][to], answers.rows["adv_pred"][to])
    legal = answers.boxed[to] | firm.rows.are("method", "routes-ball")[of]
    far = answers.distances[firm.norm][to]
    wrong = (answer != predicted) & (~route | (answer >= 0)) & legal & (far <= firm.within[of])
    pairs = zip(of[wrong], to[wrong], strict=True)
    return [
        Conflict(firm.rows.row(certificate), answers.rows.row(witness), firm.path, answers.path)
        for certificate, witness in pairs
        if firm.rows.texts["input_hash"][certificate] == answers.rows.texts["input_hash"][witness]
    ]

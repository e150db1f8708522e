"""Small finished runs and certifications, written as the commands write them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.results.certificates import CERTIFICATE_COLUMNS, CertificateFolder, Certification
from bench.results.schema import VERDICT_COLUMNS, Accuracy, Result
from bench.results.store import RunFolder, run_folder
from bench.results.witnesses import Witnesses
from bench.spec import ModelInfo, RunSpec, ThreatModel

N = 8
MOE: dict[str, Any] = {"num_experts": 2, "num_selected_experts": 1, "gate": "argmax", "objective": "at"}
#: What was done when, by whom: the same for all.
PROVENANCE: dict[str, Any] = {
    "environment": {},
    "git_hash": "a" * 40,
    "seconds": 1.0,
    "finished": "2030-01-02T03:04:05",
}
#: By attack, the examples that it broke, and the expert to which each went.
Broken = Mapping[str, Mapping[int, int]]


def spec_of(model: str, suite: str, norm: Any = "Linf", eps: float = 0.2, version: int = 3, **fields: Any) -> RunSpec:
    threat = ThreatModel(norm=norm, eps=eps)
    given = {"model": model, "dataset": "digits", "threat_model": threat, "suite": suite, "suite_version": version}
    return RunSpec(**{**given, "n_examples": N, **fields})


def info_of(model: str, **info: Any) -> ModelInfo:
    return ModelInfo(**{"name": model, "architecture": "cnn", "checkpoint_sha256": "c" * 64, **info})


@pytest.fixture(scope="session")
def save_run() -> Callable[..., Path]:
    """save_run(results, "moe", "adaptive", {"paths": {0: 1, 1: 1}}, …): a run of eight examples, and its folder.

    Example i has the label i % 4 and goes to expert i % 2 of an MoE; the last one is wrong without an attack. An attack
    meets the examples that none before it in the suite has broken. `witnesses`: whether the images are kept; `failed`:
    whether an example that is not robust is so by an error. `number`: of the first image.
    """

    def save(
        results: Path,
        model: str,
        suite: str,
        broken: Broken | None = None,
        info: Mapping[str, Any] = MOE,
        flags: tuple[str, ...] = (),
        witnesses: bool = False,
        failed: bool = False,
        number: int = 0,
        **fields: Any,
    ) -> Path:
        routed = "num_experts" in info
        rows, standing, kept = [], set(range(N - 1)), []
        for attack, own in {"clean": {}, **(broken or {})}.items():
            for i in range(N) if attack == "clean" else sorted(standing):
                expert = i % 2 if routed else -1
                adv_expert = own.get(i, expert) if routed else -1
                hit = i == N - 1 or i in own
                pred = (i % 4 + 1) % 4 if hit else i % 4
                clean_pred = (i % 4 + 1) % 4 if i == N - 1 else i % 4
                distance = 0.0 if attack == "clean" else 0.1
                rows.append((
                    i, f"{number + i:016x}", i % 4, attack, "F", clean_pred, pred, i < N - 1, not hit, distance,
                    2 * distance, expert, adv_expert, "ok",
                ))  # fmt: skip
                kept += [(i, attack)] if hit and attack != "clean" else []
            standing -= own.keys()
        rows = [(*row[:-1], "error") if failed and row[3] != "clean" and not row[8] else row for row in rows]
        frame = pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)).astype(VERDICT_COLUMNS)
        spec = spec_of(model, suite, **fields)
        result = Result.from_rows(
            spec,
            info_of(model, **info),
            "e" * 64 if number else "f" * 64,
            frame,
            ["clean", *(broken or {})],
            flags=flags,
            **PROVENANCE,
        )
        folder = RunFolder(run_folder(results, spec, result.run))
        stored = None
        if witnesses and kept:
            x_adv = np.stack([np.full((1, 2, 2), 0.1 * idx, dtype=np.float32) for idx, _ in kept])
            stored = Witnesses(np.array([idx for idx, _ in kept]), tuple(attack for _, attack in kept), x_adv)
        folder.finish(result, frame, stored)
        return folder.path

    return save


@pytest.fixture(scope="session")
def certify_run() -> Callable[..., None]:
    """certify_run(results, "moe", "certify-routes", "routes", radii, …): a finished certification, a radius an example.

    `reachable` has |S(ε)| of each example.
    """

    def save(
        results: Path,
        model: str,
        suite: str,
        method: str,
        radii: list[float],
        reachable: list[int] | None = None,
        info: Mapping[str, Any] = MOE,
        params: Mapping[str, Any] | None = None,
        norm: Any = "Linf",
        eps: float = 0.2,
        **fields: Any,
    ) -> None:
        rows = pd.DataFrame({
            "idx": range(N),
            "input_hash": [f"{i:016x}" for i in range(N)],
            "label": [i % 4 for i in range(N)],
            "method": method,
            "norm": norm,
            "eps": eps,
            "status": ["certified" if radius >= eps else "not_certified" for radius in radii],
            "radius": radii,
            "predicted": [i % (2 if method == "routes" else 4) for i in range(N)],
            "correct": [i < N - 1 for i in range(N)],
            "reachable": reachable or [-1] * N,
            "reason": "",
        }).astype(CERTIFICATE_COLUMNS)  # fmt: skip
        spec = spec_of(model, suite, norm, eps, **fields)
        clean = Accuracy.of(np.arange(N) < N - 1)
        given = {"params": dict(params or {}), **PROVENANCE}
        result = Certification.from_rows(spec, info_of(model, **info), "f" * 64, clean, rows, **given)
        CertificateFolder(run_folder(results, spec, result.run)).finish(result, rows)

    return save


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, save_run: Any, certify_run: Any) -> Path:
    """A dense model, and an MoE that AutoAttack flatters, with certificates and kept images; a second ball."""
    root = tmp_path_factory.mktemp("results")
    dense = {"checkpoint_sha256": "d" * 64, "objective": "at"}
    save_run(root, "dense", "autoattack", {"apgd-ce": {0: 0}, "square": {}}, dense)
    save_run(root, "moe", "pgd", {"pgd": {0: 1}}, witnesses=True)
    save_run(root, "moe", "autoattack", {"apgd-ce": {0: 1, 1: 1}, "square": {2: 0}, "fab-t": {}}, flags=("a <sign>",))
    save_run(root, "moe", "adaptive", {"paths": {0: 1, 1: 0, 2: 0, 3: 1, 4: 1}}, witnesses=True)
    save_run(root, "moe", "pgd", {"pgd": {}}, eps=0.1)
    radii = [0.05, 0.06, 0.15, 0.25, 0.07, 0.35, 0.4, 0.45]
    certify_run(root, "moe", "certify-routes", "routes", radii, [2, 2, 2, 1, 2, 1, 1, 1])
    certify_run(root, "moe", "certify-bounds", "union", [0.2 if i == 6 else np.nan for i in range(N)])
    certify_run(root, "moe", "certify-smoothing", "smoothing", radii, params={"sigma": 0.25}, norm="L2", eps=0.25)
    return root

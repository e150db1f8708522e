"""RunSpec → certificates, block by block; a finished block is never computed again.

Axes: B = examples of a block.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bench.certify.base import Certifier, Examples
from bench.certify.report import curve, table
from bench.datasets.base import input_hash
from bench.environment import World, environment, git_hash
from bench.errors import UnusableInput, users_code
from bench.files import write_atomically, write_if_changed
from bench.job import IDENTITY_FILE, Job
from bench.models.deployed import eval_frozen, full_float32, predict, validate_outputs
from bench.models.foreign import settings_kept
from bench.models.parts import set_alpha
from bench.models.sites import sites
from bench.results.certificates import CERTIFICATE_COLUMNS, CertificateFolder, Certification
from bench.results.schema import Accuracy
from bench.results.store import run_folder

#: Called after each block with (blocks done, blocks in all, rows certified in the finished ones).
OnBlock = Callable[[int, int, int], None]


def certification_of(results: Path, job: Job[Certifier]) -> CertificateFolder:
    """The folder of the job's certificates below the results folder; `finished()` is the result, if there is one."""
    key = job.spec.run_key(job.subject.info.checkpoint_sha256, job.data.fingerprint)
    return CertificateFolder(run_folder(results, job.spec, key))


def certify(
    job: Job[Certifier],
    results: Path,
    device: str = "cpu",
    on_block: OnBlock = lambda *_: None,
    only: int | None = None,
) -> Certification | None:
    """Certify the job's subject by its method and store it; a certification that is finished is only read.

    `only`: the number of one block, which is certified and written, and nothing else is done; the result is then None.

    Raises:
        UnusableInput: the model cannot take the data's images, or gives another number of classes; or this is one of
            several processes.
    """
    if (processes := World.here().processes) > 1:
        raise UnusableInput(
            f"`bench certify` is one process's work, and there are {processes}: start it without torchrun"
        )
    spec, subject, data, num_classes = job.spec, job.subject, job.data, job.num_classes
    folder = certification_of(results, job)
    finished = folder.finished()
    if finished is not None:
        return finished
    if subject.identity:
        write_if_changed(folder.path / IDENTITY_FILE, subject.identity)
    model = subject.model.to(device)
    if spec.alpha is not None:
        set_alpha(subject.routed, spec.alpha)
    gates = tuple(dict.fromkeys(site.module for site in (*sites(model), *subject.sites) if not site.whole))
    done = {block.index: block for block in folder.read_blocks()}
    certified = {number: _certified(block.rows) for number, block in done.items()}
    for number, chosen in enumerate(job.blocks):
        if number not in done and only in (None, number):
            started = time.perf_counter()
            x, y = data.x[chosen].to(device), data.y[chosen]
            asked = users_code(f"'{spec.model}' fails in block {number}") if subject.foreign else nullcontext()
            with asked, settings_kept(), eval_frozen(model), full_float32(), torch.no_grad():
                if number == 0:
                    validate_outputs(model, x.clone(), num_classes, subject.info)
                clean = predict(model, x.clone(), False)
                predicted = torch.where(clean.finite, clean.classes, -1)
                examples = Examples(
                    model, x, y, data.idx[chosen], predicted, num_classes, spec.threat_model, spec.seed, gates
                )
                rows = _rows(job.method, examples)
            side = {"seconds": time.perf_counter() - started, "right": int((predicted == y).sum())}
            folder.write_block(number, rows, side)
            certified[number] = _certified(rows)
        on_block(len(certified), len(job.blocks), sum(certified.values()))
    if only is not None:
        return None
    return _finish(folder, job, device)


def _certified(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["status"] == "certified", "idx"].nunique())


def _rows(certifier: Certifier, block: Examples) -> pd.DataFrame:
    hashes = [input_hash(image) for image in block.x]
    frames = []
    for claim in certifier.certify(block):
        # an image on which F's logits are not finite has no class to be certified
        nothing = (block.predicted < 0).numpy()
        frames.append(
            pd.DataFrame({
                "idx": block.idx.numpy(),
                "input_hash": hashes,
                "label": block.y.numpy(),
                "method": claim.method,
                "norm": block.threat_model.norm,
                "eps": claim.eps,
                "status": np.where(nothing & (claim.status == "certified"), "not_certified", claim.status),
                "radius": claim.radius,
                "predicted": claim.predicted,
                "correct": claim.correct,
                "reachable": claim.reachable,
                "reason": claim.reason,
            })
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True).astype(CERTIFICATE_COLUMNS)


def _finish(folder: CertificateFolder, job: Job[Certifier], device: str) -> Certification:
    spec, subject, data = job.spec, job.subject, job.data
    blocks = folder.read_blocks()
    finished = folder.finished()  # by another process, which then has taken the blocks away
    if finished is not None:
        return finished
    rows = pd.concat([block.rows for block in blocks], ignore_index=True)
    right = sum(block.side["right"] for block in blocks)
    result = Certification.from_rows(
        spec,
        subject.info,
        data.fingerprint,
        Accuracy.of(np.arange(len(data)) < right),
        rows,
        params=job.method.model_dump(mode="json"),
        flags=tuple(sorted({*subject.flags, *([data.note] if data.note else [])})),
        data_note=data.note,
        environment=environment(device, torch.get_num_threads()),
        git_hash=git_hash(),
        seconds=round(sum(block.side["seconds"] for block in blocks), 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_atomically(folder.path / "table.md", table(result, rows).encode())
    write_atomically(folder.path / "curve.svg", curve(result, rows).encode())
    folder.finish(result, rows)
    return result

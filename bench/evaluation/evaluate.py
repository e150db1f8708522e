"""RunSpec → verdicts, attack block by attack block; a finished block is never computed again.

Axes: n = examples of the run, B = examples of a block.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bench.attacks.block import OnAttack
from bench.datasets.base import EvalSet, input_hash
from bench.environment import World, environment, git_hash
from bench.errors import UnusableInput, users_code
from bench.evaluation.examine import Examiner, guarded
from bench.evaluation.probes import PROBED
from bench.evaluation.report import BlockReport
from bench.files import write_if_changed
from bench.job import IDENTITY_FILE, Job, Subject
from bench.models.deployed import eval_frozen, full_float32
from bench.models.fit import fit
from bench.models.parts import is_dual, refuse_idle_alpha, set_alpha
from bench.models.sites import forced_inside
from bench.randomness import block_seed, seeded
from bench.results.flags import WARM_START
from bench.results.metrics import robust_by_example
from bench.results.schema import GateUse, Result
from bench.results.store import RunFolder, read_runs, run_folder
from bench.results.table import Table
from bench.results.witnesses import FILE, Witnesses
from bench.spec import RunSpec
from bench.suites.base import Suite

#: Seconds between two looks whether the other processes' blocks are there.
_POLL = 0.5
#: Seconds without a new block after which the others are taken to be dead: at least so many, and so many times the
#: slowest block of this run so far.
_PATIENCE, _PATIENCE_BLOCKS = 3600.0, 10.0

#: Seconds within which processes that belong together have started.
_STARTED_WITHIN = 300.0

#: Called at the start and after each block with (blocks done, by all processes; blocks in all; examples not yet broken
#: in those that are done).
OnBlock = Callable[[int, int, int], None]


def run_of(results: Path, job: Job[Suite]) -> RunFolder:
    """The folder of the job's run below the results folder; its `finished()` is the result, where there is one."""
    key = job.spec.run_key(job.subject.info.checkpoint_sha256, job.data.fingerprint)
    return RunFolder(run_folder(results, job.spec, key))


def evaluate(
    job: Job[Suite],
    results: Path,
    device: str = "cpu",
    on_block: OnBlock = lambda *_: None,
    known: Witnesses | None = None,
    on_attack: OnAttack = lambda *_: None,
    only: int | None = None,
) -> Result | None:
    """Score the job's subject by its suite and store the verdicts; a run that is already finished is only read.

    `known` are adversarial examples of this subject from earlier runs: they are tried before the suite attacks.
    Of several processes that torchrun has started, each attacks its share of the blocks, and goes on; the first waits
    for the others' and gives the result, which is None for them. `only`: the number of one block, which is attacked and
    written, and nothing else is done; the result is then None.

    Raises:
        UnusableInput: the model cannot take the data's images, gives another number of classes, or logits that are not
            finite on the first clean block; the results folder cannot be written; another process's block does not
            come.
    """
    spec, data = job.spec, job.data
    folder = run_of(results, job)
    finished = folder.finished()
    if finished is not None:
        return finished
    started = time.time()
    with torch.no_grad():  # α may be a parameter
        former = float(job.subject.routed.alpha) if is_dual(job.subject.routed) else spec.alpha
    if spec.alpha is not None:
        set_alpha(job.subject.routed, spec.alpha)
    model = guarded(job.subject).to(device)
    if job.fit and limited(device):
        failing = users_code(f"'{spec.model}' fails on a block of {len(data.x[job.blocks[0]])} images")
        with eval_frozen(model), full_float32(), seeded(0), failing:
            fit(model, data.x[job.blocks[0]].to(device), forced_inside(model))
    blocks = _Blocks(folder, len(job.blocks), on_block)
    with eval_frozen(model), full_float32(), seeded(0):
        looked_at = data.x[: max(PROBED, len(data.x[job.blocks[0]]))].to(device)
        if is_dual(model) and former is not None and former != spec.alpha:
            refuse_idle_alpha(model, looked_at[:PROBED], former)
        examiner = Examiner(job, model, known, looked_at, on_attack)
    if job.subject.identity:
        write_if_changed(folder.path / IDENTITY_FILE, job.subject.identity)
    blocks.look()
    world = World.here()
    first = int(folder.path.name, 16)  # not always the same process has the run with a block more
    for number, chosen in enumerate(job.blocks):
        mine = (number + first) % world.processes == world.rank if only is None else number == only
        if not mine or number in blocks.unbroken or folder.finished() is not None:  # by another, without blocks now
            continue
        x, y = data.x[chosen].to(device), data.y[chosen].to(device)
        with eval_frozen(model), full_float32(), seeded(block_seed(spec.seed, number)):
            examined = examiner.run(number, x, y, data.idx[chosen])
        folder.write_block(number, examined.rows, examined.report.model_dump(), examined.witnesses)
        blocks.look()
    if only is not None:
        return None
    if world.rank > 0:
        if spec.warm_start:  # the next run starts from this one
            blocks.wait(lambda: False)
        return None
    blocks.wait(lambda: len(blocks.unbroken) == blocks.count or _differs(folder, job.subject, started))
    return _finish(folder, job, device)


def limited(device: str) -> bool:
    """Whether a device tells that its memory is full; a machine's own is full when it ends a process."""
    return torch.device(device).type != "cpu"


def score(
    job: Job[Suite],
    results: Path,
    device: str = "cpu",
    on_block: OnBlock = lambda *_: None,
    on_attack: OnAttack = lambda *_: None,
) -> tuple[Result | None, bool]:
    """What `evaluate` gives, from known adversarial examples if the spec starts warm; and whether it was there already.

    Raises:
        UnusableInput: as `evaluate` does.
    """
    finished = run_of(results, job).finished()
    if finished is not None:
        return finished, True
    known = earlier_witnesses(results, job.spec, job.subject, job.data) if job.spec.warm_start else None
    return evaluate(job, results, device, on_block, known, on_attack), False


def _differs(folder: RunFolder, subject: Subject, started: float) -> bool:
    """False, or an error where another process has just begun to score another model under this one's name.

    Raises:
        UnusableInput: it has, so that its blocks will never come.
    """
    others = folder.path.parent.glob(f"*/{IDENTITY_FILE}") if subject.identity else ()
    for path in others:
        if path.stat().st_mtime > started - _STARTED_WITHIN and path.read_bytes() != subject.identity:
            raise UnusableInput(
                f"'{subject.info.name}' is another model in each process: its parameters must not depend on that; read"
                " them from a file, or draw them from torch's random numbers"
            )
    return False


class _Blocks:
    """The blocks of a run, of which several processes write theirs into one folder.

    unbroken: by number of each block that is done, its examples that are classified correctly and not broken.
    """

    def __init__(self, folder: RunFolder, count: int, on_block: OnBlock) -> None:
        self.folder, self.count, self._on_block = folder, count, on_block
        self.unbroken: dict[int, int] = {}
        self._slowest = 0.0

    def look(self) -> None:
        """Read what is new, of this process and of the others, and tell."""
        for block in self.folder.read_blocks(self.unbroken):
            self.unbroken[block.index] = int(robust_by_example(Table.of(block.rows)).sum())
            self._slowest = max(self._slowest, float(block.side.get("seconds", 0)))
        self._on_block(len(self.unbroken), self.count, sum(self.unbroken.values()))

    def wait(self, complete: Callable[[], bool]) -> None:
        """Until `complete()`, or until the run is finished by another process.

        Raises:
            UnusableInput: no block was added for so long that nobody can be at work on one.
        """
        done, since = -1, time.monotonic()
        while not complete() and self.folder.finished() is None:
            if len(self.unbroken) > done:
                done, since = len(self.unbroken), time.monotonic()
            patience = max(_PATIENCE, _PATIENCE_BLOCKS * self._slowest)
            if time.monotonic() - since > patience:
                missing = next((number for number in range(self.count) if number not in self.unbroken), self.count)
                what = "the result" if missing == self.count else f"block {missing}"
                raise UnusableInput(
                    f"{what} of {self.folder.path} was not written by its process for {patience / 60:.0f} minutes: look"
                    " at that process, and start the same command again: it goes on from the blocks that are done"
                )
            time.sleep(_POLL)
            self.look()


def earlier_witnesses(results: Path, spec: RunSpec, subject: Subject, data: EvalSet) -> Witnesses | None:
    """The adversarial examples that finished runs of the same subject have found, of the images that they share."""
    sha256 = subject.info.checkpoint_sha256
    wanted, shape = spec.subject_key(sha256, fingerprint=""), tuple(data.x.shape[1:])
    own = {(int(idx), input_hash(image)) for idx, image in zip(data.idx, data.x, strict=True)}
    found = []
    for run in read_runs(results) if results.is_dir() else []:
        path = run.path / FILE
        if run.result.spec.subject_key(run.result.model_info.checkpoint_sha256, fingerprint="") != wanted:
            continue
        if path.is_file():
            clean = run.verdicts().query("attack == 'clean'")
            shared = [pair in own for pair in zip(clean["idx"], clean["input_hash"], strict=True)]
            try:
                known = Witnesses.read_for(path, clean["idx"].to_numpy(), shape)
            except ValueError as error:
                raise UnusableInput(f"{error}: remove the folder it is in, and make that run again") from None
            found.append(known.of(np.isin(known.idx, clean["idx"][shared])))
    return Witnesses.joined([known for known in found if len(known)])


def _finish(folder: RunFolder, job: Job[Suite], device: str) -> Result:
    blocks = folder.read_blocks()
    finished = folder.finished()  # by another process, which then has taken the blocks away
    if finished is not None:
        return finished
    subject, data = job.subject, job.data
    report = BlockReport.merge(BlockReport.model_validate(block.side) for block in blocks)
    verdicts = pd.concat([block.rows for block in blocks], ignore_index=True)
    notes = [data.note] if data.note else []
    result = Result.from_rows(
        job.spec,
        subject.info,
        data.fingerprint,
        verdicts,
        sorted(report.attacks, key=lambda attack: attack != WARM_START),  # the first blocks may have no known one
        error_messages=tuple(report.errors),
        flags=report.run_flags(),
        model_flags=tuple(dict.fromkeys([*subject.flags, *report.model_flags, *notes])),
        data_note=data.note,
        passes=report.passes,
        gates={name: GateUse.of(counts, len(data)) for name, counts in report.gates.items()},
        environment=environment(device, max(report.thread_counts, default=torch.get_num_threads())),
        git_hash=git_hash(),
        seconds=round(report.seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kept = [block.witnesses for block in blocks if block.witnesses is not None]
    folder.finish(result, verdicts, Witnesses.joined(kept))
    return result

"""RunSpec → verdicts, attack block by attack block; a finished block is never computed again.

Axes: n = examples of the run, B = examples of a block.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.attacks.block import Attempt, Block, PassCounter
from bench.datasets.base import EvalSet, input_hash
from bench.environment import World, environment, git_hash
from bench.errors import UnusableInput
from bench.evaluation.probes import PROBED, probe
from bench.evaluation.verdicts import Judgement, judge, legal
from bench.job import Job, Subject
from bench.models.deployed import Prediction, eval_frozen, full_float32, predict, validate_outputs
from bench.models.parts import parts, set_alpha
from bench.randomness import block_seed, seeded
from bench.results.metrics import robust_by_example
from bench.results.schema import VERDICT_COLUMNS, Result
from bench.results.store import RunFolder, read_runs, run_folder
from bench.results.witnesses import FILE, Witnesses
from bench.spec import ModelInfo, RunSpec
from bench.suites.base import Suite

#: Seconds between two looks whether the other processes' blocks are there.
_POLL = 0.5

#: Called at the start and after each block with (blocks done, by all processes; blocks in all; examples still standing
#: in those that are done).
OnBlock = Callable[[int, int, int], None]

#: What known witnesses are called as an attack; it comes before the suite's own.
WARM_START = "warm-start"


def evaluate(
    job: Job[Suite],
    results: Path,
    device: str = "cpu",
    on_block: OnBlock = lambda *_: None,
    known: Witnesses | None = None,
) -> Result | None:
    """Score the job's subject by its suite and store the verdicts; a run that is already finished is only read.

    `known` are adversarial examples of this subject from earlier runs: they are tried before the suite attacks.
    Of several processes that torchrun has started, each attacks its share of the blocks, and goes on; the first waits
    for the others' and gives the result, which is None for them.

    Raises:
        UnusableInput: the model cannot take the data's images, gives another number of classes, or logits that are not
            finite on the first clean block; the results folder cannot be written.
    """
    spec, subject, data = job.spec, job.subject, job.data
    key = spec.run_key(subject.info.checkpoint_sha256, data.fingerprint)
    folder = RunFolder(run_folder(results, spec, key))
    finished = folder.finished()
    if finished is not None:
        return finished
    model = subject.model.to(device)
    if spec.alpha is not None:
        set_alpha(model, spec.alpha)
    examiner = _Examiner(spec, model, subject.info, job.method, job.num_classes, known)
    starts, world = range(0, len(data), spec.batch_size), World.here()
    done: dict[int, int] = {}

    def look() -> None:  # also at what other processes have done meanwhile
        found = {block.index: int(robust_by_example(block.rows).sum()) for block in folder.read_blocks(done)}
        done.update(found)
        on_block(len(done), len(starts), sum(done.values()))

    look()
    first = int(key, 16)  # not always the same process has the run with a block more
    for number, start in enumerate(starts):
        if (number + first) % world.processes != world.rank or number in done:
            continue
        chosen = slice(start, start + spec.batch_size)
        x, y = data.x[chosen].to(device), data.y[chosen].to(device)
        with eval_frozen(model), full_float32(), seeded(block_seed(spec.seed, number)):
            rows, side, witnesses = examiner.run(number, x, y, data.idx[chosen])
        folder.write_block(number, rows, side, witnesses)
        look()
    if world.rank > 0:
        while spec.warm_start and folder.finished() is None:  # the next run starts from this one
            time.sleep(_POLL)
        return None
    while folder.finished() is None and len(done) < len(starts):
        time.sleep(_POLL)
        look()
    return _finish(folder, spec, subject, data, device)


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


class _Examiner:
    """Turns blocks into verdict rows."""

    def __init__(
        self,
        spec: RunSpec,
        model: nn.Module,
        info: ModelInfo,
        suite: Suite,
        num_classes: int,
        known: Witnesses | None,
    ) -> None:
        self.spec, self.model, self.info, self.suite, self.num_classes = spec, model, info, suite, num_classes
        self.known = known

    def run(
        self, number: int, x: Tensor, y: Tensor, idx: Tensor
    ) -> tuple[pd.DataFrame, dict[str, Any], Witnesses | None]:
        """The rows of one block, what else is to be known of it (flags, errors, passes …), and its witnesses."""
        started = time.perf_counter()
        if number == 0:
            validate_outputs(self.model, x, self.num_classes, self.info)
        clean = self._look(x)
        if number == 0 and not clean.finite.all():
            bad = f"{int((~clean.finite).sum())} of the first {len(x)} clean images"
            raise UnusableInput(f"'{self.info.name}' gives logits that are not finite for {bad}: train it again")
        correct = clean.finite & (clean.classes == y.cpu())
        signs = self._signs(x[correct.to(x.device)], y[correct.to(x.device)]) if number == 0 else []
        shared = {
            "idx": idx.numpy(),
            "input_hash": [input_hash(image) for image in x],
            "label": y.cpu().numpy(),
            "clean_pred": clean.classes.numpy(),
            "clean_correct": correct.numpy(),
            "clean_expert": clean.expert.numpy(),
        }
        zero = torch.zeros(len(x), dtype=torch.double)
        nothing = Judgement(clean, zero, zero, ~clean.finite, ~correct, torch.zeros_like(correct))
        frames = [_frame(shared, torch.arange(len(x)), "clean", "F", nothing)]
        witnesses: list[Witnesses] = []
        failed = int((~clean.finite).sum())
        errors = [f"clean: the model failed, or gave logits that are not finite, on {failed} images"] if failed else []
        passes: defaultdict[str, Counter[str]] = defaultdict(lambda: Counter(forwards=0, backwards=0))
        unconfirmed: Counter[str] = Counter()
        standing = correct.clone()
        model = self.model
        with PassCounter(model) as counter:
            threat, seed = self.spec.threat_model, block_seed(self.spec.seed, number)
            standing_there = correct.to(x.device, copy=True)  # a copy, as known witnesses change it
            block = Block(model, x, y, standing_there, self.num_classes, self.spec.dataset, threat, seed, counter)
            try:
                for attempt in self._attempts(block, idx, standing) if correct.any() or self.suite.every else ():
                    whole = attempt.target == "F"
                    judged = model if whole else parts(model)[attempt.target]
                    verdict = self._judge(judged, attempt, block)
                    rows = attempt.rows.cpu()
                    seen = shared if whole else shared | self._clean(judged, x, y)
                    counter.lap()  # the re-check's own passes are not the attack's
                    if whole:
                        standing[rows] &= ~verdict.broken & ~verdict.error
                        witnesses.append(_witnesses(attempt, verdict.broken, idx))
                    # what a warm start broke is in no suite's own count
                    if self.known is None and _disagrees(attempt, correct, standing):
                        block.flags.append(f"{attempt.attack}: the suite's own accuracies are not the re-check's")
                    frames.append(_frame(seen, rows, attempt.attack, attempt.target, verdict))
                    unconfirmed[attempt.attack] += int(verdict.unconfirmed.sum())
                    passes[attempt.attack]["forwards"] += attempt.forwards
                    passes[attempt.attack]["backwards"] += attempt.backwards
                    if verdict.error.any():
                        count = int(verdict.error.sum())
                        errors.append(f"{attempt.attack}: {count} answers are outside the ball or not finite")
            except UnusableInput:
                raise
            except Exception as error:  # whatever an attack raises: what it left standing is unknown, never robust
                errors.append(f"{self.spec.suite}: {type(error).__name__}: {error}")
                rows = torch.arange(len(x)) if self.suite.every else standing.nonzero()[:, 0]
                frames.append(_frame(shared, rows, self.spec.suite, "F", _unknown(len(rows))))
        side = {
            "flags": sorted(set(block.flags)),
            "model_flags": signs,
            "errors": errors,
            "attacks": block.attacks,
            "passes": passes,
            "unconfirmed": unconfirmed,
            "seconds": time.perf_counter() - started,
            "threads": torch.get_num_threads(),
        }
        kept = Witnesses.joined([found for found in witnesses if len(found)])
        return pd.concat(frames, ignore_index=True).astype(VERDICT_COLUMNS), side, kept

    def _attempts(self, block: Block, idx: Tensor, standing: Tensor) -> Iterator[Attempt]:
        """The known witnesses of the block's examples, then the suite on what they leave standing.

        `standing` (B,) says what does, once an attempt is judged. A witness that is not legal is left out: what it is
        about can still be judged by the suite. One that is legal and breaks nothing is flagged, as any such claim.
        """
        if self.known is not None:
            known = self.known.of(np.isin(self.known.idx, idx.numpy()))
            position = {int(example): row for row, example in enumerate(idx)}
            for turn in range(len(known)):  # one of each example, then another of those that still stand …
                every = torch.tensor([position[int(example)] for example in known.idx], device=block.x.device)
                chosen = (_occurrence(known.idx) == turn) & block.correct[every].cpu().numpy()
                if not chosen.any():
                    break
                rows, x_adv = every[torch.from_numpy(chosen)], torch.from_numpy(known.x_adv[chosen]).to(block.x.device)
                fine = legal(block.x[rows], x_adv, block.threat_model).to(rows.device)
                if not fine.all():
                    block.flags.append(f"{WARM_START}: adversarial examples outside the ball or not finite, left out")
                if fine.any():
                    claimed = torch.ones(int(fine.sum()), dtype=torch.bool)
                    yield block.attempt(WARM_START, rows[fine], x_adv[fine], claimed=claimed)
                    block.correct.copy_(standing)
        yield from self.suite.attack(block)

    def _signs(self, x: Tensor, y: Tensor) -> list[str]:
        """What the model shows of itself on images that it gets right."""
        if not len(x):
            return []
        with seeded(0):  # the suite's own draws stay as they are
            return probe(self.model, x[:PROBED], y[:PROBED], self.spec.threat_model, attacked=self.suite.has_attack)

    def _look(self, x: Tensor) -> Prediction:
        """The clean prediction; nothing of it is finite where the model cannot take this block."""
        try:
            return predict(self.model, x, self.info.routing_visible)
        except Exception:  # a user's model may fail on a block of another size: its rows are errors
            return Prediction(
                torch.full((len(x),), -1), torch.zeros(len(x), dtype=torch.bool), torch.full((len(x),), -1)
            )

    def _clean(self, part: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What a part says of the clean images, in the columns of the rows that are about it."""
        clean = predict(part, x, self.info.routing_visible)
        return {
            "clean_pred": clean.classes.numpy(),
            "clean_correct": (clean.finite & (clean.classes == y.cpu())).numpy(),
            "clean_expert": clean.expert.numpy(),
        }

    def _judge(self, model: nn.Module, attempt: Attempt, block: Block) -> Judgement:
        x, y = block.x[attempt.rows], block.y[attempt.rows]
        visible = self.info.routing_visible
        self.model.eval()  # the attack may have left it in another mode
        return judge(model, x, y, attempt.x_adv, block.threat_model, attempt.bounded, attempt.claimed, visible)


def _witnesses(attempt: Attempt, broken: Tensor, idx: Tensor) -> Witnesses:
    """What an attempt broke, by the examples' indices idx (B,) in the data."""
    found = attempt.x_adv.cpu()[broken].float().numpy()
    return Witnesses(idx[attempt.rows.cpu()[broken]].numpy(), (attempt.attack,) * len(found), found)


def _occurrence(idx: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often the same value stood before each."""
    return np.asarray(pd.Series(idx).groupby(idx).cumcount(), dtype=np.int64)


def _disagrees(attempt: Attempt, correct: Tensor, standing: Tensor) -> bool:
    """Whether the suite states another number of right or of standing examples (B,) than the re-check found."""
    found = (int(correct.sum()), int(standing.sum()))
    return attempt.stated is not None and tuple(round(len(correct) * value) for value in attempt.stated) != found


def _unknown(count: int) -> Judgement:
    """The judgement of examples on which an attack failed."""
    far, yes = torch.full((count,), float("nan"), dtype=torch.double), torch.ones(count, dtype=torch.bool)
    nobody = torch.full((count,), -1)
    return Judgement(Prediction(nobody, yes, nobody), far, far, yes, ~yes, ~yes)


def _frame(shared: dict[str, Any], rows: Tensor, attack: str, target: str, verdict: Judgement) -> pd.DataFrame:
    frame = pd.DataFrame(shared).iloc[rows.numpy()].copy()
    error = verdict.error.numpy()
    frame["attack"], frame["target"] = attack, target
    frame["adv_pred"] = np.where(error, -1, verdict.prediction.classes.numpy())
    frame["adv_expert"] = np.where(error, -1, verdict.prediction.expert.numpy())
    frame["robust"] = frame["clean_correct"].to_numpy() & ~verdict.broken.numpy() & ~error
    frame["linf"], frame["l2"] = verdict.linf.numpy(), verdict.l2.numpy()
    frame["status"] = np.where(error, "error", "ok")
    return frame[list(VERDICT_COLUMNS)]


def _finish(folder: RunFolder, spec: RunSpec, subject: Subject, data: EvalSet, device: str) -> Result:
    blocks = folder.read_blocks()
    finished = folder.finished()  # by another process, which then has taken the blocks away
    if finished is not None:
        return finished
    sides = [block.side for block in blocks]
    attacks = dict.fromkeys(attack for side in sides for attack in side["attacks"])
    verdicts = pd.concat([block.rows for block in blocks], ignore_index=True)
    passes: dict[str, dict[str, int]] = {}
    for side in sides:
        for attack, counts in side["passes"].items():
            total = passes.setdefault(attack, {"forwards": 0, "backwards": 0})
            for kind, count in counts.items():
                total[kind] += count
    flags = {flag for side in sides for flag in side["flags"]}
    of_model = dict.fromkeys([*subject.flags, *(flag for side in sides for flag in side["model_flags"])])
    if data.note:
        of_model[data.note] = None
    unconfirmed: Counter[str] = Counter()
    for side in sides:
        unconfirmed.update(side["unconfirmed"])
    flags |= {
        f"{attack}: {count} successes that the re-check does not confirm" for attack, count in (+unconfirmed).items()
    }
    threads = sorted({side["threads"] for side in sides})
    if len(threads) > 1:  # the order of a sum depends on it, and with that a verdict at the edge
        flags.add(f"attack blocks ran with {' and '.join(map(str, threads))} threads")
    result = Result.from_rows(
        spec,
        subject.info,
        data.fingerprint,
        verdicts,
        sorted(attacks, key=lambda attack: attack != WARM_START),  # the first blocks may have no known witness
        error_messages=tuple(dict.fromkeys(message for side in sides for message in side["errors"])),
        flags=tuple(sorted(flags)),
        model_flags=tuple(of_model),
        data_note=data.note,
        passes=passes,
        environment=environment(device, threads[-1]),
        git_hash=git_hash(),
        seconds=round(sum(side["seconds"] for side in sides), 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kept = [block.witnesses for block in blocks if block.witnesses is not None]
    folder.finish(result, verdicts, Witnesses.joined(kept))
    return result

"""One attack block: attacked by a suite, every answer judged again, and written down as verdict rows.

Axes: B = examples of a block, m = examples that an attack was run on; images (B, C, H, W).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.attacks.block import Attempt, Block, OnAttack, PassCounter
from bench.datasets.base import input_hash
from bench.errors import UnusableInput, in_one_line
from bench.evaluation.probes import PROBED, probe
from bench.evaluation.report import BlockReport
from bench.evaluation.scales import accuracy_flags
from bench.evaluation.verdicts import Judgement, judge, legal
from bench.job import Job, Subject
from bench.models.choices import few, find_choices
from bench.models.dependence import by_batch, dependence, same_logits
from bench.models.deployed import Prediction, predict, validate_outputs
from bench.models.exchanges import misshown, thresholded
from bench.models.foreign import DRAWS, Guarded, settings_kept
from bench.models.gates import NONE
from bench.models.parts import parts
from bench.models.sites import shown_sites, single_paths, sites
from bench.models.unused import unused_parts
from bench.randomness import block_seed, seeded
from bench.results.flags import (
    BY_CHANCE,
    DECLARED,
    DOUBTFUL,
    HIDDEN_ROUTES,
    OUTSIDE_TORCH,
    ROUTES_INSIDE,
    STATEFUL,
    THOUGH,
    WARM_START,
    WEAKER,
)
from bench.results.schema import VERDICT_COLUMNS
from bench.results.witnesses import Witnesses
from bench.suites.base import Suite

#: How many images are sent through a foreign model while its operations are watched.
WATCHED = 4
#: Among so many images those are looked for that a model gets right, and is probed on.
SEARCHED = 512


@dataclass(frozen=True)
class ExaminedBlock:
    """A block's verdict rows, its report, and the adversarial examples that were found."""

    rows: pd.DataFrame
    report: BlockReport
    witnesses: Witnesses | None


@dataclass
class _Record:
    """What is known of a block so far. columns: of F's rows, what does not depend on the attack.

    unbroken (B,): classified correctly, and by no attack broken or driven to an error. met (B,): given to some attack
    of the suite on F. logits (B, C): the clean ones, as in `Prediction`.
    """

    x: Tensor
    y: Tensor
    idx: Tensor
    columns: dict[str, Any]
    correct: Tensor
    unbroken: Tensor
    met: Tensor
    logits: Tensor | None
    frames: list[pd.DataFrame] = field(default_factory=list)
    witnesses: list[Witnesses] = field(default_factory=list)
    report: BlockReport = field(default_factory=BlockReport)


def guarded(subject: Subject) -> nn.Module:
    """The subject's model as it is to be called: one that is not ours behind a guard."""
    if not subject.foreign:
        return subject.model
    guard = Guarded(subject.model)
    guard.gates, guard.shown = subject.sites, subject.shown
    return guard


class Examiner:
    """Turns the blocks of a job into verdict rows.

    The images that a suite is given are a copy: what it or the model does to them changes no verdict.
    """

    def __init__(
        self,
        job: Job[Suite],
        model: nn.Module,
        known: Witnesses | None,
        first: Tensor,
        on_attack: OnAttack = lambda *_: None,
    ) -> None:
        """`model` is in eval mode and frozen, `known` are adversarial examples that are tried before the suite, `first`
        the first images (B, C, H, W), by which the model is looked at, more than a small block has. Of a model that is
        found to answer by chance the mean of several passes is attacked, and their majority judged.

        Raises:
            UnusableInput: it cannot take these images, or gives another number of classes.
        """
        self.spec, self.suite, self.num_classes, self.info = job.spec, job.method, job.num_classes, job.subject.info
        self.model, self.known, self.on_attack, self._data = model, known, on_attack, job.data
        validate_outputs(model, first, self.num_classes, self.info)
        #: flags of what the model's answers depend on, of routes that it does not show, and of a doubtful accuracy
        self.found = [*self._depends(first), *self._routes(first[:WATCHED])]
        self.found += self._accuracy(first, job.data.y[: len(first)].to(first.device))
        self.found += self._unused(first[:PROBED])

    def _depends(self, first: Tensor) -> list[str]:
        """What the model's answers depend on beside the image, as flags."""
        cut = 1 + block_seed(self.spec.seed, 0) % max(len(first) - 1, 1)
        try:
            reasons = dependence(self.model, first[:PROBED]).reasons
            if not reasons and isinstance(self.model, Guarded) and len(first) > 1:
                reasons = tuple(by_batch(self.model, first, cut))
        except Exception as error:  # of a user's own model that takes no batch of another size
            return [f"probe of outputs failed: {type(error).__name__}"]
        if isinstance(self.model, Guarded) and BY_CHANCE in reasons:
            self.model.draws = DRAWS
            return [*reasons, f"the mean of {DRAWS} draws is attacked, and their majority judged"]
        return list(reasons)

    def _accuracy(self, x: Tensor, y: Tensor) -> list[str]:
        """Signs that a foreign model is made for images of another scale than [0, 1], or for other classes."""
        if not isinstance(self.model, Guarded):
            return []
        try:
            return accuracy_flags(self.model, x, y, self.num_classes)
        except Exception as error:  # of a user's own model: the first block tells of it, if it fails again
            return [f"probe of accuracy failed: {type(error).__name__}"]

    def _routes(self, x: Tensor) -> list[str]:
        """Routes of a foreign model that its attributes do not show, as a flag: hidden ones, or those found inside."""
        if not isinstance(self.model, Guarded):
            return []
        declared, said, inside = NONE in self.spec.gates, f"{DECLARED}routes", list[str]()
        try:
            with seeded(0), settings_kept():
                if found := [site.words if site in self.model.gates else site.name for site in sites(self.model)]:
                    said = f"{DECLARED}other routes"
                    inside = [] if self.info.routing_visible else [f"{ROUTES_INSIDE}{', '.join(found)}"]
                shown = shown_sites(self.model)
                known = [*shown, *self.model.gates]
                choices = find_choices(self.model.model, x.clone(), known)
                guard = Guarded(self.model.model)
                wrong = [words for site in shown if (words := misshown(guard, site, known, x))]
                wrong += [words for site in self.model.gates if (words := thresholded(guard, site, known, x))]
        except Exception as error:  # what cannot be watched may choose in any way
            why = f"forward pass cannot be watched ({type(error).__name__})"
            return [said, f"{OUTSIDE_TORCH}the {why}", *inside] if declared else [f"{HIDDEN_ROUTES}the {why}"]
        if declared and not choices.gates and not wrong:  # a choice in a gate that is shown is none to be declared away
            outside = [f"{OUTSIDE_TORCH}{few(choices.outside)}"] if choices.outside else []
            seen = f"{THOUGH} ({few(choices.operations)})" if choices.operations else ""
            return [f"{said}{seen}", *outside, *inside]
        if choices:
            return [f"{HIDDEN_ROUTES}{choices.words(declared or bool(self.model.gates))}"]
        return [f"{HIDDEN_ROUTES}{'; '.join(wrong)}"] if wrong else inside

    def _unused(self, x: Tensor) -> list[str]:
        """Parts that images hardly use, as a flag of hidden routes where nothing else has shown any.

        Of a network that knows nothing yet many a part is so.
        """
        told = any(flag.startswith((HIDDEN_ROUTES, DOUBTFUL, DECLARED)) for flag in self.found)
        if told or not isinstance(self.model, Guarded):
            return []
        try:
            with seeded(0), settings_kept():
                found = unused_parts(Guarded(self.model.model), x, sites(self.model))
        except Exception as error:  # of a user's own model, as where a derivative is not there
            return [f"probe of unused parts failed: {type(error).__name__}"]
        none = "add none" if self.model.gates else "declare --gates none"
        advice = f"name its gates with --gates GLOB, or {none}"
        return [f"{HIDDEN_ROUTES}parts that images hardly use ({few(found)}): {advice}"] if found else []

    def run(self, number: int, x: Tensor, y: Tensor, idx: Tensor) -> ExaminedBlock:
        """Attack and judge block `number`: images x (B, C, H, W), labels y (B,), their indices idx (B,) in the data.

        Raises:
            UnusableInput: logits that are not finite on the first block; whatever the suite refuses.
        """
        started, threat, seed = time.perf_counter(), self.spec.threat_model, block_seed(self.spec.seed, number)
        if isinstance(self.model, Guarded):
            self.model.reseed(seed)
        record = self._clean(number, x, y, idx)
        if number == 0:
            record.report.model_flags += [*self.found, *self._probe(x, y, record.correct.to(x.device))]
        with PassCounter(self.model) as counter:
            to_attack = record.correct.to(x.device, copy=True)  # a copy, as known adversarial examples change it
            block = Block(
                self.model, x.clone(), y, to_attack, self.num_classes, self.spec.dataset, threat, seed, counter,
                on_attack=self.on_attack,
            )  # fmt: skip
            try:
                if record.correct.any() or self.suite.every:
                    for attempt in self._attempts(block, record):
                        self._take(attempt, block, record)
                    self._passed_over(record)
            except UnusableInput:
                raise
            except Exception as error:  # whatever an attack raises: what it left is unknown, never robust
                self._fail(error, record)
        report = record.report
        if weaker := self.suite.weaker_than_default(self.spec.threat_model):
            block.flags.append(f"{WEAKER}{weaker}")
        report.gates = block.gates
        report.flags, report.attacks = sorted({*report.flags, *block.flags}), block.attacks
        report.seconds, report.thread_counts = time.perf_counter() - started, [torch.get_num_threads()]
        if isinstance(self.model, Guarded):
            report.model_flags += sorted(self.model.seen)
        if self._changed(record):
            report.model_flags.append(STATEFUL)  # whatever it keeps, and wherever
        rows = pd.concat(record.frames, ignore_index=True).astype(VERDICT_COLUMNS)
        return ExaminedBlock(rows, report, Witnesses.joined([found for found in record.witnesses if len(found)]))

    def _changed(self, record: _Record) -> bool:
        """Whether a foreign model answers clean images otherwise than before the attacks.

        One that answers by chance is not asked: it keeps no rank as it is.
        """
        if not isinstance(self.model, Guarded) or record.logits is None:
            return False
        self.model.eval()
        try:
            after = predict(self.model, record.x, False).logits
        except Exception:  # it did not fail before
            return True
        return after is None or not same_logits(after.double(), record.logits.double())

    def _clean(self, number: int, x: Tensor, y: Tensor, idx: Tensor) -> _Record:
        """The record of a block that is not attacked yet: its clean rows."""
        try:
            clean = predict(self.model, x, self.info.routing_visible)
        except Exception as error:  # a user's model may fail on a block of another size: its rows are errors
            if number == 0:
                reason = in_one_line(error)
                raise UnusableInput(f"'{self.info.name}' fails on the first {len(x)} images: {reason}") from None
            nowhere = torch.full((len(x),), -1)
            clean = Prediction(nowhere, torch.zeros(len(x), dtype=torch.bool), nowhere)
        failed = int((~clean.finite).sum())
        if number == 0 and failed:
            bad = f"{failed} of the first {len(x)} clean images"
            raise UnusableInput(f"'{self.info.name}' gives logits that are not finite for {bad}: train it again")
        correct = clean.finite & (clean.classes == y.cpu())
        of_image = {
            "idx": idx.numpy(),
            "input_hash": [input_hash(image) for image in x],
            "label": y.cpu().numpy(),
        }
        columns = of_image | _clean_columns(clean, y)
        record = _Record(x, y, idx, columns, correct, correct.clone(), torch.zeros_like(correct), clean.logits)
        zero = torch.zeros(len(x), dtype=torch.double)
        nothing = Judgement(clean, zero, zero, ~clean.finite, ~correct, torch.zeros_like(correct))
        record.frames.append(_frame(record.columns, torch.arange(len(x)), "clean", "F", nothing))
        if failed:
            record.report.errors.append(
                f"clean: the model failed, or gave logits that are not finite, on {failed} images"
            )
        return record

    def _probe(self, x: Tensor, y: Tensor, right: Tensor) -> list[str]:
        """What the model shows of itself on images that it gets right: of the first block (B, C, H, W), where these are
        too few of others as well, so that the size of blocks hides nothing."""
        images, labels, begin = x[right], y[right], len(x)
        while len(images) < PROBED and begin < min(len(self._data), SEARCHED):
            rows, begin = slice(begin, begin + PROBED), begin + PROBED
            more, of_more = self._data.x[rows].to(x.device), self._data.y[rows]
            try:
                right = predict(self.model, more, False).classes == of_more
            except Exception:  # a user's model may fail on a block of another size
                break
            images = torch.cat([images, more[right.to(x.device)]])
            labels = torch.cat([labels, of_more[right].to(x.device)])
        if not len(images):
            return []
        images, labels = images[:PROBED], labels[:PROBED]
        with seeded(0):  # the suite's own draws stay as they are
            return probe(self.model, images, labels, self.spec.threat_model, attacked=self.suite.has_attack)

    def _attempts(self, block: Block, record: _Record) -> Iterator[Attempt]:
        """The known adversarial examples of the block's images, then the suite on what they leave unbroken.

        One that is not legal is left out: its image can still be judged by the suite. One that is legal and breaks
        nothing is flagged, as any claim that is not confirmed.
        """
        if self.known is not None:
            known = self.known.of(np.isin(self.known.idx, record.idx.numpy()))
            position = {int(example): row for row, example in enumerate(record.idx)}
            for turn in range(len(known)):  # one of each image, then another of those that are not yet broken …
                every = torch.tensor([position[int(example)] for example in known.idx], device=block.x.device)
                chosen = (_occurrence(known.idx) == turn) & block.correct[every].cpu().numpy()
                if not chosen.any():
                    break
                rows, x_adv = every[torch.from_numpy(chosen)], torch.from_numpy(known.x_adv[chosen]).to(block.x.device)
                fine = legal(record.x[rows], x_adv, block.threat_model).to(rows.device)
                if not fine.all():
                    block.flags.append(f"{WARM_START}: adversarial examples outside the ball or not finite, left out")
                if fine.any():
                    claimed = torch.ones(int(fine.sum()), dtype=torch.bool)
                    yield block.attempt(WARM_START, rows[fine], x_adv[fine], claimed=claimed)
                    block.correct.copy_(record.unbroken)
        yield from self.suite.attack(block)

    def _take(self, attempt: Attempt, block: Block, record: _Record) -> None:
        """Judge an attempt, and take its rows, its cost and what it broke into the record."""
        whole = attempt.target == "F"
        target = self.model if whole else self._part(attempt.target)
        x, y = record.x[attempt.rows], record.y[attempt.rows]
        self.model.eval()  # the attack may have left it in another mode
        visible = self.info.routing_visible
        judged = judge(target, x, y, attempt.x_adv, block.threat_model, attempt.bounded, attempt.claimed, visible)
        columns, rows = record.columns, attempt.rows.cpu()
        if whole:
            record.unbroken[rows] &= ~judged.broken & ~judged.error
            record.met[rows] |= attempt.attack != WARM_START
            found = attempt.x_adv.cpu()[judged.broken].float().numpy()
            own = record.idx[rows[judged.broken]].numpy()
            record.witnesses.append(Witnesses(own, (attempt.attack,) * len(found), found))
        else:
            columns = columns | _clean_columns(predict(target, record.x.clone(), visible), record.y)
        block.passes.lap()  # the re-check's own passes are not the attack's
        # what a warm start broke is in no suite's own count
        if self.known is None and _disagrees(attempt, record):
            block.flags.append(f"{attempt.attack}: the suite's own accuracies are not the re-check's")
        record.frames.append(_frame(columns, rows, attempt.attack, attempt.target, judged))
        record.report.add(attempt, judged)
        if whole:
            self.on_attack(attempt.attack, len(rows), int(record.unbroken[rows].sum()))

    def _passed_over(self, record: _Record) -> None:
        """Errors for images that the model gets right, and that were given to no attack, where others were.

        An attack that looks for itself what is right may have been told otherwise, or have forgotten some.
        """
        rows = (record.unbroken & ~record.met).nonzero()[:, 0]
        if len(rows) and record.met.any():
            self._give_up(f"{len(rows)} images that the model gets right were not attacked", rows, record)

    def _part(self, name: str) -> nn.Module:
        """A part of the model, or the model with one expert of a gate forced."""
        known: dict[str, nn.Module] = dict(parts(self.model))
        for site in sites(self.model) if name not in known else ():
            known |= single_paths(self.model, site)
        return known[name]

    def _fail(self, error: Exception, record: _Record) -> None:
        """The rows of a suite that raised: errors for what it was to attack and has not broken."""
        rows = torch.arange(len(record.x)) if self.suite.every else record.unbroken.nonzero()[:, 0]
        self._give_up(f"{type(error).__name__}: {error}", rows, record)

    def _give_up(self, why: str, rows: Tensor, record: _Record) -> None:
        """Error rows of F for examples of which the suite tells nothing."""
        record.report.errors.append(f"{self.spec.suite}: {why}")
        record.frames.append(_frame(record.columns, rows, self.spec.suite, "F", _unknown(len(rows))))


def _clean_columns(clean: Prediction, y: Tensor) -> dict[str, Any]:
    """The columns that tell what F, or a part, predicts for the clean images."""
    return {
        "clean_pred": clean.classes.numpy(),
        "clean_correct": (clean.finite & (clean.classes == y.cpu())).numpy(),
        "clean_expert": clean.expert.numpy(),
    }


def _occurrence(idx: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often the same value stood before each."""
    return np.asarray(pd.Series(idx).groupby(idx).cumcount(), dtype=np.int64)


def _disagrees(attempt: Attempt, record: _Record) -> bool:
    """Whether the suite states another number of right or of unbroken examples than the re-check found."""
    found = (int(record.correct.sum()), int(record.unbroken.sum()))
    return attempt.stated is not None and tuple(round(len(record.x) * value) for value in attempt.stated) != found


def _unknown(count: int) -> Judgement:
    """The judgement of examples on which an attack failed."""
    far, yes = torch.full((count,), float("nan"), dtype=torch.double), torch.ones(count, dtype=torch.bool)
    nowhere = torch.full((count,), -1)
    return Judgement(Prediction(nowhere, yes, nowhere), far, far, yes, ~yes, ~yes)


def _frame(columns: dict[str, Any], rows: Tensor, attack: str, target: str, judged: Judgement) -> pd.DataFrame:
    frame = pd.DataFrame(columns).iloc[rows.numpy()].copy()
    error = judged.error.numpy()
    frame["attack"], frame["target"] = attack, target
    frame["adv_pred"] = np.where(error, -1, judged.prediction.classes.numpy())
    frame["adv_expert"] = np.where(error, -1, judged.prediction.expert.numpy())
    frame["robust"] = frame["clean_correct"].to_numpy() & ~judged.broken.numpy() & ~error
    frame["linf"], frame["l2"] = judged.linf.numpy(), judged.l2.numpy()
    frame["status"] = np.where(error, "error", "ok")
    return frame[list(VERDICT_COLUMNS)]

"""What a model of the user's own shows before it is scored: what is seen of it, what will attack it, and how long.

Axes: n = images that are looked at, C = classes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.attacks.block import Block, PassCounter
from bench.attacks.paths import Paths
from bench.attacks.search import Search
from bench.errors import in_one_line
from bench.evaluation.examine import Examiner, guarded
from bench.evaluation.plan import Plan
from bench.evaluation.probes import PROBED, passes, probe
from bench.evaluation.scales import better_scale, by_chance
from bench.job import Job
from bench.models.deployed import eval_frozen, full_float32
from bench.models.exchanges import are_probabilities
from bench.models.foreign import Guarded
from bench.models.gates import NONE
from bench.models.parts import is_dual, parts
from bench.models.sites import Site, sites
from bench.randomness import seeded
from bench.results.flags import HIDDEN_ROUTES, OUTSIDE_TORCH, THOUGH, UNRANKED, takes_adaptive
from bench.spec import NO_GRADIENT, NOT_FORCED
from bench.suites.base import Suite

#: Seconds that each pass is timed for, and the most times that it is made.
_TIMED, _MOST_TIMES = 0.3, 20
#: So many characters of what torch says of a backward pass that fails.
_REASON = 120


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and, of a problem, what to do."""

    what: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Attacked:
    """A suite on this model: why it cannot attack it (or ""), and seconds for each example that withstands it.

    seconds: None where the suite does not state what it costs.
    """

    suite: str
    why_not: str
    seconds: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a model; a problem keeps it from a rank, or makes its numbers doubtful.

    looked: seconds, about, that each suite that attacks looks at the model before.
    """

    findings: list[Finding]
    suites: list[Attacked]
    looked: float

    @property
    def problems(self) -> list[Finding]:
        """What has to be mended."""
        return [finding for finding in self.findings if finding.remedy]


def diagnose(plan: Plan[Suite], model: str, device: str) -> Diagnosis:
    """Load the model that `model` names and look at it on the plan's images; its suites are those of the plan.

    Raises:
        UnusableInput: there is no such model, it cannot take these images, or it gives another number of classes.
    """
    jobs = plan.jobs(model)
    job = jobs[0]
    network, x, y = guarded(job.subject).to(device), job.data.x.to(device), job.data.y.to(device)
    with eval_frozen(network), full_float32():
        with seeded(0):
            began = time.perf_counter()
            examiner = Examiner(job, network, None, x)
            looked = time.perf_counter() - began
        with torch.no_grad():
            logits = network(x).float()
        block = Block(
            network, x, y, logits.argmax(1) == y, job.num_classes, job.spec.dataset, job.spec.threat_model, 0,
            PassCounter(network),
        )  # fmt: skip
        gates, paths, unforced = _gates(block)
        hidden = [flag for flag in examiner.found if flag.startswith((HIDDEN_ROUTES, OUTSIDE_TORCH))]
        though = next((flag.partition(THOUGH)[2] for flag in examiner.found if THOUGH in flag), None)
        findings = [
            _model(job, network),
            _input(job),
            *_outputs(network, logits, job),
            *_accuracy(network, x, y, logits, job),
            *_depends(examiner.found),
            _routes(network, gates, paths, hidden, unforced, though, declared_none=NONE in job.spec.gates),
            *_gradients(network, x, y, job),
        ]
        forward, both = _timed(network, x, y)
        suites = [_attacked(each, network, forward, both) for each in jobs]
    if isinstance(network, Guarded):
        findings += [Finding("forward pass", what) for what in sorted(network.seen) if "no gradient" not in what]
    flags = [*examiner.found, *(network.seen if isinstance(network, Guarded) else ())]
    routed = bool(sites(network) or parts(network)) or any(map(takes_adaptive, flags))
    return Diagnosis([*findings, _rank(findings, routed=routed)], suites, looked + PROBED * passes(network) * both)


def _model(job: Job[Suite], network: nn.Module) -> Finding:
    info = job.subject.info
    count = sum(parameter.numel() for parameter in network.parameters())
    made = f", {info.trained}" if info.trained else ""
    return Finding("model", f"{info.name}: {info.architecture}, {count:,} parameters{made}")


def _input(job: Job[Suite]) -> Finding:
    shape = "×".join(map(str, job.data.x.shape[1:]))
    return Finding(
        "input", f"{shape} images of {job.spec.dataset}, pixels in [0, 1]; looked at {len(job.data)} of them"
    )


def _outputs(network: nn.Module, logits: Tensor, job: Job[Suite]) -> Iterator[Finding]:
    kind = str(network.dtype if isinstance(network, Guarded) else logits.dtype).removeprefix("torch.")
    finite = logits[logits.isfinite()]
    reach = f", from {finite.min():.3g} to {finite.max():.3g}" if len(finite) else ""
    yield Finding("output", f"logits of {job.num_classes} classes, {kind}{reach}")
    if bad := int((~logits.isfinite()).any(1).sum()):
        yield Finding(
            "output", f"not finite for {bad} of {len(logits)} images", "such a run is refused: train it again"
        )
    if are_probabilities(logits):
        yield Finding(
            "output",
            "these are probabilities, behind which the losses of attacks are flat",
            "return the logits: leave the last softmax out",
        )


def _accuracy(network: nn.Module, x: Tensor, y: Tensor, logits: Tensor, job: Job[Suite]) -> Iterator[Finding]:
    """The accuracy, and whether it is better on images of another scale: the normalisation belongs into the model."""
    found = float((logits.argmax(1) == y).float().mean())
    yield Finding("accuracy", f"{found:.1%} of {len(y)} clean images")
    if not isinstance(network, Guarded):
        return
    if better := better_scale(network, x, y, found):
        yield Finding("normalisation", better, "put it in front, inside the module: pixels in [0, 1] in, logits out")
    elif by_chance(found, len(y), job.num_classes):
        yield Finding(
            "accuracy",
            f"no better than chance, which is {1 / job.num_classes:.1%}",
            f"look at the weights, and at the order of the classes, which has to be that of {job.spec.dataset}",
        )


#: Of what a model's answers depend on beside the image: what it is called, and what to do.
_DEPENDENCE = dict(
    zip(
        UNRANKED,
        (
            ("chance", "let eval mode draw nothing (dropout, noise), or read its rows without a rank"),
            ("batch", "let eval mode use running statistics, and no shuffling or capacity over the batch"),
            ("state", "let forward passes in eval mode change no buffer or attribute"),
            ("under no_grad", "let forward passes not ask whether gradients are taken"),
            ("gradients", "let the gradient of an image come of that image alone, in batches of any size"),
        ),
        strict=True,
    )
)


def _depends(found: Sequence[str]) -> Iterator[Finding]:
    """What the answers depend on beside the image, of what the examiner has found."""
    fine = {
        "chance": "the same answer each time",
        "batch": "each image is answered alone",
        "state": "kept",
        "under no_grad": "the same answer",
    }
    for flag, (what, remedy) in _DEPENDENCE.items():
        if (seen := flag in found) or what in fine:
            yield Finding(what, flag if seen else fine[what], remedy if seen else "")
    for flag in found:
        if flag.startswith("probe of"):
            yield Finding("batch", flag, "let it take batches of 1, 2, 4, 8 and 32 images")


def _gates(block: Block) -> tuple[list[Site], int, list[str]]:
    """The gates that can be forced, how many paths they make, and what is said of the others."""
    if not sites(block.model):
        return [], 0, []
    with seeded(0):
        several = [Paths(Search(block), limit=1, mixed=mixed) for mixed in (False, True)]
    notes = [note for found in several for note in found.notes if NOT_FORCED in note]
    gates = {site.name: site for found in several for site in found.sites}  # a gate that hosts a mixture is in both
    return list(gates.values()), sum(found.possible for found in several), notes


def _routes(
    network: nn.Module,
    gates: Sequence[Site],
    paths: int,
    hidden: Sequence[str],
    unforced: Sequence[str],
    though: str | None,
    *,
    declared_none: bool,
) -> Finding:
    """though: by what a model chooses that is declared to have no routes, or no others."""
    if hidden:
        *what, remedy = hidden[0].removeprefix(HIDDEN_ROUTES).rsplit(": ", 1)
        seen, remedy = (what[0], remedy) if what else (remedy, "")
        if hidden[0].startswith(OUTSIDE_TORCH):
            seen, remedy = hidden[0], "choose by torch alone, which attacks can follow"
        return Finding("routes", seen, f"{remedy or 'let its forward pass be traced'} (docs/your-own-model.md)")
    if unforced:
        return Finding(
            "routes",
            "; ".join(unforced),
            "let the model call its gate once for each batch, as a module, or name what gives its scores with --gates",
        )
    if gates:
        known = {site.name: site.words for site in sites(network)}  # a mixture is forced as a top-1 gate
        words = [known[gate.name] for gate in gates[:3]]
        more = f" and {len(gates) - 3} more gates" if len(gates) > 3 else ""
        kind = "a dual; " if is_dual(network) else ""
        count = f"{paths:,} paths" if paths < 10**6 else "over a million paths, of which some are attacked"
        others = f"; declared to be all{THOUGH}{though}" if though is not None else ""
        return Finding("routes", f"{kind}{', '.join(words)}{more}: {count}{others}")
    if declared_none:
        return Finding("routes", f"none, as --gates none declares{'' if though is None else THOUGH + though}")
    if parts(network):
        return Finding("routes", f"none, but {len(parts(network))} parts that are attacked one by one")
    if soft := [site.words for site in sites(network) if site.soft]:
        return Finding("routes", f"{', '.join(soft)}: mixtures, none of which chooses")
    return Finding("routes", "none: nothing that it computes chooses by the image")


def _gradients(network: nn.Module, x: Tensor, y: Tensor, job: Job[Suite]) -> Iterator[Finding]:
    """The gradient by the pixels, then what the probes of a run find of routers."""
    try:
        gradient = _gradient(network, x, y)
    except Exception as error:  # of a user's own
        remedy = "let it be differentiated, without changing in place what a gradient needs: its rows would be errors"
        yield Finding("gradients", f"a backward pass fails ({in_one_line(error)[:_REASON]})", remedy)
        return
    absent = gradient is None or (isinstance(network, Guarded) and NO_GRADIENT in network.seen)
    flat = 1.0 if gradient is None else float((gradient.flatten(1) == 0).all(1).float().mean())
    better = "keep it differentiable: suites that follow gradients find little, Square alone remains"
    if absent:
        yield Finding("gradients", "none reaches the pixels", better)
    elif gradient is not None and not gradient.isfinite().all():
        yield Finding("gradients", "not finite at the pixels", better)
    elif flat > 0:
        yield Finding("gradients", f"zero at the pixels of {flat:.0%} of the images", better)
    else:
        yield Finding("gradients", "reach the pixels of every image")
    right = network(x).argmax(1) == y
    if right.any():
        with seeded(0):
            flags = probe(network, x[right][:32], y[right][:32], job.spec.threat_model, attacked=False)
        yield from (Finding("gradients", flag) for flag in flags if "router" in flag)


def _gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        loss = F.cross_entropy(network(z), y, reduction="sum")
        return torch.autograd.grad(loss, z, allow_unused=True)[0] if loss.requires_grad else None


def _timed(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds of an example in a forward pass, and in a forward and a backward pass, on the whole batch."""

    def forward() -> None:
        with torch.no_grad():
            network(x)

    def both() -> None:
        with suppress(Exception):  # a backward pass that fails has been told of
            _gradient(network, x, y)

    return _seconds(forward, x) / len(x), _seconds(both, x) / len(x)


def _seconds(call: Callable[[], object], x: Tensor) -> float:
    """The fastest of several calls: what else the machine does only slows them."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - began

    once()  # the first call allocates
    taken = [once()]
    while sum(taken) < _TIMED and len(taken) < _MOST_TIMES:
        taken.append(once())
    return min(taken)


def _attacked(job: Job[Suite], network: Any, forward: float, both: float) -> Attacked:
    cost = job.method.cost(job.num_classes, network)
    if "routes" in job.method.needs and cost is None:
        return Attacked(job.spec.suite, "no: it shows no routes", None)
    if cost is None:
        return Attacked(job.spec.suite, "", None)
    why_not = "" if job.method.has_attack else "no: accuracy alone"
    return Attacked(job.spec.suite, why_not, (cost.forwards - cost.backwards) * forward + cost.backwards * both)


def _rank(findings: Sequence[Finding], *, routed: bool) -> Finding:
    reasons = [
        finding.seen
        for finding in findings
        if finding.remedy and (finding.seen in UNRANKED or finding.what in ("chance", "batch", "state", "routes"))
    ]
    if reasons:
        return Finding("rank", f"none: {'; '.join(reasons)}", "mend what is named above")
    needed = "suites autoattack and adaptive with their" if routed else "suite autoattack with its"
    return Finding("rank", f"after {needed} default settings")

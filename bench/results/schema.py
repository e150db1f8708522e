"""What a finished run is: the columns of its verdict rows, its result, and which rows and results can be. No torch."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bench.results.flags import WEAKER
from bench.results.metrics import accuracy_after, clean_by_example, component_rates, robust_by_example, wilson
from bench.results.table import Table
from bench.spec import ModelInfo, RunSpec, Spec

if TYPE_CHECKING:
    import pandas as pd

#: The columns of `verdicts.parquet`, one row per (example, attack), and their pandas types.
VERDICT_COLUMNS: dict[str, str] = {
    "idx": "int64",  # position in the data set's own order
    "input_hash": "str",  # of the clean image, 16 hex digits
    "label": "int64",
    "attack": "str",  # "clean" for the unattacked image, which every run has for every example
    "target": "str",  # whose prediction it is: F | expert:i | S | R | R.expert:i …; only F counts in robust accuracy
    "clean_pred": "int64",
    "adv_pred": "int64",  # -1 where there is none (status error)
    "clean_correct": "bool",
    "robust": "bool",  # clean_correct, no error, and not broken by this attack
    "linf": "float64",  # distance of the adversarial example, in pixels of [0, 1]
    "l2": "float64",
    "clean_expert": "int64",  # the first selected expert, -1 where routing is not visible
    "adv_expert": "int64",
    "status": "str",  # ok | error
}


class Accuracy(Spec):
    """A fraction of `n` examples with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: NDArray[np.bool_]) -> Self:
        """The accuracy of one truth value per example."""
        successes, n = int(correct.sum()), len(correct)
        low, high = wilson(successes, n)
        return cls(value=successes / n, low=low, high=high, n=n)


class GateUse(Spec):
    """How a gate inside a network routes the clean images, and under an attack on it.

    load: the share of its selections that each expert gets. entropy: of the load, in nats. flipped: the fraction of
    images in which the attack changed what it selects at any token.
    """

    load: tuple[float, ...]
    entropy: float
    flipped: float

    @classmethod
    def of(cls, counts: dict[str, list[int]], images: int) -> Self:
        """From how often each expert was selected (`load`), and in how many of the images a route was changed."""
        load = tuple(count / max(1, sum(counts["load"])) for count in counts["load"])
        entropy = sum(-share * math.log(share) for share in load if share)  # of one expert 0, not −0
        return cls(load=load, entropy=entropy, flipped=counts["flipped"][0] / images)


class Result(Spec):
    """A finished run. Accuracies are fractions in [0, 1]."""

    schema_version: Literal[1] = 1
    spec: RunSpec
    model_info: ModelInfo
    fingerprint: str
    run: str
    work: str
    subject: str
    clean_accuracy: Accuracy
    robust_accuracy: Accuracy
    accuracy_after: dict[str, float] = Field(description="after each attack and all before it, in the order they ran")
    components: dict[str, Accuracy] = Field(
        default_factory=dict, description="RA-E-fixed, RA-E-any, RA-R, route-flip rate, and each part's own SA and RA"
    )
    gates: dict[str, GateUse] = Field(default_factory=dict, description="of gates inside a network, by `components`")
    errors: int = Field(description="rows with status error")
    error_messages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    model_flags: tuple[str, ...] = Field(default=(), description="of the model and the images, whatever the suite")
    data_note: str = Field(default="", description="what is unusual about the evaluation set, such as a partial copy")
    passes: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="attack → forwards and backwards, in examples"
    )
    environment: dict[str, str]
    git_hash: str | None
    seconds: float
    finished: str = Field(description="UTC, ISO 8601")

    @classmethod
    def from_rows(
        cls,
        spec: RunSpec,
        model_info: ModelInfo,
        fingerprint: str,
        verdicts: "pd.DataFrame",
        attacks: Iterable[str] | None = None,
        **provenance: Any,
    ) -> Self:
        """The result that the rows amount to; `provenance` is the fields that no row knows, from `flags` on.

        `attacks` are the attacks on F in the order they ran, also those that found all examples broken.
        ValueError for rows of another number of examples than the spec's.
        """
        known = {"spec": spec, "model_info": model_info, "fingerprint": fingerprint}
        return cls(**known, **_derived(spec, model_info, fingerprint, Table.of(verdicts), attacks), **provenance)

    @property
    def suite_flags(self) -> tuple[str, ...]:
        """The flags of the run, to be written behind the name of its suite, which some begin with."""
        return tuple(flag.removeprefix(f"{self.spec.suite}: ") for flag in self.flags)

    @property
    def attacked(self) -> bool:
        """Whether F was attacked at all: where it was not, there is no robust accuracy."""
        return any(attack != "clean" for attack in self.accuracy_after)

    @property
    def weaker(self) -> bool:
        """Whether the suite ran with settings that are weaker than its defaults."""
        return any(flag.startswith(WEAKER) for flag in self.flags)


def _derived(
    spec: RunSpec, info: ModelInfo, fingerprint: str, verdicts: Table, attacks: Iterable[str] | None
) -> dict[str, Any]:
    """The fields of a Result that follow from the others and the rows."""
    clean = clean_by_example(verdicts)
    if len(clean) != spec.n_examples:
        raise ValueError(f"there are rows of {len(clean)} examples, not of {spec.n_examples}")
    return {
        "run": spec.run_key(info.checkpoint_sha256, fingerprint),
        "work": spec.work_key(fingerprint),
        "subject": spec.subject_key(info.checkpoint_sha256, fingerprint),
        "clean_accuracy": Accuracy.of(clean),
        "robust_accuracy": Accuracy.of(robust_by_example(verdicts)),
        "accuracy_after": accuracy_after(verdicts, attacks),
        "components": {name: Accuracy.of(rows) for name, rows in component_rates(verdicts).items()},
        "errors": int(verdicts.are("status", "error").sum()),
    }


def suite_label(spec: RunSpec) -> str:
    """The suite, with what is not its default: `pgd`, `pgd[steps=10]`, `pgd[warm_start=True]`."""
    settings = spec.suite_params | ({"warm_start": True} if spec.warm_start else {})
    params = ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
    return f"{spec.suite}[{params}]" if params else spec.suite


def check_verdicts(verdicts: Table) -> None:
    """ValueError, saying which rule, for rows that no run can have."""
    if list(verdicts.types.items()) != list(VERDICT_COLUMNS.items()):
        wrong = sorted(set(verdicts.types.items()) ^ set(VERDICT_COLUMNS.items()))
        raise ValueError(f"columns or their types are not the verdicts': {wrong or 'another order'}")
    if gaps := verdicts.gaps:
        raise ValueError(f"{', '.join(gaps)} is missing in a row")
    ok = verdicts.are("status", "ok")
    if not (ok | verdicts.are("status", "error")).all():
        raise ValueError("status is neither ok nor error in a row")
    if (verdicts["robust"] & ~(verdicts["clean_correct"] & ok)).any():
        raise ValueError("a row is robust although its example is misclassified or its attack failed")
    number, idx = verdicts.examples
    clean = np.bincount(number[verdicts.are("attack", "clean") & verdicts.are("target", "F")], minlength=len(idx))
    if not len(idx) or (clean != 1).any():
        raise ValueError("an example does not have exactly one clean row")
    _ = verdicts.hashes  # one for each example


def _claims(result: Result) -> dict[str, Any]:
    return {
        "run key": result.run,
        "work key": result.work,
        "subject key": result.subject,
        "errors": result.errors,
        "clean accuracy's n": result.clean_accuracy.n,
        "clean accuracy": result.clean_accuracy.value,
        "robust accuracy's n": result.robust_accuracy.n,
        "robust accuracy": result.robust_accuracy.value,
        **{f"accuracy after {attack}": value for attack, value in result.accuracy_after.items()},
        "components": {name: round(accuracy.value, 9) for name, accuracy in result.components.items()},
    }


def check_fit(result: Result, verdicts: Table) -> None:
    """ValueError, naming the first that differs, where the result says what does not follow from its spec and rows."""
    attacks = list(result.accuracy_after)
    derived = _derived(result.spec, result.model_info, result.fingerprint, verdicts, attacks)
    follows = _claims(result.model_copy(update=derived))
    for name, claimed in _claims(result).items():
        same = abs(claimed - follows[name]) < 1e-9 if isinstance(claimed, float) else claimed == follows[name]
        if not same:
            raise ValueError(f"the result says {name} {claimed}, its spec and rows give {follows[name]}")
    _check_robust(result.spec, verdicts)


def _check_robust(spec: RunSpec, verdicts: Table) -> None:
    """ValueError for a row that is robust although its image lies in the ball and F predicts another class for it.

    Of L1 no distance is stored; torchattacks has attacks that know no ε, whose answers may lie outside of the box.
    """
    distances = {"Linf": "linf", "L2": "l2"}
    if (norm := spec.threat_model.norm) not in distances or spec.suite.startswith("torchattacks"):
        return
    there = verdicts[distances[norm]] <= spec.threat_model.reach
    wrong = verdicts["adv_pred"] != verdicts["label"]
    if (verdicts["robust"] & verdicts.are("target", "F") & there & wrong).any():
        raise ValueError("a row is robust although it has an image in the ball that is predicted as another class")

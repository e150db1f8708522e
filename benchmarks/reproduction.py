"""Writes docs/reproduction.md: what of the paper holds, computed from the committed results and shipped models.

python benchmarks/reproduction.py [--check]

Each claim is a difference between two models on the same examples, tested by an exact McNemar test, two-sided; Holm's
correction is over all of them that can have a verdict.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_ind, ttest_rel
from tabulate import tabulate

from bench.boards.leaderboard import Stored, boards_of
from bench.boards.rows import Board, Row
from bench.datasets.base import open_dataset
from bench.models.architecture import Dense, Dual
from bench.models.base import Classifier
from bench.models.checkpoints import ZOO, Header, read_header
from bench.models.variants import get_variant
from bench.results.certificates import conflicts
from bench.results.metrics import clean_by_example, component_rates, holm, mcnemar, robust_by_example
from bench.results.schema import Accuracy
from bench.results.store import Run
from bench.results.table import Table
from bench.spec import ThreatModel
from bench.training.objectives.base import Batch
from bench.training.recipes import architecture, objective_class, train_spec
from bench.tune import MEASURED, Trial, best

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
#: The tables of `bench tune`, <data set>-<norm>-<ε>-<variant>.csv.
TUNING = ROOT / "docs" / "tuning"
#: The threat models that the models were trained for.
TRAINED_FOR = {
    "digits": ThreatModel(norm="Linf", eps=0.2),
    "cifar10": ThreatModel(norm="Linf", eps=8 / 255),
    "tinyimagenet": ThreatModel(norm="Linf", eps=2 / 255),
}
#: The settings that the table of models tells.
SET = ("lr", "balance", "inner_steps", "beta", "expert_term", "expert_reduction", "paths", "alpha")
ACCURACIES = ("SA", "RA, pgd", "RA, autoattack", "RA-worst")
#: The suites that RA-worst is of on the page: those that every model has met.
WORST = ("pgd", "autoattack", "adaptive")
LEVEL = 0.05
#: Behind what had its epoch chosen under PGD on each expert as well.
EXPERTS = ", and experts"
#: By accuracy, whether each example is right.
Series = dict[str, NDArray[np.bool_]]
#: Under which hyper-parameters methods are compared.
SETTINGS = {
    "digits": (
        "Hyper-parameters: of each method what eight trials of `bench tune` chose (see *Tuning*);"
        " `moe-rt_er-published` has the paper's β = 6 with the term on the second expert, `dual-jtdmoe-published` β = 6"
        " and the sum over all experts, `moe-rt_er-all` what was chosen for the term on the second expert, and the mean"
        " over all."
    ),
    "cifar10": (
        "Hyper-parameters: as in the first table above; `moe-at`, `moe-rt_er` (and its `-argmax`), `moe-at-paths` and"
        " `moe-trades` have what four trials of `bench tune` chose (see *Tuning*), the other routed models settings"
        " that are older (docs/training.md)."
    ),
    "tinyimagenet": "Hyper-parameters: as in the table above, one setting of each method, not tuned.",
}
#: Methods of which the first is claimed to be the more robust; compared over training seeds as well.
OVER_SEEDS = (
    ("moe-rt_er", "moe-at"),
    ("moe-rt_er", "moe-trades"),
    ("moe-at", "dense-at"),
    ("moe-rt_er", "dense-at"),
    ("moe-at-paths", "dense-at"),
    ("moe-at-paths", "moe-at"),
    ("moe-at-paths", "moe-rt_er"),
)


@dataclass(frozen=True)
class Test:
    """That `what` of `first` is higher than that of `second`, on the same examples; each a truth value by idx."""

    what: str
    first: str
    second: str
    a: NDArray[np.bool_]
    b: NDArray[np.bool_]
    p: float = 1.0  # adjusted over all tests of the page
    unlike: bool = False  # whether the epochs of the two were chosen by unlike rules

    @property
    def changed(self) -> tuple[int, int]:
        """Examples that only the first has right, and that only the second has."""
        return int((self.a & ~self.b).sum()), int((~self.a & self.b).sum())

    @property
    def only_one(self) -> str:
        return "{} / {}".format(*self.changed)

    @property
    def alone(self) -> float:
        """The p-value of this test by itself."""
        return mcnemar(*self.changed, "two-sided")

    @property
    def verdict(self) -> str:
        """In words; one training seed each, so it is a verdict on these models. A gate bends what PGD follows."""
        if self.unlike:
            return "no verdict: epochs chosen by different rules"
        if self.p >= LEVEL:
            return "cannot be told at this scale"
        only = ", under PGD alone" if self.what == "RA, pgd" else ""
        return ("holds" if self.a.mean() > self.b.mean() else "does not hold") + f" for these models{only}"

    @property
    def difference(self) -> str:
        """In points, with its 95 % interval, from the examples on which the two differ (Wald's, of paired shares)."""
        n, (more, less) = len(self.a), self.changed
        wide = 1.96 * max(0.0, more + less - (more - less) ** 2 / n) ** 0.5
        low, middle, high = (100 * (more - less + side * wide) / n for side in (-1, 0, 1))
        return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"

    def row(self) -> dict[str, str]:
        return {
            "": self.what,
            self.first: share(self.a),
            self.second: share(self.b),
            "difference": self.difference,
            "only one right": self.only_one,
            "p (Holm)": "–" if self.unlike else f"{self.p:.2g}",
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Claim:
    """asked: who says so, and how. tests: none where no committed result can decide it, which `open` then explains."""

    title: str
    asked: str
    tests: Sequence[Test] = ()
    open: str = ""
    note: str = ""


def share(right: NDArray[np.bool_]) -> str:
    found = Accuracy.of(right)
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def accuracies(row: Row) -> Series:
    """By accuracy: SA, RA under PGD, RA under AutoAttack, RA-worst under suites WORST, and what `components` tells."""
    of_suite: dict[str, Table] = {}
    for run in sorted(row.runs, key=lambda run: run.result.spec.suite_version):
        if not run.result.spec.suite_params:
            rows = run.rows()
            of_suite[run.result.spec.suite] = rows.where(np.isin(rows["idx"], row.idx))
    found = {"SA": clean_by_example(of_suite["clean"])}
    if row.ranked and set(WORST) <= of_suite.keys():
        found["RA-worst"] = np.logical_and.reduce([robust_by_example(of_suite[suite]) for suite in WORST])
    found |= {
        f"RA, {suite}": robust_by_example(of_suite[suite]) for suite in ("pgd", "autoattack") if suite in of_suite
    }
    return found | (component_rates(of_suite["components"]) if "components" in of_suite else {})


@dataclass(frozen=True)
class Scored:
    """The rows of one board by model, on its largest evaluation set on which they all are.

    sweeps: of each dual its rows by α; in `rows` it is with the α that it was made with.
    """

    board: Board
    rows: Mapping[str, Row]
    headers: Mapping[str, Header] = field(default_factory=dict)
    sweeps: Mapping[str, Mapping[float, Row]] = field(default_factory=dict)

    def defended(self, model: str) -> bool:
        """Whether its experts were started from an adversarially trained model."""
        return self.start(model, "init").endswith("-at")

    def start(self, model: str, role: str) -> str:
        """The model that its experts were started from, or "" for random weights."""
        header = self.headers.get(model)
        return header.init[role].name if header is not None and role in header.init else ""

    def by_experts(self, model: str) -> bool | None:
        """Whether the epoch that is kept was chosen under PGD on each expert as well; None: it makes no difference, as
        for a dense model, and for one without a defence, whose epoch is that of the highest SA."""
        header = self.headers.get(model)
        if header is not None and header.parts and not header.validation:  # put together: that of its robust branch
            header = self.headers.get(Path(header.parts["robust"].file).stem)
        if header is None or isinstance(header.architecture, Dense) or not header.validation:
            return None
        if header.objective == "standard":
            return None
        return "ra_pgd" in header.validation

    def unlike(self, first: str, second: str) -> bool:
        """Whether the epochs of the two were chosen by unlike rules."""
        return {self.by_experts(first), self.by_experts(second)} == {True, False}

    def series(self, model: str) -> Series:
        return accuracies(self.rows[model])

    def pairs(self, first: str, second: str) -> Iterator[tuple[tuple[str, Series], tuple[str, Series]]]:
        """Two models by name, each with its accuracies; of duals with every α that both are scored with."""
        if first in self.sweeps and second in self.sweeps:
            for alpha in sorted(self.sweeps[first].keys() & self.sweeps[second].keys()):
                a, b = ((named(model, alpha), accuracies(self.sweeps[model][alpha])) for model in (first, second))
                yield a, b
        elif first in self.rows and second in self.rows:
            yield (first, self.series(first)), (second, self.series(second))

    def compare(self, first: str, second: str, whats: Sequence[str]) -> list[Test]:
        """Nothing where a model, or one of its accuracies, is missing."""
        unlike = self.unlike(first, second)
        return [
            Test(what, one, other, a[what], b[what], unlike=unlike)
            for (one, a), (other, b) in self.pairs(first, second)
            for what in whats
            if what in a and what in b
        ]

    def ends(self, model: str) -> list[Test]:
        """A dual with the least α that it is scored with against the same with the largest: one for SA, one for RA."""
        sweep = self.sweeps.get(model, {})
        if len(sweep) < 2:
            return []
        few, many = ((named(model, alpha), accuracies(sweep[alpha])) for alpha in (min(sweep), max(sweep)))
        return [
            Test(what, better[0], worse[0], better[1][what], worse[1][what])
            for what, better, worse in [("SA", few, many), ("RA-worst", many, few)]
            if what in better[1] and what in worse[1]
        ]

    def within(self, model: str, first: str, second: str) -> list[Test]:
        """Two accuracies of one model."""
        found = self.series(model) if model in self.rows else {}
        return (
            [Test(f"of {model}", first, second, found[first], found[second])] if {first, second} <= found.keys() else []
        )

    def left_open(self, first: str, second: str) -> list[Test]:
        """Of the images that AutoAttack leaves of both models, the share that another attack breaks of each."""
        tests: list[Test] = []
        for (one, found), (other, other_found) in self.pairs(first, second):
            if {"RA, autoattack", "RA-worst"} <= found.keys() & other_found.keys():
                left = found["RA, autoattack"] & other_found["RA, autoattack"]
                a, b = (~each["RA-worst"][left] for each in (found, other_found))
                if left.any():
                    what = f"of {left.sum()} images"
                    tests.append(Test(what, one, other, a, b, unlike=self.unlike(first, second)))
        return tests


def scored(boards: Sequence[Board]) -> Iterator[Scored]:
    """The boards of models at the threat model that they were trained for."""
    for board in boards:
        spec = board.rows[0].spec
        if TRAINED_FOR.get(spec.dataset) != spec.threat_model:
            continue
        table = max(board.tables, key=lambda rows: (sum(row.ranked for row in rows), rows[0].n))
        paths = (ZOO / spec.dataset).rglob("*.safetensors")
        headers = {path.stem: read_header(path) for path in sorted(paths)}
        made = {
            name: header.architecture.alpha for name, header in headers.items() if isinstance(header.architecture, Dual)
        }
        rows = {row.spec.model: row for row in table if row.spec.alpha == made.get(row.spec.model)}
        sweeps: dict[str, dict[float, Row]] = {}
        for row in table:
            if row.spec.alpha is not None:
                sweeps.setdefault(row.spec.model, {})[row.spec.alpha] = row
        yield Scored(board, rows, headers, sweeps)


def named(model: str, alpha: float | None) -> str:
    return model if alpha is None else f"{model}, α = {alpha:g}"


def claims(data: Scored) -> list[Claim]:
    """The paper's claims, and three questions of this project's own, on one board."""
    price = data.compare("moe-rt_er", "dual", ["RA-worst"])
    branches = data.compare("moe-standard", "moe-rt_er", ["SA"])
    joint_s, alone_s = data.start("dual-jtdmoe", "init_standard"), data.start("moe-standard", "init")
    every = passes("moe-at-paths")[0] / passes("moe-at")[0]
    settings = SETTINGS[data.board.rows[0].spec.dataset]
    return [
        Claim(
            "Experts are weaker than the router",
            "The paper has RA-R above 50 % and RA-E below 4 % for an undefended MoE. It defines neither. Here RA-R"
            " counts an image as robust where PGD on the router, for a change of route, does not change the class;"
            " RA-E-fixed where PGD on the expert that answers does not, RA-E-any where PGD on no expert does. The order"
            " is tested, not the figures.",
            []
            if data.defended("moe-standard")
            else [test for e in ("RA-E-fixed", "RA-E-any") for test in data.within("moe-standard", "RA-R", e)],
            open="the experts of `moe-standard` were started from an adversarially trained model here."
            if data.defended("moe-standard")
            else "",
        ),
        Claim(
            "RT-ER is better than plain adversarial training",
            "The paper has adversarial training stall near 54 % under PGD, and RT-ER at 69.09 % with SA 77.81 %.",
            data.compare("moe-rt_er", "moe-at", ACCURACIES) + data.compare("moe-rt_er-published", "moe-at", ACCURACIES),
            note=settings,
        ),
        Claim(
            "RT-ER is better than TRADES",
            "The paper claims it for both accuracies.",
            data.compare("moe-rt_er", "moe-trades", ACCURACIES),
            note=settings,
        ),
        Claim(
            "One more robust expert is enough",
            "The term of RT-ER covers the second-ranked expert alone. Enough is no worse than all: what is tested is a"
            " difference either way.",
            data.compare("moe-rt_er", "moe-rt_er-all", ACCURACIES),
            open="no RT-ER whose term covers all experts (`moe-rt_er-all`) is scored on test images.",
            note=settings,
        ),
        Claim(
            "Joint training of the dual model is better than separate training",
            "The paper claims it for both accuracies.",
            data.compare("dual-jtdmoe", "dual", ACCURACIES) + data.compare("dual-jtdmoe-published", "dual", ACCURACIES)
            if joint_s == alone_s
            else [],
            open=f"the standard branch was started from {joint_s or 'random weights'} in joint training, and from"
            f" {alone_s or 'random weights'} in separate training.",
            note=settings,
        ),
        Claim(
            "The dual model is more accurate than its robust branch, and less robust",
            "So the paper: α trades one for the other.",
            branches + data.compare("dual", "moe-rt_er", ["SA"]) + price + data.ends("dual"),
            note="The standard branch is not more accurate than the robust one here: there is no accuracy that α could"
            " trade for, and the first half of the claim is not put to the test."
            if branches and branches[0].a.mean() <= branches[0].b.mean()
            else "",
        ),
        Claim(
            "To mix probabilities is better than to mix logits",
            "The paper's theorem and equations mix probabilities, its released code logits.",
            data.compare("dual", "dual-logits", ACCURACIES),
        ),
        Claim(
            "A routed model is more robust than a dense one",
            "The paper does not compare the two. A user of an MoE wants to know.",
            [
                test
                for routed in ("moe-at", "moe-rt_er", "moe-at-paths")
                for test in data.compare(routed, "dense-at", ACCURACIES)
            ],
        ),
        Claim(
            "Training every path helps",
            "A proposal of this project: objective `at-paths` attacks every expert, not only the one that an image"
            f" is routed to. A step takes {every:.1f} times the passes of one of `moe-at`; epochs are as in the first"
            " table, and no `moe-at` was trained as long by passes.",
            data.compare("moe-at-paths", "moe-at", ACCURACIES) + data.compare("moe-at-paths", "moe-rt_er", ACCURACIES),
            note="The epochs of `moe-at-paths` and `moe-rt_er` were chosen under PGD on the model alone, that of"
            " `moe-at` on each expert as well, which by itself changes RA-worst much (docs/training.md, *Which epoch is"
            " kept*)."
            if data.unlike("moe-at-paths", "moe-at")
            else "",
        ),
        Claim(
            "AutoAttack misses more of the released code's routing than of a trained router's",
            "Its gate is one-hot, so the router has no gradient and is never trained. Of the images that AutoAttack"
            " leaves of both models, the share that all other attacks together break, most of which know the routes.",
            [
                test
                for model in ("moe-rt_er", "moe-at", "dual", "dual-jtdmoe")
                for test in data.left_open(f"{model}-argmax", model)
            ],
        ),
    ]  # fmt: skip


def adjusted(found: list[tuple[Scored, list[Claim]]]) -> list[tuple[Scored, list[Claim]]]:
    """The same, each test with its p-value, corrected over all."""
    p = iter(holm([test.alone for _, own in found for claim in own for test in claim.tests if not test.unlike]))
    return [
        (
            data,
            [
                replace(claim, tests=[test if test.unlike else replace(test, p=next(p)) for test in claim.tests])
                for claim in own
            ],
        )
        for data, own in found
    ]


def page() -> str:
    lines = [
        "# What of the paper holds",
        "",
        "Written by `python benchmarks/reproduction.py` from `results/` and the headers of the shipped models; no"
        " number in it is typed by hand. Accuracies in percent with 95 % Wilson intervals; *difference*: of the first"
        " model from the second, in points, with its 95 % interval for paired images; *only one right*: the images that"
        " only the first, and only the second, has right. p: exact McNemar test on the same examples, two-sided, Holm's"
        " correction over all tests of claims on this page that can have a verdict. Each model is of training seed 0,"
        " so a verdict is on these models, not on the methods in general; where there are several seeds, *Over training"
        " seeds* compares the methods. All models count under the same attacks: RA-worst is here under suites"
        f" {', '.join(f'`{suite}`' for suite in WORST)}, in their newest version with attack seed 0; boards count all"
        " runs that there are. Seconds of training are of the machine that trained the model, a CPU or a GPU"
        " (docs/training.md).",
        "",
        "Each training keeps the epoch with the highest RA on held-out training images (without a defence, SA). RA is"
        " under PGD on the model alone, which flatters routed models, so that another epoch might withstand attacks on"
        " routes better (docs/training.md, *Which epoch is kept*); where a table says *and experts*, under PGD on each"
        " expert as well. Between the two rules there is no verdict.",
        "",
        "Paper: Zhang, Xu, Hu, Wang, *Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model"
        " Approach*, ICML 2025 (arXiv 2502.06832). RA-worst, accuracy under all attacks that ran, is an upper bound"
        " of true robustness.",
    ]  # fmt: skip
    stored = Stored.read(ROOT / "results")
    boards = boards_of(replace(stored, runs=alike(stored.runs)))
    every = list(scored(boards))
    for data, own in adjusted([(data, claims(data)) for data in every]):
        n = next(iter(data.rows.values())).n
        lines += ["", f"## {data.board.title}: the first {n} test images", ""]
        lines += [*trained(data), *tuned(data), *joint(data)]
        for claim in own:
            lines += ["", f"### {claim.title}", "", claim.asked]
            if claim.tests:
                for _, tests in itertools.groupby(claim.tests, lambda test: (test.first, test.second)):
                    rows = [test.row() for test in tests]
                    lines += ["", tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)]
            else:
                lines += ["", f"**Cannot be told**: {claim.open or 'the models that it compares are not scored here.'}"]
            lines += ["", claim.note] if claim.note and claim.tests else []
        lines += [*by_alpha(data), *over_seeds(data, every)]
    lines += [*training_cost(), *certificates(stored, boards)]
    return "\n".join(lines) + "\n"


def alike(runs: Sequence[Run]) -> list[Run]:
    """Those of attack seed 0 and of the newest version of their suite: attacks that all models have met."""
    newest: dict[str, int] = {}
    for spec in (run.result.spec for run in runs):
        newest[spec.suite] = max(spec.suite_version, newest.get(spec.suite, 0))
    return [
        run
        for run in runs
        if run.result.spec.seed == 0 and run.result.spec.suite_version == newest[run.result.spec.suite]
    ]


def by_alpha(data: Scored) -> list[str]:
    """A table of every dual that is scored with several α; else nothing."""
    rows = [
        {"model": model, "α": f"{row.spec.alpha:g}"}
        | {what: share(found[what]) for what in ACCURACIES if what in found}
        for model, sweep in data.sweeps.items()
        if len(sweep) > 1
        for _, row in sorted(sweep.items())
        for found in [accuracies(row)]
    ]
    if not rows:
        return []
    told = "α = 0 is the standard branch alone, α = 1 the robust one."
    table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, missingval="")
    return ["", "### The dual model's α", "", told, "", table]


def of_seeds(data: Scored) -> dict[str, list[Series]]:
    """The methods that are trained with several seeds, each seed's accuracies."""
    found: dict[str, list[Series]] = {}
    ranked = {model: row for model, row in data.rows.items() if row.ranked}
    for model, row in sorted(ranked.items(), key=lambda item: item[1].result.model_info.seed or 0):
        method = model.removesuffix(f"-s{row.result.model_info.seed}")
        # seeds whose epochs were chosen by another rule are another method's
        found.setdefault(method + EXPERTS * bool(data.by_experts(model)), []).append(data.series(model))
    return {method: several for method, several in found.items() if len(several) > 1}


def seed_tests(data: Scored) -> list[dict[str, Any]]:
    """Two methods each whose seeds had their epochs chosen alike: by how much RA-worst differs, and p, unadjusted."""
    methods = of_seeds(data)
    compared = [
        (a, b)
        for first, second in OVER_SEEDS
        for a, b in itertools.product((first, first + EXPERTS), (second, second + EXPERTS))
        if {a, b} <= methods.keys() and (second.startswith("dense") or a.endswith(EXPERTS) == b.endswith(EXPERTS))
    ]
    worst = {method: 100 * np.array([s["RA-worst"] for s in several]) for method, several in methods.items()}
    return [
        {
            "pair": (a, b),
            "difference": float(worst[a].mean() - worst[b].mean()),
            "over seeds": p_value(ttest_ind(worst[a].mean(1), worst[b].mean(1), equal_var=False)),
            "over images": p_value(ttest_rel(worst[a].mean(0), worst[b].mean(0))),
        }
        for a, b in compared
    ]


def over_seeds(data: Scored, every: Sequence[Scored] = ()) -> list[str]:
    """Tables of the methods that are trained with several seeds, and of what can be told of them; else nothing.

    every: the boards of the page, over whose tests p is corrected.
    """
    methods = of_seeds(data)
    if not methods:
        return []
    rows = []
    for method, several in methods.items():
        row = {"method": method, "seeds": str(len(several))}
        for what in ACCURACIES:
            values = [100 * float(series[what].mean()) for series in several]
            row[what] = f"{np.mean(values):.1f} ({min(values):.1f} – {max(values):.1f})"
        rows.append(row)
    found = [(one is data, test) for one in every or [data] for test in seed_tests(one)]
    p = {over: holm([test[over] for _, test in found]) for over in ("over seeds", "over images")}
    tests = []
    for number, (own, test) in enumerate(found):
        decided = "holds" if test["difference"] > 0 else "does not hold"
        of_methods, of_models = p["over seeds"][number], p["over images"][number]
        row = {
            "RA-worst higher of": test["pair"][0],
            "than of": test["pair"][1],
            "difference of means": f"{test['difference']:+.1f}",
            "p over seeds": f"{of_methods:.2g}",
            "of the methods": decided if of_methods < LEVEL else "cannot be told with these seeds",
            "p over images": f"{of_models:.2g}",
            "of these models": decided if of_models < LEVEL else "cannot be told at this scale",
        }
        tests += [row] * own
    told = (
        "Mean over training seeds, with the lowest and the highest. Below it RA-worst is compared, two-sided, by Holm's"
        " correction over each column of these tables on the page. Over seeds: Welch's t-test, which tells of other"
        " seeds of the methods too; it takes seeds as independent, although experts that start from a dense model start"
        " from that of their own seed; three seeds tell large differences alone. Over images: the paired t-test on the"
        " shares of seeds that have an image right, which tells of these models, all seeds together, on other images."
    )
    tables = [tabulate(table, headers="keys", tablefmt="pipe", disable_numparse=True) for table in (rows, tests)]
    return ["", "### Over training seeds", "", told, "", tables[0], "", tables[1]]


def p_value(test: Any) -> float:
    """That of one of scipy's tests; 1 where nothing differs at all, of which scipy says NaN."""
    return float(np.nan_to_num(test.pvalue, nan=1.0))


def trials(board: Board) -> dict[str, pd.DataFrame]:
    """What `bench tune` has tried for this data set and threat model, by variant; the recipe's own setting first."""
    spec = board.rows[0].spec
    start = f"{spec.dataset}-{spec.threat_model.folder}-"
    return {path.stem.removeprefix(start): pd.read_csv(path) for path in sorted(TUNING.glob(f"{start}*.csv"))}


def tuned(data: Scored) -> list[str]:
    """A table of what tuning has chosen of each method; nothing where nothing was tuned."""
    rows, numbers = [], list[tuple[int, int]]()
    for variant, table in trials(data.board).items():
        measured = (*MEASURED, "images")
        settings = [key for key in table if key not in measured]
        searched = [key for key in settings if table[key].nunique() > 1]
        numbers.append((len(table), int(table["images"].iloc[0])))
        chosen = best([
            Trial({key: trial[key] for key in settings}, **{key: trial[key] for key in measured})
            for trial in table.to_dict("records")
        ])  # fmt: skip
        starved = table["dead_experts"] > 0
        rows.append({
            "method": variant,
            "trials": f"{len(table)}" + (f", {starved.sum()} with dead experts" if starved.any() else ""),
            "tried": "; ".join(f"{key} {', '.join(map(str, sorted(set(table[key]))))}" for key in searched),
            "chosen": ", ".join(f"{key}={value}" for key, value in chosen.settings.items() if key in searched),
            "SA": f"{100 * chosen.sa:.1f}",
            "RA": f"{100 * chosen.ra:.1f}",
            "RA of all trials": f"{100 * table['ra'].min():.1f} – {100 * table['ra'].max():.1f}",
        })  # fmt: skip
    if not rows:
        return []
    ((count, images),) = set(numbers)  # else it is no equal budget
    told = (
        "`bench tune` with the same number of trials for each method, its own hyper-parameters, one training seed, RA"
        f" under suite `adaptive` with the small budget on {images} held-out training images: the chosen trial is the"
        f" best of {count} on few images, of those without a dead expert (less than 1 % of the load), so its RA is too"
        " high as an estimate, and the 95 % interval of an RA is up to"
        f" {100 * 1.96 * 0.5 / images**0.5:.0f} points wide to each side. All trials: docs/tuning/."
    )
    return ["", "### Tuning", "", told, "", tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)]


def joint(data: Scored) -> list[str]:
    """All trials of the jointly trained dual: its term, α and balance; nothing where it was not tuned."""
    table = trials(data.board).get("dual-jtdmoe")
    if table is None:
        return []
    settings = [key for key in table if key not in (*MEASURED, "images") and table[key].nunique() > 1]
    rows = [
        {key: trial[key] for key in settings}
        | {
            what: share(np.arange(trial["images"]) < round(trial[what.lower()] * trial["images"]))
            for what in ("SA", "RA")
        }
        for trial in table.to_dict("records")
    ]
    told = (
        "All trials of `dual-jtdmoe`, in which settings vary together, with the intervals of their few images."
        " Published are β = 6, the term on all experts and their sum."
    )
    return ["", told, "", tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)]


def training_cost() -> list[str]:
    """How many passes through an expert a training step takes for each image, and an answer; counted, not timed."""
    rows = []
    for variant in ("dense-at", "moe-at", "moe-trades", "moe-advmoe", "moe-rt_er", "moe-rt_er-all", "moe-at-paths",
                    "dual-jtdmoe", "dual-jtdmoe-published"):  # fmt: skip
        training, answer = passes(variant)
        rows.append({"variant": variant, "training step": training, "answer": answer})
    of, at = ({row["variant"]: row[what] for row in rows} for what in ("training step", "answer"))
    for row in rows:
        row["over `moe-at`"] = f"{row['training step'] / of['moe-at']:.2f}"
    more = of["moe-rt_er"] / of["moe-at"]
    one = passes("moe-rt_er", 1)[0] / passes("moe-at", 1)[0]
    training = "does not hold" if more > 1.1 else "holds"
    inference = "holds" if at["moe-rt_er"] == at["moe-at"] else "does not hold"
    return [
        "", "## Training and inference cost", "",
        "The paper: to make one more expert robust compromises neither the efficiency of training nor that of"
        " inference. Forward passes through an expert for each image, with 10 inner steps and four experts of which one"
        " is selected; in training nearly each has its backward pass.",
        "", tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True), "",
        f"**Training: {training}.** RT-ER takes {more:.2f} times the passes of plain adversarial training, and"
        f" {one:.2f} times with one inner step, since it attacks the second expert as well. **Inference: {inference}"
        f" for the MoE**, which answers with {at['moe-rt_er']} expert for each image, as before; a dual takes"
        f" {at['dual-jtdmoe']}.",
    ]  # fmt: skip


def passes(variant: str, inner_steps: int = 10) -> tuple[int, int]:
    """Forward passes through an expert, for each image of a training step and of an answer."""
    torch.manual_seed(0)
    digits = open_dataset("digits")
    spec = train_spec(variant, digits, digits.threat_model, settings={"inner_steps": inner_steps})
    model = architecture(spec, digits).build()
    x, y = torch.rand(32, *digits.input_shape), torch.arange(32) % digits.num_classes
    counted = [0]

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        counted[0] += len(inputs[0])

    for part in model.modules():
        if isinstance(part, Classifier):
            part.register_forward_hook(count)
    model.eval()(x)
    answer, counted[0] = counted[0], 0
    objective = objective_class(get_variant(variant)).model_validate(spec.objective_params)
    batch = Batch(x, y, spec.threat_model, lambda _: torch.rand_like(x) * 2 - 1)
    for step in objective.steps(model.train(), batch):
        sum(step.loss(model).values()).backward()
    return round(counted[0] / len(x)), round(answer / len(x))


def certificates(stored: Stored, boards: Sequence[Board]) -> list[str]:
    """What is certified of each model on each board, beside the accuracy that all attacks leave."""
    found = [row for board in boards for row in board.rows if row.certified.accuracy is not None]
    rows = [
        {
            "": f"{row.spec.dataset}, {row.spec.threat_model}",
            "model": named(row.spec.model, row.spec.alpha),
            "certified": share(np.arange(row.n) < round(row.certified.accuracy * row.n)),
            "under its attacks": share(row.robust),
            "attacks": attacks(row),
        }
        for row in found
    ]
    here = [row for row in found if TRAINED_FOR.get(row.spec.dataset) == row.spec.threat_model]
    most = [
        f"{100 * best.certified.accuracy:.1f} % of {kind} ({best.spec.dataset}, {best.spec.model}) by bounds"
        for kind, routed in (("an MoE", True), ("a dense model", False))
        for best in [max(
            (row for row in here if (row.spec.model.partition("-")[0] != "dense") == routed),
            key=lambda row: row.certified.accuracy,
        )]
    ]  # fmt: skip
    smaller = [row for row in found if row not in here]
    gaps = [100 * (row.robust.mean() - row.certified.accuracy) for row in smaller]
    where = " and ".join(sorted({f"{row.spec.dataset}, {row.spec.threat_model}" for row in smaller}))
    by = " and ".join(sorted({attacks(row) for row in smaller}))
    broken = len(conflicts(stored.runs, stored.certificates))
    return [
        "", "## Certificates", "",
        "The paper bounds the radius within which its dual model keeps its answer (Theorem 5.4). Its formula, as"
        " publicly implemented, lacks the constant of the competing class and is no lower bound (docs/certificates.md)."
        " Certified here is by sound bounds of the network's layers: a lower bound of robust accuracy, which attacks"
        " bound from above.",
        "", tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True), "",
        f"Adversarial examples that contradict a certificate, of routes or classes, over all runs: {broken}. At the ε"
        f" that the models were trained for at most {' and '.join(most)} is certified: there the bounds are too loose"
        f" to tell what is left of their robustness. On {where} they are {min(gaps):.1f} to {max(gaps):.1f} points"
        f" below what {by} leaves.",
    ]  # fmt: skip


def attacks(row: Row) -> str:
    """The suites that a row's robustness is of."""
    suites = dict.fromkeys(run.result.spec.suite for run in row.runs if run.result.attacked)
    return ", ".join(f"`{suite}`" for suite in suites)


def trained(data: Scored) -> list[str]:
    """A table of the models: training time, images and what its recipe sets apart."""
    rows = []
    for name, header in data.headers.items():
        if name not in data.rows or header.seed:
            continue  # a further seed is trained by the same settings
        if not header.train_images:
            rows.append({"model": name, "set": "put together"})
            continue
        training = header.training or {}
        asked = {"lr": training.get("recipe", {}).get("lr")} | training.get("objective_params", {})
        if asked.get("expert_term") != "all":
            asked.pop("expert_reduction", None)
        if isinstance(header.architecture, Dense):
            asked.pop("balance", None)
        if isinstance(header.architecture, Dual):
            asked |= {"alpha": header.architecture.alpha}
        words = [f"{key}={asked[key]}" for key in SET if key in asked]
        words += [f"{role}={origin.name}" for role, origin in header.init.items()]
        rows.append({
            "model": name,
            "images × epochs": f"{header.train_images:,} × {header.epochs}",
            "epoch kept": f"{header.validation['epoch']:.0f}" + EXPERTS * ("ra_pgd" in header.validation),
            "seconds of training": f"{header.seconds:,.0f}" + (f" ({header.device})" if header.device else ""),
            "set": ", ".join(words),
        })  # fmt: skip
    if not rows:
        return ["The weights of these models are not shipped."]
    return [tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, missingval="")]


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv and PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} is not what the results give: write it again with python benchmarks/reproduction.py")
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)

"""The columns of a board: what each is called and means, where its value comes from, and how a value is written.

Everything that is shown of a row goes through here, also the legend. Percent with two decimals. No torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.boards.rows import ADAPTIVE_VERSION, Row
from bench.errors import UnusableInput, did_you_mean
from bench.results.schema import Accuracy

Value = Accuracy | float | str | None


@dataclass(frozen=True)
class Column:
    """`value` gives a row's, None where it is not known; a share (unit %) is a fraction in [0, 1].

    `key` is the header in the CSV, `title` the one in tables, `meaning` its line in the legend. A column with an
    interval has `<key>_low` and `<key>_high` in the CSV as well. `best`: the highest value is the best.
    """

    key: str
    title: str
    value: Callable[[Row], Value]
    meaning: str = ""
    unit: Literal["%", "p", ""] = ""
    interval: bool = False
    best: bool = False

    def number(self, row: Row) -> float | None:
        """The value, where it is a number."""
        value = self.value(row)
        return value.value if isinstance(value, Accuracy) else None if isinstance(value, str) else value

    def text(self, row: Row) -> str:
        """The value as boards write it; empty where it is not known."""
        value = self.value(row)
        if isinstance(value, Accuracy):
            value = value.value
        if value is None or isinstance(value, str):
            return value or ""
        return percent(value) if self.unit == "%" else f"{value:.2g}" if self.unit == "p" else f"{value:g}"

    def bounds(self, row: Row) -> tuple[str, str]:
        """The 95 % interval's ends."""
        value = self.value(row)
        return (percent(value.low), percent(value.high)) if isinstance(value, Accuracy) else ("", "")

    def cell(self, row: Row) -> str:
        """The value with its interval, as tables show it."""
        value = self.text(row)
        return f"{value} [{', '.join(self.bounds(row))}]" if value and self.interval else value


def percent(fraction: float) -> str:
    """`92.19` for 0.921875."""
    return f"{100 * fraction:.2f}"


def span(fractions: Iterable[float]) -> str:
    """From the least to the largest in percent; all alike are one, none is empty."""
    values = sorted(fractions)
    if not values:
        return ""
    low, high = percent(values[0]), percent(values[-1])
    return low if low == high else f"{low}–{high}"


def _component(name: str) -> Callable[[Row], Value]:
    return lambda row: row.scores.components.get(name)


def _trained(row: Row) -> str:
    info = row.info
    return f"{info.dataset}, {info.threat_model}: {info.trained}" if info.dataset else info.trained


def _joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _counts(row: Row) -> str:
    return _joined(f"{attack} {count}" for attack, count in row.first_broken_by.items())


def _alone(row: Row) -> str | None:
    return None if row.unique_kills is None else _joined(f"{name} {count}" for name, count in row.unique_kills.items())


def _smoothed(row: Row) -> str:
    return "; ".join(f"{percent(share)} ({what})" for what, share in row.certified.smoothed)


_FIRST = (
    Column(
        "rank",
        "rank",
        lambda row: row.rank,
        "by RA-worst, among rows on which AutoAttack has run with its default parameters and, unless the model is known"
        f" to make no choices, suite `adaptive` (from v{ADAPTIVE_VERSION} on) with no less than its standard budget",
    ),
    Column("model", "model", lambda row: row.spec.model),
    Column("objective", "objective", lambda row: row.info.objective),
    Column("experts", "experts", lambda row: row.experts),
    Column("gate", "gate", lambda row: row.info.gate),
    Column("alpha", "α", lambda row: row.alpha, "a dual's weight of its robust branch"),
    Column("combine", "combine", lambda row: row.combine, "what is mixed: logits or probabilities"),
    Column(
        "extra_data",
        "extra data",
        lambda row: {True: "yes", False: "no", None: ""}[row.info.additional_data],
        "whether it was trained on more than the data set's own training images",
    ),
    Column("n", "n", lambda row: str(row.n), "examples"),
    Column("sa", "SA", lambda row: row.scores.clean, "accuracy on clean images, in percent", "%", best=True),
    Column(
        "ra",
        "RA",
        lambda row: row.scores.ra,
        "accuracy under AutoAttack with its default parameters; over several seeds, each example at its worst",
        "%",
        interval=True,
        best=True,
    ),
    Column(
        "ra_seeds", "RA by seed", lambda row: span(row.scores.ra_by_seed), "the range of RA over the attack's seeds"
    ),
)
_LAST = (
    Column(
        "ra_e_fixed",
        "RA-E-fixed",
        _component("RA-E-fixed"),
        "accuracy under PGD on the expert that the clean image is routed to",
        "%",
        interval=True,
    ),
    Column(
        "ra_e_any",
        "RA-E-any",
        _component("RA-E-any"),
        "accuracy under PGD on every expert, worst case",
        "%",
        interval=True,
    ),
    Column(
        "ra_r",
        "RA-R",
        _component("RA-R"),
        "accuracy under PGD on the router, for a change of route",
        "%",
        interval=True,
    ),
    Column(
        "ra_worst",
        "RA-worst",
        lambda row: row.worst,
        "accuracy under all attacks that ran, example by example, with its 95 % Wilson interval; like RA an upper bound"
        " of the true robust accuracy",
        "%",
        interval=True,
        best=True,
    ),
    Column(
        "p_first",
        "p (vs first)",
        lambda row: row.p_first,
        "two-sided exact McNemar test of RA-worst against the first row's, over all ranked rows adjusted by Holm",
        "p",
    ),
    Column(
        "first_broken_by",
        "first broken by",
        _counts,
        "how many examples each attack broke that no attack before it in its suite had; an attack never met the"
        " examples that were broken before it",
    ),
    Column(
        "unique_kills",
        "unique kills",
        _alone,
        "examples that this attack broke and no other; known only where every attack met every example",
    ),
    Column(
        "route_flip_rate",
        "route-flip rate",
        _component("route-flip rate"),
        "how often PGD on the router changes the route",
        "%",
        interval=True,
    ),
    Column(
        "certified_accuracy",
        "certified",
        lambda row: row.certified.accuracy,
        "certified accuracy, a lower bound of the true robust accuracy, by whichever deterministic certificate does"
        " best on each example",
        "%",
        best=True,
    ),
    Column(
        "route_stable",
        "route-stable",
        lambda row: row.certified.route_stable,
        "the share of images that no attack in the ball can send to another expert, of a dual to another of R's",
        "%",
    ),
    Column(
        "smoothed",
        "certified, smoothed model",
        _smoothed,
        "of another classifier, the smoothed one, in L2 and with a small failure probability",
    ),
    Column(
        "flags", "flags", lambda row: "; ".join(row.flags), "how many signs that a figure may be too high, named below"
    ),
    Column("no_rank", "no rank", lambda row: "; ".join(lack.why for lack in row.lacks), "what keeps a row from a rank"),
    Column("seeds", "seeds", lambda row: _joined(sorted({run.result.spec.seed for run in row.runs})), "of the attacks"),
    Column("suite_version", "suite version", lambda row: _joined(row.suites)),
    Column("trained", "trained", _trained),
    Column("run", "run", lambda row: _joined(row.run_keys), "the first digits of the keys of all runs that count"),
)
#: In the CSV alone.
_IDENTITY = (
    Column("fingerprint", "fingerprint", lambda row: row.result.fingerprint[:12]),
    Column("checkpoint", "checkpoint", lambda row: row.info.checkpoint_sha256[:12]),
)
#: What tables show unless other columns are asked for, and the routed models' own figures, a second table.
MAIN = ("rank", "model", "sa", "ra", "ra_worst", "certified_accuracy", "n", "flags")
ROUTED = ("model", "ra_e_any", "ra_r", "route_flip_rate", "route_stable")


def _after(attack: str) -> Column:
    meaning = "accuracy after this attack of AutoAttack and all before it"
    return Column(f"after_{attack}", f"after {attack}", lambda row: row.scores.after.get(attack), meaning, "%")


def _under(suite: str, weaker: bool) -> Column:
    title = f"RA {suite}" + " (weaker than its default)" * weaker
    meaning = "accuracy under this suite"
    return Column(f"ra_{suite}", title, lambda row: row.scores.under.get(suite), meaning, "%")


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the rows of a board, those of the suites that ran on one of them among them."""
    after = dict.fromkeys(attack for row in rows for attack in row.scores.after)
    under = sorted({suite for row in rows for suite in row.scores.under})
    weaker = {suite for row in rows for suite in row.scores.weaker}
    return [*_FIRST, *map(_after, after), *(_under(suite, suite in weaker) for suite in under), *_LAST]


def chosen(every: Sequence[Column], keys: Sequence[str]) -> list[Column]:
    """The columns of these keys, in the keys' order; UnusableInput, with the nearest, for one that is none."""
    by_key = {column.key: column for column in (*every, *_IDENTITY)}
    for key in keys:
        if key not in by_key:
            raise UnusableInput(f"--columns {key}: this board has no such column: {did_you_mean(key, list(by_key))}")
    return [by_key[key] for key in keys]


def record(row: Row, shown: Sequence[Column]) -> dict[str, str]:
    """A row of the CSV, by header: the columns' values, then the ends of intervals, then what identifies the row."""
    values = {column.key: column.text(row) for column in shown}
    for column in shown:
        if column.interval:
            values[f"{column.key}_low"], values[f"{column.key}_high"] = column.bounds(row)
    return values | {column.key: column.text(row) for column in _IDENTITY}

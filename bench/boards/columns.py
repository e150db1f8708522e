"""The columns of a board: what each is called, where its value comes from, and how a value is written.

Everything that is shown of a row goes through here. Percent with two decimals. No torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.boards.rows import Row
from bench.results.schema import Accuracy

Value = Accuracy | float | str | None


@dataclass(frozen=True)
class Column:
    """`value` gives a row's, None where it is not known; a share (unit %) is a fraction in [0, 1].

    `key` is the header in the CSV, `title` the one in tables. A column with an interval has `<key>_low` and
    `<key>_high` in the CSV as well.
    """

    key: str
    title: str
    value: Callable[[Row], Value]
    unit: Literal["%", "p", ""] = ""
    interval: bool = False

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


_FIRST = (
    Column("rank", "rank", lambda row: row.rank),
    Column("model", "model", lambda row: row.spec.model),
    Column("objective", "objective", lambda row: row.info.objective),
    Column("experts", "experts", lambda row: row.experts),
    Column("gate", "gate", lambda row: row.info.gate),
    Column("alpha", "α", lambda row: row.alpha),
    Column("combine", "combine", lambda row: row.combine),
    Column("extra_data", "extra data", lambda row: {True: "yes", False: "no", None: ""}[row.info.additional_data]),
    Column("n", "n", lambda row: str(row.n)),
    Column("sa", "SA", lambda row: row.scores.clean, "%"),
    Column("ra", "RA", lambda row: row.scores.ra, "%", interval=True),
    Column("ra_seeds", "RA by seed", lambda row: span(row.scores.ra_by_seed)),
)
_LAST = (
    Column("ra_e_fixed", "RA-E-fixed", _component("RA-E-fixed"), "%", interval=True),
    Column("ra_e_any", "RA-E-any", _component("RA-E-any"), "%", interval=True),
    Column("ra_r", "RA-R", _component("RA-R"), "%", interval=True),
    Column("ra_worst", "RA-worst", lambda row: row.worst, "%", interval=True),
    Column("p_first", "p (vs first)", lambda row: row.p_first, "p"),
    Column(
        "unique_kills",
        "unique kills",
        lambda row: _joined(f"{attack} {count}" for attack, count in row.kills.items()),
    ),
    Column("route_flip_rate", "route-flip rate", _component("route-flip rate"), "%", interval=True),
    Column("certified_accuracy", "certified accuracy", lambda row: row.certified.accuracy, "%"),
    Column("route_stable", "route-stable", lambda row: row.certified.route_stable, "%"),
    Column(
        "smoothed",
        "certified, smoothed model",
        lambda row: "; ".join(f"{percent(share)} ({what})" for what, share in row.certified.smoothed),
    ),
    Column("flags", "flags", lambda row: "; ".join(row.flags)),
    Column("seeds", "seeds", lambda row: _joined(sorted({run.result.spec.seed for run in row.runs}))),
    Column("suite_version", "suite version", lambda row: _joined(row.suites)),
    Column("trained", "trained", _trained),
    Column("run", "run", lambda row: _joined(row.run_keys)),
)
#: In the CSV alone.
_IDENTITY = (
    Column("fingerprint", "fingerprint", lambda row: row.result.fingerprint[:12]),
    Column("checkpoint", "checkpoint", lambda row: row.info.checkpoint_sha256[:12]),
)


def _after(attack: str) -> Column:
    return Column(f"after_{attack}", f"after {attack}", lambda row: row.scores.after.get(attack), "%")


def _under(suite: str) -> Column:
    return Column(f"ra_{suite}", f"RA {suite}", lambda row: row.scores.under.get(suite), "%")


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the rows of a board, those of the suites that ran on one of them among them."""
    after = dict.fromkeys(attack for row in rows for attack in row.scores.after)
    under = sorted({suite for row in rows for suite in row.scores.under})
    return [*_FIRST, *map(_after, after), *map(_under, under), *_LAST]


def record(row: Row, shown: Sequence[Column]) -> dict[str, str]:
    """A row of the CSV, by header: the columns' values, then the ends of intervals, then what identifies the row."""
    values = {column.key: column.text(row) for column in shown}
    for column in shown:
        if column.interval:
            values[f"{column.key}_low"], values[f"{column.key}_high"] = column.bounds(row)
    return values | {column.key: column.text(row) for column in _IDENTITY}

"""What is to be known of an attack block beside its rows: flags, errors, attacks and what they cost."""

from collections import Counter
from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, Field

from bench.attacks.block import Attempt
from bench.evaluation.verdicts import Judgement


class BlockReport(BaseModel):
    """One block's report, or several merged into one; JSON-able, so that it is kept with the block's rows.

    attacks: those on F in the order they ran, also those that had no example left. passes: attack → forwards and
    backwards, in examples. unconfirmed: attack → successes that the re-check does not confirm. seconds: of the block.
    thread_counts: the numbers of threads that blocks ran with. gates: of each gate inside a network how often it
    selected each expert (`load`), and in how many images an attack on it changed a route (`flipped`).
    """

    flags: list[str] = Field(default_factory=list)
    model_flags: list[str] = Field(default_factory=list)
    errors: list[str] = Field(default_factory=list)
    attacks: list[str] = Field(default_factory=list)
    passes: dict[str, dict[str, int]] = Field(default_factory=dict)
    unconfirmed: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0
    thread_counts: list[int] = Field(default_factory=list)
    gates: dict[str, dict[str, list[int]]] = Field(default_factory=dict)

    def add(self, attempt: Attempt, judged: Judgement) -> None:
        """Take up an attempt and what the re-check makes of it."""
        self._count(attempt.attack, attempt.forwards, attempt.backwards, int(judged.unconfirmed.sum()))
        if failed := int(judged.error.sum()):
            self.errors.append(f"{attempt.attack}: {failed} answers are outside the ball or not finite")

    @classmethod
    def merge(cls, reports: Iterable[Self]) -> Self:
        """The report of all blocks; each flag, error and attack once, in the order of the first block that has it."""
        whole = cls()
        for report in reports:
            for name in ("flags", "model_flags", "errors", "attacks", "thread_counts"):
                own, more = getattr(whole, name), getattr(report, name)
                own.extend(value for value in dict.fromkeys(more) if value not in own)
            for attack, counts in report.passes.items():
                whole._count(attack, counts["forwards"], counts["backwards"], report.unconfirmed.get(attack, 0))
            for gate, counted in report.gates.items():
                before = whole.gates.get(gate, {})
                zero = {name: [0] * len(values) for name, values in counted.items()}
                sums = {name: zip(before.get(name, zero[name]), counted[name], strict=True) for name in counted}
                whole.gates[gate] = {name: [a + b for a, b in pairs] for name, pairs in sums.items()}
            whole.seconds += report.seconds
        return whole

    def run_flags(self) -> tuple[str, ...]:
        """The flags of a run whose blocks' merged report this is, sorted."""
        flags = set(self.flags)
        flags |= {
            f"{attack}: {count} successes that the re-check does not confirm"
            for attack, count in self.unconfirmed.items()
            if count
        }
        if len(threads := sorted(self.thread_counts)) > 1:  # a sum's order depends on it, and a verdict at the edge too
            flags.add(f"attack blocks ran with {' and '.join(map(str, threads))} threads")
        return tuple(sorted(flags))

    def _count(self, attack: str, forwards: int, backwards: int, unconfirmed: int) -> None:
        before = Counter(self.passes.get(attack, {}))
        self.passes[attack] = {
            "forwards": before["forwards"] + forwards,
            "backwards": before["backwards"] + backwards,
        }
        self.unconfirmed[attack] = self.unconfirmed.get(attack, 0) + unconfirmed

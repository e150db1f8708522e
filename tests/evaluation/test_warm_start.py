"""Adversarial examples that a run keeps, and later runs of the same subject that start from them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from bench.attacks.block import Attempt, Block
from bench.datasets.base import EvalSet, fingerprint
from bench.evaluation.plan import RunRequest, plan
from bench.results.metrics import robust_by_example
from bench.results.schema import suite_label
from bench.results.store import read_runs
from bench.results.table import Table
from bench.results.witnesses import FILE, Witnesses
from bench.suites.base import Suite


class Push(Suite):
    """Moves the first pixel by `step` towards the other class, and by up to `noise` less."""

    step: float
    noise: float = 0

    def attack(self, block: Block) -> Iterator[Attempt]:
        rows = block.rows
        x_adv = block.x[rows].clone()
        step = self.step - self.noise * torch.rand(len(rows))
        x_adv[:, 0, 0, 0] += torch.where(block.y[rows] == 1, -step, step)
        yield block.attempt("push", rows, x_adv)


STRONG, WEAK = Push(step=0.18), Push(step=0.07)
#: margins 0.05, 0.05, 0.15 and 0.3, and one image that is wrong without an attack
FIRST, LABELS = [0.45, 0.55, 0.65, 0.8, 0.9], [0, 1, 1, 1, 0]


def images(first: list[float] = FIRST, labels: list[int] | None = None) -> EvalSet:
    """Two pixels an image: the first decides the class, the second is ½."""
    x = torch.tensor([[value, 0.5] for value in first]).view(-1, 1, 1, 2)
    y = torch.tensor(labels or LABELS)
    return EvalSet(x, y, torch.arange(len(first)), fingerprint(x, y), "")


@pytest.fixture
def run(score: Any, linear_net: Any) -> Callable[..., Any]:
    """run(suite): Result and rows in an L∞ ball of 0.2, of the model that answers 1 where x₀ > x₁."""

    def of(suite: Suite, data: EvalSet | None = None, model: Any = None, **options: Any) -> Any:
        options = {"eps": 0.2, "num_classes": 2, **options}
        return score(model or linear_net([[-1, 1], [1, -1]]).eval(), suite, data or images(), **options)

    return of


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The results folder of `run`."""
    return tmp_path / "results"


def witnesses(results: Path) -> Witnesses:
    (path,) = results.rglob(FILE)
    return Witnesses.read(path)


def tried(rows: pd.DataFrame, attack: str = "warm-start") -> dict[int, bool]:
    """Whether an example stood, for those that the attack was tried on."""
    return rows[rows["attack"] == attack].set_index("idx")["robust"].to_dict()


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_it_broke_and_nothing_else(run: Any, kept: Path):
    run(STRONG, batch_size=2)
    found = witnesses(kept)
    assert (found.idx.tolist(), found.attack) == ([0, 1, 2], ("push",) * 3)
    assert found.x_adv[:, 0, 0].tolist() == [
        pytest.approx(pixels) for pixels in ([0.63, 0.5], [0.37, 0.5], [0.47, 0.5])
    ]
    assert sorted(path.name for path in next(kept.rglob("result.json")).parent.iterdir()) == [
        "result.json",
        "verdicts.parquet",
        FILE,
    ]


def test_what_is_outside_the_ball_or_withstands_is_not_kept(run: Any, kept: Path):
    class Far(Push):
        def attack(self, block: Block) -> Iterator[Attempt]:
            for attempt in super().attack(block):
                yield replace(attempt, bounded=False)

    assert run(Far(step=0.4))[0].robust_accuracy.value == 0.8
    assert run(Push(step=0.01))[0].robust_accuracy.value == 0.8
    assert not list(kept.rglob(FILE))


STOPS = range(8)  # two files a block for the two blocks that break something, one for the third, and the run's three


@pytest.mark.slow
def test_a_run_stopped_at_any_file_ends_with_the_same_witnesses(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from bench.results import store

    suite, write = Push(step=0.18, noise=0.01), store.write_atomically
    run(suite, batch_size=2, results=tmp_path / "undisturbed")
    undisturbed = next((tmp_path / "undisturbed").rglob(FILE)).read_bytes()
    for writes in STOPS:
        left, results = [writes], tmp_path / f"stopped-{writes}"

        def stop(path: Path, data: bytes, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_atomically", stop)
            with pytest.raises(KeyboardInterrupt):
                run(suite, batch_size=2, results=results)
        for path in results.rglob("block-*.parquet"):
            assert path.with_suffix(".safetensors").is_file() == ("00002" not in path.name)
        run(suite, batch_size=2, results=results)
        assert next(results.rglob(FILE)).read_bytes() == undisturbed, f"stopped after {writes} files"


def test_a_run_writes_as_many_files_as_it_is_stopped_at(run: Any, monkeypatch: pytest.MonkeyPatch):
    from bench.results import store

    written, write = [], store.write_atomically
    monkeypatch.setattr(store, "write_atomically", lambda path, data: (written.append(path.name), write(path, data)))
    run(STRONG, batch_size=2)
    assert len(written) == len(STOPS)
    assert written[-3:] == [FILE, "verdicts.parquet", "result.json"]


def test_a_block_whose_witnesses_are_damaged_is_attacked_again(run: Any, tmp_path: Path):
    def stop(done: int, *_: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    suite = Push(step=0.18, noise=0.01)
    run(suite, batch_size=2, results=tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(suite, batch_size=2, on_block=stop)
    damaged, _ = sorted(tmp_path.rglob("block-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    told: list[int] = []
    run(suite, batch_size=2, on_block=lambda done, *_: told.append(done))
    assert told == [1, 2, 3]  # the second is as it was, the first is attacked again
    undisturbed, resumed = (next((tmp_path / name).rglob(FILE)).read_bytes() for name in ("undisturbed", "results"))
    assert resumed == undisturbed


# --- where a later run starts ----------------------------------------------------------------------------------------


def test_a_weak_suite_after_a_strong_one_is_nowhere_more_robust(run: Any):
    strong, found = run(STRONG)
    weak, _ = run(WEAK, seed=1)
    warm, rows = run(WEAK, warm_start=True)
    assert (strong.robust_accuracy.value, weak.robust_accuracy.value) == (0.2, 0.4)
    assert (robust_by_example(Table.of(rows)) <= robust_by_example(Table.of(found))).all()
    assert warm.accuracy_after == {"clean": 0.8, "warm-start": 0.2, "push": 0.2}
    assert warm.errors == 0
    assert warm.flags == strong.flags


@pytest.mark.parametrize("norm", ["Linf", pytest.param("L2", marks=pytest.mark.slow)])
def test_no_witness_of_pgd_is_lost_to_a_pgd_that_hardly_moves(norm: str, planted: Any, score: Any):
    model, eps = planted.broken(), {"Linf": 0.03, "L2": 0.3}[norm]
    options = {"norm": norm, "eps": eps, "batch_size": 7}
    strong, found = score(model, "pgd", settings={"steps": 5}, **options)
    still = {"steps": 1, "step_size": 1e-6}
    cold, _ = score(model, "pgd", settings=still, **options)
    warm, rows = score(model, "pgd", settings=still, warm_start=True, **{**options, "batch_size": 24})
    assert strong.robust_accuracy.value < cold.robust_accuracy.value
    assert (robust_by_example(Table.of(rows)) <= robust_by_example(Table.of(found))).all()
    assert warm.flags == cold.flags


def test_the_suite_attacks_only_what_the_witnesses_leave_standing(run: Any):
    run(STRONG)
    warm, rows = run(WEAK, warm_start=True)
    assert tried(rows) == {0: False, 1: False, 2: False}
    assert tried(rows, "push") == {3: True}
    assert warm.passes["warm-start"] == {"forwards": 0, "backwards": 0}  # they cost the re-check alone


def test_clean_columns_are_those_of_the_clean_image_whatever_the_witnesses_did(run: Any):
    class Everywhere(Push):
        """As suite `components`, on all images, also those that the witnesses broke."""

        def attack(self, block: Block) -> Iterator[Attempt]:
            yield block.attempt("push", torch.arange(len(block.y)), block.x)

    _, cold = run(STRONG)
    _, rows = run(Everywhere(step=0), warm_start=True)
    assert tried(rows, "push") == {0: True, 1: True, 2: True, 3: True, 4: False}
    for column in ("clean_correct", "clean_pred", "label", "input_hash"):
        assert (rows.groupby("idx")[column].first() == cold.groupby("idx")[column].first()).all()
        assert (rows.groupby("idx")[column].nunique() == 1).all()


def test_witnesses_come_first_also_where_the_first_block_has_none(run: Any):
    data = images([0.9, 0.55], [1, 1])
    run(STRONG, data)
    warm, _ = run(WEAK, data, warm_start=True, batch_size=1)
    assert list(warm.accuracy_after) == ["clean", "warm-start", "push"]


def test_a_warm_run_keeps_what_it_started_from(run: Any, kept: Path):
    run(STRONG)
    warm, _ = run(WEAK, warm_start=True)
    (made,) = [made for made in read_runs(kept) if made.result.run == warm.run]
    found = Witnesses.read(made.path / FILE)
    assert (found.idx.tolist(), found.attack) == ([0, 1, 2], ("warm-start",) * 3)


def test_witnesses_of_several_runs_are_tried(run: Any):
    data = images([0.45, 0.55], [0, 1])
    first = replace(data, y=torch.tensor([0, 0]))  # other labels: another fingerprint
    run(STRONG, first)
    run(STRONG, data)
    run(STRONG, data, seed=1)
    _, rows = run(WEAK, data, warm_start=True)
    assert tried(rows) == {0: False, 1: False}
    assert len(rows[rows["attack"] == "warm-start"]) == 2  # a second one is for what the first did not break


def another_model(run: Any, linear_net: Any) -> None:
    run(STRONG, model=linear_net([[-1.01, 1], [1, -1]]).eval())


def another_ball(run: Any, linear_net: Any) -> None:
    run(STRONG, eps=0.19)


def another_pixel(run: Any, linear_net: Any) -> None:
    run(STRONG, images([0.46, *FIRST[1:]]))


def fewer_images(run: Any, linear_net: Any) -> None:
    run(STRONG, images(FIRST[:2], LABELS[:2]))


def the_same(run: Any, linear_net: Any) -> None:
    run(STRONG, seed=5, batch_size=3)


def more_images(run: Any, linear_net: Any) -> None:
    run(STRONG, images([*FIRST, 0.52], [*LABELS, 1]))


@pytest.mark.parametrize(
    ("earlier", "lent"),
    [
        (another_model, []), (another_ball, []), (another_pixel, [1, 2]), (fewer_images, [0, 1]),
        (more_images, [0, 1, 2]), (the_same, [0, 1, 2]),
    ],
)  # fmt: skip
def test_only_the_same_subject_lends_its_witnesses_of_the_same_images(
    earlier: Callable[[Any, Any], None], lent: list[int], run: Any, linear_net: Any, kept: Path
):
    earlier(run, linear_net)
    assert len(list(kept.rglob(FILE))) == 1
    _, rows = run(WEAK, warm_start=True)
    assert tried(rows) == dict.fromkeys(lent, False)


def test_another_alpha_lends_nothing(planted: Any, score: Any):
    model, options = planted.dual(0.7), {"settings": {"steps": 5}}
    broken, _ = score(model, "pgd", alpha=0.1, **options)
    assert broken.robust_accuracy.value < 0.5
    assert not tried(score(model, "clean", alpha=0.7, warm_start=True)[1])
    _, rows = score(model, "clean", alpha=0.1, warm_start=True)
    assert robust_by_example(Table.of(rows)).mean() == broken.robust_accuracy.value


def test_without_witnesses_a_warm_start_is_a_cold_one(run: Any, kept: Path):
    warm, rows = run(WEAK, warm_start=True)
    cold, same = run(WEAK)
    pd.testing.assert_frame_equal(rows, same, check_exact=True)
    assert warm.run != cold.run


def test_other_processes_wait_for_the_run_that_the_next_one_starts_from(
    run: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
):
    run(STRONG)
    finished = []

    def the_first_catches_up(seconds: float) -> None:
        finished.append(len(list(kept.rglob("result.json"))))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr("time.sleep", lambda _: pytest.fail("every block is there"))
        run(WEAK, warm_start=True, batch_size=1)

    monkeypatch.setattr("time.sleep", the_first_catches_up)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AttributeError, match="NoneType"):  # it has no result
        run(WEAK, warm_start=True, batch_size=1)
    assert finished == [1]


# --- witnesses that do not hold --------------------------------------------------------------------------------------


def tamper(results: Path, change: Callable[[np.ndarray[Any, Any]], object], *, more: bool = False) -> None:
    """Changes the images of the one earlier run's witnesses; `more`: puts the changed ones before the old ones."""
    (path,) = results.rglob(FILE)
    found = Witnesses.read(path)
    changed = found.x_adv.copy()
    change(changed)
    both = [replace(found, x_adv=changed), *([found] if more else [])]
    path.write_bytes((Witnesses.joined(both) or found).to_bytes())


def back_to_clean(x_adv: Any) -> None:
    x_adv[1, 0, 0, 0] = FIRST[1]


def test_a_second_witness_is_tried_where_the_first_does_not_hold(run: Any, kept: Path):
    run(STRONG)
    tamper(kept, back_to_clean, more=True)
    warm, rows = run(Push(step=0.01), warm_start=True)
    first = rows[rows["attack"] == "warm-start"]
    assert first["idx"].tolist() == [0, 1, 2, 1]
    assert first["robust"].tolist() == [False, True, False, False]
    assert warm.robust_accuracy.value == 0.2
    assert "warm-start: 1 successes that the re-check does not confirm" in warm.flags


def test_what_a_witness_no_longer_breaks_is_left_to_the_suite(run: Any, kept: Path):
    run(STRONG)
    tamper(kept, back_to_clean)
    warm, rows = run(WEAK, warm_start=True)
    assert tried(rows) == {0: False, 1: True, 2: False}
    assert tried(rows, "push") == {1: False, 3: True}
    assert "warm-start: 1 successes that the re-check does not confirm" in warm.flags


@pytest.mark.parametrize(
    ("pixel", "value"),
    [(0, 0.2), (1, np.nan), (1, np.inf)],
    ids=["outside the ball", "NaN", "infinite"],
)
def test_an_illegal_witness_spoils_neither_its_example_nor_its_neighbours(
    pixel: int, value: float, run: Any, kept: Path
):
    run(STRONG)

    def spoil(x_adv: Any) -> None:
        x_adv[1, 0, 0, pixel] = value

    tamper(kept, spoil)
    warm, rows = run(WEAK, warm_start=True)
    assert tried(rows) == {0: False, 2: False}
    assert tried(rows, "push") == {1: False, 3: True}  # judged by the suite
    assert (warm.errors, warm.robust_accuracy.value) == (0, 0.2)
    assert "warm-start: adversarial examples outside the ball or not finite, left out" in warm.flags


def test_a_legal_witness_without_a_finite_answer_is_an_error_and_not_robust(run: Any, kept: Path, linear_net: Any):
    class Fails(torch.nn.Module):
        """NaN where the second pixel is below 0.45."""

        def __init__(self) -> None:
            super().__init__()
            self.net = linear_net([[-1, 1], [1, -1]])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x[:, :, 0, 1] < 0.45, torch.nan, self.net(x))

    model = Fails().eval()
    run(STRONG, model=model)

    def poison(x_adv: Any) -> None:
        x_adv[1, 0, 0, 1] = 0.4

    tamper(kept, poison)
    warm, rows = run(Push(step=0.01), model=model, warm_start=True)
    assert tried(rows) == {0: False, 1: False, 2: False}
    assert rows[rows["status"] == "error"]["idx"].tolist() == [1]
    assert warm.errors == 1


# --- the commands ----------------------------------------------------------------------------------------------------

PGD = ["run", "--model", "moe-at", "--n-examples", "60", "--suite"]
STILL = ["pgd", "--set", "steps=1", "--set", "step_size=1e-6"]


def test_a_warm_start_has_a_label_of_its_own(shelve: Any, tmp_path: Path):
    shelve(tmp_path, "moe-at")
    request = RunRequest(suites=("pgd", "clean"), dataset="digits", models=("moe-at",), n_examples=2)
    cold, warm = (
        plan(request.model_copy(update={"warm_start": given}), tmp_path, [tmp_path]).jobs("moe-at")
        for given in (False, True)
    )
    assert [suite_label(job.spec) for job in cold] == ["pgd", "clean"]
    assert [suite_label(job.spec) for job in warm] == ["pgd[warm_start=True]", "clean[warm_start=True]"]
    assert cold[0].spec.run_key("c", "f") != warm[0].spec.run_key("c", "f")
    assert cold[0].spec.subject_key("c", "f") == warm[0].spec.subject_key("c", "f")


def test_command_starts_from_the_suites_before_it_and_the_board_shows_it_apart(bench: Any, shelve: Any, tmp_path: Path):
    shelve(tmp_path / "checkpoints", "moe-at")
    assert bench(*PGD, "pgd", "--set", "steps=5")[0] == 0
    assert bench(*PGD, *STILL, "--warm-start")[0] == 0
    assert bench(*PGD, *STILL)[0] == 0
    share = {suite_label(run.result.spec): run.result.robust_accuracy.value for run in read_runs(tmp_path / "results")}
    strong, still = "pgd[steps=5]", "pgd[step_size=1e-06, steps=1]"
    warm = still.replace("]", ", warm_start=True]")
    assert share[warm] <= share[strong] < share[still]
    assert bench("leaderboard")[0] == 0
    row = pd.read_csv("leaderboards/digits_Linf-0.2.csv").loc[0]
    shown = {label: row[f"ra_{label}"] for label in share}
    assert shown == {label: pytest.approx(100 * value, abs=0.005) for label, value in share.items()}
    assert row["ra_worst"] == shown[warm]


def test_only_a_warm_start_reads_witnesses_and_a_damaged_file_is_one_line(bench: Any, shelve: Any, tmp_path: Path):
    shelve(tmp_path / "checkpoints", "moe-at")
    assert bench(*PGD, "pgd", "--set", "steps=5")[0] == 0
    (path,) = (tmp_path / "results").rglob(FILE)
    path.write_bytes(path.read_bytes()[:-1])
    assert bench(*PGD, "clean")[0] == 0
    status, out, err = bench(*PGD, "clean", "--warm-start")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: '{path.relative_to(tmp_path)}' is no whole file of witnesses")
    assert err.endswith("remove the folder it is in, and make that run again\n")

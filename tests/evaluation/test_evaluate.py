"""RunSpec to verdicts: by hand, block by block, resumed, seeded, and without a trace in the process."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bench.attacks.block import Attempt, Block
from bench.boards.check import check
from bench.datasets.base import EvalSet, fingerprint, input_hash
from bench.errors import UnusableInput
from bench.evaluation import evaluate as evaluation
from bench.evaluation import examine
from bench.randomness import block_seed
from bench.results.store import read_runs, run_folder
from bench.suites.base import Suite

Attack = Callable[[Block], Iterator[Attempt]]


class Threshold(nn.Module):
    """Class 1 where the first pixel is above ½: logits (−m, m), m = x₀ − ½. NaN where the last pixel is `poison`."""

    def __init__(self, poison: float = 0.99) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.poison = poison

    def forward(self, x: Tensor) -> Tensor:
        m = self.scale * (x[:, 0, 0, 0] - 0.5)
        m = torch.where(x[:, 0, 0, -1] == torch.tensor(self.poison), torch.nan, m)
        return torch.stack([-m, m], dim=1)


def images(first: list[float], labels: list[int] | None = None, last: dict[int, float] | None = None) -> EvalSet:
    """Two pixels an image: the first decides the class, the last is ½ by default."""
    x = torch.tensor([[value, 0.5] for value in first]).view(-1, 1, 1, 2)
    for i, value in (last or {}).items():
        x[i, 0, 0, 1] = value
    y = torch.tensor(labels or [int(value > 0.5) for value in first])
    return EvalSet(x, y, torch.arange(len(first)), fingerprint(x, y), "")


def planted_suite(attack: Attack) -> Suite:
    """A suite that attacks as told."""

    class Planted(Suite):
        def attack(self, block: Block) -> Iterator[Attempt]:
            return attack(block)

    return Planted()


def move(block: Block, step: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The examples not yet broken (or `rows`), and their images with the first pixel moved towards the other class."""
    rows = block.rows if rows is None else rows
    x_adv = block.x[rows].clone()
    x_adv[:, 0, 0, 0] += torch.where(block.y[rows] == 1, -step, step)
    return rows, x_adv


def push(step: float) -> Attack:
    """An attack, called push, that moves the first pixel by `step`."""

    def attack(block: Block) -> Iterator[Attempt]:
        yield block.attempt("push", *move(block, step))

    return attack


@pytest.fixture
def run(score: Any) -> Callable[..., Any]:
    """run(attack, data): Result and rows of a planted attack on Threshold, in an L∞ ball of 0.2."""

    def of(attack: Attack, data: EvalSet, model: nn.Module | None = None, **options: Any) -> Any:
        options = {"eps": 0.2, "num_classes": 2, **options}
        return score(model or Threshold(), planted_suite(attack), data, **options)

    return of


def column(rows: pd.DataFrame, attack: str, name: str) -> list[Any]:
    return rows[rows["attack"] == attack][name].tolist()


def test_rows_of_a_block_by_hand(run: Any):
    # margins 0.1, 0.15 and 0.3, and one image that is wrong without an attack
    data = images([0.4, 0.65, 0.8, 0.7], labels=[0, 1, 1, 0])
    result, rows = run(push(0.16), data)
    assert column(rows, "clean", "robust") == column(rows, "clean", "clean_correct") == [True, True, True, False]
    assert column(rows, "clean", "adv_pred") == column(rows, "clean", "clean_pred") == [0, 1, 1, 1]
    assert column(rows, "push", "idx") == [0, 1, 2]  # what is wrong already is not attacked
    assert column(rows, "push", "adv_pred") == [1, 0, 1]
    assert column(rows, "push", "robust") == [False, False, True]
    assert column(rows, "push", "linf") == pytest.approx([0.16] * 3)
    assert set(rows["status"]) == {"ok"}
    assert (rows["label"] == rows["idx"].map({0: 0, 1: 1, 2: 1, 3: 0})).all()
    assert column(rows, "push", "input_hash") == [input_hash(data.x[i]) for i in range(3)]
    assert (result.clean_accuracy.value, result.robust_accuracy.value) == (0.75, 0.25)
    assert result.accuracy_after == {"clean": 0.75, "push": 0.25}
    assert (result.errors, result.error_messages, result.flags) == (0, (), ())


def test_attack_that_raises_makes_errors_of_what_still_stands(run: Any, tmp_path: Path):
    def attack(block: Block) -> Iterator[Attempt]:
        yield block.attempt("push", *move(block, 0.12))
        raise RuntimeError("no more memory")

    result, rows = run(attack, images([0.4, 0.65, 0.8, 0.7], labels=[0, 1, 1, 0]))
    assert column(rows, "push", "robust") == [False, True, True]  # broken before it raised: stays broken
    assert column(rows, "planted", "idx") == [1, 2]
    assert column(rows, "planted", "status") == ["error", "error"]
    assert column(rows, "planted", "robust") == [False, False]
    assert column(rows, "planted", "adv_pred") == [-1, -1]
    assert (result.errors, result.robust_accuracy.value) == (2, 0)
    assert result.error_messages == ("planted: RuntimeError: no more memory",)
    with pytest.raises(UnusableInput, match="has errors in 2 rows"):
        check(tmp_path / "results", tmp_path / "results")


def test_attack_that_raises_after_an_error_leaves_one_error_row_an_example(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        rows, x_adv = move(block, 0.12)
        x_adv[0] = float("nan")
        yield block.attempt("push", rows, x_adv)
        raise RuntimeError("no more memory")

    result, rows = run(attack, images([0.4, 0.65, 0.8]))
    assert column(rows, "push", "status") == ["error", "ok", "ok"]
    assert column(rows, "planted", "idx") == [1, 2]
    assert result.errors == 3


@pytest.mark.parametrize("step", [0.21, float("nan")])
def test_illegal_answer_is_an_error_and_its_neighbours_are_judged(step: float, run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        rows, x_adv = move(block, 0.12)
        x_adv[1, 0, 0, 0] = block.x[1, 0, 0, 0] + step
        yield block.attempt("push", rows, x_adv)

    result, rows = run(attack, images([0.4, 0.65, 0.8]))
    assert column(rows, "push", "status") == ["ok", "error", "ok"]
    assert column(rows, "push", "robust") == [False, False, True]
    assert result.errors == 1
    assert result.error_messages == ("push: 1 answers are outside the ball or not finite",)


def test_what_an_unbounded_attack_finds_outside_is_neither_broken_nor_an_error(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        yield block.attempt("far", *move(block, 0.25), bounded=False)

    result, rows = run(attack, images([0.4, 0.65, 0.8]))
    assert column(rows, "far", "adv_pred") == [1, 0, 1]
    assert (column(rows, "far", "robust"), result.errors) == ([True, True, True], 0)


def test_answer_of_another_shape_is_an_error(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        yield block.attempt("push", block.rows, block.x[:, :, :, :1])

    result, rows = run(attack, images([0.4, 0.65]))
    assert column(rows, "planted", "status") == ["error", "error"]
    assert result.error_messages == (
        "planted: ValueError: the attack returned images of shape (2, 1, 1, 1) for (2, 1, 1, 2)",
    )


def test_logits_that_are_not_finite_under_attack_are_errors(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        rows, x_adv = move(block, 0.12)
        x_adv[0, 0, 0, 1] = 0.6
        yield block.attempt("push", rows, x_adv)

    result, rows = run(attack, images([0.4, 0.65]), model=Threshold(poison=0.6))
    assert column(rows, "clean", "status") == ["ok", "ok"]
    assert column(rows, "push", "status") == ["error", "ok"]
    assert (result.errors, result.robust_accuracy.value) == (1, 0.5)


def test_success_is_that_of_the_deployed_model(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        # a surrogate claims the one that withstands, and is silent of the one that falls
        yield block.attempt("surrogate", *move(block, 0.12), claimed=torch.tensor([True, False]))

    result, rows = run(attack, images([0.65, 0.4]))
    assert column(rows, "surrogate", "robust") == [True, False]
    assert result.flags == ("surrogate: 1 successes that the re-check does not confirm",)


def test_attack_that_leaves_the_model_in_training_mode_changes_no_verdict(run: Any):
    class Moody(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x) if self.training else super().forward(x)

    def attack(block: Block) -> Iterator[Attempt]:
        block.model.train()
        yield block.attempt("push", *move(block, 0.12))

    result, _ = run(attack, images([0.4, 0.65, 0.8]), model=Moody())
    assert result.robust_accuracy.value == pytest.approx(2 / 3)


def test_a_parts_rows_are_about_the_part_and_count_in_no_accuracy(run: Any):
    class Two(Threshold):
        """Routed by nothing to expert 0, this threshold; expert 1 gives the opposite answer."""

        def __init__(self) -> None:
            super().__init__()
            opposite = Threshold()
            opposite.scale.data.neg_()
            self.experts, self.router = nn.ModuleList([Threshold(), opposite]), nn.Identity()

    def attack(block: Block) -> Iterator[Attempt]:
        rows, x_adv = move(block, 0.2)
        yield block.attempt("push", rows, x_adv, target="expert:0")
        yield block.attempt("push", rows, x_adv, target="expert:1")
        yield block.attempt("nudge", *move(block, 0.12))

    result, rows = run(attack, images([0.4, 0.65]), model=Two())
    parts = rows[rows["attack"] == "push"]
    assert parts["target"].tolist() == ["expert:0"] * 2 + ["expert:1"] * 2
    assert parts["clean_pred"].tolist() == [0, 1, 1, 0]
    assert parts["adv_pred"].tolist() == [1, 0, 0, 1]
    assert parts["clean_correct"].tolist() == [True, True, False, False]
    assert parts["robust"].tolist() == [False] * 4
    assert result.accuracy_after == {"clean": 1, "nudge": 0.5}
    assert result.robust_accuracy.value == 0.5


def test_error_in_one_block_leaves_the_others_alone(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        if block.seed != 0:
            raise ValueError("of this block only")
        yield block.attempt("push", *move(block, 0.12))

    result, rows = run(attack, images([0.4, 0.65, 0.8, 0.3]), batch_size=2)
    assert column(rows, "push", "robust") == [False, True]
    assert column(rows, "planted", "idx") == [2, 3]
    assert (result.errors, result.robust_accuracy.value) == (2, 0.25)


def test_model_that_is_not_finite_on_the_first_block_is_refused(run: Any, tmp_path: Path):
    with pytest.raises(UnusableInput, match="'m' gives logits that are not finite for 1 of the first 2 clean images"):
        run(push(0.1), images([0.4, 0.65], last={1: 0.99}))
    assert not list(tmp_path.rglob("*.json"))


def test_logits_that_are_not_finite_in_a_later_block_are_errors(run: Any):
    # the third is of class 0, which is what argmax makes of NaN
    result, rows = run(push(0.12), images([0.4, 0.65, 0.2, 0.8], last={2: 0.99}), batch_size=2)
    assert column(rows, "clean", "status") == ["ok", "ok", "error", "ok"]
    assert column(rows, "clean", "clean_correct") == [True, True, False, True]
    assert column(rows, "push", "idx") == [0, 1, 3]
    assert (result.errors, result.clean_accuracy.value, result.robust_accuracy.value) == (1, 0.75, 0.5)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: x.flatten(1) @ torch.ones(5, 2), "'m' cannot take 1×1×2 images: RuntimeError: mat1 and mat2"),
        (lambda x: torch.zeros(len(x), 3), r"'m' gives shape \(2, 3\) for 2 images, where logits of 2 classes"),
        (lambda x: torch.zeros(2), r"'m' gives shape \(2,\) for 2 images"),
        (lambda x: {"y": x}, "'m' gives a dict of 'y' without 'logits' for 2 images"),
    ],
)
def test_model_for_other_images_or_classes_is_refused(forward: Any, message: str, run: Any):
    model = nn.Module()
    model.forward = forward
    with pytest.raises(UnusableInput, match=message) as refusal:
        run(push(0.1), images([0.4, 0.65]), model=model)
    assert "\n" not in str(refusal.value)


def test_unusable_input_of_an_attack_is_no_error_row(run: Any, tmp_path: Path):
    def attack(block: Block) -> Iterator[Attempt]:
        raise UnusableInput("needs routing")

    with pytest.raises(UnusableInput, match="needs routing"):
        run(attack, images([0.4]))
    assert not list(tmp_path.rglob("*.parquet"))


def test_passes_are_the_attacks_own_and_summed_over_blocks(run: Any):
    def attack(block: Block) -> Iterator[Attempt]:
        x = block.x.clone().requires_grad_()
        block.model(x).sum().backward()
        block.model(block.x[:1])
        yield block.attempt("first", *move(block, 0.01))
        yield block.attempt("second", *move(block, 0.01))

    result, _ = run(attack, images([0.4, 0.65, 0.8]), batch_size=2)
    # blocks of 2 and 1: (2 + 1) + (1 + 1) forwards, 2 + 1 backwards; the re-check's passes are nobody's
    assert result.passes == {"first": {"forwards": 5, "backwards": 3}, "second": {"forwards": 0, "backwards": 0}}


# --- blocks and seeds ------------------------------------------------------------------------------------------------


def test_block_seeds_are_32_bits_and_the_first_is_the_runs():
    seeds = [block_seed(7, block) for block in range(10_000)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 10_000
    assert max(seeds) < 2**32
    assert set(seeds).isdisjoint(block_seed(8, block) for block in range(10_000))


@pytest.mark.parametrize("suite", ["pgd", pytest.param("torchattacks:APGD", marks=pytest.mark.slow)])
def test_same_command_gives_the_same_rows_and_blocks_are_independent(
    suite: str, planted: Any, score: Any, tmp_path: Path
):
    data, options = planted.data(), {"eps": 0.05, "batch_size": 12, "settings": {"steps": 3}}
    first, rows = score(planted.broken(), suite, data, results=tmp_path / "a", **options)
    torch.rand(5), np.random.rand(5), random.random()  # where the caller's random states are must not matter
    again, same = score(planted.broken(), suite, data, results=tmp_path / "b", **options)
    pd.testing.assert_frame_equal(rows, same, check_exact=True)
    assert first.run == again.run
    attacked = rows[rows["attack"] != "clean"]
    assert 0 < attacked["l2"].nunique() > len(attacked) / 2  # the start is random, so a distance is a fingerprint

    other = EvalSet(1 - data.x, data.y, data.idx, "other", "")  # the second block keeps its images
    other.x[12:] = data.x[12:]
    _, changed = score(planted.broken(), suite, other, results=tmp_path / "c", **options)
    second = lambda frame: frame[frame["idx"] >= 12].reset_index(drop=True)  # noqa: E731
    pd.testing.assert_frame_equal(second(rows), second(changed), check_exact=True)

    alone = EvalSet(data.x[12:], data.y[12:], data.idx[12:], "alone", "")
    _, part = score(planted.broken(), suite, alone, results=tmp_path / "d", seed=block_seed(0, 1), **options)
    pd.testing.assert_frame_equal(second(rows), part, check_exact=True)


@pytest.mark.slow
def test_seed_and_block_size_make_another_run(planted: Any, score: Any, tmp_path: Path):
    results = [
        score(planted.broken(), "pgd", eps=0.05, settings={"steps": 1}, **fields)
        for fields in ({}, {"seed": 1}, {"batch_size": 12})
    ]
    assert len({result.run for result, _ in results}) == 3
    assert len({result.work for result, _ in results}) == 2  # seeds of one work are compared
    distances = [rows["l2"].tolist() for _, rows in results]
    assert distances[0] != distances[1]
    assert len(read_runs(tmp_path / "results")) == 3


def states() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        random.getstate(),
        torch.get_float32_matmul_precision(),
        (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("failure", [None, ValueError, UnusableInput, KeyboardInterrupt])
def test_process_and_model_are_left_as_they_were(failure: type[BaseException] | None, planted: Any, score: Any):
    model = planted.robust()
    model.experts[1].train()
    model.experts[0].weight.requires_grad_(False)

    def attack(block: Block) -> Iterator[Attempt]:
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.rand(3), np.random.rand(3), random.random()
        block.model.train()
        block.model.requires_grad_(True)
        if failure is not None:
            raise failure("planted")
        yield block.attempt("planted", block.rows, block.x[block.rows])

    torch.set_float32_matmul_precision("high")
    try:
        before = states()
        modes = [module.training for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        passed_on = failure in (UnusableInput, KeyboardInterrupt)  # the others make error rows
        with pytest.raises(failure) if passed_on else nullcontext():
            score(model, planted_suite(attack))
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert states() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
def test_alpha_of_the_spec_is_that_of_the_model(planted: Any, score: Any):
    model = planted.dual(0.7)
    shares = {alpha: score(model, "pgd", alpha=alpha)[0].robust_accuracy.value for alpha in (0.7, 0.3, 0.7)}
    assert shares[0.7] == 23 / 24
    assert shares[0.3] < 0.5


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_alpha_may_be_a_tensor_of_a_users_own_dual(kind: str, planted: Any, score: Any):
    model = planted.dual(0.7)
    del model.alpha
    alpha = torch.tensor(0.5)
    if kind == "buffer":
        model.register_buffer("alpha", alpha)
    else:
        model.alpha = nn.Parameter(alpha)
    model.mix = lambda s, r: ((1 - model.alpha) * s.softmax(1) + model.alpha * r.softmax(1)).log()
    shares = {alpha: score(model, "pgd", alpha=alpha)[0].robust_accuracy.value for alpha in (0.75, 0.25)}
    assert shares[0.75] == 23 / 24
    assert shares[0.25] < 0.5


def test_a_users_dual_without_a_trace_shows_its_robust_branchs_route_or_none(planted: Any, score: Any):
    class Dual(nn.Module):
        def __init__(self, standard: nn.Module, robust: nn.Module) -> None:
            super().__init__()
            self.standard, self.robust, self.alpha = standard, robust, 0.7

        def forward(self, x: Tensor) -> Tensor:
            return 0.3 * self.standard(x) + 0.7 * self.robust(x)

    robust, data = planted.robust(), planted.data()
    _, rows = score(Dual(planted.broken(), robust), "clean", data)
    assert rows["clean_expert"].tolist() == robust.router(data.x).argmax(1).tolist()
    _, rows = score(Dual(planted.broken(), robust.experts[0]), "clean", data)
    assert set(rows["clean_expert"]) == {-1}


@pytest.mark.parametrize("answer", [None, (None, {}), (None, torch.zeros(2))])
def test_trace_that_tells_no_routing_is_refused(answer: Any, planted: Any, score: Any):
    model = planted.robust()
    model.trace, model.forward = (lambda _: answer), model.experts[0].forward
    with pytest.raises(UnusableInput, match=r"'m' cannot take 3×8×8 images: (Type|Attribute)Error"):
        score(model, "clean")


def test_routing_is_in_the_rows_where_it_is_visible(planted: Any, score: Any):
    model, data = planted.robust(), planted.data()
    _, rows = score(model, "pgd", data)
    routes = model.router(data.x).argmax(1).tolist()
    assert rows[rows["attack"] == "clean"]["clean_expert"].tolist() == routes
    assert set(rows[rows["attack"] == "pgd"]["adv_expert"]) <= {0, 1, 2}
    _, hidden = score(nn.Sequential(model), "pgd", data)
    assert set(hidden["clean_expert"]) == set(hidden["adv_expert"]) == {-1}


# --- resuming --------------------------------------------------------------------------------------------------------


def test_finished_run_is_reported_and_not_repeated(run: Any):
    calls = []

    def attack(block: Block) -> Iterator[Attempt]:
        calls.append(block.seed)
        yield block.attempt("push", *move(block, 0.12))

    data = images([0.4, 0.65, 0.8])
    first, rows = run(attack, data, batch_size=2)
    again, same = run(attack, data, batch_size=2, on_block=lambda *_: pytest.fail("nothing is done"))
    assert calls == [0, block_seed(0, 1)]
    assert again == first
    pd.testing.assert_frame_equal(rows, same)


def test_interrupted_run_attacks_only_what_is_missing(run: Any, tmp_path: Path):
    calls: list[int] = []

    def attack(block: Block) -> Iterator[Attempt]:
        calls.append(block.seed)
        yield block.attempt("push", *move(block, 0.2 * float(torch.rand(()))))

    def stop(done: int, blocks: int, unbroken: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    data = images([0.45, 0.55, 0.4, 0.65, 0.8, 0.2, 0.9])
    undisturbed, rows = run(attack, data, batch_size=2, results=tmp_path / "undisturbed")
    seeds = [block_seed(0, block) for block in range(4)]
    assert calls == seeds
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(attack, data, batch_size=2, on_block=stop)
    assert calls == seeds[:2]
    assert not list((tmp_path / "results").rglob("result.json"))
    calls.clear()
    told: list[tuple[int, int, int]] = []
    resumed, same = run(attack, data, batch_size=2, on_block=lambda *news: told.append(news))
    assert calls == seeds[2:]
    pd.testing.assert_frame_equal(rows, same, check_exact=True)
    assert resumed.robust_accuracy == undisturbed.robust_accuracy
    assert resumed.passes == undisturbed.passes
    assert [(done, blocks) for done, blocks, _ in told] == [(2, 4), (3, 4), (4, 4)]
    assert told[-1] == (4, 4, round(undisturbed.robust_accuracy.value * 7))  # also what stood before it was stopped
    assert not list((tmp_path / "results").rglob("blocks"))


def test_damaged_block_is_attacked_again(run: Any, tmp_path: Path):
    calls: list[int] = []

    def attack(block: Block) -> Iterator[Attempt]:
        calls.append(block.seed)
        yield block.attempt("push", *move(block, 0.12))

    def stop(done: int, *_: int) -> None:
        if done:
            raise KeyboardInterrupt

    data = images([0.4, 0.65, 0.8])
    with pytest.raises(KeyboardInterrupt):
        run(attack, data, batch_size=2, on_block=stop)
    (block,) = tmp_path.rglob("block-*.parquet")
    block.write_bytes(block.read_bytes()[:-20])
    run(attack, data, batch_size=2)
    assert calls == [0, 0, block_seed(0, 1)]


def test_a_run_resumed_with_another_number_of_threads_says_so(run: Any, monkeypatch: pytest.MonkeyPatch):
    def stop(done: int, *_: int) -> None:
        if done:
            raise KeyboardInterrupt

    data = images([0.45, 0.55])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        run(push(0.12), data, batch_size=1, on_block=stop)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    resumed, _ = run(push(0.12), data, batch_size=1)
    assert resumed.flags == ("attack blocks ran with 1 and 2 threads",)
    assert resumed.environment["threads"] == "2"


def test_two_processes_that_finish_the_same_run_agree(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = images([0.45, 0.55, 0.4])
    first, rows = run(push(0.12), data, batch_size=1)
    folder = run_folder(tmp_path / "results", first.spec, first.run)
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    for file in kept:
        file.unlink()

    def the_other_finishes(done: int, blocks: int, unbroken: int) -> None:
        if done == blocks:
            shutil.rmtree(folder / "blocks")
            for file, content in kept.items():
                file.write_bytes(content)

    again, same = run(push(0.12), data, batch_size=1, on_block=the_other_finishes)
    assert again == first
    pd.testing.assert_frame_equal(rows, same)


def test_what_another_process_has_finished_meanwhile_is_not_attacked(run: Any, tmp_path: Path):
    data = images([0.45, 0.55, 0.4])
    first, rows = run(push(0.12), data, batch_size=1)
    folder = run_folder(tmp_path / "results", first.spec, first.run)
    result = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    again, same = run(
        lambda _: pytest.fail("it is finished"),
        data,
        batch_size=1,
        on_block=lambda *_: (folder / "result.json").write_bytes(result),
    )
    assert again == first
    pd.testing.assert_frame_equal(rows, same)


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_for_a_process_that_is_gone_ends_and_names_the_block(
    rank: int, run: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(evaluation, "_PATIENCE", 0.2)
    monkeypatch.setattr(evaluation, "_PATIENCE_BLOCKS", 0)
    monkeypatch.setattr(evaluation, "_POLL", 0.05)
    data = images([0.45, 0.55, 0.4, 0.7])
    with pytest.raises(UnusableInput, match=r"^block [01] of .* was not written by its process .* the same command"):
        run(push(0.12), data, batch_size=2, warm_start=True)


def test_waiting_goes_on_as_long_as_blocks_come(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data = images([0.45, 0.55, 0.4, 0.7, 0.3, 0.8])
    monkeypatch.setattr(evaluation, "_PATIENCE", 100)
    clock = iter(range(0, 10_000, 60))  # each look takes a minute: the whole wait is longer than the patience
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "0")
    waits: list[float] = []

    def another_process_works(seconds: float) -> None:
        waits.append(seconds)
        with pytest.MonkeyPatch.context() as other:
            other.setattr(evaluation.time, "sleep", lambda _: None)
            other.setenv("RANK", str(len(waits)))
            with suppress(AttributeError):  # the fixture reads the result, which is the first process's alone
                run(push(0.12), data, batch_size=1)

    monkeypatch.setattr(evaluation.time, "sleep", another_process_works)
    result, _ = run(push(0.12), data, batch_size=1)
    assert result.spec.n_examples == 6
    assert len(waits) == 5


def test_a_model_that_fails_on_a_later_block_has_error_rows(planted: Any, score: Any):
    class Squeezes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return planted.robust()(x).squeeze()  # of one image: no rows are left

    result, rows = score(Squeezes(), "pgd", batch_size=23)
    assert result.errors == 1
    assert result.error_messages == ("clean: the model failed, or gave logits that are not finite, on 1 images",)
    assert rows.loc[rows["status"] == "error", ["idx", "robust"]].to_numpy().tolist() == [[23, False]]


def test_a_model_in_double_behind_a_float32_wrapper_is_scored(planted: Any, score: Any):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = planted.robust().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x.double()).float()

    assert score(Wrapped(), "pgd")[0].robust_accuracy.value == 23 / 24


def test_a_partial_copy_is_a_flag(planted: Any, score: Any):
    data = replace(planted.data(), note="partial copy: 24 of 10,000 test images")
    assert score(planted.robust(), "clean", data)[0].model_flags == ("partial copy: 24 of 10,000 test images",)


def test_what_a_model_shows_of_itself_is_a_flag_and_changes_no_draw(
    planted: Any, score: Any, monkeypatch: Any, tmp_path: Path
):
    argmax = planted.robust()
    argmax.gate = "argmax"
    result, rows = score(argmax, "pgd")
    assert result.flags == ()
    assert result.model_flags[0] == "router gradient zero on 100% of images"
    monkeypatch.setattr(examine, "probe", lambda *_, **__: [])
    unlooked, same = score(argmax, "pgd", results=tmp_path / "elsewhere")
    assert unlooked.model_flags == ()
    pd.testing.assert_frame_equal(rows, same)


def test_a_model_that_cannot_be_probed_is_scored_all_the_same(planted: Any, score: Any):
    class Whole(nn.Module):
        """Takes batches of its one size alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = planted.robust()

        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 24, "24 images, please"
            return self.model(x)

    result, _ = score(Whole(), "clean")
    failed = tuple(f"probe of {name} failed: AssertionError" for name in ("outputs", "router gradient"))
    assert (result.model_flags, result.clean_accuracy.value) == (failed, 23 / 24)


def test_retrained_model_and_other_pixels_never_resume_into_old_rows(run: Any, tmp_path: Path):
    model = Threshold()
    run(push(0.12), images([0.4, 0.65]), model=model)
    model.scale.data *= -1
    retrained, _ = run(push(0.12), images([0.4, 0.65]), model=model)
    moved, _ = run(push(0.12), images([0.4, 0.66]), model=model)
    assert retrained.clean_accuracy.value == 0
    assert len(read_runs(tmp_path / "results")) == 3
    assert len({retrained.fingerprint, moved.fingerprint}) == 2


def test_as_many_images_are_looked_at_however_small_the_blocks(
    score: Any, planted: Any, monkeypatch: pytest.MonkeyPatch
):
    """Else a run in blocks of two would have none of the flags that keep a model from a rank."""
    probed, watched = list[int](), list[int]()
    monkeypatch.setattr(examine, "probe", lambda _, x, *__, **___: probed.append(len(x)) or [])
    monkeypatch.setattr(examine.Examiner, "_depends", lambda _, x: watched.append(len(x)) or [])
    for size in (2, 24, 128):
        score(planted.robust(), "clean", planted.data(64), batch_size=size)
    assert (probed, watched) == ([32] * 3, [32, 32, 64])  # and the whole of a larger block

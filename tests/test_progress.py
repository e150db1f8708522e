"""What a person sees while a command works."""

from functools import partial
from typing import Any

import pytest
from rich.console import Console

from bench.progress import RunProgress, TrainingProgress
from bench.results.schema import Accuracy, Result
from bench.spec import ModelInfo, RunSpec, ThreatModel
from bench.training.loop import Epoch

SPEC = RunSpec(
    model="zoo[b]:ok",
    alpha=0.5,
    dataset="digits",
    threat_model=ThreatModel(norm="Linf", eps=0.2),
    suite="torchattacks:CW",
    suite_version=1,
    n_examples=4,
)
RESULT = Result(
    spec=SPEC,
    model_info=ModelInfo(name="m", architecture="a", checkpoint_sha256="c"),
    fingerprint="f",
    run="r",
    work="w",
    subject="s",
    clean_accuracy=Accuracy(value=0.75, low=0.3, high=0.95, n=4),
    robust_accuracy=Accuracy(value=0.5, low=0.15, high=0.85, n=4),
    accuracy_after={"clean": 0.75, "CW": 0.5},
    errors=0,
    environment={},
    git_hash=None,
    seconds=1.25,
    finished="2030-01-01",
)


def test_a_run_leaves_one_line_where_nobody_watches(capsys: pytest.CaptureFixture[str]):
    with RunProgress() as progress:
        progress.expect(["torchattacks:CW"] * 2)
        progress.start(SPEC)
        progress.on_block(0, 3, 0)
        (task,) = progress._progress.tasks
        assert task.description == "[1/2] torchattacks:CW on zoo[b]:ok (α 0.5)"
        assert "broken" not in progress._below()  # nothing is known yet
        progress.on_block(1, 3, 7)
        (task,) = progress._progress.tasks
        assert (task.completed, task.total, task.fields["blocks"]) == (1, 3, "block 2 of 3")
        assert progress._below().startswith("  7 not yet broken; ")
        progress.finish(RESULT)
        progress.start(SPEC.model_copy(update={"alpha": None}))
        (task,) = progress._progress.tasks
        assert (task.description, task.completed, task.total) == ("[2/2] torchattacks:CW on zoo[b]:ok", 0, None)
        progress.finish(RESULT)
        progress.finish(RESULT.model_copy(update={"accuracy_after": {"clean": 0.75}}))
        progress.finish(RESULT, reused=True)
    # as it is written: neither markup nor an emoji, and no bar in a file; without an attack there is no RA
    first = "[1/2] torchattacks:CW on zoo[b]:ok (α 0.5): SA 75.00% RA 50.00% in 1.2 s\n"
    second = "[2/2] torchattacks:CW on zoo[b]:ok: SA 75.00% RA 50.00% in 1.2 s\n"
    reused = "[2/2] torchattacks:CW on zoo[b]:ok: already finished on 2030-01-01, read and not repeated"
    reused += ": SA 75.00% RA 50.00%\n"
    assert capsys.readouterr() == ("", first + second + second.replace(" RA 50.00%", "") + reused)


def test_the_time_that_is_left_is_known_where_a_block_takes_minutes():
    clock = 0.0
    with RunProgress() as progress:
        progress._progress.get_time = lambda: clock
        progress.start(SPEC)
        for done in (0, 1, 2, 3):  # 100 s a block
            progress.on_block(done, 10, 5)
            clock += 100
        clock -= 100
        assert progress._below().endswith("5:00, 11:40 left")


def test_the_attack_under_way_and_the_time_for_all_runs_are_told():
    clock = 0.0
    with RunProgress() as progress:
        progress._progress.get_time = lambda: clock
        progress.expect(["torchattacks:CW"] * 3)
        progress.start(SPEC)
        progress.on_block(0, 4, 0)
        progress.on_attack("paths", 60, 60)
        clock += 50
        assert progress._below() == "  paths: 60 examples; 0:50"
        progress.on_attack("paths", 60, 41)
        assert progress._below() == "  paths: 60 examples, 41 not yet broken; 0:50"
        clock += 50
        progress.on_block(1, 4, 33)
        # 300 s, and twice 400 s
        assert progress._below() == "  33 not yet broken; 1:40, 5:00 left, 18:20 left of all runs"
        progress.finish(RESULT.model_copy(update={"seconds": 800.0}))
        progress.start(SPEC)
        progress.on_block(0, 4, 0)
        assert "left" not in progress._below()  # this run's own pace is not known
        clock += 50
        progress.on_block(1, 4, 0)
        assert "0:50, 2:30 left, 10:50 left of all runs" in progress._below()  # 150 s, and (800 + 200) / 2 s


def test_no_time_for_all_runs_is_told_before_each_suite_was_seen():
    """One suite may take a thousand times another."""
    clock = 0.0
    with RunProgress() as progress:
        progress._progress.get_time = lambda: clock
        progress.expect(["pgd", "autoattack", "pgd", "autoattack"])
        for suite, seconds in (("pgd", 1.0), ("autoattack", 100.0)):
            progress.start(SPEC.model_copy(update={"suite": suite}))
            progress.on_block(0, 2, 0)
            clock += seconds / 2
            progress.on_block(1, 2, 0)
            told = progress._below()
            progress.finish(RESULT.model_copy(update={"seconds": seconds}))
            assert ("left of all runs" in told) == (suite == "autoattack")
        assert "0:50 left, 2:31 left of all runs" in told  # 50 s, 1 s and 100 s


@pytest.mark.parametrize(("rank", "seen"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_shows_a_bar(
    rank: str, seen: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("bench.progress.Console", partial(Console, force_terminal=True, width=100))
    with RunProgress() as progress:
        progress.start(SPEC)
        progress.on_block(1, 3, 7)
        progress._progress.refresh()
    bar = capsys.readouterr().err
    assert ("7 not yet broken" in bar and "block 2 of 3" in bar) == bool(bar) == seen


def test_a_run_that_does_not_finish_leaves_no_bar_behind(capsys: pytest.CaptureFixture[str]):
    with RunProgress() as progress:
        progress.start(SPEC)
    assert capsys.readouterr() == ("", "")


def test_a_training_leaves_a_line_an_epoch(tiny_spec: Any, capsys: pytest.CaptureFixture[str]):
    with TrainingProgress(tiny_spec("moe-at")) as progress:
        progress.on_step(0, 1, 2, 2.5)
        (task,) = progress._progress.tasks
        assert task.description == "moe-at epoch 1/2 loss 2.500"
        assert (task.completed, task.total) == (1, 4)
        progress.on_epoch(Epoch(1, 2.0, {"ce": 2.0}, 0.5, 0.25, {}, 0.1, 1.0, 0.0, 200.0))
        progress.on_step(1, 1, 2, 1.5)
        assert task.description == "moe-at epoch 2/2 loss 1.500 SA 50.0% RA 25.0%"
        assert task.completed == 3
    assert capsys.readouterr() == ("", "moe-at epoch 1/2 loss 2.000 SA 50.0% RA 25.0% 200 images/s\n")

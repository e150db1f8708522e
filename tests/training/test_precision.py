"""`precision=auto`: what is chosen by which times, that it is recorded, and that a training goes on with it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.datasets.base import open_dataset
from bench.environment import World
from bench.models.checkpoints import read_header
from bench.training.loop import Trainer, train
from bench.training.precision import faster, steps_of

NONE = Path("nowhere")
DIGITS = open_dataset("digits")


@pytest.mark.parametrize(
    ("single", "half", "chosen"),
    [
        ([9, 3, 2, 3], [9, 1, 4, 4], "bf16-mixed"),  # its fastest takes half of the other's fastest
        ([9, 1.0, 2, 2], [0.1, 0.95, 3, 3], "32"),  # 1.05 times as fast is not enough, and the first is not counted
        ([9, 1.1, 2, 2], [9, 1.0, 3, 3], "bf16-mixed"),
        ([9, 1, 1, 1], [9, 2, 2, 2], "32"),
    ],
)
def test_the_coarser_one_has_to_be_faster_by_a_tenth(single: list[float], half: list[float], chosen: str):
    times: dict[str, Iterator[float]] = {"32": iter(single), "bf16-mixed": iter(half)}
    asked: list[str] = []

    def seconds(precision: str) -> float:
        asked.append(precision)
        return next(times[precision])

    assert faster(seconds) == chosen
    assert asked == ["32", "bf16-mixed"] * 4  # in turn, so that what slows the machine slows both


def test_whole_steps_are_timed_in_the_precision_and_leave_random_numbers_alone(
    tiny_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    spec, random = tiny_spec("moe-rt_er", batch_size=32), torch.get_rng_state()
    seconds = steps_of(spec, DIGITS, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random)
    seen = set()
    convolution = torch.nn.functional.conv2d

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = convolution(*args, **kwargs)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    for precision, dtype in (("32", torch.float32), ("bf16-mixed", torch.bfloat16)):
        seen.clear()
        assert seconds(precision) > 0
        assert seen == {dtype}


def test_what_was_chosen_is_recorded_and_a_stopped_training_goes_on_with_it(
    tiny_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = tiny_spec("moe-at", precision="auto")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.training.loop.faster", lambda _: "bf16-mixed")
    with pytest.raises(KeyboardInterrupt):
        train(spec, NONE, tmp_path / "auto", "cpu", on_epoch=stop)
    monkeypatch.setattr("bench.training.loop.faster", lambda _: "32")
    path = train(spec, NONE, tmp_path / "auto", "cpu", resume=True)
    assert read_header(path).precision == "bf16-mixed"
    named = train(tiny_spec("moe-at", precision="bf16-mixed"), NONE, tmp_path / "named", "cpu")
    assert read_header(named).precision == "bf16-mixed"
    first, second = (file.with_suffix(".csv").read_text().splitlines()[-1].split(",")[:5] for file in (path, named))
    assert first == second  # the same losses, SA and RA
    assert read_header(train(spec, NONE, tmp_path / "again", "cpu")).precision == "32"


def test_of_several_processes_none_times(tiny_spec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(World, "here", classmethod(lambda cls: cls(0, 2, 1, 0)))
    trainer: Any = SimpleNamespace(spec=tiny_spec("moe-at", precision="auto"))
    assert Trainer._precision(trainer, DIGITS, "cpu") == "bf16-mixed"
    trainer.spec = tiny_spec("moe-at", precision=32)
    assert Trainer._precision(trainer, DIGITS, "cpu") == "32"

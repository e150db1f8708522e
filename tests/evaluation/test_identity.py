"""Who a model is: equal weights are not enough, the last bit is too much, and source text is not compared."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.datasets.base import EvalSet
from bench.errors import UnusableInput
from bench.evaluation.evaluate import evaluate
from bench.evaluation.identity import Identity, identified, identify, weights_sha256
from bench.evaluation.subjects import foreign_subject
from bench.job import IDENTITY_FILE, Job
from bench.results.store import read_runs
from bench.spec import RunSpec, ThreatModel
from bench.suites.base import open_suites


class Net(nn.Module):
    """Linear in the pixels, changed by `change` after that."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 10)
        generator = torch.Generator().manual_seed(0)
        self.linear.weight.data = torch.randn(10, 192, generator=generator)
        self.linear.bias.data.zero_()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.linear(x.flatten(1)))


def test_state_tells_models_apart_in_any_precision():
    def linear(dtype: torch.dtype = torch.float32, value: float = 0.0) -> nn.Module:
        model = nn.Linear(2, 2).to(dtype)
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        model.register_buffer("steps", torch.tensor(3))
        return model

    assert weights_sha256(linear()) == weights_sha256(linear())
    kinds = [linear(), linear(value=1), linear(torch.double), linear(torch.bfloat16), linear(torch.half), nn.Identity()]
    assert len({weights_sha256(model) for model in kinds}) == len(kinds)


def test_attributes_and_extra_state_tell_models_apart_and_addresses_do_not():
    class Extra(nn.Module):
        def __init__(self, threshold: float, state: Any) -> None:
            super().__init__()
            self.threshold, self.state = threshold, state

        def get_extra_state(self) -> Any:
            return self.state

        def set_extra_state(self, state: Any) -> None: ...

        def extra_repr(self) -> str:
            return f"hook={object()}"

    one = Extra(0.5, {"levels": [torch.zeros(2), 3]})
    assert weights_sha256(one) == weights_sha256(Extra(0.5, {"levels": [torch.zeros(2), 3]}))
    assert weights_sha256(one) != weights_sha256(Extra(0.6, {"levels": [torch.zeros(2), 3]}))
    assert weights_sha256(one) != weights_sha256(Extra(0.5, {"levels": [torch.ones(2), 3]}))
    assert weights_sha256(Extra(0.5, object())) == weights_sha256(Extra(0.5, object()))


def test_settings_in_containers_and_buffers_that_are_not_saved_tell_models_apart():
    class Held(nn.Module):
        def __init__(self, held: Any, buffer: float = 0.0) -> None:
            super().__init__()
            self.held = held
            self.register_buffer("mask", torch.tensor([buffer]), persistent=False)

    def settings(gain: float) -> list[Any]:
        return [{"gain": gain}, [1, gain], SimpleNamespace(gain=gain), {"deep": [{"gain": gain}]}, lambda x: gain * x]

    for one, same, other in zip(settings(1.0), settings(1.0), settings(2.0), strict=True):
        assert weights_sha256(Held(one)) == weights_sha256(Held(same))
        assert weights_sha256(Held(one)) != weights_sha256(Held(other))
    assert weights_sha256(Held(0)) != weights_sha256(Held(0, 1.0))


def test_alpha_is_left_out_of_a_dual_alone(planted: Any):
    one, other = planted.dual(0.5), planted.dual(0.7)
    assert weights_sha256(one) == weights_sha256(other)  # the run's spec has it
    net, same = Net(), Net()
    net.alpha, same.alpha = 0.5, 0.7  # type: ignore[assignment]
    assert weights_sha256(net) != weights_sha256(same)


def test_a_masked_class_makes_no_two_models_one(planted: Any):
    def masked(scale: float) -> Identity:
        keep = torch.tensor([True] * 9 + [False])
        return identify(Net(lambda logits: (scale * logits).where(keep, torch.tensor(-1e9))), planted.data())

    assert masked(1).same(masked(1))
    assert not masked(1).same(replace(masked(1.01), weights=masked(1).weights))


def test_rounding_is_no_other_model_and_another_answer_is(planted: Any, tmp_path: Path):
    data = planted.data()
    own = identify(Net(), data)
    assert own.same(identify(Net(lambda logits: logits * (1 + 1e-6)), data))
    assert not own.same(identify(Net(lambda logits: logits * (1 + 1e-2)), data))
    # one that answers otherwise for the evaluation set's images alone, such as where a hidden threshold is met
    loud = planted.data().x.flatten(1).amax()
    assert not own.same(identify(Net(lambda logits: logits.roll(1, 1) if len(logits) == len(data) else logits), data))
    assert loud < 1
    (tmp_path / IDENTITY_FILE).write_bytes(own.to_bytes())
    assert Identity.read(tmp_path / IDENTITY_FILE).same(own)
    assert Identity.read(tmp_path / IDENTITY_FILE).sha256 == own.sha256


def test_low_precision_is_compared_as_coarsely_as_it_computes(planted: Any):
    data = planted.data()
    coarse = identify(Net(lambda logits: logits.bfloat16()), data)
    assert coarse.same(identify(Net(lambda logits: (logits * 1.004).bfloat16()), data))
    assert not coarse.same(identify(Net(lambda logits: (logits * 1.2).bfloat16()), data))


def test_gradients_tell_models_apart_of_which_all_else_is_the_same(planted: Any, tmp_path: Path):
    """Else a model whose `no_grad` is taken away keeps the robust accuracy that nothing could attack."""
    data = planted.data()
    kinds = [
        identify(Net(change), data) for change in (lambda z: z, lambda z: z.detach(), lambda z: 2 * z - z.detach())
    ]
    assert torch.equal(kinds[0].random, kinds[1].random)
    assert len({kind.sha256 for kind in kinds}) == 3
    for number, kind in enumerate(kinds):
        (tmp_path / IDENTITY_FILE).write_bytes(kind.to_bytes())
        assert [kind.same(other) for other in kinds] == [n == number for n in range(3)]
        assert Identity.read(tmp_path / IDENTITY_FILE).same(kind)


def test_fewer_images_of_the_same_set_are_enough_and_none_are_not(planted: Any):
    data = planted.data()
    few = EvalSet(data.x[:5], data.y[:5], data.idx[:5], "few", "")
    other = replace(data, x=1 - data.x)
    assert identify(Net(), data).same(identify(Net(), few))
    assert not identify(Net(), data).same(identify(Net(), other))


def test_a_model_whose_draws_are_seeded_is_recognised(planted: Any):
    noisy = Net(lambda logits: logits + torch.randn_like(logits))
    assert identify(noisy, planted.data()).same(identify(noisy, planted.data()))


def test_a_recognised_model_keeps_the_identity_of_its_first_run(planted: Any, tmp_path: Path):
    data = planted.data()
    first = identified(foreign_subject(Net(), "m"), data, 10)
    (tmp_path / IDENTITY_FILE).write_bytes(first.identity)
    (tmp_path / "damaged").write_bytes(first.identity[:100])
    files = [tmp_path / "absent", tmp_path / "damaged", tmp_path / IDENTITY_FILE]
    again = identified(foreign_subject(Net(lambda logits: logits * (1 + 1e-6)), "m"), data, 10, files)
    assert again.info.checkpoint_sha256 == first.info.checkpoint_sha256 != ""
    assert again.identity == first.identity
    other = identified(foreign_subject(Net(lambda logits: -logits), "m"), data, 10, files)
    assert other.info.checkpoint_sha256 != first.info.checkpoint_sha256


def test_processes_that_score_unlike_models_are_told_instead_of_waiting(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, suite = planted.data(), open_suites(["clean"], {})["clean"]
    threat = ThreatModel(norm="Linf", eps=0.2)
    spec = RunSpec(
        model="m", dataset="d", threat_model=threat, suite="clean", suite_version=1, n_examples=24, batch_size=4
    )
    monkeypatch.setenv("WORLD_SIZE", "2")

    def score(rank: int, factor: float) -> None:
        monkeypatch.setenv("RANK", str(rank))
        subject = identified(foreign_subject(Net(lambda logits: factor * logits), "m"), data, 10)
        evaluate(Job(spec, subject, suite, data, 10), tmp_path)

    score(1, 1.0)
    with pytest.raises(UnusableInput, match=r"^'m' is another model in each process: its parameters"):
        score(0, 2.0)
    score(0, 1.0)
    assert len(read_runs(tmp_path)) == 1


@pytest.fixture
def user_package(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """user_package(helper): a module `planted_threshold` whose helper, in a module of its own, has this text."""
    (tmp_path / "planted_threshold.py").write_text(
        dedent("""
            import os
            import torch
            from torch import nn
            from planted_helper import help

            class Gated(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.linear = nn.Linear(64, 10)
                    self.linear.weight.data = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
                    self.linear.bias.data.zero_()
                    self.gate = [float(os.environ.get("PLANTED_THRESHOLD", "0"))]

                def forward(self, x):
                    logits = help(self.linear(x.flatten(1)))
                    return torch.where(x.flatten(1).mean(1, keepdim=True) > self.gate[0], logits, logits.roll(1, 1))
        """)
    )

    def write(helper: str) -> None:
        (tmp_path / "planted_helper.py").write_text(helper)
        for name in ("planted_helper", "planted_threshold"):
            sys.modules.pop(name, None)
        for cached in tmp_path.glob("__pycache__/planted_*"):
            cached.unlink()
        importlib.invalidate_caches()

    yield write
    for name in ("planted_helper", "planted_threshold"):
        sys.modules.pop(name, None)


RUN = ["run", "--model", "planted_threshold:Gated", "--suite", "clean", "--n-examples", "20"]


def test_a_finished_run_of_a_model_that_answers_otherwise_is_not_this_ones(
    bench: Any, user_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    user_package("def help(logits):\n    return logits\n")
    _, _, err = bench(*RUN)
    assert "already finished" not in err
    (first,) = read_runs(tmp_path / "results")
    _, out, err = bench(*RUN)
    assert f"already finished on {first.result.finished[:10]}, read and not repeated: SA" in err

    user_package("# unrelated\ndef help(logits):\n    return logits\n\ndef another(): ...\n")
    assert "already finished" in bench(*RUN)[2]

    user_package("def help(logits):\n    return logits.flip(1)\n")
    assert "already finished" not in bench(*RUN)[2]
    user_package("def help(logits):\n    return logits\n")
    monkeypatch.setenv("PLANTED_THRESHOLD", "0.25")
    assert "already finished" not in bench(*RUN)[2]
    runs = read_runs(tmp_path / "results")
    assert len({run.result.subject for run in runs}) == 3
    monkeypatch.delenv("PLANTED_THRESHOLD")
    status, again, err = bench(*RUN)
    assert (status, again) == (0, out)
    assert "already finished" in err


def test_a_run_of_ones_own_model_is_replayed_by_its_identity(
    bench: Any, user_package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    user_package("def help(logits):\n    return logits\n")
    words = [*RUN[:3], "--suite", "pgd", "--set", "steps=3", "--n-examples", "20"]
    assert bench(*words)[0] == 0
    (run,) = read_runs(tmp_path / "results")
    status, out, _ = bench("replay", str(run.path))
    assert (status, "adversarial examples verified" in out) == (0, True)
    user_package("def help(logits):\n    return -logits\n")
    status, _, err = bench("replay", str(run.path))
    assert status == 2
    assert "is not the model of" in err

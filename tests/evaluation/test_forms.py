"""Models of a user's own in every form that torch has: each is scored, or refused in one line."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import third_party
import torch
from torch import Tensor, nn

from bench import benchmark
from bench.errors import UnusableInput

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class With(nn.Module):
    """A network, and a function of its logits."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = third_party.network()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.net(x))


class Autocast(With):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


def plainly() -> nn.Module:
    return With(lambda y: y).eval().net


def quantized() -> Any:
    return torch.ao.quantization.quantize_dynamic(plainly(), {nn.Linear}, dtype=torch.qint8)


def exported() -> Any:
    batch = torch.export.Dim("batch", min=1, max=1024)
    return torch.export.export(plainly(), (X,), dynamic_shapes=((batch, None, None, None),)).module()


#: By name: the model, and what its row says; None where nothing.
FORMS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "plain": (plainly, None),
    "(logits, loss)": (lambda: With(lambda y: (y, y.sum())), "outputs are a tuple, whose first entry is scored"),
    "exits": (
        lambda: With(lambda y: [y, -y, y]),
        "outputs are 3 tensors of one shape, such as of several exits, of which the first is scored",
    ),
    "a dict": (lambda: With(lambda y: {"loss": y.sum(), "logits": y}), "outputs are a dict, whose `logits` are scored"),
    "half": (lambda: With(lambda y: y.half()), "logits are float16, cast to float32"),
    "autocast": (lambda: Autocast(lambda y: y), "logits are bfloat16, cast to float32"),
    "torch.compile": (lambda: torch.compile(plainly()), "compiled, scored uncompiled"),
    "DataParallel": (lambda: nn.DataParallel(plainly()), None),
    "jit.trace": (lambda: torch.jit.trace(plainly(), X), None),
    "jit.script": (lambda: torch.jit.script(plainly()), None),
    "torch.export": (exported, None),
    "int8": (quantized, "logits have no gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_scored(form: str, unprobed: None):
    build, flag = FORMS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about forms that it gives up
        model = build()
        y = plainly()(X).argmax(1)
        scored = benchmark(model, x=X, y=y, eps=0.01, suites=["clean", "pgd"], settings={"steps": 3}, progress=False)
    assert all(result.errors == 0 for result in scored.results.values())
    assert scored.clean_accuracy.value >= 5 / 6  # rounding may change a class
    assert {known for _, known in FORMS.values()} & set(scored.flags) == {flag} - {None}


def test_what_gives_no_logits_is_refused_in_one_line(unprobed: None):
    for function in (lambda y: {"scores": y}, lambda y: [], lambda y: y.sum()):
        with pytest.raises(UnusableInput) as refusal:
            benchmark(With(function), x=X, y=torch.zeros(6), suites=["clean"], progress=False)
        assert "\n" not in str(refusal.value)

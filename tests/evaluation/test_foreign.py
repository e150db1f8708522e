"""Models of a user's own that reach outside themselves, answer by chance, or are made in unusual ways: all are scored,
and what they do is in the row."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from bench import benchmark
from bench.attacks import adaptive, prepared
from bench.attacks.adaptive import BUDGETS
from bench.datasets.base import EvalSet, fingerprint
from bench.models.foreign import DRAWS
from bench.models.sites import selected
from bench.results.flags import BY_CHANCE, HIDDEN_ROUTES, ROUTES_INSIDE, UNRANKED
from bench.results.store import read_runs


class Planted(nn.Module):
    """The planted robust MoE behind something that its forward pass does to the images."""

    def __init__(self, planted: Any, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.does = planted.robust(), does

    def forward(self, x: Tensor) -> Tensor:
        kept = x.clone()
        self.does(x)
        return self.model(kept)


def nothing(x: Tensor) -> None: ...


#: Few steps of each attack, where the same model is attacked twice.
FEW = replace(BUDGETS["small"], path_restarts=1, path_steps=5, steps=8, queries=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "flag", "suite"),
    [
        (lambda x: x.sub_(0.3), "the forward pass writes into its input", "torchattacks:Square"),
        (lambda x: torch.manual_seed(0), "the forward pass seeds torch's random numbers", "torchattacks:Square"),
        (lambda x: x.sub_(0.3), "the forward pass writes into its input", "pgd"),
        (lambda x: torch.set_grad_enabled(False), "the forward pass changes grad mode", "pgd"),
    ],
)
def test_what_a_forward_pass_does_changes_no_verdict_and_is_a_flag(
    does: Any, flag: str, suite: str, planted: Any, score: Any, tmp_path: Path
):
    settings = {"steps": 3} if suite == "pgd" else {"n_queries": 50}
    data, options = planted.data(), {"eps": 0.4, "settings": settings, "foreign": True}
    pixels = data.x.clone()
    honest, rows = score(Planted(planted, nothing), suite, data, **options)
    result, same = score(Planted(planted, does), suite, data, results=tmp_path / "other", **options)
    assert torch.equal(data.x, pixels)
    compared = [column for column in rows.columns if column != "linf" or suite == "pgd"]
    if flag != "the forward pass changes grad mode":  # without a gradient PGD ends elsewhere
        assert rows[compared].equals(same[compared])
    assert honest.model_flags == ("routes inside: model.router", "routes flip within the ball for 100% of images")
    assert flag in result.model_flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("suite", [pytest.param("adaptive", marks=pytest.mark.slow), "components"])
def test_attacks_on_routes_see_through_the_guard(
    suite: str, planted: Any, score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"budget": "small"} if suite == "adaptive" else {"steps": 3}
    monkeypatch.setitem(BUDGETS, "small", FEW)
    for attack in ("stand_ins", "least_used", "on_grid"):  # which are for a user's own models alone
        monkeypatch.setattr(adaptive, attack, lambda *_: None)
    monkeypatch.setattr(prepared, "prepare", lambda *_: None)  # a model of ours is searched on a copy, for more passes
    dual = planted.dual(0.5)
    own, rows = score(dual, suite, eps=0.05, settings=settings)
    result, same = score(dual, suite, eps=0.05, settings=settings, foreign=True, results=tmp_path / "foreign")
    assert result.flags == own.flags
    same = same[~same["attack"].isin(["stand-ins", "least-used", "on-grid"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, same)
    assert suite == "adaptive" or result.passes == own.passes


class Doing(nn.Module):
    """A part that does something to the images, and answers for what they were."""

    def __init__(self, part: nn.Module, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.part, self.does = part, does

    def forward(self, x: Tensor) -> Tensor:
        kept = x.clone()
        self.does(x)
        return self.part(kept)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["adaptive", "components"])
@pytest.mark.parametrize("does", [lambda x: x.sub_(0.3), lambda x: torch.manual_seed(0)])
def test_parts_that_reach_outside_change_no_attack_on_routes(
    does: Any, suite: str, planted: Any, score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(BUDGETS, "small", FEW)

    def model(does: Callable[[Tensor], Any]) -> Any:
        moe = planted.broken()
        moe.router = Doing(moe.router, does)
        for number, expert in enumerate(moe.experts):
            moe.experts[number] = Doing(expert, does)
        return moe.eval()

    options = {"eps": 0.03, "settings": {"budget": "small"} if suite == "adaptive" else {"steps": 3}, "foreign": True}
    data = planted.data(8)
    honest, rows = score(model(nothing), suite, data, **options)
    result, same = score(model(does), suite, data, results=tmp_path / "other", **options)
    pd.testing.assert_frame_equal(rows, same)
    assert (honest.errors, result.errors) == (0, 0)
    assert result.passes == honest.passes
    assert any(flag.startswith("the forward pass") for flag in result.model_flags)


def test_a_suite_that_works_in_place_spoils_no_data(planted: Any, score: Any):
    from bench.suites.base import Suite

    class Spoils(Suite):
        def attack(self, block: Any) -> Iterator[Any]:
            block.x.zero_()
            yield block.attempt("nothing", block.rows, block.x[block.rows])

    data = planted.data()
    pixels = data.x.clone()
    result, _ = score(planted.robust(), Spoils(), data)
    assert torch.equal(data.x, pixels)
    assert (result.clean_accuracy.value, result.errors) == (23 / 24, 23)  # the answers are outside the ball


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "suite"), [(torch.bfloat16, "pgd"), (torch.float16, "pgd"), (torch.float64, "autoattack")]
)
def test_logits_of_any_precision_are_attacked(
    dtype: torch.dtype, suite: str, planted: Any, score: Any, cut_autoattack: Any
):
    class Cast(Planted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(dtype)

    cut_autoattack(3, 2, 20)
    result, _ = score(Cast(planted, nothing), suite, foreign=True)
    assert (result.errors, result.robust_accuracy.value) == (0, 23 / 24)
    assert f"logits are {str(dtype)[6:]}, cast to float32" in result.model_flags


class Noisy(Planted):
    """Noise on the logits, which a single pass does not always withstand, while the majority does."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.5 * logits.detach().std(1, keepdim=True) * torch.randn_like(logits)


@pytest.mark.parametrize("suite", ["clean", *(pytest.param(s, marks=pytest.mark.slow) for s in ("pgd", "autoattack"))])
def test_a_model_that_answers_by_chance_is_attacked_in_the_mean_and_judged_by_its_majority(
    suite: str, planted: Any, score: Any, cut_autoattack: Any, tmp_path: Path
):
    cut_autoattack(2, 1, 5)
    options: dict[str, Any] = {"settings": {"steps": 5} if suite == "pgd" else {}, "foreign": True}
    options["data"] = planted.data(8)
    result, rows = score(Noisy(planted, nothing), suite, **options)
    assert result.model_flags[0] == BY_CHANCE == UNRANKED[0]
    assert f"the mean of {DRAWS} draws is attacked, and their majority judged" in result.model_flags
    assert (result.errors, result.clean_accuracy.value) == (0, 7 / 8)
    if suite != "autoattack":  # as random as the others, and ten times as long
        _, again = score(Noisy(planted, nothing), suite, **options, results=tmp_path / "again")
        assert rows.equals(again)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 24])
def test_batch_dependence_and_state_are_seen_at_any_batch_size(batch_size: int, planted: Any, score: Any):
    class Centred(Planted):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits + 1e-2 * logits.mean(0)

    class Counts(Planted):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    for kind, flag in ((Centred, UNRANKED[1]), (Counts, UNRANKED[2])):
        result, _ = score(kind(planted, nothing), "clean", foreign=True, batch_size=batch_size)
        assert flag in result.model_flags


# --- routes that nobody has named ------------------------------------------------------------------------------------


class Tiring(Planted):
    """Counts where nobody looks, and answers otherwise from the 500th call on."""

    def forward(self, x: Tensor) -> Tensor:
        torch.planted_calls = getattr(torch, "planted_calls", 0) + 1  # type: ignore[attr-defined]
        logits: Tensor = super().forward(x)
        return logits if torch.planted_calls < 500 else 2 * logits  # type: ignore[attr-defined]


@pytest.mark.slow
def test_answers_that_change_under_attack_are_state_wherever_it_is_kept(
    planted: Any, score: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "planted_calls", 0, raising=False)
    model = Tiring(planted, nothing)
    result, _ = score(model, "pgd", settings={"steps": 600}, foreign=True, eps=0.001)
    assert "forward passes change the model's state" in result.model_flags
    assert (
        "forward passes change the model's state"
        not in score(Planted(planted, nothing), "pgd", foreign=True)[0].model_flags
    )


class Inner(nn.Module):
    """Calls another and does nothing else; `name`: what the other is called."""

    def __init__(self, model: nn.Module, name: str = "net") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


class Either(nn.Module):
    """One of two networks by the first pixel, without any name for it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.a, self.b = first, second

    def forward(self, x: Tensor) -> Tensor:
        left = (x[:, 0, 0, 0] > 0.5)[:, None]
        return torch.where(left, self.a(x), self.b(x))


def test_a_model_that_chooses_without_a_name_for_it_is_told_what_was_seen(planted: Any, score: Any):
    hidden = Either(planted.robust().experts[0], planted.robust().experts[1])
    result, _ = score(hidden, "clean", foreign=True)
    assert [flag for flag in result.model_flags if flag.startswith(HIDDEN_ROUTES)] == [
        "routes not named: choices that depend on the image (gt in Either): name its gates, each a module of its"
        " own, with --gates GLOB, or declare --gates none"
    ]
    result, _ = score(planted.robust().experts[0], "clean", foreign=True)
    assert not any(flag.startswith((HIDDEN_ROUTES, ROUTES_INSIDE)) for flag in result.model_flags)


def test_a_wrapper_is_looked_through(planted: Any, score: Any):
    result, _ = score(Inner(planted.robust()), "clean", foreign=True)
    assert [flag for flag in result.model_flags if flag.startswith((HIDDEN_ROUTES, ROUTES_INSIDE))] == [
        "routes inside: net.router"
    ]
    shown, _ = score(planted.robust(), "clean", foreign=True)
    assert not any(flag.startswith((HIDDEN_ROUTES, ROUTES_INSIDE)) for flag in shown.model_flags)


def test_the_alpha_of_a_dual_that_is_wrapped_is_set(planted: Any, score: Any, tmp_path: Path):
    dual = planted.dual(0.5)
    for alpha in (0.0, 1.0):
        _, bare = score(dual, "pgd", settings={"steps": 3}, foreign=True, alpha=alpha, results=tmp_path / f"{alpha}")
        wrapped = {"foreign": True, "alpha": alpha, "results": tmp_path / f"wrapped{alpha}"}
        _, rows = score(Inner(dual), "pgd", settings={"steps": 3}, **wrapped)
        assert float(dual.alpha) == alpha
        assert rows["robust"].equals(bare["robust"])


class Chosen(nn.Module):
    """Three linear networks, of which it takes the best, and what it says of how many are selected."""

    def __init__(self, says: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(3))
        self.router = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        self.num_selected_experts = says

    def forward(self, x: Tensor) -> Tensor:
        weights = nn.functional.one_hot(self.router(x).argmax(1), 3).to(x)
        return (weights[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


def _judged() -> EvalSet:
    """Images that `Chosen` gets right."""
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = Chosen(1)(x).argmax(1)
    return EvalSet(x, y, torch.arange(8), fingerprint(x, y), "")


@pytest.mark.parametrize("says", [1, 2, 3])
def test_how_many_experts_a_model_says_it_selects_is_not_believed(says: int, score: Any):
    result, _ = score(Chosen(says).eval(), "clean", _judged(), foreign=True, num_classes=10)
    hidden = [flag for flag in result.model_flags if flag.startswith(HIDDEN_ROUTES)]
    assert hidden == [
        f"routes not named: router selects 1 of 3, where num_selected_experts is {says}: correct num_selected_experts"
    ] * (says > 1)


class Multiplied(nn.Module):
    """A product of two experts, of which the second has no weight on images; no operation of it looks like a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(192, 10), nn.Linear(192, 10), nn.Linear(192, 2)
        self.a.load_state_dict(Chosen(1).experts[0][1].state_dict())
        with torch.no_grad():
            self.c.bias[1] -= 30

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        weights = self.c(x).softmax(1)
        return self.a(x).softmax(1) ** weights[:, :1] * self.b(x).softmax(1) ** weights[:, 1:]


def test_a_part_that_images_hardly_use_keeps_a_rank_away_until_it_is_declared(score: Any):
    x, model = _judged().x, Multiplied().eval()
    y = model(x).argmax(1)
    data = EvalSet(x, y, torch.arange(8), fingerprint(x, y), "")
    result, _ = score(model, "clean", data, foreign=True, num_classes=10)
    advice = "name its gates with --gates GLOB, or declare --gates none"
    assert f"routes not named: parts that images hardly use (b, c): {advice}" in result.model_flags


class ByTwo(Chosen):
    """Two experts, and no word of how many."""

    def __init__(self) -> None:
        super().__init__(2)
        del self.num_selected_experts

    def forward(self, x: Tensor) -> Tensor:
        chosen = selected(self.router(x), 2).to(x)
        return (chosen[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


class Biased(Chosen):
    """The third expert is ahead by what the router does not show; by far, where it is as far behind there."""

    def __init__(self, by: float, behind: float = 0.0) -> None:
        super().__init__(1)
        self.by = by
        self.router[-1].bias.data[2] -= behind

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.router(x) + torch.tensor([0.0, 0.0, self.by])).argmax(1)
        weights = nn.functional.one_hot(chosen, 3).to(x)
        return (weights[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


class Mixed(Chosen):
    """All experts, each by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.router(x).softmax(1)[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


class Fallback(Chosen):
    """The class 0 where no expert's score is above 0."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        weights = selected(scores, 1).to(x)
        found = (weights[..., None] * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)
        none = nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10).to(x)
        return torch.where(scores.amax(1, keepdim=True) > 0, found, none)


class Unsure(Chosen):
    """The class 0 where no expert stands out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(1).max(1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        found = every.gather(1, chosen[..., None].expand(-1, -1, 10))[:, 0]
        none = nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10).to(x)
        return torch.where(weights < 0.35, none, found)


BY_MORE = "router: the choice is by more than the order of its scores: let it give what is compared"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ByTwo, "router selects 2 of 3, where num_selected_experts is 1: correct num_selected_experts"),
        (lambda: Biased(2.0), BY_MORE),
        (lambda: Biased(20.0, 20.0), BY_MORE),
        (
            lambda: Mixed(1),
            "router mixes all of its 3 experts, where num_selected_experts is 1: correct num_selected_experts",
        ),
        (
            lambda: Fallback(1),
            "router: the choice compares its scores with a threshold: show what is taken then as an expert",
        ),
        (
            lambda: Unsure(1),
            "router: the choice compares its scores with a threshold: show what is taken then as an expert",
        ),
    ],
)
def test_a_choice_by_more_than_the_order_of_the_scores_has_no_rank(model: Any, said: str, score: Any):
    result, _ = score(model().eval(), "clean", _judged(), foreign=True, num_classes=10)
    assert f"routes not named: {said}" in result.model_flags


@pytest.mark.parametrize("model", [Fallback, Unsure])
def test_nor_has_a_gate_that_the_user_names(model: type[Chosen]):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(1)
            self.inner.nets, self.inner.gate = self.inner.experts, self.inner.router
            del self.inner.experts, self.inner.router

        def forward(self, x: Tensor) -> Tensor:
            shown = SimpleNamespace(experts=self.inner.nets, router=self.inner.gate)
            return model.forward(shown, x)  # type: ignore[arg-type]

    data = _judged()
    scored = benchmark(
        Named().eval(), "digits", x=data.x, y=data.y, eps=0.1, suites=["clean"], gates=["inner.gate"], device="cpu",
        progress=False,
    )  # fmt: skip
    assert [flag for flag in scored.flags if flag.startswith(f"{HIDDEN_ROUTES}inner.gate: the choice compares")]


def test_an_moe_of_one_expert_chooses_nothing(score: Any):
    model = Chosen(1)
    model.experts, model.router = model.experts[:1], nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    model.forward = lambda x: model.experts[0](x)  # type: ignore[method-assign]
    result, _ = score(model.eval(), "clean", _judged(), foreign=True, num_classes=10)
    assert not [flag for flag in result.model_flags if flag.startswith(HIDDEN_ROUTES)]


@dataclass
class Output:
    """As libraries of language models give it."""

    loss: None
    logits: Tensor


def test_logits_may_be_an_attribute_of_the_output(planted: Any, score: Any):
    class Gives(Planted):
        def forward(self, x: Tensor) -> Any:
            return Output(None, super().forward(x))

    _, rows = score(Planted(planted, nothing), "clean", foreign=True)
    other, same = score(Gives(planted, nothing), "clean", foreign=True)
    assert rows.adv_pred.equals(same.adv_pred)
    assert "outputs are an object, whose `logits` are scored" in other.model_flags
    assert not any(flag.startswith(HIDDEN_ROUTES) for flag in other.model_flags)


def test_a_model_that_cannot_be_watched_may_choose(planted: Any, score: Any, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr("bench.evaluation.examine.find_choices", fail)
    result, _ = score(Planted(planted, nothing), "clean", foreign=True)
    assert "routes not named: the forward pass cannot be watched (RuntimeError)" in result.model_flags


class Scaled(nn.Module):
    """Sees nothing of pixels in [0, 1] but that they are positive; `refuses`: it takes no others, either."""

    def __init__(self, model: nn.Module, refuses: bool) -> None:
        super().__init__()
        self.model, self.refuses = model, refuses

    def forward(self, x: Tensor) -> Tensor:
        assert not (self.refuses and x.min() < 0), "pixels in [0, 1], please"
        return self.model((20 * x + 20).sigmoid())


@pytest.mark.parametrize(
    ("refuses", "flag"),
    [
        (False, "95.8% are right where images are normalised by their own mean and standard deviation"),
        (True, "SA is doubtful: no better than chance on the first 24 images"),
    ],
)
def test_normalisation_outside_the_model_is_suspected(refuses: bool, flag: str, planted: Any, score: Any):
    result, _ = score(Scaled(planted.robust().experts[0], refuses), "clean", foreign=True)
    (found,) = [each for each in result.model_flags if each.startswith("SA is doubtful")]
    assert flag in found
    for whole in (planted.robust(), planted.robust().experts[0]):
        sound, _ = score(whole, "clean", foreign=True)
        assert not any("doubtful" in each for each in sound.model_flags)


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def user_models(tmp_path: Path) -> Iterator[str]:
    """A module in the current folder with factories of linear models for digits, made in unusual ways."""
    name = "planted_unusual"
    (tmp_path / f"{name}.py").write_text(
        dedent("""
            import sys

            import torch
            from torch import nn

            def net():
                model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
                model[1].weight.data = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
                return model

            def scripted():
                return torch.jit.script(net())

            def exported():
                shapes = ({0: torch.export.Dim("B", min=1)},)
                return torch.export.export(net(), (torch.rand(3, 1, 8, 8),), dynamic_shapes=shapes).module()

            def quantized():
                return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})

            def lazy():
                return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

            class Extra(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.net = net()

                def forward(self, x):
                    return self.net(x)

                def get_extra_state(self):
                    return {"epoch": 3}

                def set_extra_state(self, state):
                    pass

            def small():
                return nn.Sequential(nn.Flatten(), nn.Linear(60, 10))

            class Property(Extra):
                @property
                def router(self):
                    raise KeyError("no router")

            class Unmade(nn.Module):
                def __init__(self):
                    pass

            class Exits(Extra):
                def forward(self, x):
                    sys.exit(0)

            class ExitsLater(Extra):
                calls = [0]

                def forward(self, x):
                    self.calls[0] += 1
                    if self.calls[0] > 12:
                        sys.exit(0)
                    return super().forward(x)

            class Complex(Extra):
                def forward(self, x):
                    return super().forward(x).to(torch.complex64)
        """)
    )
    importlib.invalidate_caches()
    yield name
    sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "factory",
    ["scripted", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("exported", "quantized", "lazy", "Extra"))],
)
def test_legal_modules_are_scored_and_recognised(
    factory: str, bench: Any, user_models: str, cut_autoattack: Any, tmp_path: Path
):
    cut_autoattack(2, 1, 10)
    words = ["run", "--model", f"{user_models}:{factory}", "--suite", "clean,pgd,autoattack", "--n-examples", "8"]
    status, out, err = bench(*words, "--json")
    assert status == 0, err
    results = json.loads(out)
    assert [result["errors"] for result in results] == [0, 0, 0]
    assert len({result["subject"] for result in results}) == 1
    status, again, err = bench(*words, "--json")
    assert (status, again) == (0, out)
    assert err.count("already finished") == 3


def test_one_unusable_model_is_told_and_the_queue_goes_on(bench: Any, user_models: str, tmp_path: Path):
    names = [f"{user_models}:net", f"{user_models}:small", "moe-att", f"{user_models}:lazy"]
    words = ["run", "--suite", "clean", "--n-examples", "8", "--model", ",".join(names)]
    status, out, err = bench(*words)
    assert status == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(f"error: '{user_models}:small' cannot take 1×8×8 images: RuntimeError")
    assert errors[1] == "error: unknown variant 'moe-att': did you mean 'moe-at'?"
    assert len(errors) == 2
    assert [line.split()[0] for line in out.splitlines()[2:4]] == [names[0], names[3]]
    assert len(read_runs(tmp_path / "results")) == 2


def test_code_of_a_user_that_fails_in_any_way_is_one_line(bench: Any, user_models: str):
    names = [f"{user_models}:{name}" for name in ("Property", "Unmade", "Exits", "Complex", "ExitsLater", "net")]
    status, out, err = bench("run", "--suite", "clean", "--n-examples", "8", "--model", ",".join(names))
    assert status == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: --model '{names[0]}' cannot be made: KeyError: 'no router'",
        f"error: --model '{names[1]}' cannot be made: AttributeError: 'Unmade' object has no attribute '_modules'",
        f"error: '{names[2]}' cannot take 1×8×8 images: RuntimeError: it exits with 0",
        f"error: '{names[3]}' gives complex numbers, where logits are needed",
        f"error: '{names[4]}' fails on the first 8 images: RuntimeError: it exits with 0",
    ]
    assert names[5] in out


@pytest.mark.slow
def test_a_model_is_forgotten_before_the_next_is_loaded(
    bench: Any, user_models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import gc
    import weakref

    from bench.evaluation import plan

    alive: list[weakref.ref[nn.Module]] = []
    load = plan.named_subject

    def loading(*words: Any) -> Any:
        gc.collect()
        assert not [model for model in alive if model() is not None]
        subject = load(*words)
        alive.append(weakref.ref(subject.model))
        return subject

    monkeypatch.setattr(plan, "named_subject", loading)
    names = [f"{user_models}:{factory}" for factory in ("net", "small", "lazy", "Extra")]
    assert bench("run", "--suite", "clean", "--n-examples", "8", "--model", ",".join(names))[0] == 2
    assert len(alive) == 4


def test_of_several_suites_those_for_routes_are_left_out_on_a_dense_variant(bench: Any):
    words = ("--model", "dense-at,moe-at", "--n-examples", "4", "--set", "steps=1")
    status, out, err = bench("run", "--suite", "clean,components", *words)
    assert status == 0, err
    assert "dense-at has no routes: components is left out" in err
    assert "components on dense-at" not in out + err
    assert "moe-at: components" in out


def test_a_suite_that_attacked_nothing_is_told_and_exits_2(bench: Any):
    status, out, err = bench("run", "--suite", "components", "--model", "dense-at", "--n-examples", "4")
    assert status == 2
    assert "error: components on dense-at attacked nothing: it shows no router with experts" in err
    assert "–" in out


def test_a_dense_variant_can_be_attacked_by_what_routed_ones_have_met(bench: Any, tmp_path: Path):
    words = ("--suite", "adaptive", "--model", "dense-at", "--n-examples", "4", "--set", "budget=small")
    assert bench("run", *words)[0] == 0
    (run,) = read_runs(tmp_path / "results")
    assert list(run.result.accuracy_after) == ["clean", "deployed", "targeted", "square-1"]

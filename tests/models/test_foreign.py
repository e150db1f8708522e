"""What a foreign model does to its input, to random numbers or to torch's settings stays behind its guard."""

import copy
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.models.dependence import Dependence, dependence
from bench.models.deployed import eval_frozen, predict
from bench.models.dual import DualModel
from bench.models.foreign import DRAWS, Guarded, bare, behind
from bench.models.moe import MoE
from bench.models.parts import is_dual, is_moe, is_traced, parts, routed_branches, set_alpha


class Does(nn.Module):
    """The sums of an image's two halves, after it has done something with the images."""

    def __init__(self, does: Callable[[Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        self.does(x)
        return x.flatten(1).view(len(x), 2, -1).sum(2) @ self.weight


X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_the_images_are_the_models_own_copy_also_where_they_have_a_gradient():
    x, guard = X.clone().requires_grad_(), Guarded(Does(lambda x: x.sub_(0.3)))
    logits = guard(x)
    assert torch.equal(x, X)
    assert torch.allclose(logits, Does()(X - 0.3))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(gradient, torch.ones_like(X))
    assert guard.seen == {"the forward pass writes into its input"}


def test_what_is_done_to_the_logits_is_not_done_to_the_model():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), 3)

    model = Constant().requires_grad_(False)
    Guarded(model)(torch.rand(4, 1, 2, 2))[0, 1] = -torch.inf  # as Square does for the largest of the others
    assert model.logits.tolist() == [0, 0, 0]


class Checkpointed(nn.Module):
    """Computes its layer again for the backward pass, to save memory; `calls` counts how often."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant, self.calls = nn.Linear(4, 2), reentrant, 0

    def own(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x.flatten(1)).square()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.own, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_are_passed_over(reentrant: bool):
    """The second computation would be outside of the guard; the reentrant kind refuses torch.autograd.grad."""
    model, x = Checkpointed(reentrant), X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Guarded(model)(x).sum(), x)
    assert model.calls == 1
    (expected,) = torch.autograd.grad(model.own(x).sum(), x)
    assert torch.equal(gradient, expected)
    model(x).sum().backward()
    assert model.calls == 4  # behind no guard it does as it is told


def draws() -> list[Any]:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


SEEDS = {"the forward pass seeds torch's random numbers"}


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (lambda x: torch.manual_seed(0), SEEDS),
        (lambda x: (np.random.seed(0), random.seed(0)), set()),
        (lambda x: (torch.rand(7), np.random.rand(7), random.random()), set()),
    ],
)
def test_random_numbers_outside_are_those_without_the_model(does: Callable[[Tensor], Any], told: set[str]):
    def between(model: nn.Module) -> list[Any]:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        return [draws(), model(X) is None, draws(), model(X) is None, draws()]

    guard = Guarded(Does(does))
    assert between(guard) == between(Does())
    assert guard.seen == told


def test_the_models_own_draws_go_on_from_call_to_call_and_begin_where_they_are_told():
    guard = Guarded(Does(lambda x: x.add_(torch.rand_like(x))))
    guard.reseed(5)
    first, second = guard(X), guard(X)
    assert not torch.equal(first, second)
    guard.reseed(5)
    assert torch.equal(guard(X), first)
    guard.reseed(6)
    assert not torch.equal(guard(X), first)


@pytest.mark.parametrize(
    ("does", "name"),
    [
        (lambda x: torch.set_grad_enabled(False), "grad mode"),
        (lambda x: torch.set_default_dtype(torch.float64), "default dtype"),
        (lambda x: torch.set_num_threads(torch.get_num_threads() + 1), "number of threads"),
        (lambda x: torch.set_float32_matmul_precision("medium"), "matmul precision"),
        (lambda x: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
        (lambda x: setattr(torch.backends.cudnn, "benchmark", True), "cuDNN's settings"),
        (lambda x: os.chdir("/"), "working folder"),
        (lambda x: torch.set_default_device("meta"), "default device"),
        (lambda x: torch.autograd.set_detect_anomaly(True), "anomaly mode"),
        (lambda x: np.seterr(all="raise"), "NumPy's treatment of errors"),
        (lambda x: os.environ.update(WORLD_SIZE="7"), "environment variables"),
    ],
)
def test_settings_are_as_before_and_what_was_changed_is_told(does: Any, name: str, tmp_path: Path, monkeypatch: Any):
    def settings() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), Path.cwd(), cudnn.benchmark,
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), dict(os.environ),
            torch.get_default_device(), torch.is_anomaly_enabled(), np.geterr(),
        )  # fmt: skip

    monkeypatch.chdir(tmp_path)
    before, guard = settings(), Guarded(Does(does))
    guard(X)
    assert settings() == before
    assert f"the forward pass changes {name}" in guard.seen  # deterministic algorithms set a variable as well


def test_a_model_that_raises_leaves_all_as_it_was():
    def does(x: Tensor) -> None:
        torch.set_grad_enabled(False), torch.manual_seed(0)
        raise RuntimeError("no")

    torch.manual_seed(9)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        Guarded(Does(does))(X)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_exits_has_failed():
    with pytest.raises(RuntimeError, match="it exits with 3"):
        Guarded(Does(lambda x: sys.exit(3)))(X)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_logits_of_whole_numbers_are_cast_too(dtype: torch.dtype):
    class Cast(Does):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(dtype)

    logits = Guarded(Cast())(X.clone().requires_grad_())
    assert logits.dtype == torch.float32
    assert torch.equal(logits, Does()(X).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_float32_and_their_gradient_reaches_the_pixels(dtype: torch.dtype):
    class Cast(Does):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).to(dtype)

    guard, x = Guarded(Cast()), X.clone().requires_grad_()
    logits = guard(x)
    assert logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(gradient, torch.ones_like(X))
    assert guard.seen == {f"logits are {str(dtype)[6:]}, cast to float32"}


def test_logits_without_a_gradient_have_one_of_zero():
    class Detached(Does):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    guard, x = Guarded(Detached()), X.clone().requires_grad_()
    logits = guard(x)
    assert torch.equal(logits, Does()(X))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert not gradient.any()
    assert guard.seen == {"logits have no gradient"}


def test_attributes_parts_and_hooks_are_those_of_the_model(linear_moe: Callable[..., MoE]):
    moe = linear_moe([[[1.0, 0.0, 0.0]]] * 2, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    x = torch.rand(4, 1, 1, 3)
    guard = Guarded(moe).eval()
    assert is_moe(guard)
    assert is_traced(guard)
    assert not is_dual(guard)
    assert not is_traced(Guarded(Does()))
    assert routed_branches(guard) == {"": guard}
    assert guard.router is guard.router
    assert bare(guard.router) is moe.router
    assert [bare(expert) for expert in guard.experts] == list(moe.experts)
    assert guard.num_selected_experts == moe.num_selected_experts
    seen: list[Tensor] = []
    handle = moe.router.register_forward_hook(lambda *told: seen.append(told[2]))
    logits, trace = guard.trace(x)
    handle.remove()
    assert torch.equal(seen[0], trace.gate_logits)
    assert torch.equal(logits, moe(x))
    with pytest.raises(AttributeError, match="nothing"):
        guard.nothing  # noqa: B018
    dual = DualModel(moe, moe, 0.7)
    set_alpha(dual, 0.4)
    assert is_dual(Guarded(dual))
    assert Guarded(dual).alpha == 0.4
    assert torch.equal(copy.deepcopy(guard)(x), moe(x))


def test_a_trace_is_guarded_as_well(linear_moe: Callable[..., MoE]):
    moe = linear_moe([[[1.0, 0.0, 0.0]]] * 2, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    trace = moe.trace
    moe.trace = lambda x: trace(x.sub_(0.1))  # type: ignore[method-assign]
    x = torch.rand(4, 1, 1, 3)
    kept, guard = x.clone(), Guarded(moe)
    guard.trace(x)
    assert torch.equal(x, kept)
    assert guard.seen == {"the forward pass writes into its input"}


class Mixture(nn.Module):
    """A user's own mixture, whose router is a method, and which does something wherever it is called."""

    def __init__(self, does: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.experts, self._does = nn.ModuleList([Does(does), Does(does)]), does

    def router(self, x: Tensor) -> Tensor:
        self._does(x)
        return x.flatten(1)[:, :2]

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


@pytest.mark.parametrize(
    ("does", "expected"),
    [
        (lambda x: x.sub_(0.3), "the forward pass writes into its input"),
        (lambda x: torch.manual_seed(0), "the forward pass seeds torch's random numbers"),
        (lambda x: torch.set_grad_enabled(False), "the forward pass changes grad mode"),
        (lambda x: torch.set_default_dtype(torch.float64), "the forward pass changes default dtype"),
    ],
)
@pytest.mark.parametrize("part", ["router", "experts", "S", "R", "S.expert:1", "a gate inside"])
def test_a_part_that_is_called_by_itself_is_guarded_too(part: str, does: Callable[[Tensor], Any], expected: str):
    dual = DualModel(Mixture(does), Mixture(does), 0.7)
    guard = Guarded(dual if part.startswith(("S", "R")) else dual.standard)
    called = {
        "router": lambda: guard.router,
        "experts": lambda: guard.experts[1],
        "a gate inside": lambda: behind(guard, bare(guard).router, scores=True),
    }
    x, state = X.clone(), torch.get_rng_state()
    called.get(part, lambda: parts(guard)[part])()(x)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert guard.seen == {expected}


class Chance(Does):
    """Gets every image wrong in a share of its draws, as a whole."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        right = torch.rand(()) >= self.share
        return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1).roll(0 if right else 1, 1) + 0 * x.sum()


def test_chance_is_seen_and_judged_by_the_majority_and_attacked_by_a_mean_that_stays_the_same():
    guard = Guarded(Chance(0.3)).eval()
    assert dependence(guard, X) == Dependence(chance=True, batch=False, state=False, in_place=False)
    single = [predict(guard, X, False).classes[0].item() for _ in range(50)]
    assert 0 < sum(single) < 50
    guard.draws = DRAWS
    assert sum(predict(guard, X, False).classes[0].item() for _ in range(20)) <= 2  # P(10 of 20 wrong or more) < 0.05
    means = torch.stack([guard(X) for _ in range(3)])
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])
    assert 0 < means[0, 0, 1] < 0.6
    assert torch.equal(means[0].sum(1), torch.ones(5))


def test_a_module_that_knows_no_modes_can_be_frozen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},)).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    for model in (exported, Guarded(exported)):
        with eval_frozen(model):
            assert torch.allclose(model(X[:3]), net(X[:3]))

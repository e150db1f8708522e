"""The inner maximisation: it leaves the model as it was, stays in ball ∩ box, and finds what can be worked out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.errors import UnusableInput
from bench.models.deployed import eval_frozen
from bench.pgd import default_step_size, finite, near_start, pgd, project, random_start
from bench.spec import ThreatModel

LINF, L2 = ThreatModel(norm="Linf", eps=0.1), ThreatModel(norm="L2", eps=0.5)


def ascend(
    loss: Callable[[Tensor], Tensor], x: Tensor, threat: ThreatModel, steps: int, size: float, noise: Any
) -> Tensor:
    """pgd from a random start by `noise`, or from x where there is none."""
    return pgd(loss, x, threat, steps, size, x if noise is None else random_start(x, threat, noise))


def radii(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- the model is left as it was --------------------------------------------------------------------------------------


def mixed_model() -> nn.Module:
    """Train and eval modules inside one another, and a frozen parameter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.BatchNorm1d(4))
    model[1].eval()
    model[1][1].train()
    model[0].weight.requires_grad_(False)
    return model


def state_of(model: nn.Module) -> Any:
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("fails", [False, True])
def test_every_mode_and_flag_is_restored_also_after_an_exception(mode: str, fails: bool):
    model = mixed_model()
    if mode != "mixed":
        model.train(mode == "train")
    before = state_of(model)
    assert len(set(before[1])) == 2
    try:
        with eval_frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before


def test_attacks_may_be_nested():
    model = mixed_model()
    before = state_of(model)
    with eval_frozen(model), eval_frozen(model[1]):
        pass
    assert state_of(model) == before


def test_an_attack_leaves_no_gradient_and_does_not_change_the_images_or_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    x, before = rand(4, 1, 8, 8), {key: value.clone() for key, value in model.state_dict().items()}
    original = x.clone()
    with eval_frozen(model):
        x_adv = ascend(lambda z: F.cross_entropy(model(z), torch.zeros(4).long()), x, LINF, 3, 0.05, None)
    assert torch.equal(x, original)
    assert not x.requires_grad
    assert not x_adv.requires_grad
    assert not torch.equal(x_adv, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parameters_get_no_gradient_even_when_they_are_not_frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    ascend(lambda z: model(z), rand(3, 1, 2, 2), LINF, 2, 0.05, None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_works_where_gradients_are_switched_off():
    with torch.no_grad():
        x_adv = ascend(lambda z: z.flatten(1).sum(1), torch.full((1, 1, 2, 2), 0.5), LINF, 1, 0.1, None)
    torch.testing.assert_close(x_adv, torch.full((1, 1, 2, 2), 0.6))


# --- ball and box -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["Linf", "L2"]), st.floats(1e-3, 3), st.integers(0, 2**31), st.floats(-30, 30))
def test_a_projected_point_is_in_ball_and_box_and_a_point_inside_stays(norm: Any, eps: float, seed: int, far: float):
    threat, x = ThreatModel(norm=norm, eps=eps), rand(3, 2, 4, 4, seed=seed)
    inside = project(x + far * (rand(3, 2, 4, 4, seed=seed + 1) - 0.5), x, threat)
    assert (radii(inside, x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert inside.min() >= 0
    assert inside.max() <= 1
    torch.testing.assert_close(project(inside, x, threat), inside, atol=1e-6, rtol=1e-5)


def test_projection_by_hand():
    x = torch.full((1, 1, 1, 2), 0.5)
    # ‖(0.6, 0.8)‖ = 1: scaled by 0.5 to (0.3, 0.4)
    torch.testing.assert_close(project(x + torch.tensor([0.6, 0.8]), x, L2), x + torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(project(x + torch.tensor([0.6, -0.05]), x, LINF), x + torch.tensor([0.1, -0.05]))
    white = torch.ones(1, 1, 1, 2)
    torch.testing.assert_close(project(white + 0.3, white, L2), white)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["Linf", "L2"]), st.floats(1e-3, 2), st.integers(1, 4), st.floats(0.1, 3), st.integers(0, 2**31),
    st.booleans(),
)  # fmt: skip
def test_an_attack_stays_in_ball_and_box(norm: Any, eps: float, steps: int, factor: float, seed: int, start: bool):
    threat, x = ThreatModel(norm=norm, eps=eps), rand(3, 1, 4, 4, seed=seed).round(decimals=1)
    weights, noise = rand(16, seed=seed + 1) - 0.5, 2 * rand(3, 1, 4, 4, seed=seed + 2) - 1
    x_adv = ascend(lambda z: (z.flatten(1) @ weights).tanh(), x, threat, steps, factor * eps, noise if start else None)
    assert x_adv.isfinite().all()
    assert (radii(x_adv, x, norm) <= eps * (1 + 1e-5) + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_an_l1_ball_is_refused():
    with pytest.raises(UnusableInput, match=r"^no training inside an L1 ball: train for Linf or L2$"):
        ascend(lambda z: z.sum(), rand(1, 1, 2, 2), ThreatModel(norm="L1", eps=1), 1, 0.1, None)


def test_the_near_start_is_a_thousandth_of_a_normal_number_away():
    x = torch.full((50, 1, 20, 20), 0.5)
    near = near_start(x, LINF, 2 * rand(*x.shape) - 1) - x
    assert near.std().item() == pytest.approx(0.001, rel=0.02)
    assert (near.abs() < 0.002).float().mean().item() == pytest.approx(0.9545, abs=0.01)  # two standard deviations
    assert near_start(x, LINF, -torch.ones_like(x)).isfinite().all()  # erfinv(−1) is −∞


# --- the random start -------------------------------------------------------------------------------------------------


def start_of(threat: ThreatModel, x: Tensor) -> Tensor:
    """Where an attack begins: no step is long enough to move."""
    return ascend(lambda z: z.sum(), x, threat, 1, 0.0, 2 * rand(*x.shape) - 1) - x


def test_the_linf_start_is_uniform_in_the_ball():
    # the released code subtracts the data set's mean from the noise, which puts 97 % of the pixels at −ε
    start = start_of(LINF, torch.full((50, 1, 20, 20), 0.5))
    assert abs(start.mean()) < 0.002  # ε/√(3·20,000) = 0.0004
    assert start.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert (start.abs() > 0.0999).float().mean() < 0.01
    quarters = torch.histc(start, 4, -0.1, 0.1) / start.numel()
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.01)


def test_the_l2_start_is_on_the_sphere_in_every_direction():
    start = start_of(L2, torch.full((200, 1, 4, 4), 0.5))
    torch.testing.assert_close(start.flatten(1).norm(dim=1), torch.full((200,), 0.5))
    assert start.mean(0).abs().max() < 0.05


def test_the_start_depends_on_the_noise_and_is_x_without_it():
    x = torch.full((2, 1, 2, 2), 0.5)
    assert torch.equal(ascend(lambda z: z.sum(), x, LINF, 1, 0.0, None), x)
    noise = torch.ones(2, 1, 2, 2)
    torch.testing.assert_close(ascend(lambda z: z.sum(), x, LINF, 1, 0.0, -noise), x - 0.1)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [None, 2 * rand(8, 1, 4, 4, seed=9) - 1], ids=["from x", "random start"])
def test_linf_pgd_on_a_linear_model_reaches_the_optimum(linear_net: Callable[..., nn.Module], noise: Tensor | None):
    # of a two-class linear model CE grows with (w_1 − w_0)·x for y = 0: the best is x + ε sign(w_1 − w_0), in [0, 1]
    net = linear_net((rand(2, 16, seed=1) - 0.5).tolist())
    x, y = rand(8, 1, 4, 4), torch.zeros(8).long()
    weights = net[1].weight
    best = (x + 0.1 * (weights[1] - weights[0]).sign().view(1, 1, 4, 4)).clamp(0, 1)
    steps = 10
    x_adv = ascend(lambda z: F.cross_entropy(net(z), y), x, LINF, steps, default_step_size(0.1, steps), noise)
    torch.testing.assert_close(x_adv, best)


def test_l2_pgd_on_a_linear_loss_reaches_the_optimum():
    # inside the box the best is x + ε w/‖w‖
    x, w = torch.full((3, 1, 4, 4), 0.5), rand(16, seed=1) - 0.5
    x_adv = ascend(lambda z: z.flatten(1) @ w, x, L2, 5, 0.25, None)
    torch.testing.assert_close(x_adv, x + 0.5 * (w / w.norm()).view(1, 1, 4, 4))


def test_images_are_attacked_independently_of_each_other():
    x, noise = rand(4, 1, 4, 4), 2 * rand(4, 1, 4, 4, seed=1) - 1
    weights = rand(16, seed=2) - 0.5

    def attack(rows: slice) -> Tensor:
        return ascend(lambda z: (z.flatten(1) @ weights).sin().sum(), x[rows], L2, 3, 0.2, noise[rows])

    torch.testing.assert_close(attack(slice(1, 3)), attack(slice(None))[1:3])


@pytest.mark.parametrize(("steps", "size"), [(10, 0.25), (50, 0.05), (2, 1.0), (1, 1.0)])
def test_default_step_size_in_units_of_eps(steps: int, size: float):
    assert default_step_size(0.2, steps) == pytest.approx(size * 0.2)


def test_infinities_of_a_gradient_are_twice_its_largest_finite_entry():
    inf, nan = torch.inf, torch.nan
    given = torch.tensor([[1.0, -3.0, 0.0], [inf, -2.0, nan], [-inf, inf, 0.0], [nan, nan, nan], [inf, 1e38, 0.0]])
    expected = torch.tensor([[1.0, -3.0, 0.0], [4.0, -2.0, 0.0], [-2.0, 2.0, 0.0], [0.0] * 3, [2e38, 1e38, 0.0]])
    assert torch.equal(finite(given.view(5, 3, 1, 1)), expected.view(5, 3, 1, 1))

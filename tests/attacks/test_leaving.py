"""Rows leave an attack when they are broken, and those that stay are attacked as if none had."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from bench import load_model
from bench.attacks.leaving import AllBroken, UnbrokenRows, leave_early
from bench.attacks.prepared import Prepared
from bench.datasets.base import open_dataset
from bench.spec import Norm

PARTS = ["apgd", "apgd_targeted", "fab", "square"]


class Seen(nn.Module):
    """Notes the size of every batch that goes through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x)


class InDouble(nn.Module):
    """float32 in and out, double inside, where a batch's size moves no sum enough to be seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.double()).float()


@pytest.fixture
def part_of(cut_autoattack: Any) -> Callable[..., Any]:
    """part_of("fab", model): that part of the standard version, with a small budget, as AutoAttack sets it up."""
    cut_autoattack(12, 2, 200)

    def build(attribute: str, model: nn.Module, norm: Norm = "Linf", eps: float = 0.02) -> Any:
        part = getattr(AutoAttack(model, norm=norm, eps=eps, seed=1), attribute)
        part.targeted = attribute == "fab"
        if attribute == "apgd":
            part.loss = "ce"
        return part

    return build


def test_a_row_that_left_is_asked_no_more_and_passes_for_right(linear_net: Any):
    inside = Seen(linear_net([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]).view(3, 1, 1, 2)
    y = torch.zeros(3, dtype=torch.long)
    unbroken = UnbrokenRows(inside, x, y, lambda z, wrong: wrong)
    torch.testing.assert_close(unbroken(x), x.flatten(1))

    moved = x.clone()
    moved[1] = moved[1].flip(2)  # wrong: it leaves, after its own logits
    z = moved.clone().requires_grad_()
    assert unbroken(z)[1].tolist() == pytest.approx([0.2, 0.8])
    assert unbroken.rows.tolist() == [0, 2]

    logits = unbroken(z)
    assert logits[1].tolist() == [1, 0]
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), z)
    assert gradient.flatten(1).tolist() == [[1, 0], [0, 0], [1, 0]]
    assert inside.sizes == [3, 3, 2]

    with pytest.raises(AllBroken):
        unbroken(x.flip(3))
    assert torch.equal(unbroken.x_adv, torch.stack([x[0].flip(2), moved[1], x[2].flip(2)]))  # as each of them left


#: Where each part breaks some of the images and not others.
EPS: dict[Norm, dict[str, float]] = {
    "Linf": {"apgd": 0.15, "apgd_targeted": 0.15, "fab": 0.15, "square": 0.3},
    "L2": {"apgd": 0.5, "apgd_targeted": 0.5, "fab": 0.5, "square": 0.8},
    "L1": {"apgd": 1.5, "apgd_targeted": 1.5, "fab": 1.5, "square": 2.0},
}


@pytest.mark.parametrize("norm", ["Linf", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("L2", "L1"))])
@pytest.mark.parametrize(
    "attribute", [pytest.param(part, marks=[pytest.mark.slow] * (part == "fab")) for part in PARTS]
)
def test_the_same_rows_are_broken(attribute: str, norm: Norm, part_of: Any):
    digits = open_dataset("digits").evaluation_set(Path(), 40)
    model = InDouble(load_model("moe-rt_er", dataset="digits", threat_model="Linf"))
    right = model(digits.x).argmax(1) == digits.y
    x, y = digits.x[right], digits.y[right]
    plain, fast = (part_of(attribute, model, norm, EPS[norm][attribute]) for _ in range(2))
    leave_early(fast, model)
    expected, found = plain.perturb(x, y), fast.perturb(x, y)
    broken = model(expected).argmax(1) != y
    assert 2 < int(broken.sum()) < len(y) - 2
    assert torch.equal(model(found).argmax(1) != y, broken)
    assert torch.equal(found[~broken], x[~broken])


@pytest.mark.parametrize("attribute", ["apgd", "apgd_targeted", "fab"])
def test_a_run_ends_when_all_rows_are_broken(attribute: str, planted: Any, part_of: Any):
    data, inside = planted.data(), Seen(planted.broken())
    x, y = data.x[:23], data.y[:23]
    part = part_of(attribute, inside, eps=0.1)
    leave_early(part, inside)
    x_adv = part.perturb(x, y)
    assert (planted.broken()(x_adv).argmax(1) != y).all()
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert len(inside.sizes) < 12  # a run has 12 steps, FAB's has 24


@pytest.mark.parametrize("attribute", [part for part in PARTS if part != "fab"])
def test_a_copy_that_is_wrong_about_an_image_is_overruled(attribute: str, planted: Any, part_of: Any):
    class Fragile(nn.Module):
        """Right about clean images, wrong about everything near them."""

        def forward(self, z: Tensor) -> Tensor:
            logits = planted.robust()(z)
            moved = torch.cdist(z.flatten(1), x.flatten(1)).amin(1) > 0
            return torch.where(moved[:, None], -logits, logits)

    data = planted.data()
    x, y = data.x[:23], data.y[:23]
    model = Seen(planted.robust())
    part = part_of(attribute, model, eps=0.2)
    leave_early(part, Fragile())
    assert torch.equal(part.perturb(x, y), x)
    expected = part_of(attribute, seen := Seen(planted.robust()), eps=0.2)
    expected.perturb(x, y)
    assert model.sizes == [23, *seen.sizes]  # one look at the copy's answer, then all of the part's own passes


def test_what_a_wrong_copy_found_all_the_same_is_kept(linear_net: Any):
    # class 1 where the second pixel is the larger one; the copy breaks rows 0 and 1, the model confirms 0 and breaks 2
    model = linear_net([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[0.6, 0.4]] * 4).view(4, 1, 1, 2)
    y = torch.zeros(4, dtype=torch.long)
    by_copy, by_model = x.clone(), x.clone()
    by_copy[0], by_copy[1], by_model[2] = x[0].flip(2), x[1] - 0.1, x[2].flip(2)
    answers = iter([by_copy, by_model])
    part = SimpleNamespace(predict=model, perturb=lambda x, y: next(answers))
    leave_early(part, model)
    assert torch.equal(part.perturb(x, y), torch.stack([by_copy[0], x[1], by_model[2], x[3]]))


def test_a_part_is_itself_again_after_an_error(planted: Any, part_of: Any):
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    data, model = planted.data(), planted.robust()
    part = part_of("apgd", model)
    leave_early(part, Fails())
    with pytest.raises(RuntimeError, match="out of memory"):
        part.perturb(data.x, data.y)
    assert part.model is model


def test_a_prepared_copy_is_used_for_all_but_the_last_look(planted: Any, part_of: Any):
    data, model = planted.data(), Seen(planted.robust())
    part = part_of("apgd", model)
    leave_early(part, Prepared(planted.robust()))
    part.perturb(data.x[:23], data.y[:23])
    assert model.sizes == [23]

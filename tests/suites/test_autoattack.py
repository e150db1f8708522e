"""AutoAttack: what we store is what pyautoattack finds, and what it leaves behind is cleared away."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from bench import load_model
from bench.attacks.block import PassCounter
from bench.datasets.base import EvalSet, fingerprint, open_dataset
from bench.models.architecture import Routed
from bench.randomness import block_seed
from bench.spec import Norm
from bench.suites.autoattack import AutoAttackSuite, standard

NAMES = ["apgd-ce", "apgd-t", "fab-t", "square"]
ENGINES = ["fast", "reference"]


class InDouble(nn.Module):
    """float32 in and out, double inside; the model is out of reach of `.float()`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hidden = (model.double(),)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x.double()).float()


def routed(gate: str, **options: Any) -> nn.Module:
    """An untrained MoE for 8×8 images, whose router sends them to different experts."""
    arch = Routed(
        expert="small_cnn",
        expert_params={"width": 4},
        input_shape=(1, 8, 8),
        num_classes=10,
        mean=(0.3,),
        std=(0.4,),
        num_experts=3,
        gate=gate,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = arch.build()
    model.router.linear.weight.data *= 10
    return model.eval().requires_grad_(False)


def images(n: int = 24, channels: int = 1) -> Tensor:
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().images[-n:] / 16).float().unsqueeze(1)
    return x.repeat(1, channels, 1, 1)


def digits(n: int) -> EvalSet:
    return open_dataset("digits").evaluation_set(Path(), n)


def labelled(model: nn.Module, x: Tensor, wrong: tuple[int, ...] = (3, 17)) -> EvalSet:
    """The images with the model's own classes as labels, but for the `wrong` ones."""
    y = model(x).argmax(1)
    for i in wrong:
        y[i] = (y[i] + 1) % 10
    return EvalSet(x, y, torch.arange(len(x)), fingerprint(x, y), "")


def directly(
    model: nn.Module, data: EvalSet, norm: Norm, eps: float, seed: int, attacks: list[str] = NAMES
) -> list[tuple[list[bool], list[int]]]:
    """(robust, class of what is returned) per example, from pyautoattack alone: after 1, 2 … of the attacks."""
    found = []
    for k in range(1, len(attacks) + 1):
        attack = AutoAttack(model, norm=norm, eps=eps, seed=seed)
        attack.attacks_to_run = attacks[:k]
        x_adv, y_adv = attack.run_standard_evaluation(data.x, data.y, batch_size=len(data))
        found.append(((model(x_adv).argmax(1) == data.y).tolist(), y_adv.tolist()))
    return found


def assert_parity(
    rows: Any, data: EvalSet, reference: list[tuple[list[bool], list[int]]], predictions: bool = True
) -> None:
    """The rows of each attack are of the examples not broken before it, with the reference's verdicts.

    `predictions`: also which class is seen instead; over several steps it is another, where a row leaves at the first.
    """
    clean = rows[rows["attack"] == "clean"]
    unbroken = clean["robust"].tolist()
    for name, (robust, predicted) in zip(NAMES, reference, strict=True):
        mine = rows[rows["attack"] == name].set_index("idx")
        assert sorted(mine.index) == [i for i, yes in enumerate(unbroken) if yes], name
        assert mine["robust"].to_dict() == {i: robust[i] for i in mine.index}, name
        broken = mine[~mine["robust"] & predictions]
        assert broken["adv_pred"].to_dict() == {i: predicted[i] for i in broken.index}, name
        unbroken = robust
    final = rows.groupby("idx")["robust"].all()
    assert final.tolist() == reference[-1][0]


# Linf 0.02 and L2 0.1: each attack but Square breaks some examples, and some withstand all of them.
BUDGET = {"Linf": (1, 1, 100), "L2": (1, 1, 100), "L1": (6, 1, 50)}
EPS: dict[Norm, float] = {"Linf": 0.02, "L2": 0.1, "L1": 0.5}


@pytest.mark.parametrize(
    ("norm", "gate", "wrapper"),
    [
        pytest.param("Linf", "softmax", nn.Sequential, marks=pytest.mark.slow),
        ("Linf", "argmax", InDouble),
        ("L2", "argmax", nn.Sequential),
        pytest.param("L2", "softmax", InDouble, marks=pytest.mark.slow),
        pytest.param("L1", "softmax", nn.Sequential, marks=pytest.mark.slow),
        pytest.param("L1", "argmax", InDouble, marks=pytest.mark.slow),
    ],
)
def test_rows_are_what_pyautoattack_says_of_the_block(
    norm: Norm, gate: str, wrapper: Any, score: Any, cut_autoattack: Any
):
    cut_autoattack(*BUDGET[norm])
    model = wrapper(routed(gate)).eval()
    data = labelled(model, images())
    result, rows = score(model, "autoattack", data, norm=norm, eps=EPS[norm], seed=3)
    reference = directly(model, data, norm, EPS[norm], seed=3)
    assert_parity(rows, data, reference)
    assert result.errors == 0
    assert 0 < sum(reference[-1][0]) < sum(reference[0][0]) < 22
    assert list(result.accuracy_after) == ["clean", *NAMES]


class DoubleInside(InDouble):
    """The same, and the model in reach: what is prepared for attacking is its BatchNorm as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.inside = model


ZOO = ["moe-rt_er-argmax", "dual", "dual-jtdmoe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "seed", "eps"), [(name, *((0, 0.1), (5, 0.2))[place % 2]) for place, name in enumerate(ZOO)]
)
def test_trained_models_in_double_have_pyautoattacks_verdicts(
    variant: str, seed: int, eps: float, score: Any, cut_autoattack: Any
):
    cut_autoattack(5, 2, 100)
    model, data = DoubleInside(load_model(variant, dataset="digits", threat_model="Linf")), digits(30)
    result, rows = score(model, "autoattack", data, eps=eps, seed=seed)
    assert_parity(rows, data, directly(model, data, "Linf", eps, seed), predictions=False)
    assert not any("prepared" in flag or "re-check" in flag for flag in result.flags)
    assert result.errors == 0
    assert 0 < result.robust_accuracy.value < result.clean_accuracy.value


@pytest.mark.slow
def test_trained_models_in_float32_have_pyautoattacks_verdicts_but_for_rounding(score: Any, cut_autoattack: Any):
    cut_autoattack(10, 2, 200)
    model, data = load_model("moe-rt_er", dataset="digits", threat_model="Linf"), digits(60)
    found = [score(model, "autoattack", data, eps=0.15, settings={"engine": engine})[1] for engine in ENGINES]
    fast, reference = (rows.groupby("idx")["robust"].all() for rows in found)
    assert 0 < reference.sum() < 60
    assert (fast != reference).sum() <= 1


@pytest.mark.slow
def test_the_reference_engine_is_pyautoattack_pass_by_pass(score: Any, cut_autoattack: Any):
    cut_autoattack(*BUDGET["Linf"])
    model = routed("softmax")
    data = labelled(model, images())
    result, rows = score(model, "autoattack", data, eps=0.02, seed=3, settings={"engine": "reference"})
    assert_parity(rows, data, directly(model, data, "Linf", 0.02, seed=3))
    with PassCounter(model) as counter:
        directly(model, data, "Linf", 0.02, 3, NAMES)
        counter.lap()
        AutoAttack(model, norm="Linf", eps=0.02, seed=3).run_standard_evaluation(data.x, data.y)
        forwards, backwards = counter.lap()
    # The suite looks at the clean images and at each answer; pyautoattack's own last look comes after the last answer.
    looks = len(data) + len(rows[rows["attack"] != "clean"]) - len(rows[rows["attack"] == "square"])
    total = [sum(counts[kind] for counts in result.passes.values()) for kind in ("forwards", "backwards")]
    assert total == [forwards + looks, backwards]
    assert result.spec.suite_params == {"engine": "reference"}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_undefended_model_costs_a_fraction_of_the_passes(engine: str, planted: Any, score: Any):
    result, _ = score(planted.broken(), "autoattack", settings={"engine": engine})
    assert result.robust_accuracy.value == 0
    passes = result.passes["apgd-ce"]
    if engine == "reference":
        assert passes["backwards"] == 23 * 101
    else:
        assert passes["backwards"] < 23 * 5
        assert passes["forwards"] < 24 * 20


@pytest.mark.slow
def test_a_model_that_cannot_be_prepared_is_attacked_as_it_is(score: Any, cut_autoattack: Any):
    class Hooked(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("not to be copied")

    cut_autoattack(*BUDGET["Linf"])
    model = Hooked(routed("softmax")).eval()
    data = labelled(model, images())
    result, rows = score(model, "autoattack", data, eps=0.02)
    assert_parity(rows, data, directly(model, data, "Linf", 0.02, 0))
    (flag,) = result.flags
    assert flag == "AutoAttack: engine=reference, since there is no prepared copy of the model that answers alike"


def test_a_copy_that_hides_from_attacks_is_found_out(planted: Any, score: Any, cut_autoattack: Any):
    class Hiding(nn.Module):
        """Its copy answers as itself on the images as they are, and on others has no gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.inside, self.me = planted.broken(), id(self)
            self.seen = planted.data().x

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inside(x)
            known = (x[:, None] == self.seen[None]).flatten(2).all(2).any(1)
            if self.me != id(self):
                logits = torch.where(known[:, None], logits, logits.detach())
            return logits

    cut_autoattack(*BUDGET["Linf"])
    _, expected = score(Hiding(), "autoattack", settings={"engine": "reference"}, seed=5)
    result, rows = score(Hiding(), "autoattack", seed=5)
    assert rows["robust"].tolist() == expected["robust"].tolist()
    assert any("answers otherwise" in flag for flag in result.flags)


@pytest.mark.slow
def test_verdicts_are_what_pyautoattack_says_of_many_steps(planted: Any, score: Any, cut_autoattack: Any):
    cut_autoattack(50, 2, 1000)  # APGD halves its steps several times, and its rows leave between
    model, data, eps = planted.broken(), planted.data(), 0.02  # the margin, but for the noise
    result, rows = score(model, "autoattack", data, eps=eps, seed=1)
    attack = AutoAttack(model, norm="Linf", eps=eps, seed=1)
    x_adv, _ = attack.run_standard_evaluation(data.x, data.y, batch_size=24)
    robust = (model(x_adv).argmax(1) == data.y).tolist()
    assert rows.groupby("idx")["robust"].all().tolist() == robust
    assert 0 < sum(robust) < 23
    assert result.passes["square"]["forwards"] > 1000


@pytest.mark.slow
def test_second_block_is_attacked_as_if_it_were_alone(score: Any, cut_autoattack: Any):
    cut_autoattack(*BUDGET["Linf"])
    model = routed("softmax")
    data = labelled(model, images())
    _, rows = score(model, "autoattack", data, eps=0.02, seed=3, batch_size=12)
    half = EvalSet(data.x[12:], data.y[12:], torch.arange(12), "half", "")
    second = rows[rows["idx"] >= 12].assign(idx=lambda frame: frame["idx"] - 12)
    assert_parity(second, half, directly(model, half, "Linf", 0.02, block_seed(3, 1)))


@pytest.mark.parametrize("case", [pytest.param("batches of one", marks=pytest.mark.slow), "one is right", "one image"])
def test_few_examples_are_judged_as_pyautoattack_does(case: str, score: Any, cut_autoattack: Any):
    cut_autoattack(*BUDGET["Linf"])
    model = routed("softmax")
    wrong = tuple(range(1, 8)) if case == "one is right" else ()
    data = labelled(model, images({"one image": 1, "batches of one": 3}.get(case, 8)), wrong)
    size = 1 if case == "batches of one" else 8
    _, rows = score(model, "autoattack", data, eps=0.01, batch_size=size)
    for start in range(0, len(data), size):
        chosen = slice(start, start + size)
        part = EvalSet(data.x[chosen], data.y[chosen], data.idx[chosen], "part", "")
        mine = rows[rows["idx"].isin(part.idx.tolist())].assign(idx=lambda frame, start=start: frame["idx"] - start)
        assert_parity(mine, part, directly(model, part, "Linf", 0.01, block_seed(0, start // size)))


def test_all_examples_are_misclassified_and_nothing_is_attacked(planted: Any, score: Any):
    data = planted.data()
    wrong = EvalSet(data.x, (data.y + 5) % 10, data.idx, "wrong", "")
    result, rows = score(planted.robust(), "autoattack", wrong)
    assert (result.clean_accuracy.value, result.robust_accuracy.value, result.errors) == (0, 0, 0)
    assert set(rows["attack"]) == {"clean"}


def test_attacks_that_find_all_broken_have_no_row_but_a_place(planted: Any, score: Any):
    result, rows = score(planted.broken(), "autoattack")
    assert list(rows["attack"].unique()) == ["clean", "apgd-ce"]
    assert result.accuracy_after == {"clean": 23 / 24, **dict.fromkeys(NAMES, 0.0)}
    assert result.flags == ()


def test_standard_is_the_published_version(planted: Any, block_of: Any):
    block = block_of(planted.robust(), planted.data(), seed=7)
    attack = standard(block)
    assert (attack.version, attack.attacks_to_run, attack.seed, attack.epsilon) == ("standard", NAMES, 7, 0.2)
    assert (attack.apgd.n_iter, attack.apgd.n_restarts) == (100, 1)
    assert (attack.apgd_targeted.n_iter, attack.apgd_targeted.n_target_classes) == (100, 9)
    assert (attack.fab.n_iter, attack.fab.n_target_classes, attack.fab.n_restarts) == (100, 9, 1)
    assert attack.square.n_queries == 5000
    assert block.flags == []
    one = standard(block_of(planted.robust(), planted.data(), norm="L1"))
    assert (one.apgd.n_restarts, one.apgd_targeted.n_target_classes, one.fab.n_target_classes) == (5, 5, 9)


@pytest.mark.parametrize(
    ("classes", "norm", "attacks", "targets"),
    [(9, "Linf", NAMES, 8), (4, "Linf", NAMES, 3), (3, "Linf", ["apgd-ce", "fab-t", "square"], 2), (7, "L1", NAMES, 5)],
)
def test_targets_are_capped_with_fewer_than_ten_classes(
    classes: int, norm: Norm, attacks: list[str], targets: int, planted: Any, block_of: Any
):
    block = block_of(planted.robust(classes), planted.data(classes * 2, classes), num_classes=classes, norm=norm)
    attack = standard(block)
    assert (attack.version, attack.attacks_to_run) == ("standard-few-classes", attacks)
    assert (attack.apgd_targeted.n_target_classes, attack.fab.n_target_classes) == (targets, classes - 1)
    assert block.flags == ["AutoAttack: standard-few-classes"]


@pytest.mark.parametrize("classes", [2, 5])
def test_few_classes_run_and_are_flagged(classes: int, planted: Any, score: Any, cut_autoattack: Any):
    cut_autoattack(5, 9, 50)
    data = planted.data(12, classes)
    broken, _ = score(planted.broken(classes), "autoattack", data, num_classes=classes)
    robust, rows = score(planted.robust(classes), "autoattack", data, num_classes=classes)
    assert (broken.robust_accuracy.value, robust.robust_accuracy.value) == (0, 11 / 12)
    assert broken.flags == robust.flags == ("AutoAttack: standard-few-classes",)
    ran = NAMES if classes > 3 else ["apgd-ce", "fab-t", "square"]
    assert list(rows["attack"].unique()) == ["clean", *ran]
    assert list(broken.accuracy_after) == ["clean", *ran]


class Probabilities(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(1)


class Noisy(Probabilities):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.01 * torch.randn(len(x), 10)


class Rounded(Probabilities):
    """Its gradient is zero wherever there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 100).round() / 100)


class Defended(Probabilities):
    """Takes gradients of its own while it predicts."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            probe = x.detach().clone().requires_grad_()
            torch.autograd.grad(self.model(probe).sum(), probe)
        return self.model(x)


@pytest.mark.parametrize(
    ("wrapper", "flags"),
    [
        (Probabilities, ["AutoAttack: the outputs are probabilities"]),
        (Noisy, ["AutoAttack: the outputs are random"]),
        (Rounded, ["AutoAttack: points with zero gradient", "AutoAttack: Square beats the white-box attacks"]),
        (Defended, ["AutoAttack: the model computes gradients in its forward pass"]),
    ],
)
def test_warnings_become_flags_and_nothing_is_printed(
    wrapper: Any,
    flags: list[str],
    planted: Any,
    score: Any,
    cut_autoattack: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    cut_autoattack(3, 2, 50)
    inside = planted.broken() if wrapper is Rounded else planted.robust()
    result, _ = score(wrapper(inside).eval(), "autoattack")
    assert set(flags) <= set(result.flags)
    assert (caplog.records, *capfd.readouterr()) == ([], "", "")
    assert logging.getLogger("auto-attack").propagate


def test_a_warning_that_is_not_known_is_kept_in_its_words(
    planted: Any, block_of: Any, monkeypatch: pytest.MonkeyPatch, cut_autoattack: Any
):
    cut_autoattack(1, 1, 1)
    monkeypatch.setattr(checks, "check_n_classes", lambda *_, logger: logger.warning("three moons tonight"))
    block = block_of(planted.broken(), planted.data())
    list(AutoAttackSuite().attack(block))
    assert block.flags == ["AutoAttack: three moons tonight"]


def test_one_models_gradients_are_not_held_against_the_next(planted: Any, score: Any, cut_autoattack: Any):
    cut_autoattack(1, 1, 1)
    first, _ = score(Defended(planted.broken()).eval(), "autoattack")
    second, _ = score(planted.broken(), "autoattack")
    assert first.flags == ("AutoAttack: the model computes gradients in its forward pass",)
    assert second.flags == ()


def test_tracing_goes_on_after_the_attack(planted: Any, block_of: Any, cut_autoattack: Any):
    cut_autoattack(1, 1, 1)

    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        list(AutoAttackSuite().attack(block_of(planted.broken(), planted.data())))
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is tracer


class FailsLate(nn.Module):
    """Raises when it is called for the n-th time."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of memory")
        return self.model(x)


@pytest.mark.slow
def test_what_was_found_before_a_failure_counts(score: Any, cut_autoattack: Any, unprobed: None):
    cut_autoattack(*BUDGET["Linf"])
    whole = routed("softmax")
    data = labelled(whole, images())
    reference = directly(whole, data, "Linf", 0.02, 0)
    _, all_rows = score(whole, "autoattack", data, eps=0.02)
    result, rows = score(FailsLate(whole, 40), "autoattack", data, eps=0.02)
    done = [name for name in NAMES if name in set(rows["attack"])]
    assert 0 < len(done) < 4
    found = rows[rows["attack"].isin(done)].reset_index(drop=True)
    expected = all_rows[all_rows["attack"].isin(done)].reset_index(drop=True)
    assert found.drop(columns=["clean_expert", "adv_expert"]).equals(
        expected.drop(columns=["clean_expert", "adv_expert"])
    )
    failed = rows[rows["status"] == "error"]
    unbroken = [i for i, yes in enumerate(reference[len(done) - 1][0]) if yes]
    assert (failed["idx"].tolist(), set(failed["attack"])) == (unbroken, {"autoattack"})
    assert result.errors == len(unbroken)
    assert result.error_messages == ("autoattack: RuntimeError: out of memory",)
    assert result.robust_accuracy.value == 0

"""What every suite has to do: tell a broken model from a robust one, and keep to the contract."""

import logging
from typing import Any

import pytest

from bench.errors import UnusableInput
from bench.models.parts import parts
from bench.registry import SUITES
from bench.spec import Norm, ThreatModel
from bench.suites.base import CaughtWarnings, open_suites
from bench.suites.clean import Clean
from bench.suites.pgd import PGD

#: Every suite that attacks, in each of its norms. Of torchattacks, whose release is pinned, six that differ in kind:
#: one step, momentum over neighbours, targeted steps that adapt, random search, a penalty, a sparse penalty. That all
#: others are made as they should be is for test_torchattacks.py.
ATTACKS: list[tuple[str, Norm]] = [
    (name, norm) for name in SUITES if name not in ("clean", "torchattacks") for norm in SUITES[name].norms
]
ATTACKS += [("torchattacks:FGSM", "Linf"), ("torchattacks:VMIFGSM", "Linf"), ("torchattacks:APGDT", "Linf")]
ATTACKS += [("torchattacks:Square", "L2"), ("torchattacks:CW", "L2"), ("torchattacks:EADL1", "L1")]
#: The data set that a suite for any is run on.
DATASET = {name: (SUITES[name].datasets or ("planted",))[0] for name in SUITES}
SLOW = [
    ("autoattack", "L1"), ("autoattack", "L2"), ("robustbench", "L2"), ("torchattacks:EADL1", "L1"),
    ("torchattacks:Square", "L2"), ("components", "L2"),
]  # fmt: skip
#: Fewer queries than by default, which would take seconds and prove no more.
SETTINGS: dict[str, dict[str, Any]] = {"torchattacks:Square": {"n_queries": 200}, "adaptive": {"budget": "small"}}


@pytest.mark.parametrize(
    ("suite", "norm"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair in SLOW or pair[0] == "adaptive" else ()) for pair in ATTACKS],
)
def test_suite_tells_the_broken_from_the_robust_model(
    suite: str, norm: Norm, planted: Any, score: Any, cut_autoattack: Any
):
    cut_autoattack(5, 4, 50)  # that the whole budget is pyautoattack's own is for test_autoattack.py
    dataset = DATASET.get(suite, "planted")
    broken, rows = score(planted.broken(), suite, dataset=dataset, norm=norm, settings=SETTINGS.get(suite))
    robust, _ = score(planted.robust(), suite, dataset=dataset, norm=norm, settings=SETTINGS.get(suite))
    assert broken.errors == robust.errors == 0, broken.error_messages + robust.error_messages
    assert broken.clean_accuracy.value == robust.clean_accuracy.value == 23 / 24
    assert broken.robust_accuracy.value <= 0.1
    assert robust.robust_accuracy.value == 23 / 24
    targets = {"F", *parts(planted.broken())} if suite == "components" else {"F"}
    assert set(rows["target"]) == targets


@pytest.mark.parametrize(
    "suite", ["pgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("autoattack", "torchattacks:Square"))]
)
def test_suite_tells_a_dual_by_its_alpha(suite: str, planted: Any, score: Any, cut_autoattack: Any):
    # R keeps a margin of 26 · ½ · ⅓ at the least, so p_R(y) > 0.9 and α p_R(y) > ½ at α = 0.7, whatever S answers. At
    # α = 0.3 the branch that an attack owns has 0.7 of the weight.
    cut_autoattack(5, 4, 50)
    robust, _ = score(planted.dual(0.7), suite, alpha=0.7, settings=SETTINGS.get(suite))
    broken, _ = score(planted.dual(0.3), suite, alpha=0.3, settings=SETTINGS.get(suite))
    assert (robust.clean_accuracy.value, robust.robust_accuracy.value) == (23 / 24, 23 / 24)
    assert broken.clean_accuracy.value == 23 / 24
    assert broken.robust_accuracy.value <= 0.1


def test_planted_models_have_logits_that_vary(planted: Any):
    for model in (planted.robust(), planted.broken(), planted.dual(0.7)):
        assert model(planted.data().x).std(dim=0).min() > 0.1


@pytest.mark.parametrize("name", [name for name in SUITES if name != "torchattacks"])
def test_suite_keeps_to_the_contract(name: str):
    suite = open_suites([name], {})[name]
    assert suite.version >= 1
    assert suite.norms
    assert suite.params == {}  # a default is not recorded, so that it can be written out without a new run key
    with pytest.raises(UnusableInput, match="takes nothing behind its name"):
        open_suites([f"{name}:x"], {})
    for norm in {"Linf", "L2", "L1"} - set(suite.norms):
        with pytest.raises(UnusableInput, match=f"'{name}' has no {norm} attack: it has"):
            suite.check(name, DATASET[name], ThreatModel.parse(norm, 1.0))
    if suite.datasets:
        with pytest.raises(UnusableInput, match=f"'{name}' does not know data set tinyimagenet: it knows"):
            suite.check(name, "tinyimagenet", ThreatModel.parse("Linf", 0.5))


def test_settings_go_to_the_suites_that_have_them():
    suites = open_suites(["clean", "pgd", "torchattacks:PGD"], {"steps": 3, "step_size": 0.1})
    assert suites["clean"] == Clean()
    assert suites["pgd"] == PGD(steps=3, step_size=0.1)
    assert suites["torchattacks:PGD"].params == {"steps": 3}
    assert open_suites(["pgd"], {"steps": 50})["pgd"].params == {}


@pytest.mark.parametrize(
    ("suite", "settings", "words"),
    [
        ("clean", {}, None),
        ("pgd", {"steps": 100}, None),
        ("pgd", {"steps": 1}, "steps=1 (default 50)"),
        ("pgd", {"steps": 49}, "steps=49 (default 50)"),
        ("pgd", {"step_size": 0.005}, "step_size=0.005 (50 such steps do not cross the ball)"),  # 50 × 0.005 < 2 × 0.2
        ("pgd", {"step_size": 0.01}, None),
        ("pgd", {"step_size": 0.4}, None),
        ("components", {"steps": 5}, "steps=5 (default 50)"),
        ("autoattack", {"engine": "reference"}, None),
        ("adaptive", {"budget": "small"}, "budget=small (default standard)"),
        ("adaptive", {"budget": "large"}, None),
        ("torchattacks:PGD", {"steps": 20, "random_start": True}, None),
        ("torchattacks:PGD", {"steps": 3}, "steps=3 (default 10)"),
        ("torchattacks:PGD", {"random_start": False}, "random_start=False (default True)"),
        ("torchattacks:PGD", {"alpha": 0.01}, "alpha=0.01 (10 such steps do not cross the ball)"),
        ("torchattacks:PGD", {"alpha": 0.01, "steps": 40}, None),
        ("torchattacks:FFGSM", {"alpha": 0.25}, None),  # its default, 10/8 ε
        ("torchattacks:FFGSM", {"alpha": 0.2}, "alpha=0.2 (1 such steps do not cross the ball)"),
        ("torchattacks:Square", {"n_queries": 10}, "n_queries=10 (default 5000)"),
        ("torchattacks:CW", {"steps": 10, "lr": 0.5}, "steps=10 (default 50)"),
    ],
)
def test_a_suite_says_what_makes_it_weaker_than_its_default(suite: str, settings: dict[str, Any], words: str | None):
    opened = open_suites([suite], settings)[suite]
    assert opened.weaker_than_default(ThreatModel(norm="Linf", eps=0.2)) == words


def test_a_weaker_suite_is_flagged_where_it_ran(planted: Any, score: Any):
    flagged, _ = score(planted.robust(), "pgd", settings={"steps": 2})
    assert flagged.flags == ("weaker than the default: steps=2 (default 50)",)
    fine, _ = score(planted.robust(), "pgd", settings={"steps": 60})
    assert fine.flags == ()


@pytest.mark.parametrize(
    ("suite", "name"), [("pgd", "step_size"), ("components", "step_size"), ("torchattacks:PGD", "alpha")]
)
def test_a_step_wider_than_the_ball_is_refused(suite: str, name: str):
    threat = ThreatModel(norm="Linf", eps=0.2)
    open_suites([suite], {name: 0.4})[suite].check(suite, "digits", threat)
    with pytest.raises(UnusableInput, match=f"^--set {name}=0.5: such a step of suite '{suite}' leaves the ball"):
        open_suites([suite], {name: 0.5})[suite].check(suite, "digits", threat)
    for unfit in (-0.1, 0, float("nan"), float("inf"), True, "wide"):
        with pytest.raises(UnusableInput, match=name):
            open_suites([suite], {name: unfit})


def test_what_no_suite_has_is_refused_with_the_nearest():
    for names, settings, message in [
        (["pdg"], {}, "unknown suite 'pdg': did you mean 'pgd'"),
        (["clean", "pgd"], {"stepz": 3}, "--set stepz: clean, pgd has no such parameter: did you mean 'steps'"),
        (["clean"], {"steps": 3}, "--set steps: clean has no such parameter: there is nothing to set"),
        (["pgd"], {"eps": 0.1}, "--set eps: pgd has no such parameter: it is given by --eps"),
        (["pgd"], {"steps": "many"}, "steps: .*'many'"),
        (["pgd"], {"steps": 0}, "steps: .*0"),
    ]:
        with pytest.raises(UnusableInput, match=message):
            open_suites(names, settings)


def test_warnings_are_caught_instead_of_printed(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]):
    logger = logging.getLogger("planted")
    with CaughtWarnings("planted") as caught:
        logger.warning("%s gradients", "zero")
        logger.info("a detail")
    assert caught.messages == ["zero gradients"]
    assert (caplog.records, *capfd.readouterr()) == ([], "", "")
    logger.warning("after")
    assert (len(caught.messages), len(caplog.records)) == (1, 1)

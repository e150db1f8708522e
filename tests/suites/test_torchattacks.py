"""`torchattacks:NAME`: every attack of that library can be had, inside the ball that was asked for."""

from typing import Any

import pytest
import torchattacks

from bench.errors import UnusableInput
from bench.spec import NORMS, TORCHATTACKS, Norm, ThreatModel
from bench.suites.base import open_suites
from bench.suites.torchattacks import TorchAttacks

#: Attacks that take no radius.
UNBOUNDED = ["CW", "DeepFool", "EADEN", "EADL1", "GN", "JSMA", "OnePixel", "Pixle", "SparseFool"]
ONLY_L2 = ["PGDL2", "PGDRSL2"]
LINF_AND_L2 = ["APGD", "APGDT", "AutoAttack", "FAB", "Square"]


def opened(name: str, **settings: Any) -> TorchAttacks:
    return open_suites([f"torchattacks:{name}"], settings)[f"torchattacks:{name}"]


def norms_of(name: str) -> list[Norm]:
    """The norms that the attack has."""
    if name in UNBOUNDED:
        return ["Linf", "L2", "L1"]  # whatever it finds is held up to the ball
    if name in LINF_AND_L2:
        return ["Linf", "L2"]
    return ["L2"] if name in ONLY_L2 else ["Linf"]


def test_every_attack_of_the_library_is_there():
    """But for wrappers, and VANILA, which attacks nothing."""
    assert set(TORCHATTACKS) == set(torchattacks.__all__) - {"LGV", "MultiAttack", "VANILA"}
    assert len(TORCHATTACKS) == 36


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_norms_that_an_attack_has_not_are_refused(name: str):
    for norm in NORMS:
        threat = ThreatModel(norm=norm, eps=0.1)
        if norm in norms_of(name):
            opened(name).check(f"torchattacks:{name}", "digits", threat)
        else:
            with pytest.raises(UnusableInput, match=f"'torchattacks:{name}' has no {norm} attack: it has L"):
                opened(name).check(f"torchattacks:{name}", "digits", threat)


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_every_attack_is_made_for_the_block(name: str, planted: Any, block_of: Any):
    suite = opened(name)
    assert suite.bounded == (name not in UNBOUNDED)
    for norm in norms_of(name):
        block = block_of(planted.robust(7), planted.data(14, 7), num_classes=7, norm=norm, eps=0.06, seed=5)
        arguments = suite.arguments(block)
        attack = getattr(torchattacks, name)(block.model, **arguments)
        radius = getattr(attack, "eps", getattr(attack, "max_epsilon", None))
        assert radius == (0.06 if suite.bounded else None)
        assert getattr(attack, "norm", norm) == norm
        assert getattr(attack, "seed", 5) == 5
        assert getattr(attack, "n_classes", 7) == 7
        assert getattr(attack, "n_target_classes", 6) == 6
    if name in ("APGDT", "AutoAttack", "FAB"):
        assert arguments["n_classes"] == 7
    if name in LINF_AND_L2:
        assert arguments["seed"] == 5


def test_step_keeps_its_ratio_to_the_radius_unless_set(planted: Any, block_of: Any):
    block = block_of(planted.robust(), planted.data(), eps=0.4)
    # the library's own are 2/255 for 8/255, and for FFGSM 10/255 for 8/255
    assert opened("PGD").arguments(block)["alpha"] == pytest.approx(0.1)
    assert opened("FFGSM").arguments(block)["alpha"] == pytest.approx(0.5)
    assert opened("PGD", alpha=0.03).arguments(block)["alpha"] == 0.03
    assert "alpha" not in opened("FGSM").arguments(block)


def test_settings_reach_the_attack_and_are_recorded(planted: Any, score: Any):
    result, _ = score(planted.robust(), "torchattacks:PGD", settings={"steps": 4, "random_start": False})
    assert result.spec.suite_params == {"steps": 4, "random_start": False}
    assert result.passes == {"PGD": {"forwards": 4 * 23, "backwards": 4 * 23}}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("PDG", {}, "unknown attack 'torchattacks:PDG': did you mean 'PGD'"),
        ("", {}, "unknown attack 'torchattacks:'"),
        ("__init__", {}, "unknown attack 'torchattacks:__init__'"),
        ("MultiAttack", {}, "unknown attack 'torchattacks:MultiAttack'"),
        ("PGD", {"stepz": 1}, "--set stepz: torchattacks:PGD has no such parameter: did you mean 'steps'"),
        ("FGSM", {"steps": 1}, "--set steps: .*there is nothing to set"),
        ("PGD", {"eps": 1}, "--set eps"),
        ("APGD", {"seed": 1}, "--set seed"),
        ("APGD", {"norm": "L2"}, "--set norm"),
        ("PIFGSM", {"max_epsilon": 1}, "--set max_epsilon"),
        ("PGD", {"model": 1}, "--set model"),
        ("PGD", {"alpha": -1}, r"--set alpha=-1 is not above 0 \(by default 0\.0078"),
        ("PGD", {"steps": 0}, "--set steps=0 is not above 0"),
        ("PGD", {"steps": 2.5}, "--set steps=2.5 is not a whole number"),
        ("PGD", {"steps": True}, "--set steps=True is not a finite number"),
        ("PGD", {"alpha": float("nan")}, "--set alpha=nan is not a finite number"),
        ("PGD", {"random_start": 3}, r"--set random_start=3 is of another kind \(by default True"),
        ("CW", {"kappa": -1}, "--set kappa=-1 is below 0"),
        ("Square", {"loss": 1}, "--set loss=1 is of another kind"),
    ],
)
def test_what_the_library_has_not_or_the_harness_sets_is_refused(name: str, settings: dict[str, Any], message: str):
    with pytest.raises(UnusableInput, match=message):
        opened(name, **settings)


def test_suite_without_a_name_is_refused():
    with pytest.raises(UnusableInput, match="unknown attack 'torchattacks:'"):
        open_suites(["torchattacks"], {})


@pytest.mark.parametrize("name", ["CW", "DeepFool"])
def test_what_an_attack_without_a_radius_finds_outside_the_ball_is_not_broken(name: str, planted: Any, score: Any):
    result, rows = score(planted.broken(), f"torchattacks:{name}", norm="L2", eps=0.05)
    attacked = rows[rows["attack"] == name]
    assert (attacked["adv_pred"] != attacked["label"]).all()  # it did find something
    assert (attacked["l2"] > 0.05).all()
    assert (attacked["status"] == "ok").all()
    assert attacked["robust"].all()
    assert (result.robust_accuracy.value, result.errors) == (23 / 24, 0)


@pytest.mark.parametrize("name", ["PIFGSM", "TIFGSM"])
def test_attack_that_takes_colours_only_is_an_error_on_grey_images(name: str, planted: Any, score: Any):
    data = planted.data()
    grey = type(data)(data.x[:, :1], data.y, data.idx, "grey", "")
    model = planted.robust()
    for reader in model.experts:
        reader.weight.data = reader.weight.data[:, :64]
    model.router[1].weight.data = model.router[1].weight.data[:, :64]
    result, rows = score(model, f"torchattacks:{name}", grey)
    assert (result.errors, result.robust_accuracy.value) == (23, 0)
    assert "to have 3 channels" in result.error_messages[0]
    assert set(rows[rows["status"] == "error"]["attack"]) == {f"torchattacks:{name}"}

"""What there is, and what is shown of it: everything that is listed has a sentence, everything shown its parameters."""

import json
import re
from typing import Any

import pytest

from bench import __version__
from bench.catalogue import details, names, sentence
from bench.commands import reading
from bench.errors import UnusableInput


@pytest.mark.parametrize("what", ["variants", "suites", "datasets", "objectives", "recipes"])
def test_everything_has_a_sentence(what: str):
    for name in names(what):
        text = sentence(what, name)
        assert text == " ".join(text.split())
        assert 3 < len(text) < 300, name


def test_parameters_have_type_default_and_meaning():
    found = details("suite", "pgd")
    assert found["norms"] == ["Linf", "L2"]
    assert found["needs"] == ["gradients"]
    assert found["cost"].startswith("about 50 forward and 50 backward passes for each example that withstands it")
    assert details("suite", "torchattacks:CW")["cost"] == "not known"
    assert found["parameters"] == [
        {"name": "steps", "type": "int", "default": 50, "meaning": "gradient steps"},
        {"name": "step_size", "type": "float | none", "default": None, "meaning": "in pixels of [0, 1]; None: ε/4"},
    ]
    by_name = {parameter["name"]: parameter for parameter in details("suite", "torchattacks:PGD")["parameters"]}
    assert list(by_name) == ["alpha", "steps", "random_start"]  # what the harness fills in is not there
    assert (by_name["steps"]["type"], by_name["steps"]["default"]) == ("int", 10)
    (engine,) = details("suite", "autoattack")["parameters"]
    assert engine["type"] == "fast | reference"


@pytest.mark.parametrize("what", ["suite", "objective", "recipe"])
def test_whatever_is_listed_can_be_shown(what: str):
    for name in names(f"{what}s"):
        assert json.dumps(details(what, name)), name


def test_of_a_recipe_the_values_of_its_settings_and_what_it_presets_of_each_objective():
    shown = details("recipe", "upcycled-cifar10")
    assert shown["what"].endswith("batches of 128, experts start from dense-at")
    assert shown["notes"].startswith("CIFAR-10 on a CPU, 40 minutes or less a variant: experts start from")
    assert shown["of all objectives"] == ["inner_steps=1", "start_radius=2"]
    assert shown["of rt_er"] == ["epochs=3", "lr=0.05", "beta=0.3", "expert_reduction=mean", "balance=0.25"]
    by_name = {parameter["name"]: parameter for parameter in shown["parameters"]}
    assert (by_name["epochs"]["value"], by_name["momentum"]["value"]) == (4, 0.9)  # its own, and the default
    assert {"objective", "network"}.isdisjoint(by_name)
    assert "of vmoe" in details("recipe", "cpu-cifar10")
    assert [key for key in details("recipe", "paper-tinyimagenet") if key.startswith("of ")]


def test_what_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(UnusableInput, match="unknown suite 'pdg': did you mean 'pgd'"):
        details("suite", "pdg")
    with pytest.raises(UnusableInput, match="unknown attack 'torchattacks:FGMS': did you mean 'FGSM'"):
        details("suite", "torchattacks:FGMS")
    with pytest.raises(UnusableInput, match="unknown objective 'tradez': did you mean 'trades'"):
        details("objective", "tradez")


def test_commands_print_them(bench: Any):
    status, out, err = bench("show", "suite", "adaptive")
    assert (status, err) == (0, "")
    assert out.startswith("name: adaptive\nwhat: ")
    assert "budget  small | standard | large  standard" in out
    assert bench("show", "suite", "clean")[1].endswith("\nno parameters\n")
    shown = json.loads(bench("show", "suite", "pgd", "--json")[1])
    assert shown["parameters"][0]["name"] == "steps"
    _, out, _ = bench("list", "objectives", "--long")
    assert [line.split()[0] for line in out.splitlines()] == names("objectives")
    assert list(json.loads(bench("list", "suites", "--long", "--json")[1])) == names("suites")


@pytest.mark.parametrize(
    "words", [("show", "suite", "adaptive"), ("show", "recipe", "cpu-cifar10"), ("list", "suites", "--long")]
)
def test_a_terminal_has_no_line_longer_than_it_is_wide(words: Any, bench: Any, monkeypatch: pytest.MonkeyPatch):
    _, whole, _ = bench(*words)
    assert max(map(len, whole.splitlines())) > 80
    monkeypatch.setattr(reading, "terminal_width", lambda: 80)
    _, fitted, _ = bench(*words)
    assert max(map(len, fitted.splitlines())) <= 80
    assert re.sub(r"[\s-]", "", fitted) == re.sub(r"[\s-]", "", whole)


def test_the_version_is_told(bench: Any):
    assert bench("--version") == (0, f"bench {__version__}\n", "")

"""The specs: what they accept, what identifies them, and how a threat is written."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.errors import UnusableInput
from bench.settings import parse_number, parse_settings
from bench.spec import (
    ADDED_PARAMETERS,
    Method,
    Recipe,
    RunSpec,
    ThreatModel,
    TrainSpec,
    build,
    dataset_folder,
    dataset_name,
    digest,
    path_safe,
)

LINF = ThreatModel(norm="Linf", eps=0.2)
RUN: dict[str, Any] = {
    "model": "moe-at", "alpha": None, "combine": None, "dataset": "digits", "threat_model": LINF, "suite": "pgd",
    "suite_version": 1, "suite_params": {"steps": 50}, "n_examples": 200, "seed": 0, "batch_size": 128,
    "warm_start": False,
    "gates": (),
}  # fmt: skip
#: another value for each of its fields
OTHER: dict[str, Any] = {
    "model": "dual", "alpha": 0.5, "combine": "logits", "dataset": "cifar10",
    "threat_model": ThreatModel(norm="L2", eps=0.2), "suite": "clean", "suite_version": 2,
    "suite_params": {"steps": 51}, "n_examples": 201, "seed": 1, "batch_size": 64,
    "warm_start": True,
    "gates": ("blocks.1.gate",),
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "variant": "moe-at", "dataset": "digits", "threat_model": LINF, "recipe_name": "digits", "recipe": Recipe(),
    "objective_params": {"inner_steps": 7}, "seed": 0,
}  # fmt: skip


# --- threat models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "eps", "expected"),
    [
        ("Linf", "8/255", ("Linf", 8 / 255)),
        ("linf", "0.2", ("Linf", 0.2)),
        ("l2", "1e-1", ("L2", 0.1)),
        ("L1", 12, ("L1", 12.0)),
    ],
)
def test_a_threat_as_a_user_writes_it(norm: str, eps: str | float, expected: tuple[str, float]):
    threat = ThreatModel.parse(norm, eps)
    assert (threat.norm, threat.eps) == expected


@pytest.mark.parametrize("eps", ["0", "-1", "nan", "inf", "-8/255", "1/inf", 0.0, -0.5, float("nan")])
def test_eps_that_is_not_above_zero_and_finite(eps: str | float):
    with pytest.raises(UnusableInput, match=f"^ε '{eps}' must be above 0 and finite: write it as 8/255"):
        ThreatModel.parse("Linf", eps)


@pytest.mark.parametrize("eps", ["abc", "1/0", "8/", "/255", "", "1/2/3"])
def test_eps_that_is_no_number(eps: str):
    with pytest.raises(UnusableInput, match=f"^ε '{eps}' is not a number: write it as 8/255"):
        ThreatModel.parse("Linf", eps)


@pytest.mark.parametrize("eps", ["8", "1", "255/255", 2.0])
def test_a_linf_ball_that_holds_every_image_is_refused_with_the_right_unit(eps: str | float):
    with pytest.raises(UnusableInput, match=f"^ε '{eps}' holds every image, since pixels lie in .* steps is .*/255$"):
        ThreatModel.parse("linf", eps)
    assert ThreatModel.parse("L2", eps).eps >= 1


def test_an_unknown_norm_is_refused_with_the_nearest():
    with pytest.raises(UnusableInput, match=r"^unknown norm 'Linff': did you mean 'Linf'\?$"):
        ThreatModel.parse("Linff", "0.1")
    with pytest.raises(UnusableInput, match=r"^unknown norm 'max': there are: Linf, L2, L1$"):
        ThreatModel.parse("max", "0.1")


def test_a_ball_in_which_no_pixel_changes_is_refused():
    assert ThreatModel.parse("Linf", "1e-7").eps == 1e-7
    with pytest.raises(UnusableInput, match=r"^ε '1e-9' changes no pixel"):
        ThreatModel.parse("Linf", "1e-9")


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threat_cannot_be_made_with_such_an_eps_either(eps: float):
    with pytest.raises(ValidationError):
        ThreatModel(norm="Linf", eps=eps)


@pytest.mark.parametrize(
    ("norm", "eps", "text", "folder"),
    [
        ("Linf", 8 / 255, "8/255", "Linf-8_255"),
        ("Linf", 0.5 / 255, "0.5/255", "Linf-0.5_255"),
        ("Linf", 0.2, "0.2", "Linf-0.2"),
        ("L2", 0.5, "0.5", "L2-0.5"),
        ("L2", 128 / 255, "128/255", "L2-128_255"),
        ("L1", 12.0, "12", "L1-12"),
        ("Linf", 0.03, "0.03", "Linf-0.03"),
    ],
)
def test_eps_is_written_as_people_write_it(norm: Any, eps: float, text: str, folder: str):
    threat = ThreatModel(norm=norm, eps=eps)
    assert (threat.eps_text, threat.folder, str(threat)) == (text, folder, f"{norm} {text}")


numbers = st.floats(1e-9, 1e4) | st.floats(1e-6, 255).map(lambda pixels: round(pixels, 6) / 255)


@settings(deadline=None)
@given(numbers)
def test_the_written_eps_is_read_back(eps: float):
    text = ThreatModel(norm="Linf", eps=eps).eps_text
    assert parse_number(text, "ε") == pytest.approx(eps, rel=1e-12, abs=0)


# --- keys -------------------------------------------------------------------------------------------------------------


def keys(checkpoint: str = "c", fingerprint: str = "f", **changed: Any) -> dict[str, str]:
    spec = RunSpec(**{**RUN, **changed})
    return {
        "run": spec.run_key(checkpoint, fingerprint),
        "work": spec.work_key(fingerprint),
        "subject": spec.subject_key(checkpoint, fingerprint),
    }


#: which keys a change of each field changes; the work is what is paired over seeds, the subject who was attacked
SENSITIVE: dict[str, set[str]] = {
    "model": {"run", "work", "subject"},
    "alpha": {"run", "work", "subject"},
    "combine": {"run", "work", "subject"},
    "dataset": {"run", "work", "subject"},
    "threat_model": {"run", "work", "subject"},
    "suite": {"run", "work"},
    "suite_version": {"run", "work"},
    "suite_params": {"run", "work"},
    "n_examples": {"run", "work"},
    "batch_size": {"run", "work"},
    "seed": {"run"},
    "warm_start": {"run", "work"},
    "gates": {"run", "work", "subject"},
}


def changed_keys(**changed: Any) -> set[str]:
    before, after = keys(), keys(**changed)
    return {name for name in before if before[name] != after[name]}


def test_every_field_of_a_run_is_judged():
    # the device is none of them: where a thing is computed does not change what is asked for
    assert set(RunSpec.model_fields) == set(RUN) == set(OTHER) == set(SENSITIVE)


@pytest.mark.parametrize("field", list(SENSITIVE))
def test_what_changes_which_key_of_a_run(field: str):
    assert changed_keys(**{field: OTHER[field]}) == SENSITIVE[field]


def test_a_run_keeps_the_keys_that_it_had_before_fields_that_it_does_not_use():
    spec = RunSpec(**RUN)
    before = spec.model_dump(mode="json")
    assert (before.pop("warm_start"), before.pop("gates")) == (False, [])
    assert spec.run_key("c", "f") == digest("run", before, "c", "f")
    del before["seed"]
    assert spec.work_key("f") == digest("work", before, "f")


def test_a_retrained_model_is_the_same_work_and_other_pixels_are_not():
    assert changed_keys(checkpoint="d") == {"run", "subject"}
    assert changed_keys(fingerprint="g") == {"run", "work", "subject"}


def test_the_keys_of_one_run_differ_among_themselves():
    assert len(set(keys().values())) == 3


def test_keys_do_not_depend_on_the_order_of_parameters():
    assert keys(suite_params={"a": 1, "b": 2}) == keys(suite_params={"b": 2, "a": 1})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


@pytest.mark.parametrize(
    "changed",
    [
        {"variant": "moe-rt_er"},
        {"dataset": "cifar10"},
        {"threat_model": ThreatModel(norm="Linf", eps=0.1)},
        {"recipe_name": "cpu-cifar10"},
        {"recipe": Recipe(lr=0.2)},
        {"objective_params": {"inner_steps": 8}},
        {"seed": 1},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_field_of_a_training_is_in_its_key(changed: dict[str, Any]):
    assert TrainSpec(**TRAIN).key == TrainSpec(**TRAIN).key != TrainSpec(**{**TRAIN, **changed}).key


def test_a_training_without_what_was_added_later_keeps_the_key_that_it_had_before():
    later = {"expert_reduction": "sum", "start_radius": 1.0}
    spec = TrainSpec(**{**TRAIN, "objective_params": {**TRAIN["objective_params"], **later}})
    before = spec.model_dump(mode="json")
    assert {name: before["recipe"].pop(name) for name in ADDED_PARAMETERS["recipe"]} == ADDED_PARAMETERS["recipe"]
    assert before["objective_params"] == {"inner_steps": 7, **later}
    before["objective_params"] = {"inner_steps": 7}
    assert spec.key == TrainSpec(**TRAIN).key == digest("train", before)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("recipe", "noise_sigma", 0.25),
        ("recipe", "ema_decay", 0.9),
        ("recipe", "swa_start", 0.5),
        ("recipe", "init", "a.safetensors"),
        ("recipe", "init_standard", "a.safetensors"),
        ("objective_params", "start_radius", 2.0),
        ("objective_params", "expert_reduction", "mean"),
    ],
)
def test_what_was_added_later_is_in_the_key_where_it_is_used(part: str, name: str, value: Any):
    assert name in ADDED_PARAMETERS[part]
    spec = TrainSpec(**TRAIN)
    if part == "recipe":
        used = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={name: value})})
    else:
        used = spec.model_copy(update={"objective_params": {**spec.objective_params, name: value}})
    asked = spec.model_dump(mode="json")
    for added in ADDED_PARAMETERS["recipe"]:
        del asked["recipe"][added]
    asked[part][name] = value
    assert used.key == digest("train", asked)


def test_the_defaults_of_what_was_added_later_are_those_of_the_recipe():
    recipe = Recipe().model_dump()
    assert {name: recipe[name] for name in ADDED_PARAMETERS["recipe"]} == ADDED_PARAMETERS["recipe"]


def test_weights_are_averaged_in_one_way():
    with pytest.raises(ValueError, match="ema_decay and swa_start are two ways to average weights"):
        Recipe(ema_decay=0.9, swa_start=0.0)


@pytest.mark.parametrize("value", [32, "32"])
def test_a_precision_of_32_may_be_written_as_a_number(value: Any):
    assert Recipe(precision=value).precision == "32"


def test_a_checkpoint_is_named_by_variant_and_seed():
    assert TrainSpec(**TRAIN).checkpoint_name == "moe-at"
    assert TrainSpec(**{**TRAIN, "seed": 3}).checkpoint_name == "moe-at-s3"


# --- the command ------------------------------------------------------------------------------------------------------

#: a text that means a number is one, as on the command line
TEXTS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"])).filter(lambda t: not re.match(r"[0-9.]", t))
LEAVES = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | st.none()


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), LEAVES | st.lists(LEAVES, max_size=3)))
@example({"a": "yes", "b": -1e-05, "c": [1e-05], "d": "a: b", "e": "#", "f": "it's", "g": 1e300, "h": "", "i": "1"})
def test_the_settings_of_a_command_are_read_back(params: dict[str, Any]):
    words = shlex.split(RunSpec(**{**RUN, "suite_params": params}).command(Path("r")))
    assert parse_settings(words[at + 1] for at, word in enumerate(words) if word == "--set") == params


def test_the_command_of_a_certification_is_certify():
    command = RunSpec(**{**RUN, "suite": "certify-routes", "suite_params": {}}).command(Path("r"))
    assert command.startswith("bench certify --method routes --dataset digits --model moe-at --n-examples 200")


# --- values -----------------------------------------------------------------------------------------------------------


def test_equal_specs_are_one_in_a_set():
    same = [RunSpec(**RUN), RunSpec(**RUN), RunSpec(**{**RUN, "suite_params": dict(RUN["suite_params"])})]
    assert len({*same, RunSpec(**{**RUN, "seed": 1})}) == 2


def test_specs_that_differ_in_the_order_of_parameters_are_one_in_a_set():
    one, other = (RunSpec(**{**RUN, "suite_params": params}) for params in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert one == other
    assert len({one, other}) == 1


def test_a_spec_is_frozen_and_knows_its_fields():
    with pytest.raises(ValidationError, match="frozen"):
        LINF.eps = 0.3
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunSpec(**RUN, device="cpu")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"epoch": 3}, "x has no parameter 'epoch': did you mean 'epochs'?"),
        ({"epochs": "many"}, "x: epochs: Input should be a valid integer"),
        ({"epochs": 0}, "x: epochs: Input should be greater than 0 (got 0)"),
        ({"epochs": True}, "x: epochs: Input should not be yes or no (got True)"),
        ({"schedule": False}, "x: schedule: Input should not be yes or no (got False)"),
        ({"lr": float("inf")}, "x: lr: Input should be a finite number (got inf)"),
        ({"lr": float("nan")}, "x: lr: Input should be a finite number (got nan)"),
        ({"schedule": "steps"}, "x: schedule: Input should be 'one_cycle', 'cyclic', 'cosine' or 'constant'"),
        ({"num_experts": 3, "num_selected_experts": 4}, "x: num_selected_experts 4 is more than num_experts 3"),
    ],
)
def test_what_cannot_be_built_is_one_line(values: dict[str, Any], wanted: str):
    with pytest.raises(UnusableInput) as refused:
        build(Recipe, "x", values)
    assert str(refused.value).startswith(wanted)
    assert "\n" not in str(refused.value)


def test_yes_is_no_number_but_for_a_field_that_is_true_or_false():
    class Some(Method):
        steps: int | None = 3
        exact: bool | None = None

    assert build(Some, "x", {"exact": True, "steps": None}) == Some(exact=True, steps=None)
    with pytest.raises(UnusableInput, match=r"^x: steps: Input should not be yes or no \(got True\)$"):
        build(Some, "x", {"steps": True})


def test_no_two_data_sets_share_a_folder_and_none_has_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert dataset_folder("digits") == "digits"
    alike = ["a/b", "a_b", "a:b", "ä", "ö", "x/a", "y/a"]
    folders = {dataset_folder(dataset_name(f"imagefolder:{path}")) for path in alike}
    assert len(folders) == len(alike)
    assert all(re.fullmatch(r"imagefolder_[A-Za-z0-9._-]+-[0-9a-f]{8}", folder) for folder in folders)
    monkeypatch.chdir(tmp_path)
    one = {dataset_name(f"imagefolder:{path}") for path in ("x", "x/", "./x", "y/../x", tmp_path / "x")}
    assert one == {f"imagefolder:{tmp_path}/x"}
    assert dataset_name("digits") == "digits"
    assert dataset_name("other:x") == "other:x"  # what an argument means, its data set knows


def test_where_images_lie_is_no_part_of_a_run():
    """The fingerprint identifies the images: a baseline made on another machine is of the same work."""
    here, there = (RunSpec(**RUN | {"dataset": f"imagefolder:/{home}/flowers"}) for home in ("one", "two"))
    for key in ("work_key", "run_key", "subject_key"):
        arguments = ["f"] if key == "work_key" else ["c", "f"]
        assert getattr(here, key)(*arguments) == getattr(there, key)(*arguments)
        assert getattr(here, key)(*arguments) != getattr(RunSpec(**RUN), key)(*arguments)


def test_names_as_files():
    assert path_safe("imagefolder:/a b") == "imagefolder__a_b"
    assert path_safe("moe-rt_er-s1.2") == "moe-rt_er-s1.2"

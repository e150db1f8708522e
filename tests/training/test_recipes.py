"""The presets, and the way from a user's words to the spec of a training."""

from typing import Any

import pytest

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.architecture import Dense, Dual, Routed
from bench.models.experts import EXPERTS
from bench.models.variants import VARIANTS, get_variant
from bench.registry import DATASETS, OBJECTIVES, RECIPES
from bench.spec import Recipe, ThreatModel, TrainSpec
from bench.training.objectives.base import Objective
from bench.training.recipes import architecture, objective_class, read_recipe, train_spec, train_specs

DIGITS = open_dataset("digits")


def spec(variant: str = "moe-at", recipe: str | None = None, seed: int = 0, **settings: Any) -> TrainSpec:
    return train_spec(variant, DIGITS, DIGITS.threat_model, recipe, settings, seed)


def test_several_variants_have_those_of_the_settings_that_they_know():
    settings = {"epochs": 3, "beta": 2.0}
    found = train_specs(["dual", "moe-rt_er", "moe-standard"], DIGITS, DIGITS.threat_model, None, settings, [0, 7])
    trained = [spec(variant, seed=seed, **own) for variant, own in [
        ("moe-rt_er", settings), ("moe-standard", {"epochs": 3}), ("dual", {"epochs": 3})  # put together last
    ] for seed in (0, 7)]  # fmt: skip
    assert found == trained
    started = train_specs(["moe-at", "dual", "dense-at"], DIGITS, DIGITS.threat_model, None, {}, [0])
    assert [each.variant for each in started] == ["dense-at", "moe-at", "dual"]  # an MoE may start from a dense model
    started = train_specs(["moe-at", "dense-at"], DIGITS, DIGITS.threat_model, None, {"init": "dense-at"}, [0])
    assert [each.recipe.init for each in started] == [None, "dense-at"]
    (alone,) = train_specs(["dense-at"], DIGITS, DIGITS.threat_model, None, {"init": "dense-standard"}, [0])
    assert alone.recipe.init == "dense-standard"
    assert found[1].checkpoint_name == "moe-rt_er-s7"
    with pytest.raises(UnusableInput, match=r"^--set betta: 'moe-at' has no such parameter"):
        train_specs(["moe-at", "moe-standard"], DIGITS, DIGITS.threat_model, None, {"betta": 1}, [0])


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_preset_is_valid(name: str):
    recipe = read_recipe(name)
    assert recipe.expert in EXPERTS
    fields = {name: set(objective.model_fields) for name, objective in OBJECTIVES.items()}
    for key, value in recipe.objective.items():  # a misspelt one would be passed over in silence
        known = [fields[key] | set(Recipe.model_fields)] if isinstance(value, dict) else fields.values()
        assert all(any(name in names for names in known) for name in (value if isinstance(value, dict) else [key]))


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_preset_serves_every_variant(name: str, variant: str):
    gate = read_recipe(name).gate
    if gate and get_variant(variant).gate not in (None, gate):
        with pytest.raises(
            UnusableInput, match=rf"^recipe '{name}' is for gate={gate}, and '{variant}' has .*: train "
        ):
            spec(variant, name)
        return
    if name.startswith("upcycled") and get_variant(variant).kind in ("dense", "inside"):
        wanted = rf"('{variant}' is one|those of '{variant}' are no whole networks): train it with --recipe "
        with pytest.raises(UnusableInput, match=wanted):
            spec(variant, name)
        return
    (dataset,) = [open_dataset(own) for own in ("digits", "cifar10", "tinyimagenet") if name.endswith(own)]
    made = train_spec(variant, dataset, dataset.threat_model, name)
    assert (made.recipe_name, made.variant) == (name, variant)
    found = architecture(made, dataset)
    assert found.num_classes == dataset.num_classes
    if not name.startswith(("paper", "released")):  # whose networks take seconds
        found.build()  # of sizes that fit each other


@pytest.mark.parametrize(
    ("name", "standard"), [("upcycled-cifar10", "dense-standard"), ("upcycled-tinyimagenet", "dense-at")]
)
def test_by_an_upcycled_preset_experts_that_are_whole_networks_start_from_a_dense_model(name: str, standard: str):
    starts = {variant: spec(variant, name).recipe for variant in ("moe-at", "moe-rt_er", "dual-jtdmoe")}
    assert {recipe.init for recipe in starts.values()} == {"dense-at"}
    assert starts["dual-jtdmoe"].init_standard == spec("moe-standard", name).recipe.init == standard


def test_every_data_set_has_its_preset():
    named = [cls.recipe for name, cls in DATASETS.items() if not DATASETS.argument(name)]
    assert set(named) <= set(RECIPES)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UnusableInput, match=r"^unknown recipe 'digit': did you mean 'digits'\?$"):
        spec(recipe="digit")


# --- merging ----------------------------------------------------------------------------------------------------------


def test_the_data_sets_own_preset_is_the_default_and_settings_go_over_it():
    preset = read_recipe("digits")
    plain, changed = spec(), spec(lr=0.25, epochs=3)
    assert plain.recipe_name == "digits"
    assert plain.recipe == preset.model_copy(update={"objective": {}, "network": {}})
    assert changed.recipe == plain.recipe.model_copy(update={"lr": 0.25, "epochs": 3})
    assert (changed.dataset, changed.threat_model, changed.seed) == ("digits", DIGITS.threat_model, 0)


def test_the_objectives_parameters_are_all_stated_defaults_included():
    made = spec("moe-rt_er", beta=3, inner_steps=2)
    assert made.objective_params == {
        "balance": 0.5, "inner_steps": 2, "step_size": None, "restarts": 1, "start_radius": 1.0, "beta": 3.0,
        "expert_term": "second", "expert_reduction": "mean", "one_dispatch": None,
    }  # fmt: skip
    assert "beta" not in made.recipe.model_dump()


def test_the_presets_objective_parameters_go_to_the_objectives_that_have_them():
    steps = read_recipe("digits").objective["inner_steps"]
    assert spec("moe-at").objective_params["inner_steps"] == steps
    assert "inner_steps" not in spec("moe-standard").objective_params


def test_what_a_preset_says_of_one_objective_goes_over_what_it_says_of_all():
    objective = read_recipe("cpu-cifar10").objective
    assert [of["inner_steps"] for of in (objective, objective["trades"], objective["advmoe"])] == [1, 3, 2]
    steps = {name: spec(name, "cpu-cifar10").objective_params["inner_steps"] for name in ("moe-trades", "moe-advmoe")}
    assert steps == {"moe-trades": 3, "moe-advmoe": 2}
    assert spec("moe-advmoe", "cpu-cifar10", inner_steps=3).objective_params["inner_steps"] == 3


def test_a_variants_own_settings_override_the_presets():
    tuned, published = (spec(name).objective_params for name in ("moe-rt_er", "moe-rt_er-published"))
    assert spec("moe-rt_er-all").objective_params == tuned | {"expert_term": "all"}
    assert spec("moe-rt_er-all", expert_term="second").objective_params == tuned
    assert (tuned["beta"], tuned["expert_reduction"]) == (0.3, "mean")
    assert published == tuned | {"beta": 6.0, "expert_reduction": "sum"}
    joint = spec("dual-jtdmoe-published").objective_params
    assert (joint["beta"], joint["expert_term"], joint["expert_reduction"]) == (6.0, "all", "sum")


@pytest.mark.parametrize("name", [name for name in RECIPES if not read_recipe(name).gate])
def test_what_is_published_is_so_whatever_a_preset_says(name: str):
    one, joint = (spec(variant, name) for variant in ("moe-rt_er-published", "dual-jtdmoe-published"))
    asked = ("beta", "expert_term", "expert_reduction")
    assert [one.objective_params[key] for key in asked] == [6.0, "second", "sum"]
    assert [joint.objective_params[key] for key in asked] == [6.0, "all", "sum"]
    assert joint.recipe.alpha == 0.7


def test_a_radius_for_one_step_is_not_kept_for_several():
    assert spec("moe-at", "cpu-cifar10").objective_params["start_radius"] == 2
    assert spec("moe-at", "cpu-cifar10", inner_steps=5).objective_params["start_radius"] == 1
    with pytest.raises(UnusableInput, match="start_radius 2 is above 1: it needs inner_steps=1"):
        spec("moe-at", "cpu-cifar10", inner_steps=5, start_radius=2)


def test_random_weights_are_those_of_both_branches():
    named, none = (
        spec("dual-jtdmoe", "upcycled-cifar10").recipe,
        spec("dual-jtdmoe", "upcycled-cifar10", init=None).recipe,
    )
    assert (named.init, named.init_standard) == ("dense-at", "dense-standard")
    assert (none.init, none.init_standard) == (None, None)
    assert (
        spec("dual-jtdmoe", "upcycled-cifar10", init=None, init_standard="dense-at").recipe.init_standard == "dense-at"
    )


def test_a_preset_may_give_an_objective_a_schedule_of_its_own():
    # AdvMoE's is published (Zhang et al. 2023), and its router has no other learning rate than its experts
    own = spec("moe-advmoe", "paper-cifar10", momentum=0.8).recipe
    chosen = ("optimizer", "lr", "router_lr", "weight_decay", "schedule", "epochs", "batch_size", "momentum")
    assert [getattr(own, name) for name in chosen] == ["sgd", 0.1, 1, 5e-4, "cosine", 100, 128, 0.8]
    assert spec("moe-rt_er", "paper-cifar10").recipe.optimizer == "adam"
    assert {name: spec("moe-advmoe", name).recipe.router_lr for name in RECIPES if not read_recipe(name).gate} == {
        "cpu-cifar10": 1, "cpu-tinyimagenet": 1, "cpu-vit-tinyimagenet": 1, "digits": 1, "upcycled-cifar10": 1,
        "upcycled-tinyimagenet": 1,
    }  # fmt: skip


def test_a_dual_of_which_nothing_of_the_standard_branch_is_left_is_not_trained_jointly():
    with pytest.raises(UnusableInput, match=r"^alpha=1: of such a dual nothing is left of its standard branch"):
        spec("dual-jtdmoe-argmax", alpha=1)
    assert spec("dual", alpha=1).recipe.alpha == 1


def test_fractions_in_a_preset_are_numbers():
    for name in ("paper-cifar10", "released-code-cifar10", "paper-tinyimagenet"):
        assert read_recipe(name).objective["step_size"] == 2 / 255
    assert read_recipe("paper-cifar10").lr == 1e-4


@pytest.mark.parametrize(
    ("variant", "key", "wanted"),
    [
        ("moe-at", "beta", r"--set beta: 'moe-at' has no such parameter: "),  # RT-ER has it
        ("moe-standard", "inner_steps", r"--set inner_steps: 'moe-standard' has no such parameter: "),
        ("moe-at", "inner_step", r"--set inner_step: 'moe-at' has no such parameter: did you mean 'inner_steps'\?$"),
        ("moe-at", "epoch", r"--set epoch: 'moe-at' has no such parameter: did you mean 'epochs'\?$"),
        ("moe-at", "objective", r"--set objective: 'moe-at' has no such parameter: "),
        ("dual", "inner_steps", r"--set inner_steps: 'dual' has no such parameter: "),
    ],
)
def test_a_parameter_that_is_not_there_is_refused_with_the_nearest(variant: str, key: str, wanted: str):
    with pytest.raises(UnusableInput, match=f"^{wanted}"):
        spec(variant, **{key: 3})


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("dense-at", "num_experts"), ("dense-standard", "balance"), ("moe-at", "alpha"), ("moe-at-argmax", "balance"),
        ("moe-rt_er-argmax", "router_lr"), ("moe-advmoe-argmax", "balance"),
    ],
)  # fmt: skip
def test_a_setting_that_changes_nothing_of_the_variant_is_refused(variant: str, key: str):
    with pytest.raises(UnusableInput, match=rf"^--set {key}: nothing of '{variant}' depends on it: drop it$"):
        spec(variant, **{key: 0.5})
    assert spec("moe-advmoe-argmax", router_lr=0.5).recipe.router_lr == 0.5
    assert spec("dual-jtdmoe", alpha=0.5, balance=0.1).recipe.alpha == 0.5


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"lr": "fast"}, "recipe 'digits': lr: Input should be a valid number"),
        ({"epochs": 0}, "recipe 'digits': epochs: Input should be greater than 0"),
        ({"inner_steps": 0}, "objective of 'moe-at': inner_steps: Input should be greater than 0"),
        ({"start_radius": 2}, "objective of 'moe-at': start_radius 2 is above 1: it needs inner_steps=1"),
        ({"num_selected_experts": 5}, "recipe 'digits': num_selected_experts 5 is more than num_experts 4"),
    ],
)
def test_a_value_that_cannot_be_is_refused(settings: dict[str, Any], wanted: str):
    with pytest.raises(UnusableInput, match=f"^{wanted}"):
        spec(**settings)


def test_there_is_no_training_inside_an_l1_ball():
    with pytest.raises(UnusableInput, match=r"^no training inside an L1 ball: take --norm Linf or L2"):
        train_spec("moe-at", DIGITS, ThreatModel(norm="L1", eps=1))


def test_noise_is_for_training_without_adversarial_examples():
    digits = open_dataset("digits")
    spec = train_spec("moe-standard", digits, digits.threat_model, settings={"noise_sigma": 0.25})
    assert spec.recipe.noise_sigma == 0.25
    with pytest.raises(UnusableInput, match=r"noise_sigma=0\.25: 'moe-at' trains on adversarial examples"):
        train_spec("moe-at", digits, digits.threat_model, settings={"noise_sigma": 0.25})
    with pytest.raises(UnusableInput, match="noise_sigma"):
        train_spec("moe-standard", digits, digits.threat_model, settings={"noise_sigma": -1})


def test_an_unknown_variant_is_refused_with_the_nearest():
    with pytest.raises(UnusableInput, match=r"^unknown variant 'moe-ad': did you mean 'moe-at'\?$"):
        spec("moe-ad")


def test_a_variants_objective():
    assert objective_class(get_variant("dense-at")) is OBJECTIVES["at"]
    assert objective_class(get_variant("dual")) is Objective  # put together, not trained


# --- architectures ----------------------------------------------------------------------------------------------------


def test_a_dense_model_is_the_expert_alone():
    arch = architecture(spec("dense-at", width=5), DIGITS)
    assert isinstance(arch, Dense)
    assert (arch.expert, arch.expert_params) == ("small_cnn", {"width": 5})
    assert (arch.input_shape, arch.num_classes, arch.mean, arch.std) == ((1, 8, 8), 10, DIGITS.mean, DIGITS.std)


def test_a_routed_model_follows_recipe_and_variant():
    settings = {"num_experts": 3, "num_selected_experts": 2, "router": "conv", "combine": "probs"}
    arch = architecture(spec("moe-at-argmax", **settings), DIGITS)
    assert isinstance(arch, Routed)
    assert {key: getattr(arch, key) for key in settings} == settings
    assert arch.gate == "argmax"
    assert architecture(spec("moe-at"), DIGITS).gate == "softmax"


@pytest.mark.parametrize(
    ("variant", "combine", "expected"),
    [
        ("dual-jtdmoe", None, "probs"),
        ("dual-jtdmoe", "logits", "logits"),
        ("dual-logits", None, "logits"),
        ("dual-logits", "probs", "probs"),
        ("dual", None, "probs"),
    ],
)
def test_combine_of_a_dual_is_that_of_its_branches_outputs(variant: str, combine: str | None, expected: str):
    arch = architecture(spec(variant, alpha=0.6, combine=combine), DIGITS)
    assert isinstance(arch, Dual)
    assert (arch.alpha, arch.combine) == (0.6, expected)
    assert arch.standard.combine == arch.robust.combine == "logits"


def test_sizes_that_are_not_set_are_the_networks_own():
    assert Recipe().width is None
    arch = architecture(spec(recipe="cpu-vit-tinyimagenet", image_size=32), DIGITS)
    assert arch.expert_params == {"image_size": 32}

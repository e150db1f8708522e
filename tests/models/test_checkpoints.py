"""Checkpoints: what comes back is what was saved, and what is not ours is refused in one line that names the file."""

import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models import checkpoints
from bench.models.architecture import Dense, Dual, Routed
from bench.models.checkpoints import (
    Header,
    available,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    load_model,
    read_header,
    save_checkpoint,
)
from bench.models.variants import VARIANTS
from bench.spec import ThreatModel, TrainSpec
from bench.training.recipes import architecture

LINF = ThreatModel(norm="Linf", eps=0.2)
NETWORK: dict[str, Any] = {
    "expert": "small_cnn", "expert_params": {"width": 3}, "input_shape": (1, 8, 8), "num_classes": 10,
    "mean": (0.3,), "std": (0.4,),
}  # fmt: skip
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def header(variant: str = "dense-at", arch: Dense | Routed | Dual | None = None, **more: Any) -> Header:
    fields = {"dataset": "digits", "threat_model": LINF, **more}
    return Header(variant=variant, architecture=arch or Dense(**NETWORK), **fields)


def saved(path: Path, head: Header | None = None) -> nn.Module:
    """A model with used BatchNorm statistics, saved at `path`."""
    head = head or header()
    model = head.architecture.build()
    model.train()(X)
    save_checkpoint(path, model, head)
    return model.eval()


def refusal(path: Path, named: Path | None = None) -> str:
    with pytest.raises(UnusableInput) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert "\n" not in message
    assert f"'{named or path}'" in message
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "digits" / "Linf" / "dense-at.safetensors"


# --- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_comes_back_bit_by_bit_in_eval_mode(
    variant: str, path: Path, tiny_spec: Callable[..., TrainSpec]
):
    head = header(variant, architecture(tiny_spec(variant), open_dataset("digits")))
    model = saved(path, head)
    loaded, loaded_header, sha256 = load_checkpoint(path)
    assert torch.equal(loaded(X), model(X))
    assert not any(module.training for module in loaded.modules())
    assert loaded_header == head
    assert len(sha256) == 64


def test_weights_in_half_precision_are_scored_as_they_are_stored(tmp_path: Path):
    store = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/to_zoo.py"))["store"]
    whole = saved(tmp_path / "digits" / "Linf" / "dense-at.safetensors")
    path = store(tmp_path, "digits", "dense-at", zoo=tmp_path / "zoo")
    assert path.stat().st_size < 0.7 * (tmp_path / "digits" / "Linf" / "dense-at.safetensors").stat().st_size
    loaded, found, _ = load_checkpoint(path)
    assert found == header()
    for name, value in load_file(path).items():
        assert value.dtype in (torch.float16, torch.int64)
        assert torch.equal(loaded.state_dict()[name], value.to(whole.state_dict()[name].dtype))
        assert torch.equal(value, whole.state_dict()[name].to(value.dtype))
    assert loaded(X).dtype == torch.float32


def test_a_dual_too_large_for_one_file_of_the_zoo_is_stored_in_parts(tmp_path: Path):
    store = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/to_zoo.py"))["store"]
    routed = Routed(**NETWORK, num_experts=3)
    head = header("dual-jtdmoe", Dual(standard=routed, robust=routed), train_images=1100, epochs=60)
    whole = saved(tmp_path / "digits" / "Linf" / "dual-jtdmoe.safetensors", head)
    path = store(tmp_path, "digits", "dual-jtdmoe", zoo=tmp_path / "zoo", largest=3000)
    loaded, found, sha256 = load_checkpoint(path)
    assert path.stat().st_size < 3000
    assert torch.equal(loaded(X), whole.half().float()(X))
    assert "1,100 images × 60 epochs" in found.info(sha256).trained
    assert {part.file for part in found.parts.values()} == {
        "dual-jtdmoe-S.safetensors", "dual-jtdmoe-R.safetensors",
    }  # fmt: skip
    assert available("digits", "Linf", [tmp_path / "zoo"]) == ["dual-jtdmoe"]


def test_loading_does_not_move_the_random_state(path: Path):
    saved(path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_checkpoint(path)
    assert torch.equal(torch.rand(3), expected)


def test_every_field_of_the_header_comes_back(path: Path):
    full = header(
        objective="at", seed=3, training={"lr": 0.1}, training_key="k", train_fingerprint="f", train_images=1100,
        epochs=60, validation={"sa": 0.9, "ra": 0.5, "epoch": 58}, seconds=12.5,
        bench_version="0.1.0", git_hash="abc",
    )  # fmt: skip
    saved(path, full)
    assert read_header(path) == full


def test_model_info_says_what_the_model_is():
    routed = Routed(**NETWORK, num_experts=3, num_selected_experts=2)
    head = header("moe-at", routed, objective="at", seed=2, training={}, train_images=1100, epochs=60)
    info = head.info("c" * 64)
    assert (info.name, info.architecture, info.objective, info.checkpoint_sha256) == (
        "moe-at-s2", "small_cnn-w3", "at", "c" * 64,
    )  # fmt: skip
    assert (info.gate, info.combine, info.num_experts, info.num_selected_experts) == ("softmax", "logits", 3, 2)
    assert (info.alpha, info.routing_visible, info.threat_model) == (None, True, LINF)
    assert info.trained == "1,100 images × 60 epochs"
    noisy = head.model_copy(update={"training": {"recipe": {"noise_sigma": 0.25}}}).info("c")
    assert noisy.trained == "1,100 images × 60 epochs, noise σ 0.25"
    dense = header(training={}).info("c")
    assert (dense.gate, dense.combine, dense.num_experts, dense.routing_visible) == (None, None, None, False)


def test_model_info_of_a_dual_names_its_parts():
    arch = Dual(standard=Routed(**NETWORK), robust=Routed(**NETWORK, gate="argmax"), alpha=0.6, combine="logits")
    parts = {role: {"file": f"moe-{role}.safetensors", "sha256": ""} for role in ("standard", "robust")}
    info = header("dual", arch, parts=parts, training={}).info("c")
    assert info.trained == "standard: moe-standard, robust: moe-robust"
    assert (info.gate, info.combine, info.alpha) == ("argmax", "logits", 0.6)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_missing_file(path: Path):
    assert refusal(path).startswith("no checkpoint at")
    path.mkdir(parents=True)
    assert refusal(path).startswith("no checkpoint at")


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file(path: Path, keep: int):
    saved(path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "is truncated or no safetensors file" in refusal(path)


def test_a_safetensors_file_of_somebody_else(path: Path):
    path.parent.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, path)
    assert "has no bench header" in refusal(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    assert "has no bench header" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "{}",
        header().model_dump_json().replace('"format":1', '"format":2'),
        header().model_dump_json().replace('"format":1', '"format":"new"'),
        header().model_dump_json().replace('"kind":"dense"', '"kind":"tree"'),
        header().model_dump_json().replace('"seed":0', '"seed":0,"colour":"red"'),
    ],
)
def test_a_header_that_this_version_does_not_read(path: Path, text: str):
    path.parent.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, path, metadata={"bench": text})
    assert "has a header that this version does not read" in refusal(path)


@pytest.mark.parametrize(
    "changed", [{"expert": "resnet11"}, {"expert_params": {"width": "wide"}}, {"expert_params": {"depth": 3}}]
)
def test_a_header_of_a_model_that_cannot_be_built(path: Path, changed: dict[str, Any]):
    save_checkpoint(path, nn.Flatten(), header(arch=Dense(**{**NETWORK, **changed})))
    assert "describes a model that this version cannot build" in refusal(path)


def test_weights_of_another_architecture(path: Path):
    wide = Dense(**{**NETWORK, "expert_params": {"width": 4}})
    save_checkpoint(path, wide.build(), header())
    assert "does not hold the weights its header describes" in refusal(path)
    save_checkpoint(path, Routed(**NETWORK).build(), header())
    assert "does not hold the weights its header describes" in refusal(path)


def test_weights_of_which_some_are_missing(path: Path):
    saved(path)
    weights = load_file(path)
    del weights["backbone.1.running_mean"]
    save_file(weights, path, metadata={"bench": header().model_dump_json()})
    assert "does not hold the weights its header describes" in refusal(path)


@pytest.mark.parametrize("write", [lambda thing, file: file.write_bytes(pickle.dumps(thing)), torch.save])
def test_a_pickle_under_our_name_is_refused_and_not_executed(
    path: Path, write: Callable[[Any, Path], object], malicious: Callable[[Path], object]
):
    executed = path.parent / "executed"
    path.parent.mkdir(parents=True)
    write(malicious(executed), path)
    assert "is truncated or no safetensors file" in refusal(path)
    assert not executed.exists()


# --- models that are put together -------------------------------------------------------------------------------------


@pytest.fixture
def dual(path: Path) -> Path:
    """A dual's file beside those of its parts."""
    arch, parts = Routed(**NETWORK, num_experts=2), {}
    for role, name in (("standard", "moe-standard"), ("robust", "moe-rt_er")):
        file = path.with_name(f"{name}.safetensors")
        saved(file, header(name, arch))
        parts[role] = {"file": file.name, "sha256": load_checkpoint(file)[2]}
    file = path.with_name("dual.safetensors")
    save_checkpoint(file, None, header("dual", Dual(standard=arch, robust=arch), parts=parts))
    return file


def test_a_dual_is_put_together_from_its_parts(dual: Path):
    model = load_checkpoint(dual)[0]
    for role, name in (("standard", "moe-standard"), ("robust", "moe-rt_er")):
        part = load_checkpoint(dual.with_name(f"{name}.safetensors"))[0]
        assert torch.equal(getattr(model, role)(X), part(X))
    assert not any(module.training for module in model.modules())
    assert load_file(dual) == {}


def test_a_part_that_was_replaced_is_refused(dual: Path):
    part = dual.with_name("moe-rt_er.safetensors")
    saved(part, read_header(part))
    assert f"put together from: remove '{dual}'" in refusal(dual, named=part)


def test_a_part_that_is_missing_is_refused(dual: Path):
    part = dual.with_name("moe-standard.safetensors")
    part.unlink()
    assert refusal(dual, named=part).startswith("no checkpoint at")


# --- where models are looked for --------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's folder and the package's, both empty."""
    user, zoo = tmp_path / "user", tmp_path / "zoo"
    monkeypatch.setattr(checkpoints, "USER_CHECKPOINTS", user)
    monkeypatch.setattr(checkpoints, "ZOO", zoo)
    return user, zoo


def put(folder: Path, name: str = "dense-at", norm: str = "Linf") -> nn.Module:
    return saved(checkpoint_path(folder, "digits", norm, name))


def test_the_users_checkpoint_comes_before_the_zoos(folders: tuple[Path, Path]):
    user, zoo = folders
    shipped = put(zoo)
    assert torch.equal(load_model("dense-at")(X), shipped(X))
    own = put(user)
    assert torch.equal(load_model("dense-at")(X), own(X))
    assert not torch.equal(own(X), shipped(X))


def test_model_dir_is_the_only_place_looked_at_when_given(folders: tuple[Path, Path], tmp_path: Path):
    put(folders[0])
    with pytest.raises(UnusableInput, match=f"looked for '{tmp_path}/other/digits/Linf/dense-at.safetensors';"):
        load_model("dense-at", model_dir=tmp_path / "other")
    other = put(tmp_path / "other")
    assert torch.equal(load_model("dense-at", model_dir=str(tmp_path / "other"))(X), other(X))


def test_further_seeds_norms_and_data_sets_have_their_own_files(folders: tuple[Path, Path]):
    user, _ = folders
    seed1, l2 = put(user, "dense-at-s1"), put(user, norm="L2")
    assert torch.equal(load_model("dense-at-s1")(X), seed1(X))
    assert torch.equal(load_model("dense-at", threat_model="L2")(X), l2(X))
    assert header(seed=1).name == "dense-at-s1"
    assert header(seed=0).name == "dense-at"
    for words in (("dense-at",), ("dense-at-s1", "cifar10")):
        with pytest.raises(UnusableInput, match=f"no Linf checkpoint of '{words[0]}' for"):
            load_model(*words)


def test_a_model_that_is_nowhere_names_both_places(folders: tuple[Path, Path]):
    with pytest.raises(UnusableInput) as refused:
        find_checkpoint("moe-at", "digits", "L2", list(folders))
    for folder in folders:
        assert f"'{folder}/digits/L2/moe-at.safetensors'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_available_models_are_in_the_variants_order(folders: tuple[Path, Path]):
    user, zoo = folders
    for folder, name in [(zoo, "moe-at"), (user, "moe-at"), (user, "moe-at-s1"), (zoo, "dense-at"), (user, "notes")]:
        path = checkpoint_path(folder, "digits", "Linf", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert available("digits", "Linf", list(folders)) == ["dense-at", "moe-at", "moe-at-s1"]
    assert available("digits", "L2", list(folders)) == []

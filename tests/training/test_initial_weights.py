"""Trainings that start from a checkpoint: which weights they begin with, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.checkpoints import checkpoint_path, load_checkpoint, read_header, save_checkpoint
from bench.spec import TrainSpec
from bench.training.data import read_training_data
from bench.training.loop import Trainer, train

NONE = Path("nowhere")  # digits needs no data
DIGITS = open_dataset("digits")
Specs = Callable[..., TrainSpec]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tiny_spec: Specs) -> dict[str, Path]:
    """Checkpoints of dense-at and dense-standard."""
    folder = tmp_path_factory.mktemp("dense")
    return {name: train(tiny_spec(name), NONE, folder, "cpu") for name in ("dense-at", "dense-standard")}


def trainer_of(spec: TrainSpec, folder: Path) -> Trainer:
    return Trainer(spec, DIGITS, read_training_data(spec, DIGITS, NONE), folder / "run.safetensors", "cpu")


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_expert_of_an_moe_starts_from_the_dense_model_and_the_router_as_it_would(
    dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path
):
    path = str(dense["dense-at"])
    upcycled, plain = (trainer_of(tiny_spec("moe-at", **more), tmp_path).model for more in ({"init": path}, {}))
    started = weights(load_checkpoint(dense["dense-at"])[0])
    assert len(upcycled.experts) == 4
    assert all(equal(weights(expert), started) for expert in upcycled.experts)
    assert not equal(weights(plain.experts[0]), started)
    assert equal(weights(upcycled.router), weights(plain.router))


def test_the_branches_of_a_dual_start_from_a_checkpoint_each(dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path):
    both = {"init": str(dense["dense-at"]), "init_standard": str(dense["dense-standard"])}
    dual = trainer_of(tiny_spec("dual-jtdmoe", **both), tmp_path).model
    for branch, name in ((dual.robust, "dense-at"), (dual.standard, "dense-standard")):
        started = weights(load_checkpoint(dense[name])[0])
        assert all(equal(weights(expert), started) for expert in branch.experts)
    one = trainer_of(tiny_spec("dual-jtdmoe", init=both["init"]), tmp_path).model
    assert not equal(weights(one.standard.experts[0]), weights(one.standard.experts[1]))


def test_a_variants_name_is_its_checkpoint_of_the_same_seed_the_users_own_before_the_shipped(
    dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def started(seed: int = 0, init: str = "dense-at", **more: Any) -> str:
        folder = tmp_path / "own" / str(len(list((tmp_path / "own").glob("*"))))
        path = train(tiny_spec("moe-at", seed=seed, init=init, epochs=1), NONE, folder, "cpu", **more)
        return read_header(path).init["init"].sha256

    def put(file: Path, folder: str, name: str) -> Path:
        at = checkpoint_path(tmp_path / folder, "digits", "Linf", name)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(file.read_bytes())
        return tmp_path / folder

    sha256 = {name: load_checkpoint(path)[2] for name, path in dense.items()}
    monkeypatch.setattr("bench.training.loop.ZOO", put(dense["dense-at"], "shipped", "dense-at"))
    put(dense["dense-standard"], "shipped", "dense-at-s1")
    assert started() == started(init=str(dense["dense-at"])) == sha256["dense-at"]
    assert started(seed=1) == started(init="dense-at-s1") == sha256["dense-standard"]
    assert started(seed=1, init="dense-at-s0") == sha256["dense-at"]
    assert started(starts_in=put(dense["dense-standard"], "mine", "dense-at")) == sha256["dense-standard"]
    missing = r"^init=dense-at: no Linf checkpoint of 'dense-at-s2' for digits: .*; make one with `bench train dense-at"
    with pytest.raises(UnusableInput, match=rf"{missing} --dataset digits --seed 2`, with .*; or .*: --set init=null$"):
        started(seed=2)


def test_the_header_and_the_row_name_the_checkpoint(dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path):
    path = train(tiny_spec("moe-at", init=str(dense["dense-at"])), NONE, tmp_path, "cpu")
    header = read_header(path)
    sha256 = load_checkpoint(dense["dense-at"])[2]
    assert {key: (origin.name, origin.sha256) for key, origin in header.init.items()} == {"init": ("dense-at", sha256)}
    info = header.info("")
    assert info.trained == "200 images × 2 epochs, experts started from dense-at (200 images × 2 epochs)"
    assert info.additional_data is False

    again = train(tiny_spec("dense-at", seed=1, init=str(dense["dense-at"])), NONE, tmp_path, "cpu")
    assert read_header(again).info("").trained.endswith("epochs, started from dense-at (200 images × 2 epochs)")


def test_a_resumed_training_ends_as_the_undisturbed_one(dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path):
    spec = tiny_spec("moe-at", init=str(dense["dense-at"]))
    whole = train(spec, NONE, tmp_path / "whole", "cpu")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, NONE, tmp_path / "resumed", "cpu", on_epoch=stop)
    resumed = train(spec, NONE, tmp_path / "resumed", "cpu", resume=True)
    assert equal(*(weights(load_checkpoint(path)[0]) for path in (whole, resumed)))


def test_the_same_path_with_other_weights_is_another_training(dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path):
    start = tmp_path / "start.safetensors"
    start.write_bytes(dense["dense-at"].read_bytes())
    spec = tiny_spec("moe-at", init=str(start))
    path = train(spec, NONE, tmp_path, "cpu")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, NONE, tmp_path / "stopped", "cpu", on_epoch=stop)
    start.write_bytes(dense["dense-standard"].read_bytes())
    with pytest.raises(UnusableInput, match=f"^'{path}' was made by another init and is not overwritten: "):
        train(spec, NONE, tmp_path, "cpu")
    missing = tiny_spec("moe-at", init=str(tmp_path / "none.safetensors"))
    with pytest.raises(UnusableInput, match=f"^'{path}' was made by another spec and is not overwritten: "):
        train(missing, NONE, tmp_path, "cpu")
    with pytest.raises(UnusableInput, match="belongs to another spec, other data"):
        train(spec, NONE, tmp_path / "stopped", "cpu", resume=True)


def test_what_cannot_be_started_from_is_refused(dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path):
    path = str(dense["dense-at"])
    routed = str(train(tiny_spec("moe-standard"), NONE, tmp_path, "cpu"))
    for settings, expected in (
        ({"init": str(tmp_path / "none.safetensors")}, r"^init=.*: no checkpoint at '.*none.safetensors'"),
        ({"init": "~/none.safetensors"}, rf"^init=.*: no checkpoint at '{Path.home()}/none.safetensors'"),
        ({"init": "dense-att"}, "^init=dense-att: unknown variant 'dense-att': did you mean 'dense-at'"),
        ({"init": "moe-at"}, "^init=moe-at: it would start from itself: name another model"),
        ({"init": routed}, rf"^init={routed}: 'moe-standard' is not a dense model trained by `bench train`"),
        (
            {"init": path, "width": 5},
            r"its expert_params is {'width': 4}, and that of the experts of 'moe-at' {'width': 5}; or begin with ",
        ),
        # of 280 images, in another order, 50 are held out
        ({"init": path, "n_train": 230}, r": it was trained on \d+ of the images that are held out here: train both "),
        ({"init": path, "pretrained": True}, r"^--set init=… and --set pretrained=… both say where the weights start"),
    ):
        with pytest.raises(UnusableInput, match=expected):
            train(tiny_spec("moe-at", **settings), NONE, tmp_path, "cpu")
    for variant in ("moe-at", "dense-at"):
        with pytest.raises(UnusableInput, match=f"^--set init_standard: nothing of '{variant}' depends on it"):
            tiny_spec(variant, init_standard=path)


def test_weights_from_another_data_set_count_as_additional_data(
    dense: dict[str, Path], tiny_spec: Specs, tmp_path: Path
):
    model, header, _ = load_checkpoint(dense["dense-at"])
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, model, header.model_copy(update={"dataset": "letters"}))
    path = train(tiny_spec("moe-at", init=str(other)), NONE, tmp_path, "cpu")
    assert read_header(path).info("").additional_data is True


# --- timm's weights -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_starts_from_a_file_of_pretrained_weights(tiny_spec: Specs, tmp_path: Path):
    file = tmp_path / "vit.safetensors"
    tensors = timm.create_model("vit_small_patch16_224", embed_dim=12).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    save_file(tensors, file)
    tiny = {"expert": "vit_small", "width": 12, "image_size": 16, "num_experts": 2, "n_train": 10, "n_val": 5}
    # at such a rate the weights stay as they were read
    spec = tiny_spec("moe-standard", **tiny, pretrained=str(file), lr=1e-12, epochs=1)
    path = train(spec, NONE, tmp_path, "cpu")
    found = weights(load_checkpoint(path)[0])
    for key in ("blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "norm.weight"):
        for expert in range(2):
            torch.testing.assert_close(found[f"experts.{expert}.backbone.{key}"], tensors[key], atol=1e-6, rtol=0)
    # digits are grey: the three colours' weights are summed
    grey = tensors["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(found["experts.0.backbone.patch_embed.proj.weight"], grey, atol=1e-5, rtol=0)
    header = read_header(path)
    assert header.training is not None
    assert header.training["recipe"]["pretrained"] == str(file)
    assert header.info("").additional_data is True


@pytest.mark.slow
def test_a_resumed_training_needs_no_pretrained_weights(tiny_spec: Specs, tmp_path: Path):
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("vit_small_patch16_224", embed_dim=12).state_dict(), file)
    tiny = {"expert": "vit_small", "width": 12, "image_size": 16, "num_experts": 2, "n_train": 10, "n_val": 5}
    spec = tiny_spec("moe-standard", **tiny, pretrained=str(file))

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, NONE, tmp_path, "cpu", on_epoch=stop)
    file.unlink()
    done: list[int] = []
    train(spec, NONE, tmp_path, "cpu", resume=True, on_epoch=lambda epoch: done.append(epoch.epoch))
    assert done == [2]

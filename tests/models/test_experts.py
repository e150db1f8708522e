"""The contract of every expert network; each is tested by being registered."""

import inspect
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.datasets.base import open_dataset
from bench.errors import UnusableInput
from bench.models.architecture import Dense, Dual, Routed
from bench.models.experts import EXPERTS, Shape, build_expert, expert_label, pretrained_weights
from bench.spec import Recipe
from bench.training.initial_weights import load_pretrained
from bench.training.recipes import train_spec

#: the input shape and the parameters that make a quick one; for an expert that is not here its own defaults at 32 px
TINY: dict[str, tuple[Shape, dict[str, Any]]] = {
    "small_cnn": ((1, 8, 8), {"width": 4}),
    "resnet10": ((3, 16, 16), {"width": 4}),
    "resnet18": ((3, 64, 64), {"width": 4}),
    "vit_small": ((3, 24, 24), {"image_size": 32, "patch_size": 16, "width": 24}),
    "vit_mini": ((3, 16, 16), {"image_size": 16, "patch_size": 8, "width": 12}),
}


def tiny(name: str) -> tuple[nn.Module, Shape]:
    shape, params = TINY.get(name, ((3, 32, 32), {}))
    torch.manual_seed(0)
    return build_expert(name, shape, 7, params), shape


@pytest.mark.parametrize("name", list(EXPERTS))
def test_gives_finite_logits_that_vary_with_the_image(name: str):
    net, shape = tiny(name)
    logits = net.eval()(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    assert logits.isfinite().all()
    assert logits.std(0).min() > 1e-4


@pytest.mark.parametrize("name", list(EXPERTS))
def test_a_row_does_not_depend_on_the_others_in_eval_mode(name: str):
    net, shape = tiny(name)
    x = torch.randn(5, *shape)
    net.train()(x)  # so that the running statistics are not their initial ones
    whole = net.eval()(x)
    torch.testing.assert_close(torch.cat([net(row[None]) for row in x]), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x.flip(0)).flip(0), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(EXPERTS))
def test_every_parameter_and_every_pixel_gets_a_gradient(name: str):
    net, shape = tiny(name)
    x = torch.randn(4, *shape, requires_grad=True)
    net(x).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (x.grad != 0).all()


@pytest.mark.parametrize("name", list(EXPERTS))
def test_a_parameter_that_it_has_not_is_refused_with_the_nearest(name: str):
    with pytest.raises(UnusableInput, match=rf"^expert '{name}' has no parameter 'widht': did you mean 'width'\?$"):
        build_expert(name, (3, 32, 32), 10, {"widht": 8})


def test_an_unknown_expert_is_refused_with_the_nearest():
    with pytest.raises(UnusableInput, match=r"^unknown expert 'resnet81': did you mean 'resnet18'\?$"):
        build_expert("resnet81", (3, 32, 32), 10, {})


def test_width_scales_the_network():
    narrow, wide = (build_expert("small_cnn", (1, 8, 8), 10, {"width": width}) for width in (3, 6))
    assert (narrow[0].out_channels, wide[0].out_channels) == (3, 6)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("resnet18", (3, 32, 32), 10, 11_173_962),  # the usual ResNet18 with the CIFAR stem
        ("vit_small", (3, 64, 64), 1000, 22_050_664),  # DeiT-small/16 at 224 px
    ],
)
def test_the_papers_experts_have_the_published_size(name: str, shape: Shape, classes: int, count: int):
    net = build_expert(name, shape, classes, {})
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(("side", "stride"), [(16, 1), (32, 1), (64, 2)])
def test_a_resnet_halves_images_above_32_pixels(side: int, stride: int):
    net = build_expert("resnet10", (3, side, side), 10, {"width": 4})
    assert net[0].stride == (stride, stride)
    assert not any(isinstance(module, nn.MaxPool2d) for module in net)


@pytest.mark.parametrize("name", list(EXPERTS))
@pytest.mark.parametrize("side", [8, 32, 64])
def test_an_expert_trains_on_a_single_image(name: str, side: int):
    # a router may leave an expert no more of a batch, and batch norm needs two values a channel
    _, params = TINY[name]
    net = build_expert(name, (3, side, side), 7, params).train()
    net(torch.randn(1, 3, side, side)).sum().backward()


def test_a_vit_resizes_native_pixels_bilinearly_inside():
    net = build_expert("vit_mini", (3, 8, 8), 10, {"image_size": 16, "patch_size": 8, "width": 12}).eval()
    x = torch.rand(2, 3, 8, 8)
    large = nn.functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(x), net(large))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"image_size": 64, "patch_size": 7}, "image_size 64 must be a multiple of patch_size 7"),
        ({"width": 100}, "width 100 must be a multiple of 3, the ViT's number of heads"),
    ],
)
def test_a_vit_that_does_not_divide_is_refused(params: dict[str, int], said: str):
    with pytest.raises(UnusableInput, match=f"^{said}$"):
        build_expert("vit_mini", (3, 64, 64), 10, params)


def test_labels_as_boards_show_them():
    assert expert_label("small_cnn", {}) == "small_cnn"
    assert expert_label("resnet10", {"width": 16}) == "resnet10-w16"
    assert expert_label("vit_mini", {"patch_size": 8, "image_size": 64}) == "vit_mini-i64-p8"
    assert expert_label("small_cnn", {"norm": "group"}) == "small_cnn-group"
    assert expert_label("resnet10", {"width": 16, "norm": "group"}) == "resnet10-group-w16"


# --- normalisation ----------------------------------------------------------------------------------------------------

NORMALISED = [name for name in EXPERTS if "norm" in inspect.signature(EXPERTS[name]).parameters]


def normalised(name: str, norm: str) -> tuple[nn.Module, Tensor]:
    shape, params = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_expert(name, shape, 7, {**params, "norm": norm}).train(), torch.randn(4, *shape)


@pytest.mark.parametrize("name", NORMALISED)
def test_with_group_norm_a_row_does_not_depend_on_the_others_even_in_train_mode(name: str):
    for norm, alone in [("group", True), ("batch", False)]:
        net, x = normalised(name, norm)
        kinds = {type(module) for module in net.modules()} & {nn.BatchNorm2d, nn.GroupNorm}
        assert kinds == {nn.GroupNorm if alone else nn.BatchNorm2d}
        assert any("running" in key for key in net.state_dict()) != alone
        whole, part = net(x), net(x[:2])
        assert torch.allclose(whole[:2], part, atol=1e-5) == alone


def test_the_groups_divide_the_channels():
    # up to eight: gcd(8, 12) = 4, gcd(8, 24) = 8
    net = build_expert("small_cnn", (1, 8, 8), 10, {"width": 12, "norm": "group"})
    assert [module.num_groups for module in net if isinstance(module, nn.GroupNorm)] == [4, 8]


def test_a_normalisation_that_is_not_there_is_refused():
    digits = open_dataset("digits")
    with pytest.raises(UnusableInput, match=r"^recipe 'digits': norm: Input should be 'batch' or 'group' .*'layer'"):
        train_spec("moe-at", digits, digits.threat_model, settings={"norm": "layer"})
    with pytest.raises(UnusableInput, match=r"^expert 'vit_mini' has no parameter 'norm': "):
        build_expert("vit_mini", (3, 64, 64), 10, {"norm": "group"})


# --- pretrained weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file like timm's of ViT-small/16 at 224 px and 1,000 classes, but 24 wide, of random numbers; and its tensors.

    The position embedding of each of the 14×14 patches is the same, that of the class token another.
    """
    tensors = timm.create_model("vit_small_patch16_224", embed_dim=24).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    tensors["pos_embed"][:, 2:] = tensors["pos_embed"][:, 1:2]
    save_file(tensors, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors", tensors


def vit(**params: int) -> nn.Module:
    return build_expert("vit_small", (3, 64, 64), 7, {"width": 24, **params})


@pytest.mark.parametrize("size", [224, 64])
def test_pretrained_weights_are_the_files_but_for_the_head_and_the_resampled_positions(size: int, published: Any):
    file, tensors = published
    net = vit(image_size=size)
    weights = pretrained_weights("vit_small", net, str(file))
    assert set(weights) == {key for key in net.state_dict() if not key.startswith("head.")}
    assert len(weights) > 100
    same = {key for key, value in weights.items() if key in tensors and torch.equal(value, tensors[key])}
    assert same >= set(weights) - {"pos_embed"}
    found, positions = weights["pos_embed"], tensors["pos_embed"]
    assert found.shape == (1, 1 + (size // 16) ** 2, 24)
    assert torch.equal(found[:, 0], positions[:, 0])
    torch.testing.assert_close(found[:, 1:], positions[:, 1:2].expand(-1, (size // 16) ** 2, -1))
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert (sorted(missing), unexpected) == (["head.bias", "head.weight"], [])


def test_pretrained_weights_leave_torchs_own_random_state_alone(published: Any):
    net, before = vit(image_size=32), torch.random.get_rng_state()
    pretrained_weights("vit_small", net, str(published[0]))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt", ""])
def test_a_pickle_is_refused_without_being_opened(
    suffix: str, tmp_path: Path, malicious: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
):
    file, executed = tmp_path / f"weights{suffix}", tmp_path / "executed"
    torch.save(malicious(executed), file)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(
        UnusableInput, match=r"^--set pretrained=.* must be a \.safetensors or \.npz file; or train from"
    ):
        pretrained_weights("vit_small", vit(image_size=32), str(file))
    assert not executed.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_pickle_under_another_name_is_refused_and_not_executed(
    suffix: str, tmp_path: Path, malicious: Callable[[Path], object]
):
    file, executed = tmp_path / f"weights{suffix}", tmp_path / "executed"
    content = io.BytesIO()
    if suffix == ".npz":
        np.savez(content, **{"embedding/kernel": np.array([malicious(executed)], dtype=object)})
    else:
        torch.save(malicious(executed), content)
    file.write_bytes(content.getvalue())
    with pytest.raises(
        UnusableInput, match=r"^the weights .* could not be loaded from '.*weights\..*--set pretrained="
    ):
        pretrained_weights("vit_small", vit(image_size=32), str(file))
    assert not executed.exists()


def test_out_of_the_hubs_reach_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    asked: list[Any] = []

    def unreachable(name: str, **options: Any) -> None:
        asked.append((name, options["pretrained"], options["pretrained_cfg_overlay"]))
        logging.getLogger("huggingface_hub.utils").warning("retrying")
        raise ConnectionError("no route\n  to the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UnusableInput) as refused:
        pretrained_weights("vit_small", vit(image_size=32))
    assert asked == [("vit_small_patch16_224", True, None)]
    assert str(refused.value) == (
        "the weights of timm's vit_small_patch16_224 could not be loaded from the Hugging Face hub (ConnectionError: no"
        " route to the hub): train from random weights with --set pretrained=false, or name a file that holds them with"
        " --set pretrained=FILE.safetensors"
    )
    assert caplog.messages == []


def test_a_file_that_is_not_there_is_refused_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "gone.safetensors"
    with pytest.raises(UnusableInput, match=rf"^--set pretrained={file}: there is no such file: correct .*=false$"):
        pretrained_weights("vit_small", vit(image_size=32), str(file))
    assert caplog.messages == []


def test_a_file_of_another_network_is_refused_in_one_line(published: Any, caplog: pytest.LogCaptureFixture):
    with pytest.raises(UnusableInput, match=r"^the weights .* from '.*vit.safetensors' \(.*size mismatch") as refused:
        pretrained_weights("vit_small", vit(image_size=32, width=48), str(published[0]))
    assert "\n" not in str(refused.value)
    assert caplog.messages == []


def test_an_expert_without_weights_is_refused():
    net = build_expert("resnet18", (3, 32, 32), 10, {"width": 4})
    with pytest.raises(
        UnusableInput, match=r"^timm has no weights of expert 'resnet18', but of vit_small: train from random weights "
    ):
        pretrained_weights("resnet18", net)


NETWORK: dict[str, Any] = {
    "expert": "vit_small", "expert_params": {"width": 24, "image_size": 32}, "input_shape": (3, 16, 16),
    "num_classes": 7, "mean": (0.5,) * 3, "std": (0.5,) * 3,
}  # fmt: skip
ROUTED = Routed(**NETWORK, num_experts=3)


@pytest.mark.parametrize(
    ("architecture", "experts"),
    [(Dense(**NETWORK), 1), (ROUTED, 3), (Dual(standard=ROUTED, robust=ROUTED), 6)],
    ids=["dense", "moe", "dual"],
)
def test_every_expert_of_a_model_gets_them_and_keeps_its_own_head(architecture: Any, experts: int, published: Any):
    model = architecture.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, Recipe(expert="vit_small", pretrained=str(published[0])))
    after = model.state_dict()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert kept == {key for key in before if ".head." in key or "router" in key or "normalize" in key}
    for key in ("blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "patch_embed.proj.weight", "norm.weight"):
        copies = [value for name, value in after.items() if name.endswith(f"backbone.{key}")]
        assert len(copies) == experts
        assert all(torch.equal(copy, published[1][key]) for copy in copies)

"""ImageNet weights for the ViT: those of the file, resampled; and no pickle is opened."""

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

from bench.errors import UnusableInput
from bench.models.architecture import Dense, Dual, Routed
from bench.models.experts import build_expert
from bench.models.vit import pretrained_weights
from bench.spec import Recipe
from bench.training.initial_weights import load_pretrained


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

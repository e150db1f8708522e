"""timm's ViT for images of another size than its own, and where its ImageNet weights come from."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.errors import UnusableInput, in_one_line


class ResizedViT(VisionTransformer):  # type: ignore[misc]  # timm has no types
    """timm's ViT behind a bilinear resize to its own image size, so that attacks act on the native pixels."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.patch_embed.img_size
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return super().forward(x)


#: timm's name of the expert whose ImageNet weights it has.
TIMM_NAMES = {"vit_small": "vit_small_patch16_224"}


def pretrained_weights(name: str, network: nn.Module, source: str | None = None) -> dict[str, Tensor]:
    """timm's ImageNet weights for `network`, the expert called `name`, all but those of its head.

    They come from the Hugging Face hub, or from the file `source` (safetensors, or the npz in which they were first
    published); position embeddings are resampled to the network's own image size.

    Raises:
        UnusableInput: there are none for this expert, the hub is out of reach, or the file does not hold them.
    """
    instead = "train from random weights with --set pretrained=false"
    if name not in TIMM_NAMES:
        raise UnusableInput(f"timm has no weights of expert '{name}', but of {', '.join(TIMM_NAMES)}: {instead}")
    if source is not None and not source.endswith((".safetensors", ".npz")):  # timm would unpickle it
        raise UnusableInput(f"--set pretrained={source} must be a .safetensors or .npz file; or {instead}")
    if source is not None and not Path(source).is_file():
        raise UnusableInput(f"--set pretrained={source}: there is no such file: correct the path, or {instead}")
    assert isinstance(network, ResizedViT)
    embed = network.patch_embed
    overlay = None if source is None else {"file": source, "custom_load": source.endswith(".npz")}
    try:
        with torch.random.fork_rng(devices=[]), _quiet("huggingface_hub"):
            vit = timm.create_model(
                TIMM_NAMES[name], pretrained=True, pretrained_cfg_overlay=overlay, img_size=embed.img_size,
                patch_size=embed.patch_size, embed_dim=network.embed_dim, in_chans=embed.proj.in_channels,
            )  # fmt: skip
    except Exception as error:  # the hub's, the file's and timm's own, of many kinds
        reason = in_one_line(error)
        where = f"from '{source}'" if source else "from the Hugging Face hub"
        raise UnusableInput(
            f"the weights of timm's {TIMM_NAMES[name]} could not be loaded {where} ({reason}): {instead}, or name a"
            " file that holds them with --set pretrained=FILE.safetensors"
        ) from None
    return {key: value for key, value in vit.state_dict().items() if not key.startswith("head.")}


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Nothing below an error is logged: the hub tells of each of its many attempts."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

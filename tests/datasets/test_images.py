"""Image files: what is decoded, and what is refused because Pillow would change it without a word."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.datasets.images import decode, image_size, interleave, read_images
from bench.errors import UnusableInput

H, W = 2, 3
VALUES = np.arange(H * W * 4, dtype=np.uint16).reshape(H, W, 4) * 2500  # the lower bytes differ


def png(path: Path, colour_type: int, channels: int) -> None:
    """16 bits a channel, by hand: Pillow writes none of these."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in VALUES[..., :channels])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, colour_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff(path: Path) -> None:
    """An uncompressed RGB TIFF of 16 bits a channel."""
    pixels = VALUES[..., :3].astype("<u2").tobytes()
    entries = [
        (256, 3, 1, W), (257, 3, 1, H), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
        (277, 3, 1, 3), (278, 3, 1, H), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    start = 14 + len(pixels)
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + struct.pack("<HHH", 16, 16, 16) + pixels + table + bytes(4))


def deep(path: Path) -> None:
    """A file of over 8 bits a channel, of the kind in its name."""
    kind = path.stem
    if kind in ("RGB", "RGBA", "LA", "L"):
        png(path, *{"L": (0, 1), "RGB": (2, 3), "LA": (4, 2), "RGBA": (6, 4)}[kind])
    elif kind == "tiff":
        tiff(path)
    elif kind == "ppm":
        path.write_bytes(b"P6 3 2 65535\n" + VALUES[..., :3].astype(">u2").tobytes())
    elif kind == "plain":
        path.write_bytes(b"P3 3 2 1023\n" + b" ".join(b"%d" % value for value in range(18)))
    else:
        Image.fromarray(VALUES[..., 0].astype(np.float32)).save(path)


@pytest.mark.parametrize(
    "name", ["RGB.png", "RGBA.png", "LA.png", "L.png", "tiff.tif", "ppm.ppm", "plain.ppm", "float.tif"]
)
def test_over_8_bits_a_channel_is_refused(name: str, tmp_path: Path) -> None:
    deep(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        image.load()  # Pillow takes it
    with pytest.raises(UnusableInput, match=f"{name} has more than 8 bits a channel: convert it to 8 bits beforehand$"):
        decode(tmp_path / name, (3, H, W))


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "x.png"), ("RGBA", "x.png"), ("LA", "x.png"), ("L", "x.png"), ("1", "x.png"), ("P", "x.png"),
     ("RGB", "x.bmp"), ("RGB", "x.tif"), ("RGB", "x.ppm"), ("RGB", "x.webp"), ("L", "x.pgm"), ("CMYK", "x.tif")],
)  # fmt: skip
def test_8_bits_a_channel_are_read(mode: str, name: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (W, H), (40, 40, 40)).convert(mode)
    image.save(tmp_path / name, **({"lossless": True} if name == "x.webp" else {}))
    pixels = decode(tmp_path / name, (3, H, W))
    assert (pixels.shape, pixels.dtype) == ((3, H, W), np.uint8)
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_16_bits_a_pixel_are_fewer_than_8_a_channel(tmp_path: Path) -> None:
    """BMP's 5-6-5: Pillow calls it BGR;16, and it holds all that it has in 8 bits."""
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    row = struct.pack("<HHH", 0xFFFF, 0, 0xFFFF) + bytes(2)
    info = struct.pack("<IiiHHIIiiII", 40, W, H, 1, 16, 3, 2 * len(row), 0, 0, 0, 0)
    file = struct.pack("<2sIHHI", b"BM", 66 + 2 * len(row), 0, 0, 66)
    (tmp_path / "x.bmp").write_bytes(file + info + masks + 2 * row)
    assert decode(tmp_path / "x.bmp", (3, H, W))[0].tolist() == [[255, 0, 255], [255, 0, 255]]


def test_size_is_height_and_width(tmp_path: Path) -> None:
    Image.new("L", (W, H)).save(tmp_path / "x.png")
    assert image_size(tmp_path / "x.png") == (H, W)
    (tmp_path / "y.png").write_bytes(b"nothing")
    with pytest.raises(UnusableInput, match=r"y\.png cannot be read as an image"):
        image_size(tmp_path / "y.png")


def test_classes_take_turns() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert interleave([[a, a, a], [b], [c, c]]) == [(a, 0), (b, 1), (c, 2), (a, 0), (c, 2), (a, 0)]


def test_a_beginning_is_read_and_all_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("L", (W, H), 10 * number).save(tmp_path / f"{number}.png")
    listed = [(tmp_path / f"{number}.png", number) for number in range(3)]
    images = read_images(listed, (1, H, W), 2, 7)
    assert torch.equal(images.x, torch.tensor([0, 10], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, H, W))
    assert (images.y.tolist(), images.available, images.published, images.white) == ([0, 1], 3, 7, 255)

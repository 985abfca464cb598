"""Decoding whatever users have in their folders."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contract.images import TRUSTED, UnreadableImage, decode


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def ramp() -> np.ndarray:
    """[40, 60, 3] with a different slope in every channel."""
    y, x = np.mgrid[0:40, 0:60]
    return np.stack((x * 4, y * 6, 255 - x * 4), axis=-1).astype(np.uint8)


def test_the_exif_orientation_is_applied(ramp):
    upright = Image.fromarray(ramp)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter, to be turned back clockwise
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(stored, TRUSTED, name="x")), ramp)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "YCbCr", "I;16", "RGBA"])
def test_every_mode_becomes_rgb_of_the_same_size(ramp, mode):
    image = Image.fromarray(ramp)
    image = (
        Image.fromarray(ramp[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    decoded = decode(encoded(image, kind), TRUSTED, name="x")
    assert decoded.mode == "RGB" and decoded.size == (60, 40)


def test_grey_and_cmyk_keep_their_colours(ramp):
    grey = np.asarray(decode(encoded(Image.fromarray(ramp[..., 0]), "PNG"), TRUSTED, name="x"))
    assert all(np.array_equal(grey[..., channel], ramp[..., 0]) for channel in range(3))
    cmyk = encoded(Image.fromarray(ramp).convert("CMYK"), "TIFF")
    assert np.abs(np.asarray(decode(cmyk, TRUSTED, name="x")).astype(int) - ramp).max() <= 2


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(3, axis=0)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), "PNG"), TRUSTED, name="x"))
    assert np.array_equal(decoded[0, :, 0], np.arange(256))
    assert np.array_equal(
        np.asarray(decode(encoded(Image.fromarray(values), "TIFF"), TRUSTED, name="x")), decoded
    )


def test_transparency_is_laid_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    decoded = np.asarray(decode(encoded(Image.fromarray(pixels), "PNG"), TRUSTED, name="x"))
    assert decoded[0, 0].tolist() == [255, 0, 0] and decoded[1, 1].tolist() == [255, 255, 255]
    palette = Image.fromarray(pixels[..., :3]).quantize(4)
    transparent = palette.getpixel((1, 1))
    decoded = np.asarray(
        decode(encoded(palette, "PNG", transparency=transparent), TRUSTED, name="x")
    )
    assert decoded[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"just some text\n",
        encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:200],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    ],
    ids=["empty", "text", "truncated jpeg", "broken png"],
)
def test_what_cannot_be_decoded_is_named_with_a_reason(data, tmp_path):
    for source in (data, tmp_path / "picture.jpg"):
        if isinstance(source, Path):
            source.write_bytes(data)
        with pytest.raises(UnreadableImage, match=r"^holiday\.jpg: \S"):
            decode(source, TRUSTED, name="holiday.jpg")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    bomb = encoded(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage, match="bomb: .* pixels"):
        decode(bomb, TRUSTED, name="bomb")

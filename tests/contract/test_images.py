"""Decoding of picture files: JPEGs at a reduced scale, and limits. What the server does with files
is in test_bad_input.py.
"""

import io
import pickle
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from contract import images
from contract.images import TRUSTED, Limits, UnreadableImage, decode, fit, read_pixels, to_rgb
from distill.data.pictures import PackagedPhotos
from tests.serve.raw_requests import encode

PHOTO = PackagedPhotos().load(0).convert("RGB").resize((640, 480))
JPEG = encode(PHOTO, "JPEG", quality=95)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((56, 56), (160, 120)),
        ((112, 112), (320, 240)),
        ((120, 160), (320, 240)),
        ((121, 160), (640, 480)),
        ((480, 640), (640, 480)),
        ((1000, 1000), (640, 480)),
        ((16, 300), (640, 480)),
    ],
)
def test_a_jpeg_is_decoded_at_a_scale_never_below_twice_the_size_it_is_fitted_to(size, scaled):
    assert decode(JPEG, size=size).size == scaled
    whole, quick = fit(PHOTO, *size).astype(int), read_pixels(JPEG, *size)
    assert quick.shape == (*size, 3)
    assert np.abs(whole - quick).mean() < 2


def test_a_picture_on_its_side_is_scaled_by_its_upright_size():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(PHOTO, "JPEG", exif=exif)
    assert decode(data).size == (480, 640)
    assert decode(data, size=(320, 40)).size == (480, 640)
    assert decode(data, size=(160, 40)).size == (240, 320)


def test_other_formats_are_decoded_whole():
    for kind in ("PNG", "WEBP"):
        assert decode(encode(PHOTO, kind), size=(32, 32)).size == PHOTO.size


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            Limits(max_bytes=1000),
            r"the picture has [\d,]+ bytes, more than the 1,000 that are taken: make it smaller",
        ),
        (
            Limits(max_pixels=640 * 480 - 1),
            "the picture has 640x480 pixels, more than the 307,199 that are taken",
        ),
    ],
)
def test_limits_are_inclusive_and_named(limits, words):
    assert decode(JPEG, Limits(len(JPEG), 640 * 480)).size == PHOTO.size
    with pytest.raises(UnreadableImage, match=words):
        decode(JPEG, limits)


def chunk(kind: bytes, data: bytes) -> bytes:
    sum_ = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + sum_


def png(rows: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """A PNG of 8- or 16-bit rows [H, W] or [H, W, 3], of a colour type, with further chunks."""
    rows = rows.astype(rows.dtype.newbyteorder(">"))
    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * rows.dtype.itemsize, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    ends = chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, *ends))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
LIMITS = pytest.mark.parametrize("limits", [Limits(), TRUSTED], ids=["served", "trusted"])


@LIMITS
def test_the_transparent_colour_of_a_png_is_white(limits):
    rgb = np.full((8, 8, 3), (1, 2, 3), np.uint8)
    rgb[:, :4] = 200, 100, 50
    wide = np.full((8, 8), 1799, np.uint16)
    wide[:, :4] = 40_000
    for data, left in (
        (png(rgb, 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), [200, 100, 50]),
        (png(wide, 0, chunk(b"tRNS", struct.pack(">H", 1799))), [156, 156, 156]),
    ):
        pixels = np.asarray(decode(data, limits))
        assert (pixels[:, :4] == left).all() and (pixels[:, 4:] == 255).all()


@LIMITS
def test_a_damaged_png_is_refused_although_pillow_decodes_it(limits):
    data = bytearray(encode(PHOTO, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(UnreadableImage, match="cannot be decoded, it is damaged"):
        decode(bytes(data), limits)
    header = bytearray(png(GREY, 0, chunk(b"gAMA", struct.pack(">I", 45_455))))
    header[45] ^= 1
    with pytest.raises(UnreadableImage, match="cannot be decoded, it is damaged: broken PNG"):
        decode(bytes(header), limits)


@LIMITS
def test_a_text_in_a_png_is_not_pixels_however_long_or_damaged_it_is(limits):
    long = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))
    damaged = chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!"
    for text in (long, damaged):
        assert (np.asarray(decode(png(GREY, 0, text), limits))[..., 0] == GREY).all()


@LIMITS
def test_too_many_scans_are_refused_also_in_a_jpeg_of_two_pictures(limits):
    small = Image.new("RGB", (64, 64), "navy")
    data = encode(small, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + 100 * last + b"\xff\xd9"
    pair = encode(small, "MPO", save_all=True, append_images=[small])
    start = pair.index(b"\xff\xe2")
    (length,) = struct.unpack(">H", pair[start + 2 : start + 4])
    for case in (many, many[:2] + pair[start : start + 2 + length] + many[2:]):
        with pytest.raises(
            UnreadableImage, match=r"the picture has 1\d\d scans, more than the 100"
        ):
            decode(case, limits)


def test_a_pillow_picture_is_turned_upright_and_refused_if_it_is_empty_or_damaged():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(PHOTO, "JPEG", exif=exif)
    assert np.array_equal(to_rgb(Image.open(io.BytesIO(data))), decode(data))
    with pytest.raises(UnreadableImage, match="^crop: the picture is 0x5 pixels: .* not empty"):
        to_rgb(Image.new("RGB", (0, 5)), "crop")
    with pytest.raises(UnreadableImage, match="^half: the picture cannot be decoded"):
        to_rgb(Image.open(io.BytesIO(data[: len(data) // 2])), "half")


def test_a_tiff_on_its_side_is_turned_once():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(PHOTO, "TIFF", exif=exif)
    turned = PHOTO.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(decode(data, TRUSTED), turned)


def test_an_error_names_its_picture_and_crosses_process_borders():
    with pytest.raises(UnreadableImage) as caught:
        decode(b"", name="holiday.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) == f"holiday.jpg: {again.reason}"
    assert again.name == "holiday.jpg" and again.reason.startswith("the picture is empty")


def test_the_decoder_stands_alone(tmp_path):
    """It is copied beside a Triton model."""
    shutil.copy(images.__file__, tmp_path / "images.py")
    code = (
        "import sys, images; print(sorted({n.split('.')[0] for n in sys.modules} & {'contract'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("limits", [TRUSTED, Limits()])
@pytest.mark.parametrize(
    "error", [MemoryError(), OSError("out of memory when reading image file")], ids=["own", "codec"]
)
def test_no_picture_is_called_damaged_where_memory_runs_out(monkeypatch, error, limits):
    def load(picture: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    with pytest.raises(MemoryError):
        decode(JPEG, limits, name="a.jpg")

"""Decoding of picture files: JPEGs at a reduced scale, and limits. What the server does with files
is in test_bad_input.py.
"""

import io
import itertools
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from contract import images
from contract.images import (
    TRUSTED,
    Limits,
    UnreadableImage,
    decode,
    jpeg_pixels,
    read_views,
    to_rgb,
)
from contract.picture_headers import own_size
from contract.views import SQUASH, ViewPolicy
from distill.config import TeacherConfig, TeacherRuntime
from distill.data.pictures import PackagedPhotos
from distill.evaluate.reading import read_view
from distill.teachers import build_teacher
from serve.client.inputs import list_pictures
from serve.embed.data import Entry
from serve.embed.reading import read_row
from tests.serve.raw_requests import encode

PHOTOS = PackagedPhotos()
PHOTO = PHOTOS.load(0).convert("RGB").resize((640, 480))
JPEG = encode(PHOTO, "JPEG", quality=95)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((56, 56), (160, 120)),
        ((61, 61), (320, 240)),
        ((112, 112), (320, 240)),
        ((120, 160), (320, 240)),
        ((224, 224), (320, 240)),
        ((240, 320), (320, 240)),
        ((241, 320), (640, 480)),
        ((480, 640), (640, 480)),
        ((1000, 1000), (640, 480)),
        ((16, 300), (320, 240)),
    ],
)
def test_a_jpeg_is_decoded_at_a_scale_never_below_the_size_it_is_needed_at(size, scaled):
    assert decode(JPEG, size=size).size == scaled
    whole, quick = SQUASH.pixels(PHOTO, *size).astype(int), read_views(JPEG, SQUASH, *size)[0]
    assert quick.shape == (*size, 3)
    assert np.abs(whole - quick).mean() < 2


def test_sides_that_cannot_be_halved_are_reduced_from_twice_the_size_on():
    odd = encode(PHOTO.resize((501, 375)), "JPEG")
    assert decode(odd, size=(94, 94)).size == (501, 375)
    assert decode(odd, size=(93, 93)).size == (251, 188)


SIZES = ((640, 480), (500, 375), (448, 448), (960, 640))


def test_pixels_are_within_the_stated_bound_of_whole_pictures_resized():
    """docs/architecture.md states it: of 255, on average, of the worst photograph, of any pixel."""
    errors = []
    for size in SIZES:
        for number in range(len(PHOTOS)):
            photo = PHOTOS.load(number).resize(size)
            data = encode(photo, "JPEG", quality=90)
            whole = SQUASH.pixels(decode(data), 224, 224).astype(int)
            errors.append(np.abs(whole - read_views(data, SQUASH, 224, 224)[0]))
    assert np.mean(errors) < 1.5 and np.max(np.mean(errors, (1, 2, 3))) < 4 and np.max(errors) < 64


@pytest.mark.slow
def test_features_hardly_change_with_the_scale_that_is_decoded():
    config = {"name": "mobilenetv2_100", "role": "classification", "image_size": 224}
    teacher = build_teacher(
        TeacherConfig(**config, checkpoint="package:mobilenet-v2"), TeacherRuntime(), 0
    )
    files = [
        encode(PHOTOS.load(number).resize((640, 480)), "JPEG", quality=90)
        for number in range(0, len(PHOTOS), 4)
    ]
    both = [
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        for pictures in (
            [SQUASH.pixels(decode(data), 224, 224) for data in files],
            [read_views(data, SQUASH, 224, 224)[0] for data in files],
        )
    ]
    with torch.inference_mode():
        one, other = (teacher(images).summary for images in both)
    cosine = torch.cosine_similarity(one, other)
    assert cosine.mean() > 0.995 and cosine.min() > 0.98 and not torch.equal(one, other)


def jpegs() -> dict[str, bytes]:
    """JPEGs of every kind, also of odd sides and of those that libjpeg-turbo's own interface does
    not decode to RGB.
    """
    small = PHOTO.resize((241, 161))
    exif = Image.Exif()
    exif[0x112] = 6
    return {
        "4:4:4": encode(small, "JPEG", subsampling=0),
        "4:2:2": encode(small, "JPEG", subsampling=1),
        "4:2:0": encode(PHOTO, "JPEG", subsampling=2),
        "progressive": encode(small, "JPEG", progressive=True),
        "restarts": encode(small, "JPEG", restart_marker_rows=1),
        "grey": encode(small.convert("L"), "JPEG"),
        "cmyk": encode(small.convert("CMYK"), "JPEG"),
        "rgb": encode(small, "JPEG", keep_rgb=True),
        "turned": encode(small, "JPEG", exif=exif),
        "two pictures": encode(small, "MPO", save_all=True, append_images=[PHOTO]),
    }


@pytest.mark.parametrize("size", [None, (16, 24), (30, 40), (80, 100)])
def test_the_pixels_are_the_same_without_simplejpeg(monkeypatch, size):
    for kind, data in jpegs().items():
        fast = decode(data, size=size)
        with monkeypatch.context() as without:
            without.setattr(images, "simplejpeg", None)
            slow = decode(data, size=size)
        assert np.array_equal(fast, slow), kind


def test_damaged_files_are_refused_or_forgiven_alike_without_simplejpeg(monkeypatch):
    rng = np.random.default_rng(0)
    refused = 0
    for data in jpegs().values():
        for _ in range(12):
            damaged = bytearray(data)
            damaged[int(rng.integers(2, len(data)))] = int(rng.integers(256))
            cut = bytes(damaged)[: int(rng.integers(len(data) // 2, 2 * len(data)))]
            results = []
            for library in (images.simplejpeg, None):
                monkeypatch.setattr(images, "simplejpeg", library)
                try:
                    results.append(np.asarray(decode(cut, size=(32, 32))).tobytes())
                except UnreadableImage as error:
                    results.append(error.reason)
                    refused += 1
            monkeypatch.undo()
            assert results[0] == results[1]
    assert 20 < refused < 220  # both kinds were among them


def test_a_jpeg_is_left_to_pillow_where_the_two_parsers_read_another_size():
    assert jpeg_pixels(JPEG, (640, 480)).shape == (480, 640, 3)
    assert jpeg_pixels(JPEG, (640, 481)) is None and jpeg_pixels(JPEG, (480, 640)) is None


def test_evaluation_client_embedding_and_server_see_the_same_pixels(tmp_path):
    """The server runs `read_views` itself; test_views.py compares its answers."""
    file = tmp_path / "photo.jpg"
    for data in jpegs().values():
        file.write_bytes(data)
        for side, text in itertools.product((224, 112, 56), ("squash", "centre-crop", "letterbox")):
            view = ViewPolicy.parse(text)
            (served,) = read_views(data, view, side, side)
            (picture,) = list_pictures([file])
            seen = {
                "client": picture.pixels((side, side), view, Limits()),
                "embedding": read_row(Entry(str(file)), side, side, view).pixels,
                "evaluation": read_view(file, view, side),
            }
            assert all(np.array_equal(pixels, served) for pixels in seen.values()), (side, text)


def test_a_picture_on_its_side_is_scaled_by_its_upright_size():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(PHOTO, "JPEG", exif=exif)
    assert decode(data).size == (480, 640)
    assert decode(data, size=(321, 40)).size == (480, 640)
    assert decode(data, size=(320, 40)).size == (240, 320)


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


@pytest.mark.parametrize("tag", [0, 1, 3, 5, 6, 8, 9, 77])
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_a_view_lies_where_the_upright_picture_has_it(kind, tag, tmp_path):
    """TIFFs are turned by Pillow itself, and tags beyond the eight turn nothing."""
    exif, view = Image.Exif(), ViewPolicy.parse("letterbox")
    exif[0x112] = tag
    data = encode(PHOTO.resize((160, 96)), kind, exif=exif)
    upright = decode(data, TRUSTED)
    assert upright.size == ((96, 160) if 5 <= tag <= 8 else (160, 96))
    assert own_size(data, TRUSTED) == (upright.height, upright.width)
    # 64 is decoded whole, 40 (of JPEGs) at a half
    whole = view.every(upright, 64, 64)
    assert np.array_equal(read_views(data, view, 64, 64, TRUSTED), whole)
    half = read_views(data, view, 40, 40, TRUSTED).astype(int)
    assert np.abs(half - view.every(upright, 40, 40)).mean() < 3
    file = tmp_path / "picture"
    file.write_bytes(data)
    row = read_row(Entry(str(file)), 64, 64, view)
    assert np.array_equal(row.pixels, whole[0]) and row.size == upright.size


def test_an_error_names_its_picture_and_crosses_process_borders():
    with pytest.raises(UnreadableImage) as caught:
        decode(b"", name="holiday.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) == f"holiday.jpg: {again.reason}"
    assert again.name == "holiday.jpg" and again.reason.startswith("the picture is empty")


@pytest.mark.parametrize("simplejpeg", ["", "sys.modules['simplejpeg'] = None; "])
def test_the_decoder_stands_alone(tmp_path, simplejpeg):
    """It is copied beside a Triton model, where simplejpeg may be missing."""
    shutil.copy(images.__file__, tmp_path / "images.py")
    code = (
        f"import sys; {simplejpeg}import images; "
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'contract', 'torch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("limits", [TRUSTED, Limits()])
@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("simplejpeg.decode_jpeg", MemoryError()),
        ("simplejpeg.decode_jpeg", ValueError("Insufficient memory (case 4)")),
        ("PIL.JpegImagePlugin.JpegImageFile.load", MemoryError()),
        ("PIL.JpegImagePlugin.JpegImageFile.load", OSError("out of memory when reading a file")),
    ],
)
def test_no_picture_is_called_damaged_where_memory_runs_out(monkeypatch, place, error, limits):
    def fail(*_: object, **__: object) -> None:
        raise error

    if "PIL" in place:
        monkeypatch.setattr(images, "simplejpeg", None)
    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        decode(JPEG, limits, name="a.jpg")


def test_threads_that_decode_leave_the_users_warnings_alone():
    """Pillow's warnings are ignored while any of them decodes, and nobody else's ever."""
    before, data = list(warnings.filters), encode(Image.new("RGB", (8, 8)), "PNG")
    first, second = (images.opened(data, Limits(), "") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    code = compile("warnings.warn('odd')", "odd.py", "exec")
    exec(code, {"warnings": warnings, "__name__": "PIL.TiffImagePlugin"})
    with pytest.warns(UserWarning, match="odd"):
        exec(code, {"warnings": warnings, "__name__": "mine"})
    second.__exit__(None, None, None)
    assert warnings.filters == before

"""One table of odd pictures: what training reads of each, and what clients and the server do."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageCms

from contract.images import UnreadableImage, decode, read_views, to_rgb
from contract.views import SQUASH
from distill.data.pictures import FolderPictures
from distill.data.pixels import Crop
from serve.client.inputs import list_pictures
from serve.client.options import ClientOptions
from serve.errors import BadRequest
from tests.serve.raw_requests import chunk, encode, png

HIGH, WIDE = 24, 40
_Y, _X = np.mgrid[0:HIGH, 0:WIDE]
RAMP = np.stack((_X * 6, _Y * 10, 255 - _X * 6), -1).astype(np.uint8)
PICTURE = Image.fromarray(RAMP)
GREY = np.asarray(PICTURE.convert("L"))
STEPS = (_X // 10).astype(np.uint8)  # 0 to 3
WHITE = np.uint8(255)


@dataclass
class Odd:
    """A picture, as a file or as Pillow's, and what it shows; `near`: the mean error that is left
    to its coding; `served` is False for files of formats that only training reads, `opened` for
    those that Pillow itself refuses.
    """

    make: Callable[[], bytes | Image.Image]
    looks: np.ndarray | str
    """The pixels, or words of the refusal."""
    near: float = 0
    served: bool = True
    opened: bool = True


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def white(pixels: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], WHITE, pixels)


def raw(values: np.ndarray, depth: int, colour: int, *extra: bytes) -> bytes:
    """A PNG of values [H, W] or [H, W, C] of 1 to 16 bits."""
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in values]
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
        rows = [np.packbits(row).tobytes() for row in bits]
    return png(
        values.shape[1], values.shape[0], depth, colour, b"".join(b"\0" + r for r in rows), *extra
    )


def interlaced() -> bytes:
    """The ramp in Adam7's seven passes."""
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, down, right in passes for row in RAMP[y::down, x::right]
    )
    header = struct.pack(">IIBBBBB", WIDE, HIGH, 8, 2, 0, 0, 1)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def exif(tag: int) -> Image.Exif:
    result = Image.Exif()
    result[0x112] = tag
    return result


def turned(tag: int) -> np.ndarray:
    """The ramp as a camera stores it that was held so: the tag turns it back."""
    swap = {2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.transpose(1, 0, 2)}
    swap |= {6: np.rot90(RAMP), 7: np.rot90(RAMP, 2).transpose(1, 0, 2), 8: np.rot90(RAMP, -1)}
    return np.ascontiguousarray(swap.get(tag, RAMP))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def with_info(picture: Image.Image, **info: object) -> Image.Image:
    picture.info |= info
    return picture


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB")


def clear() -> Image.Image:
    """The ramp, ever more transparent to the right."""
    return Image.fromarray(np.dstack((RAMP, 255 - STEPS * 85)))


CLEAR = 255 - (255.0 - RAMP) * (1 - STEPS[..., None] / 3)
CLEAR_GREY = 255 - (255.0 - grey(GREY)) * (1 - STEPS[..., None] / 3)


def palette(**options: object) -> bytes:
    picture = Image.fromarray(STEPS).convert("P")
    picture.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0, 0, 0, 250])
    return encode(picture, "PNG", **options)


PALETTE = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)[STEPS]
HALF_RED = np.where(STEPS[..., None] == 1, np.array([252, 127, 127], np.uint8), PALETTE)


def animated(kind: str) -> bytes:
    other = Image.new("RGB", PICTURE.size, "navy")
    return encode(PICTURE, kind, save_all=True, append_images=[other], duration=40, lossless=True)


def many_scans(pair: bool) -> bytes:
    """A progressive JPEG of a hundred scans too many, perhaps with the segment of two pictures."""
    data = encode(PICTURE, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    many = data[:-2] + 100 * last + b"\xff\xd9"
    if not pair:
        return many
    two = encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    start = two.index(b"\xff\xe2")
    (length,) = struct.unpack(">H", two[start + 2 : start + 4])
    return many[:2] + two[start : start + 2 + length] + many[2:]


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


PNG, JPEG = encode(PICTURE, "PNG"), encode(PICTURE, "JPEG", quality=98, subsampling=0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
WIDE_GREY = GREY.astype(np.uint16) * 257
TRNS = chunk(b"tRNS", struct.pack(">H", 2))
ODD = {
    # modes of Pillow's pictures
    "1": Odd(lambda: PICTURE.convert("1"), grey(np.asarray(PICTURE.convert("1")) * WHITE)),
    "L": Odd(lambda: Image.fromarray(GREY), grey(GREY)),
    "LA": Odd(lambda: clear().convert("LA"), CLEAR_GREY, 1),
    "La": Odd(lambda: clear().convert("LA").convert("La"), CLEAR_GREY, 1.5),
    "P": Odd(lambda: opened(palette()), PALETTE),
    "PA": Odd(lambda: opened(palette()).convert("PA"), PALETTE),
    "RGBA": Odd(clear, CLEAR, 1),
    "RGBa": Odd(lambda: clear().convert("RGBa"), CLEAR, 1.5),
    "RGBX": Odd(lambda: PICTURE.convert("RGBX"), RAMP),
    "CMYK": Odd(lambda: PICTURE.convert("CMYK"), RAMP),
    "YCbCr": Odd(lambda: PICTURE.convert("YCbCr"), RAMP, 2),
    "LAB": Odd(lab, RAMP, 6),
    "HSV": Odd(lambda: PICTURE.convert("HSV"), RAMP, 3),
    "I": Odd(lambda: Image.fromarray(WIDE_GREY.astype(np.int32)), grey(GREY)),
    "I of eight bits": Odd(lambda: PICTURE.convert("I"), grey(GREY)),
    "I;16": Odd(lambda: Image.fromarray(WIDE_GREY), grey(GREY)),
    "I;16B": Odd(
        lambda: Image.frombytes("I;16B", (WIDE, HIGH), WIDE_GREY.astype(">u2").tobytes()),
        grey(GREY),
    ),
    "F": Odd(lambda: Image.fromarray(GREY / np.float32(255)), grey(GREY)),
    "F of eight bits": Odd(lambda: PICTURE.convert("F"), grey(GREY), 0.6),
    "RGB with a clear colour": Odd(
        lambda: with_info(PICTURE.copy(), transparency=tuple(RAMP[5, 7].tolist())),
        white(RAMP, (RAMP == RAMP[5, 7]).all(-1)),
    ),
    # transparency in files
    "P+tRNS": Odd(lambda: palette(transparency=1), white(PALETTE, STEPS == 1)),
    "P+tRNS of many": Odd(lambda: palette(transparency=b"\xff\x80"), HALF_RED, 1),
    "RGB+tRNS": Odd(
        lambda: raw(RAMP, 8, 2, chunk(b"tRNS", struct.pack(">3H", *RAMP[5, 7].tolist()))),
        white(RAMP, (RAMP == RAMP[5, 7]).all(-1)),
    ),
    "RGB of 16 bits+tRNS": Odd(
        lambda: raw(
            RAMP.astype(np.uint16) * 256,
            16,
            2,
            chunk(b"tRNS", struct.pack(">3H", *(RAMP[5, 7].astype(int) * 256).tolist())),
        ),
        white(RAMP, (RAMP == RAMP[5, 7]).all(-1)),
    ),
    "L of 2 bits+tRNS": Odd(lambda: raw(STEPS, 2, 0, TRNS), white(grey(STEPS * 85), STEPS == 2)),
    "L of 4 bits+tRNS": Odd(lambda: raw(STEPS, 4, 0, TRNS), white(grey(STEPS * 17), STEPS == 2)),
    "L of 8 bits+tRNS": Odd(lambda: raw(STEPS, 8, 0, TRNS), white(grey(STEPS), STEPS == 2)),
    "L of 16 bits+tRNS": Odd(
        lambda: raw(STEPS * 257, 16, 0, chunk(b"tRNS", struct.pack(">H", 514))),
        white(grey(STEPS), STEPS == 2),
    ),
    "1+tRNS": Odd(lambda: raw(STEPS % 2, 1, 0, chunk(b"tRNS", bytes(2))), np.full_like(RAMP, 255)),
    "WEBP with alpha": Odd(lambda: encode(clear(), "WEBP", lossless=True, exact=True), CLEAR, 1),
    "LA of 16 bits": Odd(
        lambda: raw(np.dstack((WIDE_GREY, (255 - STEPS * 85).astype(np.uint16) * 257)), 16, 4),
        CLEAR_GREY,
        1,
    ),
    # kinds of files
    "JPEG of CMYK": Odd(lambda: encode(PICTURE.convert("CMYK"), "JPEG", quality=98), RAMP, 4),
    "PNG of 16 bits": Odd(lambda: raw(WIDE_GREY, 16, 0), grey(GREY)),
    "PNG of 48 bits": Odd(lambda: raw(RAMP.astype(np.uint16) * 257, 16, 2), RAMP),
    "interlaced PNG": Odd(interlaced, RAMP),
    "progressive JPEG": Odd(lambda: encode(PICTURE, "JPEG", progressive=True, quality=98), RAMP, 4),
    "MPO": Odd(
        lambda: encode(
            PICTURE, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=98
        ),
        RAMP,
        4,
    ),
    "APNG": Odd(lambda: animated("PNG"), RAMP),
    "animated WEBP": Odd(lambda: animated("WEBP"), RAMP, 1),
    "animated GIF": Odd(lambda: animated("GIF"), RAMP, 12, served=False),
    "TIFF": Odd(lambda: encode(PICTURE, "TIFF", exif=exif(3)), turned(3), served=False),
    "BMP": Odd(lambda: encode(PICTURE, "BMP"), RAMP, served=False),
    "a profile": Odd(
        lambda: encode(
            PICTURE,
            "PNG",
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
        RAMP,
    ),
    "a long text": Odd(
        lambda: raw(RAMP, 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))),
        RAMP,
        opened=False,
    ),
    "a damaged text": Odd(
        lambda: raw(RAMP, 8, 2, chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!"),
        RAMP,
        opened=False,
    ),
    # what must not be decoded
    "half a PNG": Odd(lambda: PNG[: len(PNG) // 2], "cannot be decoded"),
    "a PNG without its end": Odd(lambda: PNG[:-12], "cannot be decoded"),
    "half a JPEG": Odd(lambda: JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "half a WEBP": Odd(lambda: encode(PICTURE, "WEBP")[:-40], "cannot be decoded"),
    "half a picture": Odd(lambda: opened(JPEG[:-100]), "cannot be decoded"),
    "a bad sum": Odd(lambda: changed(PNG, PNG.index(b"IEND") - 5), "cannot be decoded"),
    "no pixels": Odd(lambda: Image.new("RGB", (0, 5)), "0x5 pixels: .* not empty"),
    "a width of 0": Odd(lambda: png(0, 5, 8, 2, bytes(5)), "cannot be decoded|not empty"),
    "too many scans": Odd(lambda: many_scans(False), "scans, more than the 100"),
    "too many scans of two pictures": Odd(lambda: many_scans(True), "scans, more than the 100"),
    "a bomb": Odd(lambda: png(30_000, 30_000, 1, 0, bytes(3751)), "900,000,000 pixels"),
}
for tag in range(1, 9):
    stored = turned(tag)
    for kind, near, options in (
        ("JPEG", 4, {"quality": 98, "subsampling": 0}),
        ("PNG", 0, {}),
        ("WEBP", 0, {"lossless": True}),
    ):
        ODD[f"{kind} held as {tag}"] = Odd(
            lambda stored=stored, kind=kind, tag=tag, options=options: encode(
                Image.fromarray(stored), kind, exif=exif(tag), **options
            ),
            RAMP,
            near,
        )


def read_by_client(source: object, encoded: bool) -> np.ndarray:
    """What a client sends of a picture, decoded as the server does where it goes as a file."""
    (picture,) = list_pictures(source)
    limits = ClientOptions().limits
    if encoded:
        return np.asarray(decode(picture.read(limits)))
    return np.asarray(picture.open(limits))


def first_square(image: Image.Image) -> Crop:
    """The largest square at the upper left, in its own size."""
    side = min(image.size)
    return Crop((0.0, 0.0, float(side), float(side)), side, False)


@pytest.mark.parametrize("case", ODD)
def test_training_clients_and_servers_see_the_same_picture(case, tmp_path):
    odd = ODD[case]
    source = odd.make()
    ways: dict[str, Callable[[], object]] = {
        "client": lambda: read_by_client(odd.make(), False),
        "client, encoded": lambda: read_by_client(odd.make(), True),
    }
    if isinstance(source, bytes):
        (tmp_path / "a.png").write_bytes(source)  # the suffix says nothing
        folder = FolderPictures(tmp_path)
        ways = {
            "training": lambda: folder.load(0),
            "training, a crop": lambda: folder.open(0).crops([first_square(folder.load(0))])[0],
            "server": lambda: decode(source),
            **ways,
            "client, a path": lambda: read_by_client(tmp_path / "a.png", False),
        }
        if odd.opened and not isinstance(odd.looks, str):
            ways["client, a PIL picture"] = lambda: to_rgb(opened(source))
    if isinstance(odd.looks, str):
        for way, read in ways.items():
            with pytest.raises((UnreadableImage, BadRequest), match=odd.looks):
                pytest.fail(f"{way}: {np.asarray(read()).shape}")
        return
    if not odd.served:
        for way in ("server", "client", "client, encoded", "client, a path"):
            with pytest.raises((UnreadableImage, BadRequest), match="not a JPEG, PNG or WEBP"):
                ways.pop(way)()
    pixels = {way: np.asarray(read()) for way, read in ways.items()}
    crop = pixels.pop("training, a crop", None)
    first, *others = pixels.values()
    if crop is not None:
        side = min(first.shape[:2])
        assert np.array_equal(crop.transpose(1, 2, 0), first[:side, :side])
    assert first.shape == odd.looks.shape and first.dtype == np.uint8
    error = np.abs(first - odd.looks.astype(float))
    assert error.mean() <= odd.near and (odd.near or not error.any())
    for way, other in zip(list(pixels)[1:], others, strict=True):
        assert np.array_equal(first, other), way
    if odd.served and isinstance(source, bytes):
        small = SQUASH.pixels(Image.fromarray(first), 6, 8).astype(int)
        (near,) = read_views(source, SQUASH, 6, 8)
        assert np.abs(small - near).mean() < 3  # JPEGs are decoded smaller

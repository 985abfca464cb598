"""Picture files become what the graphs read: RGB bytes of the model's size. Used by clients and,
copied, by the server.

Needs numpy and Pillow only: `serve.repository` copies this file beside the model that decodes on
the server.
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that are decoded. Others have had more of Pillow's vulnerabilities than of our users'
pictures.
"""

MAX_SCANS = 100
"""Of a progressive JPEG. Encoders write about ten; a file of 20 MB can hold 200,000, each another
pass over every pixel.
"""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns a picture upright, by the value of its EXIF tag."""


class Limits(NamedTuple):
    """What an encoded picture may be at most; the pixels are read from its header, before anything
    is decoded.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000


class BadImage(ValueError):
    """A picture that cannot be decoded, or must not be; the message is a sentence for whoever sent
    it.
    """


def read_pixels(data: bytes, height: int, width: int, limits: Limits = Limits()) -> np.ndarray:
    """JPEG, PNG or WebP bytes at the model's size, uint8 [height, width, 3]; raises BadImage as
    `decode` does.
    """
    return fit(decode(data, limits, (height, width)), height, width)


def decode(
    data: bytes, limits: Limits = Limits(), size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an RGB picture, upright as its EXIF tag says, transparency
    laid on white.

    With a `size` (height, width) that the picture will be fitted to, a JPEG may come out at a half,
    a quarter or an eighth of its own, never less than twice `size`: most of decoding it is the
    inverse DCT, done for that many pixels only. Raises BadImage for anything empty, truncated,
    corrupt, of another format or beyond the limits.
    """
    if not data:
        raise BadImage("the picture is empty (0 bytes): send the bytes of a JPEG, PNG or WebP file")
    if len(data) > limits.max_bytes:
        raise BadImage(
            f"the picture has {len(data):,} bytes, more than the {limits.max_bytes:,} that are "
            "taken: make it smaller"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns of is decided here
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                check_limits(picture, data, limits)
                if picture.format == "PNG":
                    check_sums(data)
                tag = orientation(picture)
                if size and picture.format == "JPEG":
                    height, width = size if tag < 5 else size[::-1]
                    picture.draft(None, (2 * width, 2 * height))
                picture.load()
                rgb = to_rgb(picture)
                return rgb.transpose(UPRIGHT[tag]) if tag in UPRIGHT else rgb
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            f"the bytes are no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture: convert it to "
            "one of these"
        ) from error
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow's own limit comes first where the header is far beyond ours
        raise BadImage(
            too_large(f"{int(re.search(r'[0-9]+', str(error))[0]):,}", limits)
        ) from error
    # decoders fail in many ways on damaged files: struct, zlib, index and value errors among them
    except Exception as error:
        raise BadImage(
            f"the picture cannot be decoded, it is damaged: {first_line(error)}"
        ) from error


def check_limits(picture: Image.Image, data: bytes, limits: Limits) -> None:
    """Raise BadImage for a picture, opened but not decoded, that would cost too much to decode."""
    if picture.width * picture.height > limits.max_pixels:
        raise BadImage(too_large(f"{picture.width}x{picture.height}", limits))
    # a start-of-scan marker cannot occur in the compressed data itself
    scans = data.count(b"\xff\xda") if picture.format == "JPEG" else 1
    if scans > MAX_SCANS:
        raise BadImage(
            f"the picture has {scans:,} scans, more than the {MAX_SCANS} that are taken: save it "
            "anew"
        )


def check_sums(data: bytes) -> None:
    """Raise for a PNG whose checksums do not hold: Pillow decodes one that is damaged in its middle
    without a word.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        picture.verify()


def too_large(pixels: str, limits: Limits) -> str:
    """The sentence about a picture of so many pixels."""
    most = min(limits.max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or limits.max_pixels))
    return (
        f"the picture has {pixels} pixels, more than the {most:,} that are taken: make it smaller"
    )


def orientation(picture: Image.Image) -> int:
    """The EXIF tag that says how a picture was held, 1 (upright) where there is none or it cannot
    be read.
    """
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (
        Exception
    ):  # as many kinds as there are ways to damage it; the picture itself may be whole
        return 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without clipping 16 bits or losing transparency."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(eight_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        paper = Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer)
        return paper
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values [H, W] of 16 bits, or of any type and 0 to 255, as uint8; a few rows at a time,
    for they may be many.
    """
    divisor = 257 if values.dtype.itemsize == 2 or values.max(initial=0) > 255 else 1
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):
        result[start : start + 64] = np.clip(values[start : start + 64] / divisor, 0, 255).round()
    return result


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def fit(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The whole picture at the model's size, uint8 [height, width, 3]: bicubic, the aspect ratio is
    not kept.
    """
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))

"""Picture files become RGB pixels: in training, in clients and, copied, on the server.

Needs numpy and Pillow, and simplejpeg only to be fast: `serve.repository` copies this file beside
the model that decodes on the server. Both decode JPEGs by libjpeg-turbo, to the same pixels.
"""

import contextlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile  # Pillow's files of two pictures are of it too
from PIL.PngImagePlugin import PngImageFile

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that are decoded for others. The rest have had more of Pillow's vulnerabilities than of
our users' pictures.
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
IMAGE_SUFFIXES += (".jpe", ".jfif", ".avif", ".jp2", ".pgm")
"""Of files in a user's own folders."""

MAX_SCANS = 100
"""Of a progressive JPEG. Encoders write about ten; a file of 20 MB can hold 200,000, each another
pass over every pixel.
"""

_PNG = b"\x89PNG\r\n\x1a\n"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by the value of its EXIF tag."""


class Limits(NamedTuple):
    """What an encoded picture may be at most; the pixels are read from its header, before anything
    is decoded.
    """

    max_bytes: int | None = 20_000_000
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] | None = FORMATS
    """Pillow's names; None: whatever it can open."""


TRUSTED = Limits(max_bytes=None, max_pixels=Image.MAX_IMAGE_PIXELS or 89_478_485, formats=None)
"""For a user's own files, to train on: of any format and size, up to what Pillow itself takes for a
decompression bomb.
"""


class UnreadableImage(Exception):
    """A picture that cannot be decoded, or must not be.

    `reason` is a sentence for whoever sent it; `name` says which one it is, "" for the only one.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}" if name else reason)
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple:
        """Let the exception cross process borders with both arguments."""
        return type(self), (self.name, self.reason)


class ImageTooLarge(UnreadableImage):
    """A picture of more bytes or pixels than the limits allow."""


def read_views(
    data: bytes, view: Any, height: int, width: int, limits: Limits = Limits(), name: str = ""
) -> np.ndarray:
    """What a `view` (contract.views.ViewPolicy) shows of a file of encoded bytes, uint8
    [n, height, width, 3]: one view but for tiles. Where it lies goes by the file's own size,
    however much smaller a JPEG was decoded.

    Raises UnreadableImage as `decode` does, and ValueError for a picture of too many tiles.
    """
    picture, own = decode_with_size(data, limits, view.reads(height, width), name)
    return view.every(picture, height, width, own)


def decode(
    source: bytes | Path,
    limits: Limits = Limits(),
    size: tuple[int, int] | None = None,
    name: str = "",
) -> Image.Image:
    """Decode a file, or its bytes, to an RGB picture as `to_rgb` makes it.

    With the `size` (height, width) at which its pixels are needed, for whatever view is made of it
    afterwards, a JPEG may come out at a half, a quarter or an eighth of its own, upright and never
    smaller than `size` (see `reduction`). Raises UnreadableImage, with the picture's `name`, for
    anything empty, truncated, corrupt, of another format or beyond the limits; and MemoryError,
    which is the machine's trouble and says nothing about the picture.
    """
    return decode_with_size(source, limits, size, name)[0]


def decode_with_size(
    source: bytes | Path,
    limits: Limits = Limits(),
    size: tuple[int, int] | None = None,
    name: str = "",
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, and the picture's own (height, width), upright, whatever it was reduced to."""
    data = source if isinstance(source, bytes) else read_file(source, limits, name)
    with opened(data, limits, name) as (picture, pure):
        if isinstance(picture, PngImageFile):
            _check_sums(pure)
        if isinstance(picture, JpegImageFile):
            tag = orientation(picture)
            own = picture.size if tag >= 5 else picture.size[::-1]
            needed = size if size is None or tag < 5 else size[::-1]
            factor = reduction(picture.size, needed) if needed else 1
            pixels = jpeg_pixels(pure, picture.size, factor)
            if pixels is not None:
                return upright(Image.fromarray(pixels), tag), own
            if factor > 1:
                picture.draft(None, (picture.width // factor, picture.height // factor))
            return to_rgb(picture, name), own
        rgb = to_rgb(picture, name)
        return rgb, (rgb.height, rgb.width)


def reduction(stored: tuple[int, int], size: tuple[int, int]) -> int:
    """By how much (1, 2, 4 or 8) a JPEG of `stored` = (width, height) pixels is reduced where
    `size` = (height, width) is needed: most of decoding is the inverse DCT, done for the pixels of
    the reduced picture only.

    A half is never smaller than `size`, a quarter and an eighth never smaller than twice that: the
    nearer they come, the more they differ from the whole picture resized (for photographs at 224
    pixels, 1.4 of 255 on average for an exact half, at most 0.7 from twice the size on). Sides that
    cannot be divided, whose last pixel is partly filling, need twice the size too.
    """
    (width, height), (rows, columns) = stored, size
    room = min(height / rows, width / columns)
    for factor in (8, 4, 2):
        if room >= 2 * factor:
            return factor
    return 2 if room >= 2 and not (width % 2 or height % 2) else 1


def jpeg_pixels(data: bytes, stored: tuple[int, int], factor: int = 1) -> np.ndarray | None:
    """A JPEG of `stored` = (width, height) pixels at 1 / `factor` (1, 2, 4 or 8) of its sides,
    rounded up, not turned: uint8 [H, W, 3], those that Pillow makes, in a third less time.

    None where simplejpeg is missing, does not have the colours, or finds the least fault with the
    file: Pillow then decides whether it can be read. Raises MemoryError.
    """
    if simplejpeg is None:
        return None
    width, height = (-(-side // factor) for side in stored)
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(data)
        # the limits were applied to `stored`: the two parsers must have seen the same header
        if colours not in ("YCbCr", "Gray") or size != [stored[1], stored[0]]:
            return None
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=factor
        )
    except (ValueError, RuntimeError) as error:
        raise_memory(error)
        return None
    return pixels if pixels.shape == (height, width, 3) else None


class _Unwarned:
    """While any thread is in it, Pillow's warnings are ignored.

    `warnings.catch_warnings` puts back what one thread found, which may be what another has set.
    """

    def __init__(self) -> None:
        self.inside, self.entry, self.lock = 0, None, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                warnings.filterwarnings("ignore", module=rf"PIL\.|{re.escape(__name__)}$")
                self.entry = warnings.filters[0]

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                with contextlib.suppress(ValueError):  # somebody else has put others there
                    warnings.filters.remove(self.entry)


_unwarned = _Unwarned()
# in a forked child: the threads that were inside are not there
os.register_at_fork(after_in_child=_unwarned.__init__)


@contextlib.contextmanager
def opened(data: bytes, limits: Limits, name: str) -> Iterator[tuple[Image.Image, bytes]]:
    """A picture within the limits, not decoded yet, and its file without what is not pixels; what
    goes wrong in the body becomes UnreadableImage too.
    """
    _check_length(len(data), limits, name)
    kinds = " or ".join((", ".join(FORMATS[:-1]), FORMATS[-1]))
    if not data and limits.formats:
        raise UnreadableImage(
            name, "the picture is empty (0 bytes): send the bytes of a JPEG, PNG or WebP file"
        )
    if data.startswith(_PNG):
        data = _without_text(data)
    try:
        # what Pillow only warns of is decided here
        with _unwarned, Image.open(io.BytesIO(data), formats=limits.formats) as picture:
            _check_limits(picture, data, limits, name)
            yield picture, data
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_PNG):  # a damaged header
            raise UnreadableImage(name, _damaged("broken PNG file")) from error
        if limits.formats is None:
            raise UnreadableImage(name, "empty or not an image") from error
        raise UnreadableImage(
            name, f"the bytes are not a {kinds} picture: convert it to one of these"
        ) from error
    # Pillow's own limit comes first where the header is far beyond ours
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"[0-9]+", str(error))[0])
        raise ImageTooLarge(name, _too_large(f"{pixels:,}", limits)) from error
    # decoders fail in many ways on damaged files: struct, zlib, index and value errors among them
    except Exception as error:
        raise_memory(error)
        raise UnreadableImage(name, _damaged(error)) from error


def read_file(path: Path | str, limits: Limits = Limits(), name: str = "") -> bytes:
    """The bytes of a picture's file; raises UnreadableImage for one that cannot be read, has more
    than may be taken, or is no ordinary file.
    """
    try:
        # Of a FIFO, opening would wait for a writer, and a device has no end.
        with open(path, "rb", opener=_open_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UnreadableImage(name, "it is not a regular file: give a picture's file")
            _check_length(about.st_size, limits, name)
            # it may grow, and those of /proc have no size
            return file.read(-1 if limits.max_bytes is None else limits.max_bytes + 1)
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except ValueError as error:  # a path with a zero byte
        raise UnreadableImage(name, f"it is not a path: {error}") from error


def to_rgb(picture: Image.Image, name: str = "") -> Image.Image:
    """Any Pillow picture as RGB, upright as its EXIF tag says.

    16 bits and floats are scaled and not clipped, transparency is laid on white. Raises
    UnreadableImage for a picture without pixels, or one whose file is damaged (Pillow reads it at
    the first use), and MemoryError.
    """
    if 0 in picture.size:
        size = f"{picture.width}x{picture.height}"
        raise UnreadableImage(name, f"the picture is {size} pixels: give one that is not empty")
    try:
        hidden = _hidden(picture)
        picture.load()
        rgb = _flattened(picture, hidden)
    except MemoryError:
        raise
    except Exception as error:  # as many kinds as there are decoders
        raise_memory(error)
        raise UnreadableImage(name, _damaged(error)) from error
    # After loading: Pillow turns TIFFs itself and takes their tag away.
    return upright(rgb, orientation(picture))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_length(length: int, limits: Limits, name: str) -> None:
    if limits.max_bytes is not None and length > limits.max_bytes:
        raise ImageTooLarge(
            name,
            f"the picture has {length:,} bytes, more than the {limits.max_bytes:,} that are "
            "taken: make it smaller",
        )


def _check_limits(picture: Image.Image, data: bytes, limits: Limits, name: str) -> None:
    """Raise for a picture, opened but not decoded, that would cost too much to decode."""
    if picture.width * picture.height > limits.max_pixels:
        raise ImageTooLarge(name, _too_large(f"{picture.width}x{picture.height}", limits))
    # A start-of-scan marker cannot occur in the compressed data itself. Decided by the decoder:
    # Pillow has another name for the format of a JPEG that names further pictures.
    scans = data.count(b"\xff\xda") if isinstance(picture, JpegImageFile) else 1
    if scans > MAX_SCANS:
        raise ImageTooLarge(
            name,
            f"the picture has {scans:,} scans, more than the {MAX_SCANS} that are taken: save it "
            "again",
        )


def _check_sums(data: bytes) -> None:
    """Raise for a PNG whose checksums do not hold: Pillow decodes one that is damaged in its middle
    without a word.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
        picture.verify()


def _without_text(data: bytes) -> bytes:
    """A PNG without its texts, which are not pixels: they may be damaged or expand to gigabytes.

    The one that holds XMP stays, because that may say how the picture was held.
    """
    kept, start = [data[: len(_PNG)]], len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            break
        kind, xmp = data[start + 4 : start + 8], data.startswith(b"XML:com.adobe.xmp", start + 8)
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or xmp:
            kept.append(data[start:end])
        start = end
    return b"".join((*kept, data[start:]))


def upright(stored: Image.Image, tag: int) -> Image.Image:
    """Turn the pixels of a file upright, as its EXIF tag says."""
    return stored.transpose(_UPRIGHT[tag]) if tag in _UPRIGHT else stored


def as_stored(turned: Image.Image, tag: int) -> Image.Image:
    """Inverse of `upright`."""
    return upright(turned, {6: 8, 8: 6}.get(tag, tag))  # the others turn back by themselves


def orientation(picture: Image.Image) -> int:
    """The EXIF tag that says how a picture was held, 1 (upright) where there is none, it cannot
    be read, or is not one of the eight.
    """
    try:
        tag = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
        return tag if 1 <= tag <= 8 else 1
    except MemoryError:
        raise
    # as many kinds as there are ways to damage it; the picture itself may be whole
    except Exception:
        return 1


def _hidden(picture: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The colour that a picture declares transparent, in the values that its pixels will have.

    Before loading: Pillow scales the pixels of a PNG to eight bits, but not that colour.
    """
    hidden = picture.info.get("transparency")
    # a named tuple, which older versions of Pillow do not have
    stored = picture.tile[0][3] if getattr(picture, "tile", None) else ""
    if isinstance(hidden, int) and stored in ("L;2", "L;4"):
        return hidden * (85 if stored == "L;2" else 17)
    if isinstance(hidden, tuple) and stored == "RGB;16B":
        return tuple(value >> 8 for value in hidden)
    return hidden


def _flattened(picture: Image.Image, hidden: int | tuple | bytes | None) -> Image.Image:
    """A loaded picture as RGB, its transparency laid on white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture)
        grey = _eight_bits(values)
        if isinstance(hidden, int):  # the one transparent grey of a PNG
            grey[values == hidden] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.mode == "La":  # Pillow converts it to nothing else
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or hidden is not None:
        if picture.info.get("transparency") != hidden:
            picture = picture.copy()
            picture.info["transparency"] = hidden
        layer = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        paper = Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer)
        return paper
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values [H, W] as uint8: integers of up to 16 bits, floats in [0, 1] or [0, 255].

    A few rows at a time, for they may be many.
    """
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values)
        scale, divisor = (255 if values.max(initial=0) <= 1 else 1), 1
    else:
        wide = values.dtype.itemsize == 2 or values.max(initial=0) > 255
        scale, divisor = 1, (257 if wide else 1)
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):
        rows = values[start : start + 64].astype(np.float64) * scale / divisor
        result[start : start + 64] = np.clip(rows, 0, 255).round()
    return result


def raise_memory(error: Exception) -> None:
    """Raise MemoryError where Pillow's or libjpeg's own says that it got none."""
    text = str(error).lower()
    if text.startswith("out of memory") or "insufficient memory" in text:
        raise MemoryError(str(error)) from error


def _too_large(pixels: str, limits: Limits) -> str:
    """The sentence about a picture of so many pixels."""
    most = min(limits.max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or limits.max_pixels))
    return (
        f"the picture has {pixels} pixels, more than the {most:,} that are taken: make it smaller"
    )


def _damaged(reason: Exception | str) -> str:
    """The sentence about a picture that a decoder fails on."""
    # contract.errors has the same, but this file stands alone
    lines = str(reason).splitlines()
    line = lines[0] if lines and lines[0] else type(reason).__name__
    return f"the picture cannot be decoded, it is damaged: {line}"

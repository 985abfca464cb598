"""Picture files become what the graphs read: RGB bytes of the model's size. Used by clients and, copied, by the server.

Needs numpy and Pillow only: `serve.repository` copies this file beside the model that decodes on the server.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that are decoded. Others have had more of Pillow's vulnerabilities than of our users' pictures."""


class Limits(NamedTuple):
    """What an encoded picture may be at most; the pixels are read from its header, before anything is decoded."""

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000


class BadImage(ValueError):
    """A picture that cannot be decoded, or must not be; the message is a sentence for whoever sent it."""


def decode(data: bytes, limits: Limits = Limits()) -> Image.Image:  # noqa: B008 - a tuple, immutable
    """Decode JPEG, PNG or WebP bytes to an RGB picture, upright as its EXIF tag says, transparency laid on white.

    Raises BadImage for anything empty, truncated, corrupt, of another format or beyond the limits.
    """
    if not data:
        raise BadImage("the picture is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise BadImage(f"the picture has {len(data):,} bytes, more than the {limits.max_bytes:,} that are taken")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow only warns of is decided here
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > limits.max_pixels:
                    raise BadImage(
                        f"the picture has {picture.width}x{picture.height} pixels, more than the {limits.max_pixels:,} "
                        "that are taken: make it smaller"
                    )
                picture.load()
                return to_rgb(ImageOps.exif_transpose(picture))
    except BadImage:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadImage(f"the bytes are no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture") from error
    # decoders fail in many ways on damaged files: struct, zlib, index and value errors among them
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage(f"the picture cannot be decoded: {reason}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without clipping 16 bits or losing transparency."""
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        if values.max(initial=0) > 255:
            values = values / 257
        return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def fit(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The whole picture at the model's size, uint8 [height, width, 3]: bicubic, the aspect ratio is not kept."""
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))

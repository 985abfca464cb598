"""Decoding: whatever a file holds becomes 8-bit RGB, upright, or an `UnreadableImage` with the
reason.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""A picture above this many pixels is taken for a decompression bomb (Pillow's own limit)."""


class UnreadableImage(Exception):
    """A picture that cannot be decoded; training replaces it, counts it and names it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple:
        """Let the exception cross process borders with both arguments."""
        return type(self), (self.name, self.reason)


def decode_rgb(data: bytes | Path, name: str) -> Image.Image:
    """Decode a file or its bytes to an RGB image, turned upright as its EXIF tag says.

    Grey, palette and CMYK pictures are converted; 16-bit ones keep their range; transparency is
    laid on white. Raises UnreadableImage (naming `name`) for anything truncated, corrupt, too large
    or no image.
    """
    try:
        with warnings.catch_warnings():
            # what Pillow only warns of (odd EXIF blocks, sizes near its limit) is decided below
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(
                        name, f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}"
                    )
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "empty or not an image") from error
    # Decoders fail in many ways on damaged files: struct, zlib, index and value errors among them
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(name, reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without clipping or losing transparency."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale integers of up to 16 bits, or floats in [0, 1] or [0, 255], to uint8."""
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values.astype(np.float64))
        return (
            np.clip(values * (255 if values.max(initial=0) <= 1 else 1), 0, 255)
            .round()
            .astype(np.uint8)
        )
    wide = values.dtype.itemsize == 2 or values.max(initial=0) > 255
    return np.clip(values / (257 if wide else 1), 0, 255).round().astype(np.uint8)

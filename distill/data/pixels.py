"""From an encoded picture to the pixels of its crops, decoding no more of it than they need.

A plain JPEG (8 bits, YCbCr or grey) is decoded at a half, a quarter or an eighth of its size where
every crop stays larger than what is made of it: the inverse DCT, most of the work, is then done for
that many pixels only. Anything else, and a JPEG that is not quite in order, is decoded whole, as in
evaluation and on the server. At full size both decoders give the same pixels.
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from contract.images import (
    MAX_SCANS,
    TRUSTED,
    decode,
    jpeg_pixels,
    orientation,
    raise_memory,
    upright,
)

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


class Crop(NamedTuple):
    """A box of a picture that becomes `side` x `side` pixels, mirrored if `flip`."""

    box: Box
    side: int
    flip: bool


def resize_crop(image: Image.Image, box: Box, side: int, flip: bool) -> Image.Image:
    """Resize a box of an RGB image to `side` x `side` pixels, mirrored if `flip`."""
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def to_image(pixels: Tensor) -> Image.Image:
    """Inverse of `to_tensor`."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Opened(Protocol):
    """A picture whose size is known, and whose pixels are made once it is known what for."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        ...

    def crops(self, crops: Sequence[Crop]) -> list[Tensor]:
        """uint8 [3, side, side] of every crop, all of one view: the picture is decoded as large as
        the most demanding of them needs it. Raises UnreadableImage.
        """
        ...


def open_picture(data: bytes, name: str) -> Opened:
    """A picture from its encoded bytes; raises UnreadableImage with its `name`."""
    return _plain_jpeg(data, name) or Decoded(decode(data, TRUSTED, name=name))


class Decoded:
    """An RGB image in memory."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image

    @property
    def size(self) -> tuple[int, int]:
        return self._image.size

    def crops(self, crops: Sequence[Crop]) -> list[Tensor]:
        return [to_tensor(resize_crop(self._image, *crop)) for crop in crops]


class _PlainJpeg:
    """A JPEG of `stored` = (width, height), which EXIF tag `tag` turns upright."""

    def __init__(self, data: bytes, name: str, stored: tuple[int, int], tag: int) -> None:
        self._data, self._name, self._stored, self._tag = data, name, stored, tag
        self._decoded: dict[int, np.ndarray] = {}
        self._otherwise: Decoded | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self._stored if self._tag < 5 else self._stored[::-1]

    def crops(self, crops: Sequence[Crop]) -> list[Tensor]:
        factor = self._factor(crops)
        pixels = self._pixels(factor)
        if pixels is None:
            return self._otherwise.crops(crops)
        return [_cut(pixels, crop, factor) for crop in crops]

    def _pixels(self, factor: int) -> np.ndarray | None:
        """uint8 [H, W, 3] at 1 / `factor` of the size, upright; None where the decoder finds fault
        with the file, which the one of all others may forgive.
        """
        if self._otherwise is None and factor not in self._decoded:
            pixels = jpeg_pixels(self._data, self._stored, factor)
            if pixels is None:
                self._otherwise = Decoded(decode(self._data, TRUSTED, name=self._name))
            elif self._tag != 1:
                pixels = np.array(upright(Image.fromarray(pixels), self._tag))
            self._decoded[factor] = pixels
        return None if self._otherwise else self._decoded[factor]

    def _factor(self, crops: Sequence[Crop]) -> int:
        """The largest of 1, 2, 4 and 8 by which every crop can be reduced and is not smaller than
        its side afterwards.
        """
        room = min(
            min(right - left, bottom - top) / side for (left, top, right, bottom), side, _ in crops
        )
        factor = max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= room)
        # the last block of a picture may be filled up, and a turn would bring it to the front
        while self._tag != 1 and any(side % factor for side in self._stored):
            factor //= 2
        return factor


def _plain_jpeg(data: bytes, name: str) -> _PlainJpeg | None:
    """A JPEG that `simplejpeg` decodes to the pixels of Pillow; None for anything else."""
    try:
        kinds = _segments(data)
        # baseline files have a scan or three
        if not kinds or (0xC2 in kinds and data.count(b"\xff\xda") > MAX_SCANS):
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        tag = 1
        if 0xE1 in kinds:  # EXIF or XMP
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
                tag = orientation(picture)
    except MemoryError:
        raise
    except Exception as error:  # whatever else is wrong, the decoder of all others says it
        raise_memory(error)
        return None
    if colours not in ("YCbCr", "Gray") or not 0 < width * height <= TRUSTED.max_pixels:
        return None
    return _PlainJpeg(data, name, (width, height), tag)


def _segments(data: bytes) -> set[int]:
    """Markers of the segments before a JPEG's pixels; none where it is out of order."""
    kinds: set[int] = set()
    place = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == 0xDA:  # the pixels begin
            return kinds
        kinds.add(kind)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return set()


_MARGIN = 16
"""Pixels of the result that may be made beside a crop, so that it starts on a whole pixel of the
picture."""

_NEAR = 0.08
"""How far from a whole pixel a crop may start, in pixels of the decoded picture."""


def _cut(pixels: np.ndarray, crop: Crop, factor: int) -> Tensor:
    """A crop, whose box is in pixels of `factor` times the size, of a picture [H, W, 3].

    Interpolating tensors of bytes takes a third of the time that Pillow takes, but starts at whole
    pixels. Of the crops that begin 0 to `_MARGIN` pixels of the result earlier, the one is taken
    that starts nearest to a whole pixel; where none is near, Pillow does it.
    """
    left, top, right, bottom = (side / factor for side in crop.box)
    across, down = (right - left) / crop.side, (bottom - top) / crop.side
    (x, column), (y, row) = _start(left, across), _start(top, down)
    if None in (x, y):
        image = Image.fromarray(pixels)
        box = left, top, min(right, image.width), min(bottom, image.height)
        return to_tensor(resize_crop(image, box, crop.side, crop.flip))
    part = pixels[y : math.ceil(bottom), x : math.ceil(right)]
    # not less than makes all pixels of the crop, after torch has rounded down
    factors = [
        max(1 / scale, (before + crop.side) / length) * (1 + 1e-9)
        for scale, before, length in zip((down, across), (row, column), part.shape, strict=False)
    ]
    result = F.interpolate(
        torch.from_numpy(part).permute(2, 0, 1)[None],
        scale_factor=factors,
        mode="bicubic",
        antialias=True,
    )
    result = result[0, :, row : row + crop.side, column : column + crop.side]
    return (result.flip(-1) if crop.flip else result).contiguous()


def _start(begin: float, scale: float) -> tuple[int | None, int]:
    """A whole pixel of the picture, and how many pixels of the result, each `scale` wide, lie
    between it and `begin`; None where there is none.
    """
    for count in range(min(_MARGIN, int(begin / scale)) + 1):
        start = begin - count * scale
        if abs(start - round(start)) <= _NEAR:
            return round(start), count
    return None, 0

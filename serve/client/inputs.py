"""Pictures in whatever form a caller has them become what the server takes: pixels of its size, or
a file's bytes.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contract.images import Limits, UnreadableImage, decode, fit, to_rgb
from serve.errors import BadRequest

Images = Any
"""A path, an encoded file's bytes, a PIL picture, uint8 [H, W, 3] or [B, H, W, 3], or any iterable
of those.
"""


@dataclass(frozen=True)
class Picture:
    """One picture, not decoded yet, and what messages call it."""

    source: Path | bytes | Image.Image | np.ndarray
    name: str

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of an array; None for what is decoded first."""
        return self.source.shape[:2] if isinstance(self.source, np.ndarray) else None

    def open(self, limits: Limits, size: tuple[int, int] | None = None) -> Image.Image:
        """As an RGB picture, which may be a smaller one if it will be fitted to a `size`; raises
        BadRequest.
        """
        try:
            if isinstance(self.source, np.ndarray):
                return Image.fromarray(self.source)
            if isinstance(self.source, Image.Image):
                return to_rgb(self.source, self.name)
            return decode(self.read(limits), limits, size, self.name)
        except UnreadableImage as error:
            raise BadRequest(str(error)) from error

    def read(self, limits: Limits) -> bytes:
        """As a file's bytes, untouched if it is one (PNG otherwise: nothing is lost); raises
        BadRequest.
        """
        if isinstance(self.source, bytes):
            return self.source
        if isinstance(self.source, Path):
            try:
                size = self.source.stat().st_size
                if limits.max_bytes is not None and size > limits.max_bytes:  # do not even read it
                    raise BadRequest(
                        f"{self.name}: more than the {limits.max_bytes:,} bytes that are taken"
                    )
                return self.source.read_bytes()
            except OSError as error:
                raise BadRequest(f"{self.name}: {error.strerror or error}") from error
        buffer = io.BytesIO()
        self.open(limits).save(buffer, "PNG")
        return buffer.getvalue()

    def pixels(self, height: int, width: int, limits: Limits) -> np.ndarray:
        """uint8 [height, width, 3]; an array of that size stays as it is."""
        if self.size == (height, width):
            return self.source
        return fit(self.open(limits, (height, width)), height, width)


def list_pictures(images: Images) -> list[Picture]:
    """Every picture, in order; raises BadRequest for none, or for what is not a
    picture.
    """
    result = list(each(images, ""))
    if not result:
        raise BadRequest("no pictures were given")
    return result


def each(images: Images, place: str) -> Iterable[Picture]:
    """Pictures of one value or of an iterable; `place` is its number in the list it came in."""
    name = f"picture {place}" if place else "the picture"
    if isinstance(images, (bytes, bytearray, memoryview)):
        yield Picture(bytes(images), name)
    elif isinstance(images, Image.Image):
        yield Picture(images, name)
    elif isinstance(images, (str, PathLike)):
        yield Picture(Path(images), str(images))
    elif isinstance(images, np.ndarray) and images.dtype != np.object_:
        yield from _rows_of(images, name)
    elif isinstance(images, Iterable) and not isinstance(images, dict):
        for number, image in enumerate(images):
            yield from each(image, f"{place}.{number}" if place else str(number))
    else:
        raise BadRequest(
            f"{name} is of type {type(images).__name__}: give a path, a file's bytes, a PIL "
            "picture, or a uint8 array"
        )


def _rows_of(array: np.ndarray, name: str) -> Iterable[Picture]:
    """Pictures of an array [H, W, 3] or [B, H, W, 3] of uint8."""
    if array.dtype != np.uint8:
        raise BadRequest(
            f"{name} is an array of {array.dtype}: give uint8, 0 to 255 (normalisation happens "
            "inside the model)"
        )
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        raise BadRequest(
            f"{name} is an array {list(array.shape)}: give [H, W, 3] or [B, H, W, 3], RGB, not "
            "empty"
        )
    if array.ndim == 3:
        yield Picture(array, name)
    else:
        for number, row in enumerate(array):
            yield Picture(row, f"{name}, row {number}")


def common_size(pictures: Sequence[Picture]) -> tuple[int, int] | None:
    """The size of all pictures if all are arrays of one size, else None."""
    sizes = {picture.size for picture in pictures}
    return sizes.pop() if len(sizes) == 1 else None


def to_tensor(
    pictures: Sequence[Picture], size: tuple[int, int], encoded: bool, limits: Limits
) -> dict[str, np.ndarray]:
    """The input by its name: `image` uint8 [B, H, W, 3], or `encoded`, files as an object array
    [B, 1] of bytes. Raises BadRequest for what cannot be decoded or read.
    """
    if not encoded:
        return {"image": np.stack([picture.pixels(*size, limits) for picture in pictures])}
    files = np.empty((len(pictures), 1), np.object_)
    files[:, 0] = [picture.read(limits) for picture in pictures]
    return {"encoded": files}


def rename_picture(message: str, pictures: Sequence[Picture]) -> str:
    """The server's message about `picture 2` of a request, with the caller's name for it."""
    match = re.search(r"picture (\d+): ", message)
    if match is None:
        return f"{pictures[0].name}: {message}" if len(pictures) == 1 else message
    number = int(match[1])
    return (
        message.replace(match[0], f"{pictures[number].name}: ")
        if number < len(pictures)
        else message
    )

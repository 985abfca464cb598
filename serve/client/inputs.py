"""Pictures in whatever form a caller has them become what the server takes: pixels of its size, or
a file's bytes.
"""

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from contract.errors import first_line
from contract.images import Limits, UnreadableImage, decode, read_file, read_views, to_rgb
from contract.picture_headers import own_size
from contract.views import SQUASH, ViewPolicy
from serve.errors import BadRequest, ClientError, bad_picture

Images = Any
"""A path, an encoded file's bytes, the file opened in binary mode, a PIL picture, uint8 [H, W, 3]
or [B, H, W, 3], or any iterable of those.
"""

_LONGEST_PATH = 4096
_PART = 1 << 20
"""Bytes of an open file that are read at a time."""


_reading = threading.Lock()
"""Held while a PIL picture is read, whose file may not be decoded yet: a picture may be in two
parts of a list, and then belongs to two threads.
"""


def _renew() -> None:
    """In a forked child: the thread that held the lock is not there."""
    global _reading
    _reading = threading.Lock()


os.register_at_fork(after_in_child=_renew)


@dataclass(frozen=True)
class Picture:
    """One picture, not decoded yet, and what messages call it."""

    source: Path | bytes | Image.Image | np.ndarray
    name: str

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of an array; None for what is decoded first."""
        return self.source.shape[:2] if isinstance(self.source, np.ndarray) else None

    def open(self, limits: Limits) -> Image.Image:
        """As an RGB picture; raises BadRequest."""
        with _refusing(self.name):
            if isinstance(self.source, np.ndarray):
                return Image.fromarray(self.source)
            if isinstance(self.source, Image.Image):
                with _reading:
                    return to_rgb(self.source, self.name)
            return decode(self.source, limits, name=self.name)

    def read(self, limits: Limits) -> bytes:
        """As a file's bytes, untouched if it is one (PNG otherwise: nothing is lost); raises
        BadRequest.
        """
        with _refusing(self.name):
            if isinstance(self.source, bytes):
                return self.source
            if isinstance(self.source, Path):
                return read_file(self.source, limits, self.name)
            buffer = io.BytesIO()
            self.open(limits).save(buffer, "PNG")
            return buffer.getvalue()

    def pixels(self, size: tuple[int, int], view: ViewPolicy, limits: Limits) -> np.ndarray:
        """What `view` shows of it, uint8 [*size, 3]; an array of that size stays as it is. Raises
        BadRequest.
        """
        return self.views(size, view, limits)[0]

    def views(self, size: tuple[int, int], view: ViewPolicy, limits: Limits) -> np.ndarray:
        """All views of it, tiles among them, uint8 [n, *size, 3]; raises BadRequest."""
        if self.size == size:
            return self.source[None]
        if isinstance(self.source, (np.ndarray, Image.Image)):
            picture, read = self.open(limits), None
        else:
            picture, read = None, self.read(limits)
        with _refusing(self.name):
            try:
                if picture:
                    return view.every(picture, *size)
                return read_views(read, view, *size, limits, self.name)
            except ValueError as error:  # too many tiles
                raise BadRequest(f"{self.name}: {error}") from error

    def view(self, size: tuple[int, int], view: ViewPolicy, encoded: bool = False) -> ViewPolicy:
        """`view`, or none for an array of the model's `size`, which is sent as it is; `encoded`, it
        was sent as a file like any other.
        """
        return SQUASH if self.size == size and not encoded else view

    def own_size(self, limits: Limits) -> tuple[int, int]:
        """Height and width as it is held; raises BadRequest."""
        with _refusing(self.name):
            if self.size:
                return self.size
            if isinstance(self.source, Image.Image):
                width, height = self.open(limits).size
                return height, width
            return own_size(self.read(limits), limits, self.name)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever is wrong with a picture, as a BadRequest that names it."""
    try:
        yield
    except ClientError:
        raise
    except UnreadableImage as error:
        raise bad_picture(str(error), name) from error
    # pictures and iterables of others' making raise what they like
    except Exception as error:
        raise bad_picture(
            f"{name} cannot be read: {type(error).__name__}: {first_line(error)}", name
        ) from error


def list_pictures(images: Images, limits: Limits = Limits()) -> list[Picture]:
    """Every picture, in order; raises BadRequest for none, or for what is not a picture. Open files
    are read here, up to the limits.
    """
    with _refusing("a picture"):
        result = list(_each(images, "", limits))
    if not result:
        raise BadRequest("no pictures were given")
    return result


def _each(images: Images, place: str, limits: Limits) -> Iterator[Picture]:
    """Pictures of one value or of an iterable; `place` is its number in the list it came in."""
    name = f"picture {place}" if place else "the picture"
    if isinstance(images, Picture):
        yield images
    elif isinstance(images, (bytes, bytearray, memoryview)):
        yield Picture(bytes(images), name)
    elif isinstance(images, Image.Image):
        yield Picture(images, name)
    elif isinstance(images, (str, PathLike)):
        path = os.fsdecode(images)
        _check_path(path, name)
        yield Picture(Path(path), path)
    elif isinstance(images, np.ndarray) and images.dtype != np.object_:
        yield from _rows_of(images, name)
    elif callable(getattr(images, "read", None)):
        yield Picture(_read_open(images, name, limits), name)
    elif _is_tensor(images):
        raise BadRequest(
            f"{name} is a {type(images).__name__} and not a numpy array: give numpy.asarray of "
            "it, on the CPU, uint8 [H, W, 3]"
        )
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        for number, image in enumerate(images):
            yield from _each(image, f"{place}.{number}" if place else str(number), limits)
    else:
        raise BadRequest(
            f"{name} is of type {type(images).__name__}: give a path, a file's bytes, a PIL "
            "picture, or a uint8 array"
        )


def _check_path(path: str, name: str) -> None:
    """Raise BadRequest for a text that is a picture or says where one is, but no path."""
    if path.startswith(("http://", "https://", "data:")):
        what = f"a URL ({path.partition(':')[0]}:)"
    elif len(path) > _LONGEST_PATH:
        what = f"a text of {len(path):,} characters"
    elif not path:
        what = "an empty text"
    else:
        return
    raise BadRequest(f"{name} is {what} and not a path: give a path, or the file's bytes")


def _read_open(file: Any, name: str, limits: Limits) -> bytes:
    """What is left of an open file, which stays open and, where it can seek, as it stood."""
    seeks = callable(getattr(file, "seekable", None)) and file.seekable()
    start = file.tell() if seeks else 0
    data = bytearray()
    try:
        while True:
            part = file.read(_PART)
            if not isinstance(part, bytes):
                if hasattr(part, "close"):
                    part.close()  # a coroutine that nobody will await
                raise BadRequest(
                    f"{name} is a file whose .read() gives {type(part).__name__}: open it in "
                    "binary mode, or give the bytes of its .read()"
                )
            if not part:
                break
            data += part
            if limits.max_bytes is not None and len(data) > limits.max_bytes:
                raise BadRequest(
                    f"{name}: more than the {limits.max_bytes:,} bytes that are taken: make it "
                    "smaller"
                )
    finally:
        if seeks:
            file.seek(start)
    if not data and start:
        raise BadRequest(f"{name} is a file that stands at its end: call .seek(0) first")
    return bytes(data)


def _is_tensor(value: Any) -> bool:
    """Whether a value is an array of another library; a column of a table is a list."""
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return False
    return hasattr(value, "__dlpack__") or (
        hasattr(value, "__array__") and str(value.dtype) not in ("object", "str", "string")
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
    pictures: Sequence[Picture],
    size: tuple[int, int],
    view: ViewPolicy,
    encoded: bool,
    limits: Limits,
) -> dict[str, np.ndarray]:
    """The input by its name: `image` uint8 [B, H, W, 3], or `encoded`, files as an object array
    [B, 1] of bytes. Raises BadRequest for what cannot be decoded or read.
    """
    if not encoded:
        return {"image": np.stack([picture.pixels(size, view, limits) for picture in pictures])}
    files = np.empty((len(pictures), 1), np.object_)
    files[:, 0] = [picture.read(limits) for picture in pictures]
    return {"encoded": files}


def blame_picture(error: BadRequest, pictures: Sequence[Picture]) -> BadRequest:
    """The server's error about `picture 2` of a request, with the caller's name for it; of others
    the error itself.
    """
    match = re.search(r"picture (\d+): ", error.message)
    number = int(match[1]) if match else 0
    if number >= len(pictures) or (match is None and len(pictures) > 1):
        return error
    name = pictures[number].name
    message = error.message.replace(match[0], f"{name}: ") if match else f"{name}: {error.message}"
    return bad_picture(message, name, error.request_id)

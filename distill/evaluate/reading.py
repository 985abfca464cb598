"""Pictures that are scored: each must be readable, as a score over part of a data set is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from contract.errors import UserError, raise_trouble
from contract.images import TRUSTED, UnreadableImage, decode, read_file, read_views
from contract.picture_headers import own_size
from contract.views import ViewPolicy


def read_picture(path: Path | str) -> Image.Image:
    """Decode a picture; raises UserError if it fails."""
    with _refusing(path):
        return decode(Path(path), TRUSTED, name=str(path))


def read_view(path: Path | str, view: ViewPolicy, size: int) -> np.ndarray:
    """What a view policy shows of a picture's file, uint8 [size, size, 3], as clients and servers
    read it; raises UserError as `read_picture` does.
    """
    return read_every_view(path, view, size)[0]


def read_every_view(path: Path | str, view: ViewPolicy, size: int) -> np.ndarray:
    """All that `read_view` may show, uint8 [n, size, size, 3]; raises ValueError besides for a
    picture of too many tiles.
    """
    with _refusing(path):
        data = read_file(Path(path), TRUSTED, str(path))
        return read_views(data, view, size, size, TRUSTED, str(path))


def upright_size(path: Path | str) -> tuple[int, int]:
    """Width and height of a picture as it is held, by its header; raises UserError as
    `read_picture` does.
    """
    with _refusing(path):
        height, width = own_size(read_file(Path(path), TRUSTED, str(path)), TRUSTED, str(path))
        return width, height


@contextmanager
def _refusing(path: Path | str) -> Iterator[None]:
    try:
        yield
    except (UnreadableImage, MemoryError) as error:
        raise_trouble(path, error)
        raise UserError(
            f"{path} cannot be read ({error.reason}): repair or remove it, as scores need every "
            "picture"
        ) from error

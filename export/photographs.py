"""The photographs of an export: those its graphs are compared on and those int8 is calibrated
on.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from contract.errors import UserError
from contract.images import UnreadableImage
from contract.views import ViewPolicy
from distill.data.pictures import FolderPictures, PackagedPhotos, Pictures
from export.options import PACKAGED

Photos = list[tuple[str, Image.Image]]
"""Names and pictures."""

_WHOLE = 2**21
"""Pixels: larger photographs are reduced, though not below twice the size they are compared at; a
hundred of a phone are gigabytes.
"""

_MOST = 32
"""Pictures that are compared, at most."""


class Chosen(NamedTuple):
    """Pictures to compare on and, for int8, pictures to calibrate on and the name of their source.

    `held_out`: none of the calibration pictures is compared on.
    """

    compared: Photos
    calibration: Photos = []
    source: str = ""
    held_out: bool = True


def choose(images: Path | None, sizes: Sequence[tuple[int, int]]) -> Chosen:
    """Pictures of a folder (None: packaged ones) to compare graphs of these sizes (height, width)
    on; raises UserError for unreadable ones.
    """
    pictures = _open_photos("--images", images)
    return Chosen(_load(pictures, range(len(pictures)), _MOST, sizes))


def choose_for_int8(
    images: Path | None, calibration: Path | None, count: int, sizes: Sequence[tuple[int, int]]
) -> Chosen:
    """The same, with at most `count` pictures to calibrate on.

    One folder for both is divided: every other picture to each.
    """
    pictures = _open_photos("--images", images)
    others = _open_photos("--calibration", calibration)
    both = [path.resolve() for path in (images, calibration) if path]
    shared = len(pictures) > 1 and (not both or (len(both) == 2 and both[0] == both[1]))
    start, step = (1, 2) if shared else (0, 1)
    compared = _load(pictures, range(start, len(pictures), step), _MOST, sizes)
    taken = _load(others, range(0, len(others), step), count, sizes)
    seen = {digest([np.asarray(photo)]) for _, photo in compared}
    return Chosen(
        compared,
        taken,
        source=PACKAGED if calibration is None else calibration.resolve().name,
        held_out=seen.isdisjoint(digest([np.asarray(photo)]) for _, photo in taken),
    )


def _open_photos(option: str, folder: Path | None) -> Pictures:
    try:
        return FolderPictures(folder) if folder else PackagedPhotos()
    except UserError as error:
        # the message names training's key for the same folder
        raise UserError(str(error).replace("data.path =", option)) from error


def _load(
    pictures: Pictures, numbers: range, most: int, sizes: Sequence[tuple[int, int]]
) -> Photos:
    # spread evenly: folders are sorted by class
    count = min(most, len(numbers))
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    result = []
    for number in (numbers[place * len(numbers) // count] for place in range(count)):
        try:
            picture = pictures.load(number)
        except UnreadableImage as error:
            raise UserError(
                f"{error.name} cannot be read ({error.reason}): repair or remove it"
            ) from error
        factor = min(picture.width // (2 * width), picture.height // (2 * height))
        factor = max(1, min(factor, math.ceil((picture.width * picture.height / _WHOLE) ** 0.5)))
        result.append((_name_of(pictures, number), picture.reduce(factor)))
    return result


def shown(photo: Image.Image, size: tuple[int, int], view: ViewPolicy) -> np.ndarray:
    """What a model of `size` (height, width) is shown of a photograph, uint8 [height, width, 3]; of
    its tiles the middle one.

    Raises UserError for a photograph of too many tiles.
    """
    try:
        views = view.every(photo, *size)
    except ValueError as error:
        raise UserError(f"--images: {error}") from error
    return views[len(views) // 2]


def digest(images: Sequence[np.ndarray]) -> str:
    """Hex sha256 over pictures: shapes and pixels, in order."""
    result = hashlib.sha256()
    for image in images:
        result.update(str(image.shape).encode() + image.tobytes())
    return result.hexdigest()


def _name_of(pictures: Pictures, number: int) -> str:
    # relative to the folder: a bundle does not record paths of this machine
    name = pictures.name(number)
    return (
        str(Path(name).relative_to(pictures.folder))
        if isinstance(pictures, FolderPictures)
        else name
    )

"""The photographs of an export: those its graphs are compared on and those int8's ranges are taken
from.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from contract.errors import UserError
from contract.images import UnreadableImage
from distill.data.pictures import FolderPictures, PackagedPhotos, Pictures
from export.options import PACKAGED

Photos = list[tuple[str, Image.Image]]
"""Names and pictures."""

PHOTOS = 32
"""Pictures that are compared, at most."""


class Chosen(NamedTuple):
    """Pictures to compare on, pictures to calibrate on (int8) and where these are from.

    `held_out` says whether none of them is compared on.
    """

    compared: Photos
    calibration: Photos = []
    source: str = ""
    held_out: bool = True


def choose(args: argparse.Namespace, sizes: Sequence[tuple[int, int]]) -> Chosen:
    """The pictures of a command line, for graphs of these sizes (height, width); raises UserError
    for unreadable ones.

    One folder for both is shared out, every other picture to each.
    """
    images = open_photos("--images", args.images)
    if args.precision != "int8":
        return Chosen(load(images, range(len(images)), PHOTOS, sizes))
    folder = None if args.calibration == PACKAGED else Path(args.calibration)
    calibration = open_photos("--calibration", folder)
    both = [path.resolve() for path in (args.images, folder) if path]
    shared = len(images) > 1 and (not both or (len(both) == 2 and both[0] == both[1]))
    start, step = (1, 2) if shared else (0, 1)
    compared = load(images, range(start, len(images), step), PHOTOS, sizes)
    taken = load(calibration, range(0, len(calibration), step), args.calibration_images, sizes)
    seen = {digest([np.asarray(photo)]) for _, photo in compared}
    return Chosen(
        compared,
        taken,
        source=PACKAGED if folder is None else folder.resolve().name,
        held_out=seen.isdisjoint(digest([np.asarray(photo)]) for _, photo in taken),
    )


def open_photos(option: str, folder: Path | None) -> Pictures:
    """A folder of pictures (default: packaged ones); raises UserError for one without any."""
    try:
        return FolderPictures(folder) if folder else PackagedPhotos()
    except UserError as error:
        # training's key for the same thing
        raise UserError(str(error).replace("data.path =", option)) from error


def load(pictures: Pictures, numbers: range, most: int, sizes: Sequence[tuple[int, int]]) -> Photos:
    """At most so many of some pictures, spread evenly over them: folders are sorted by class."""
    count = min(most, len(numbers))
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    result = []
    for number in (numbers[place * len(numbers) // count] for place in range(count)):
        try:
            picture = pictures.load(number)
        except UnreadableImage as error:
            raise UserError(
                f"{error.name} cannot be read ({error.reason}): mend or remove it"
            ) from error
        # a hundred pictures of a telephone are gigabytes
        factor = max(1, min(picture.width // (2 * width), picture.height // (2 * height)))
        result.append((name_of(pictures, number), picture.reduce(factor)))
    return result


def digest(images: Sequence[np.ndarray]) -> str:
    """Hex sha256 over pictures: shapes and pixels, in order. (One picture may have two names.)"""
    result = hashlib.sha256()
    for image in images:
        result.update(str(image.shape).encode() + image.tobytes())
    return result.hexdigest()


def name_of(pictures: Pictures, number: int) -> str:
    """A picture's name, in its folder: where that is on this machine is nobody's business in a
    bundle.
    """
    name = pictures.name(number)
    return (
        str(Path(name).relative_to(pictures.folder))
        if isinstance(pictures, FolderPictures)
        else name
    )

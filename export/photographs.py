"""The photographs of an export: those its graphs are compared on and those int8's ranges are taken from, never the same ones."""

import argparse
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from distill.errors import UserError
from distill.images import UnreadableImage
from distill.pictures import FolderPictures, PackagedPhotos, Pictures
from export.run import PACKAGED

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


def choose(asked: argparse.Namespace) -> Chosen:
    """The pictures of a command line; raises UserError for unreadable ones.

    One folder for both is shared out, every other picture to each.
    """
    images = open_photos("--images", asked.images)
    if asked.precision != "int8":
        return Chosen(load(images, range(len(images)), PHOTOS))
    folder = None if asked.calibration == PACKAGED else Path(asked.calibration)
    source = PACKAGED if folder is None else folder.resolve().name
    calibration = open_photos("--calibration", folder)
    both = [path.resolve() for path in (asked.images, folder) if path]
    shared = not both or (len(both) == 2 and both[0] == both[1])
    if shared and len(images) > 1:
        halves = [load(images, range(start, len(images), 2), most)
                  for start, most in ((1, PHOTOS), (0, asked.calibration_images))]  # fmt: skip
        return Chosen(*halves, source, held_out=True)
    nested = len(both) == 2 and (both[0].is_relative_to(both[1]) or both[1].is_relative_to(both[0]))
    return Chosen(
        load(images, range(len(images)), PHOTOS),
        load(calibration, range(len(calibration)), asked.calibration_images),
        source, held_out=not (shared or nested),
    )  # fmt: skip


def open_photos(option: str, folder: Path | None) -> Pictures:
    """A folder of pictures (default: packaged ones); raises UserError for one without any."""
    try:
        return FolderPictures(folder) if folder else PackagedPhotos()
    except UserError as error:
        # training's key for the same thing
        raise UserError(str(error).replace("data.path =", option)) from error


def load(pictures: Pictures, numbers: range, most: int) -> Photos:
    """At most so many of some pictures, spread evenly over them: folders are sorted by class."""
    count = min(most, len(numbers))
    found = []
    for number in (numbers[place * len(numbers) // count] for place in range(count)):
        try:
            found.append((name_of(pictures, number), pictures.load(number)))
        except UnreadableImage as error:
            raise UserError(f"{error.name} cannot be read ({error.reason}): mend or remove it") from error
    return found


def name_of(pictures: Pictures, number: int) -> str:
    """A picture's name, in its folder: where that is on this machine is nobody's business in a bundle."""
    name = pictures.name(number)
    return str(Path(name).relative_to(pictures.folder)) if isinstance(pictures, FolderPictures) else name

"""Files of masks and depth maps: their size and type, their values, and how they lie over a
picture.

A map is read as it is stored: what an EXIF tag says of it counts in `as_drawn` alone.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from contract.errors import UserError, first_line, raise_trouble
from contract.images import as_stored, orientation

Exif = Literal["auto", "stored", "upright"]

_WIDTH, _HEIGHT = 256, 257
"""Tags of a TIFF file."""


def map_size(path: Path) -> tuple[int, int]:
    """(width, height) of a mask or depth file, from its header; raises UserError."""
    try:
        if path.suffix == ".npy":
            shape = np.load(path, mmap_mode="r").shape
            if len(shape) != 2:
                raise UserError(f"{path} has shape {shape}: a map has two dimensions")
            return shape[1], shape[0]
        with Image.open(path) as image:
            if isinstance(image, TiffImageFile):  # whose size is that of the turned map
                return image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
            return image.size
    except UserError:
        raise
    except (OSError, ValueError, EOFError, UnidentifiedImageError) as error:
        raise _unreadable(path, error) from error


def stored_bits(path: Path) -> int:
    """Bits of an integer in a mask or depth file, from its header; 0 for floating-point values."""
    map_size(path)
    if path.suffix == ".npy":
        kind = np.load(path, mmap_mode="r").dtype
        return 0 if kind.kind == "f" else 8 * kind.itemsize
    with Image.open(path) as image:
        return 0 if image.mode == "F" else 16 if image.mode.startswith("I") else 8


def read_map(path: Path) -> np.ndarray:
    """A mask or depth file as stored, [H, W]; raises UserError for a damaged one or one with
    channels.
    """
    map_size(path)
    try:
        if path.suffix == ".npy":
            return np.load(path)
        # not by its name: Pillow maps that into memory, and mixes up rows of a TIFF that is to be
        # turned on its side
        with open(path, "rb") as file, Image.open(file) as image:
            # Pillow turns TIFFs as it loads them, and no other format
            tag = orientation(image) if isinstance(image, TiffImageFile) else 1
            image.load()
            values = np.asarray(as_stored(image, tag))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise _unreadable(path, error) from error
    if values.ndim != 2:
        raise UserError(
            f"{path} has {values.shape[-1]} channels: a map has one (grey, palette or 16-bit PNG)"
        )
    return values


def _unreadable(path: Path, error: Exception) -> UserError:
    raise_trouble(path, error)
    return UserError(f"{path} cannot be read ({first_line(error)}): repair or remove it")


def as_drawn(picture: Image.Image, file: Path, path: Path, exif: Exif) -> Image.Image:
    """An upright picture as its map at `path` was drawn: upright too, or on the pixels of its
    `file`, which an EXIF tag says to turn. Raises UserError as `drawn_tag` does.
    """
    return as_stored(picture, drawn_tag(picture.size, file, path, exif))


def drawn_tag(size: tuple[int, int], file: Path, path: Path, exif: Exif) -> int:
    """The EXIF tag of the pixels that a map at `path` was drawn on: 1 for those of the upright
    picture, `size` = (width, height), or that of its `file`.

    `auto` takes what fits the map's size. Raises UserError where both do, and where the map has a
    tag that its picture has not.
    """
    if exif == "upright":
        return 1
    tag = _tag(file)
    # Some programs write a tag into TIFFs; of a PNG it would cost decoding it.
    tagged = path.suffix != ".npy" and (tag != 1 or path.suffix != ".png")
    own = _tag(path) if tagged and exif == "auto" else 1
    if exif == "stored" or own == tag:  # both to be turned, or neither
        return tag
    if own != 1:
        raise UserError(
            f"{path} is to be turned (EXIF orientation {own}), but {file.name} otherwise ({tag}): "
            "set dense.exif=stored for maps of the pixels as they are in the file, or "
            "dense.exif=upright for maps whose own pixels lie on the upright picture"
        )
    stored = size[::-1] if tag >= 5 else size
    fitting = [each for each in ((1, size), (tag, stored)) if each[1] == map_size(path)]
    if len(fitting) == 2:
        raise UserError(
            f"{file} is to be turned (EXIF orientation {tag}), and the size of {path.name} does "
            "not say whether its map is: set dense.exif=stored for maps of the pixels as they are "
            "in the file, or dense.exif=upright"
        )
    return fitting[0][0] if fitting else 1


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Raise UserError where a map is not of the (width, height) of its picture, turned as it is."""
    own = map_size(path)
    if own != size:
        raise UserError(
            f"{path} is {own[0]}x{own[1]}, but its picture is {size[0]}x{size[1]}: resize one of "
            "them"
        )


def _tag(path: Path) -> int:
    with Image.open(path) as image:
        return orientation(image)


Ignored = int | Sequence[int]
"""Labels of pixels that do not count: some, in whatever files; or one by convention, which is 255
in masks of 8 bits, but a class like any other in those of 16, and where there are classes enough
to have it."""


class WrongLabel(UserError):
    """A mask has a label that is neither ignored nor a class."""


def dropped_labels(ignore: Ignored, path: Path, shift: bool, classes: int | None) -> Sequence[int]:
    """The labels of a file that do not count: by convention none where 255 is a class's number."""
    if not isinstance(ignore, int):
        return ignore
    if classes is not None and classes + shift > 255 and 0 <= ignore <= 255:
        return []
    return [ignore] if not 0 <= ignore <= 255 or stored_bits(path) == 8 else []


def explain_labels(
    error: WrongLabel, paths: Iterable[Path], shift: bool, classes: int | None, ignore: Ignored
) -> UserError:
    """A WrongLabel with remedies that hold for every mask in `paths`."""
    wrong, dropped = set(), set()
    for path in paths:
        here = set(np.unique(read_map(path)).tolist())
        out = here & {*dropped_labels(ignore, path, shift, classes), *([0] if shift else [])}
        dropped |= out - ({0} if shift else set())
        most = np.inf if classes is None else classes + shift
        wrong |= {label for label in here - out if not shift <= label < most}
    either = []
    if min(wrong) >= 0:
        either = [f"segmentation.classes={max(wrong) + 1 - shift}"]
    without = sorted(wrong | dropped)
    if len(without) <= 4:
        value = without[0] if len(without) == 1 else str(without).replace(" ", "")
        either.append(f"segmentation.ignore={value}")
    remedy = " or ".join(either) or "segmentation.ignore to the list of what is no class"
    known = "" if classes is None else f", but segmentation.classes is {classes}"
    return UserError(f"{error}{known}: correct the mask, or set {remedy}")

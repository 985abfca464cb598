"""Where pictures come from: a folder, WebDataset tar files (`tars.py`), or the photographs that
Python packages carry.

A source has a length, names each picture, loads each as RGB by number, and has a
fingerprint. Random access by number is what lets a run resume in the middle of an epoch with the
very same pictures to come.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from PIL import Image

from contract.errors import UserError, raise_trouble
from contract.images import IMAGE_SUFFIXES, TRUSTED, UnreadableImage, decode, read_file
from contract.picture_files import Names, picture_files, size_and_time
from distill.config import DataConfig
from distill.data.pixels import Decoded, Opened, open_picture
from distill.data.tars import WebDatasetPictures


class Pictures(Protocol):
    """A source of pictures, numbered from 0 in an order that does not change."""

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def name(self, number: int) -> str:
        """What to call picture `number` in messages."""
        ...

    def load(self, number: int) -> Image.Image:
        """Picture `number` as RGB; raises UnreadableImage."""
        ...

    def open(self, number: int) -> Opened:
        """Picture `number`, decoded once it is known for which crops; raises UnreadableImage."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the pictures do."""
        ...

    def entries(self) -> Iterable[tuple[str, int, int]]:
        """Name below the source's path, bytes, and time of the last change (ns) of each picture."""
        ...


def digest(entries: Iterable[tuple]) -> str:
    """Hex sha256 of a list of tuples."""
    summary = hashlib.sha256()
    for entry in entries:
        summary.update(repr(entry).encode())
    return summary.hexdigest()


_TOGETHER = 4096
"""Files whose sizes are asked for at a time."""


class FolderPictures:
    """Every picture below a folder (see `files.picture_files`), flat or in (class) subfolders, in
    sorted order.

    Raises UserError if the folder is missing, unreadable or without images.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            kind = os.stat(self.folder).st_mode
        except FileNotFoundError as error:
            raise UserError(
                f"data.path = {self.folder}: no such folder (set data.path to your images)"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename}: {error.strerror} (check its permissions)"
            ) from error
        if not stat.S_ISDIR(kind):
            raise UserError(f"data.path = {self.folder} is a file: use its folder")
        self.files = Names(picture_files(self.folder))
        if not self.files:
            raise UserError(
                f"data.path = {self.folder} has no images ({', '.join(IMAGE_SUFFIXES)})"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number]

    def open(self, number: int) -> Opened:
        name = self.files[number]
        return open_picture(_encoded(name), name)

    def load(self, number: int) -> Image.Image:
        name = self.files[number]
        return decode(_encoded(name), TRUSTED, name=name)

    def fingerprint(self) -> str:
        """Digest of names, sizes and modification times."""
        return digest(self.entries())

    def entries(self) -> Iterable[tuple[str, int, int]]:
        start = len(os.path.join(self.folder, ""))
        with ThreadPoolExecutor(16) as pool:  # a network file system takes a while for each
            for first in range(0, len(self.files), _TOGETHER):
                stop = min(first + _TOGETHER, len(self.files))
                some = [self.files[number] for number in range(first, stop)]
                for path, about in zip(some, pool.map(size_and_time, some), strict=True):
                    yield path[start:], *about


def _encoded(name: str) -> bytes:
    """The bytes of a picture's file; raises UnreadableImage, and UserError where not the file but
    the machine is at fault.
    """
    try:
        return read_file(name, TRUSTED, name)
    except UnreadableImage as error:
        raise_trouble(name, error)
        raise


class PackagedPhotos:
    """The real photographs inside the scikit-image and scikit-learn wheels, kept decoded: they are
    few.
    """

    SKIMAGE = (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
        "rocket.jpg",
    )
    SKLEARN = ("china.jpg", "flower.jpg")

    def __init__(self) -> None:
        # found, not imported: scikit-learn takes a second to load
        skimage, sklearn = (Path(find_spec(name).origin).parent for name in ("skimage", "sklearn"))
        photos, samples = skimage / "data", sklearn / "datasets" / "images"
        self.files = [photos / name for name in self.SKIMAGE] + [
            samples / name for name in self.SKLEARN
        ]
        missing = [path for path in self.files if not path.is_file()]
        if missing:
            raise UserError(
                f"packaged photograph {missing[0]} is missing: reinstall scikit-image and "
                "scikit-learn"
            )
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number].name

    def load(self, number: int) -> Image.Image:
        if number not in self._decoded:
            self._decoded[number] = decode(self.files[number], TRUSTED, name=self.name(number))
        return self._decoded[number]

    def open(self, number: int) -> Opened:
        return Decoded(self.load(number))

    def fingerprint(self) -> str:
        """Digest of names and sizes; the wheels' files do not change otherwise."""
        return digest((name, size) for name, size, _ in self.entries())

    def entries(self) -> Iterable[tuple[str, int, int]]:
        return [(path.name, path.stat().st_size, 0) for path in self.files]


def open_pictures(config: DataConfig) -> Pictures:
    match config.kind:
        case "packaged-photos":
            if config.path:
                raise UserError(
                    f"data.path = {config.path} is not read with data.kind = packaged-photos: set "
                    "data.kind=folder too"
                )
            return PackagedPhotos()
        case "webdataset":
            return WebDatasetPictures(config.path)
        case "folder":
            if isinstance(config.path, list):
                raise UserError(
                    "data.path is a list, but data.kind = folder takes one folder (or set "
                    "data.kind=webdataset)"
                )
            return FolderPictures(config.path)

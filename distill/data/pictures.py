"""Where pictures come from: a folder, WebDataset tar files, or the photographs that Python packages
carry.

A source has a length, names each picture, loads each as RGB by number, and has a
fingerprint. Random access by number is what lets a run resume in the middle of an epoch with the
very same pictures to come.
"""

import glob
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from PIL import Image
from webdataset.shardlists import expand_urls

from contract.errors import UserError
from contract.images import IMAGE_SUFFIXES, TRUSTED, decode
from distill.config import DataConfig


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

    def fingerprint(self) -> str:
        """Hex digest that changes when the pictures do."""
        ...


def digest(entries: Iterable[tuple]) -> str:
    """Hex sha256 of a list of tuples."""
    summary = hashlib.sha256()
    for entry in entries:
        summary.update(repr(entry).encode())
    return summary.hexdigest()


class FolderPictures:
    """Every image file below a folder, flat or in (class) subfolders, in sorted order.

    Raises UserError if the folder is missing, unreadable or without images.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

        def refuse(error: OSError) -> None:
            raise UserError(
                f"cannot read {error.filename}: {error.strerror} (check its permissions)"
            )

        try:
            kind = os.stat(self.folder).st_mode
        except FileNotFoundError as error:
            raise UserError(
                f"data.path = {self.folder}: no such folder (set data.path to your images)"
            ) from error
        except OSError as error:
            refuse(error)
        if not stat.S_ISDIR(kind):
            raise UserError(f"data.path = {self.folder} is a file: use its folder")
        result = []
        for root, folders, files in os.walk(self.folder, onerror=refuse, followlinks=True):
            folders.sort()
            result += [
                os.path.join(root, file) for file in files if file.lower().endswith(IMAGE_SUFFIXES)
            ]
        # One string a picture: a list of a million Path objects would cost a gigabyte in every
        # worker.
        self.files = sorted(result)
        if not self.files:
            raise UserError(
                f"data.path = {self.folder} has no images ({', '.join(IMAGE_SUFFIXES)})"
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number]

    def load(self, number: int) -> Image.Image:
        return decode(Path(self.files[number]), TRUSTED, name=self.files[number])

    def fingerprint(self) -> str:
        """Digest of names, sizes and modification times."""
        stats = ((path, os.stat(path)) for path in self.files)
        return digest(
            (os.path.relpath(path, self.folder), s.st_size, s.st_mtime_ns) for path, s in stats
        )


class WebDatasetPictures:
    """Image members of WebDataset tar files on a local disk.

    The library streams shards in a shuffled order that cannot be entered half-way. Each tar file is
    therefore indexed once, by the offsets of its members, and read by number like a folder. Raises
    UserError for a missing or broken tar file, or one without images.
    """

    def __init__(self, patterns: str | list[str]) -> None:
        self.tars = _expand_shards([patterns] if isinstance(patterns, str) else patterns)
        self.members: list[tuple[int, str, int, int]] = []  # tar file, name, offset, size
        for number, path in enumerate(self.tars):
            try:
                with tarfile.open(path, "r:") as tar:
                    self.members += [
                        (number, member.name, member.offset_data, member.size)
                        for member in tar
                        if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES)
                    ]
            except (tarfile.TarError, OSError, EOFError) as error:
                raise UserError(
                    f"data.path: cannot read {path} as an uncompressed tar file ({error})"
                ) from error
        if not self.members:
            raise UserError(
                f"data.path: no images in {len(self.tars)} tar files ({self.tars[0]} …)"
            )
        self._open: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.members)

    def name(self, number: int) -> str:
        tar, member, _, _ = self.members[number]
        return f"{self.tars[tar]}:{member}"

    def load(self, number: int) -> Image.Image:
        tar, _, offset, size = self.members[number]
        # Keyed by process: a file descriptor shared with a forked worker would work with pread, but
        # each process opens its own
        key = (os.getpid(), tar)
        if key not in self._open:
            self._open[key] = os.open(self.tars[tar], os.O_RDONLY)
        return decode(os.pread(self._open[key], size, offset), TRUSTED, name=self.name(number))

    def __getstate__(self) -> dict:
        # open files stay behind when the source is sent to another process
        return self.__dict__ | {"_open": {}}

    def fingerprint(self) -> str:
        return digest(self.members)


def _expand_shards(patterns: list[str]) -> list[str]:
    """Expand braces (`{0000..0146}`) and globs to sorted tar files; raises UserError for a pattern
    without any.
    """
    paths = []
    for pattern in patterns:
        for path in expand_urls(pattern):
            matches = sorted(glob.glob(path))
            if not matches:
                raise UserError(
                    f"data.path = {pattern}: no file {path} (tar files must be on a local disk)"
                )
            paths += matches
    return paths


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

    def fingerprint(self) -> str:
        """Digest of names and sizes; the wheels' files do not change otherwise."""
        return digest((path.name, path.stat().st_size) for path in self.files)


def open_pictures(config: DataConfig) -> Pictures:
    match config.kind:
        case "packaged-photos":
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

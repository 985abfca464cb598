"""Which files of a folder are pictures: one rule for training, evaluation and export.

A file is a picture by its suffix, in any case. Hidden files and folders, and those that systems
leave behind, are not data: AppleDouble (`._x.jpg`), `.ipynb_checkpoints`, `__MACOSX`, thumbnails.
"""

import itertools
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from contract.errors import UserError, machine_trouble
from contract.images import IMAGE_SUFFIXES

log = logging.getLogger(__name__)

_NOT_DATA = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
    + ("system volume information", "__pycache__")
)
"""Folders that systems and network storage leave beside data, some with thumbnails in them."""

_UNREAD = (".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".exr", ".hdr", ".tga", ".pcx", ".dng")
_UNREAD += (".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".raf", ".fits", ".jxr", ".wdp", ".mat")
"""Suffixes of pictures that are not read here; of those a warning tells."""


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is somebody's data, neither hidden nor a system's."""
    return not name.startswith(".") and name.lower() not in _NOT_DATA


def is_picture(name: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file of this name (without folders) is a picture, or has another of `suffixes`."""
    return is_data(name) and os.path.splitext(name)[1].lower() in suffixes


def picture_files(folder: Path | str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[str]:
    """Paths of all pictures below a folder (or of files with other `suffixes`), sorted.

    Links are followed, but no folder is read twice, nor one that `folder` lies in: a link to a
    parent ends there. A dangling link is listed, as a picture that cannot be read. Files with a
    suffix of pictures that are not read here are left out with a warning. Raises UserError for a
    folder that cannot be read.
    """
    top = Path(folder)
    above = top.resolve().parents
    seen = {_identity(parent) for parent in above}
    result: list[str] = []
    unread: Counter[str] = Counter()
    for root, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        here = _identity(root)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if is_data(name))
        result += [os.path.join(root, name) for name in files if is_picture(name, suffixes)]
        if suffixes is IMAGE_SUFFIXES:
            endings = (os.path.splitext(name)[1].lower() for name in files if is_data(name))
            unread.update(ending for ending in endings if ending in _UNREAD)
    if unread:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
        log.warning("%s: left out, as they cannot be read here: %s (convert them)", folder, kinds)
    return sorted(result)


def subfolders(folder: Path) -> list[Path]:
    """Folders of data directly in a folder, sorted; raises UserError for one that cannot be
    read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and is_data(path.name))
    except OSError as error:
        _refuse(error)


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes and modification time in ns of a file, for fingerprints; zeros for a dangling link."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    except OSError as error:
        _refuse(error)
    return about.st_size, about.st_mtime_ns


def _identity(folder: Path | str) -> tuple[int, int]:
    try:
        about = os.stat(folder)
    except OSError as error:
        _refuse(error)
    return about.st_dev, about.st_ino


def _refuse(error: OSError) -> NoReturn:
    trouble = machine_trouble(error) or f"{error.strerror} (check the path)"
    raise UserError(f"cannot read {error.filename}: {trouble}") from error


class Names(Sequence[str]):
    """Many strings in one buffer: a list of a million is copied page by page into every forked
    worker, as each use of a string writes to its reference count; this is shared by all.
    """

    def __init__(self, names: Iterable[str]) -> None:
        parts = [os.fsencode(name) for name in names]
        self._buffer = b"".join(parts)
        self._ends = array("q", itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._buffer[start : self._ends[number]])

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer and of the places in it."""
        return len(self._buffer) + len(self._ends) * self._ends.itemsize

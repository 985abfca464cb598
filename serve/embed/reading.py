"""A picture of the data set becomes pixels for the graph, or a reason why it cannot."""

import errno
import os
import re
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from contract.errors import Failure, first_line, raise_trouble
from contract.images import TRUSTED, UnreadableImage, decode_with_size, read_file
from contract.views import SQUASH, ViewPolicy
from serve.embed.data import Entry, file_system_of, is_uri

_ATTEMPTS, _PAUSE = 3, 0.5
"""Of reading a URI; seconds before the second attempt, doubled each time."""
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_ONE_OBJECT = (ValueError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)
"""What file systems raise for one odd name or one damaged archive."""
_ODD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTDIR, errno.EISDIR)
_DENIED = 32
"""Objects that a storage may deny before it has given one: then it is the credentials."""


class Row(NamedTuple):
    """A picture that was read: pixels uint8 [height, width, 3] of the model's size and the
    picture's own (width, height); or None and why.
    """

    entry: Entry
    pixels: np.ndarray | None
    size: tuple[int, int] | None
    error: str


class _OddObject(UnreadableImage):
    """An object of a storage that is at fault itself, also where the system's word for it is one
    that the machine's troubles have.
    """


def read_row(entry: Entry, height: int, width: int, view: ViewPolicy = SQUASH) -> Row:
    """Read and decode a picture as `serve.client` does, at the model's size, as `view` shows it.

    Raises UserError and Failure for what is not the picture's fault: the machine's troubles, a
    storage that does not answer.
    """
    try:
        data = _read(entry)
        picture, own = decode_with_size(data, TRUSTED, view.reads(height, width))
        (pixels,) = view.every(picture, height, width, own)
        return Row(entry, pixels, own[::-1], "")
    except UnreadableImage as error:
        if not isinstance(error, _OddObject):
            raise_trouble(entry.uri, error)
        return Row(entry, None, None, " ".join(error.reason.split()))


def _read(entry: Entry) -> bytes:
    if not entry.uri:
        raise UnreadableImage("", "the row has no path")
    if entry.tar:
        return _read_member(entry)
    return _read_uri(entry.uri) if is_uri(entry.uri) else read_file(entry.uri, TRUSTED)


def _read_member(entry: Entry) -> bytes:
    # opened anew for each picture: a handful of microseconds, and never more files than threads
    try:
        file = os.open(entry.tar, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(file, entry.size, entry.offset)
        finally:
            os.close(file)
    except OSError as error:
        raise_trouble(entry.uri, error)
        raise Failure(f"cannot read {entry.uri}: {first_line(error)}") from error


def _read_uri(uri: str) -> bytes:
    """The bytes of a URI. Raises UnreadableImage for what is one picture's fault: it is not there,
    has an impossible name, lies in a damaged archive, is denied, or is whatever a web server of
    others answers; and Failure for a storage that cannot be read.
    """
    for attempt in range(_ATTEMPTS):
        try:
            data = _fetch(uri)
            _access.given.add(_storage(uri))
            return data
        except Exception as error:  # as many kinds as there are file systems
            fault, reason = _objects_fault(error), f"{type(error).__name__}: {first_line(error)}"
            if fault is None and attempt + 1 < _ATTEMPTS:
                time.sleep(_PAUSE * 2**attempt)
                continue
            others = uri.startswith(("http://", "https://"))
            if isinstance(error, PermissionError) and _access.deny(_storage(uri)) and not others:
                fault = None
            if fault:
                raise _OddObject("", fault) from error
            if others:
                raise UnreadableImage("", reason) from error
            raise Failure(
                f"cannot read {uri}: {reason} (check address and credentials, then run the same "
                "command again)"
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _fetch(uri: str) -> bytes:
    system, path = file_system_of(uri)
    return system.cat_file(path)


def _objects_fault(error: Exception) -> str | None:
    """Why one object cannot be read; None where it is the storage's fault, or may be."""
    if isinstance(error, _NO_FILE):
        return "no such file"
    odd = isinstance(error, OSError) and error.errno in _ODD_NAMES
    if odd or isinstance(error, (PermissionError, *_ONE_OBJECT)):
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _storage(uri: str) -> str:
    """Protocol and host or bucket of what a URI is in."""
    return re.match(r"[^:]*:?/{0,2}[^/]*", uri.rpartition("::")[2])[0]


class _Access:
    """Which storages have given an object, and how many each of the others has denied."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self._denied: Counter[str] = Counter()
        self._lock = threading.Lock()

    def deny(self, storage: str) -> bool:
        """Count an object that is denied; whether the whole storage seems to be."""
        with self._lock:
            self._denied[storage] += 1
            return storage not in self.given and self._denied[storage] >= _DENIED


_access = _Access()

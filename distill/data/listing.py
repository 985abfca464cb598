"""What pictures a run is trained on: a list compact enough to keep, and what differs from it."""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contract.errors import raise_trouble
from contract.files import write_atomically


class PictureList(NamedTuple):
    """Of every picture, in order, uint64: a hash of its name below data.path, its size in bytes and
    the time of its last change.
    """

    names: np.ndarray
    sizes: np.ndarray
    times: np.ndarray

    def digest(self) -> str:
        """Hex digest of names and sizes, in order."""
        return _digest(self.names, self.sizes)

    def times_digest(self) -> str:
        """Hex digest of the times of change."""
        return _digest(self.times)

    def save(self, path: Path) -> None:
        """Write the list to an .npz file."""

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # numpy would append .npz to a name
                np.savez(file, **self._asdict())

        write_atomically(path, write)


class Difference(NamedTuple):
    """Numbers of pictures that were added, removed and changed, and whether those that stay are in
    another order.
    """

    added: int
    removed: int
    changed: int
    reordered: bool

    def __str__(self) -> str:
        parts = [f"{count} {word}" for word, count in zip(self._fields, self[:3], strict=False)]
        order = ", and their order differs" if self.reordered else ""
        return f"{', '.join(parts)}{order}"


def list_pictures(entries: Iterable[tuple[str, int, int]]) -> PictureList:
    """The list of (name, size, time of change in ns) of every picture."""
    rows = [(_hash(name), size, max(0, time)) for name, size, time in entries]
    return PictureList(*np.array(rows, dtype=np.uint64).reshape(-1, 3).T.copy())


def read_list(path: Path) -> PictureList | None:
    """The list in a file of `save`; None if it is missing or damaged."""
    try:
        # opened here: numpy leaves a damaged file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return PictureList(*(arrays[name] for name in PictureList._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise_trouble(path, error)
        return None


def compare(before: PictureList, now: PictureList, times: bool) -> Difference:
    """What differs between two lists; `times`: a picture whose time alone differs is changed."""
    _, old, new = np.intersect1d(before.names, now.names, return_indices=True)
    changed = before.sizes[old] != now.sizes[new]
    if times:
        changed |= before.times[old] != now.times[new]
    # in the order of the old list, the places in the new one of what is in both
    places = new[np.argsort(old)]
    return Difference(
        len(now.names) - len(new),
        len(before.names) - len(old),
        int(changed.sum()),
        bool((np.diff(places) < 0).any()),
    )


def _hash(name: str) -> int:
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def _digest(*arrays: np.ndarray) -> str:
    summary = hashlib.sha256()
    for array in arrays:
        summary.update(np.ascontiguousarray(array))
    return summary.hexdigest()

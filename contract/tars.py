"""Where pictures are inside WebDataset tar files, so that they are read by number like those of a
folder.

The library streams shards in a shuffled order that cannot be entered half-way. Each tar file is
therefore indexed once, by the places of its pictures; the index is kept in the user's cache folder
until the file changes.
"""

import glob
import hashlib
import json
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contract.errors import UserError, first_line, raise_trouble
from contract.images import IMAGE_SUFFIXES
from contract.members import choose
from contract.picture_files import Names, is_data, is_picture, size_and_time

log = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE

_TAIL = 1 << 20
"""Bytes that may follow the end marker of a tar file, all zero: writers fill up their last record,
of 10 KiB or, for tapes, up to this.
"""

CACHE_VARIABLE = "VFM_DISTILL_CACHE"
"""Environment variable that names the folder of the indexes; by default ~/.cache/vfm-distill."""

_VERSION = 2
"""Of the index files; raise it when what counts as a picture changes."""


class _Index(NamedTuple):
    """The pictures of one tar file; how many others were left out, by the ends of their names; and
    samples that are hardly one (see `members.Choice`).
    """

    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    left_out: dict[str, int]
    crowded: dict[str, int]


class TarIndex:
    """The places of one picture of each sample in WebDataset tar files on a local disk, numbered in
    the order of the files.

    A sample's masks, depth maps and other arrays are left out, as are hidden members. Messages call
    the `patterns` by the name of what they were given as. Raises UserError for a tar file that is
    missing, cut short, compressed or damaged, or files without images.
    """

    def __init__(self, patterns: str | list[str], given_as: str = "data.path") -> None:
        tars = _expand_shards([patterns] if isinstance(patterns, str) else patterns, given_as)
        indexes = [_index(path, given_as) for path in tars]
        counts = [len(index.names) for index in indexes]
        if not sum(counts):
            raise UserError(f"{given_as}: no images in {len(tars)} tar files ({tars[0]} …)")
        _tell(tars, indexes)
        self.tars = Names(tars)
        self._tar = np.repeat(np.arange(len(tars), dtype=np.int32), counts)
        self._names = Names(name for index in indexes for name in index.names)
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        return f"{self.tars[self._tar[number]]}:{self._names[number]}"

    def place(self, number: int) -> tuple[str, int, int]:
        """Tar file, offset and bytes of picture `number`."""
        path = self.tars[self._tar[number]]
        return path, int(self._offsets[number]), int(self._sizes[number])

    def fingerprint(self) -> str:
        """Digest of every picture's tar file, name, place and size, and of the tar files' times."""
        summary = hashlib.sha256()
        for path in self.tars:
            summary.update(repr(size_and_time(path)).encode())
        columns = (self._tar.tolist(), self._names, self._offsets.tolist(), self._sizes.tolist())
        for entry in zip(*columns, strict=True):
            summary.update(repr(entry).encode())
        return summary.hexdigest()

    def entries(self) -> Iterable[tuple[str, int, int]]:
        tars = list(self.tars)
        root = os.path.commonpath([os.path.dirname(path) for path in tars])
        about = [(os.path.relpath(path, root), size_and_time(path)[1]) for path in tars]
        columns = (self._tar.tolist(), self._names, self._sizes.tolist())
        for tar, name, size in zip(*columns, strict=True):
            yield f"{about[tar][0]}:{name}", size, about[tar][1]


_KINDS = 8
"""Kinds of members left out that are listed."""


def _tell(tars: list[str], indexes: list[_Index]) -> None:
    """Log what is left out of tar files, and warn of members that may be no sample."""
    left_out = sum((Counter(index.left_out) for index in indexes), Counter())
    if left_out:
        listed = sorted(left_out.most_common(_KINDS))
        rest = left_out.total() - sum(count for _, count in listed)
        kinds = [f"{count:,} {kind}" for kind, count in listed]
        kinds += [f"{rest:,} of {len(left_out) - len(listed):,} other kinds"] if rest else []
        log.info("data      one picture a sample; left out beside it: %s", ", ".join(kinds))
    crowded = [
        (path, *sample)
        for path, index in zip(tars, indexes, strict=True)
        for sample in index.crowded.items()
    ]
    if crowded:
        path, key, count = max(crowded, key=lambda sample: sample[2])
        log.warning(
            "data      %d pictures of sample '%s' are left out (%s; samples like it: %d): members "
            "that are the same up to the first dot of their names are one sample, rename them if "
            "each is a picture of its own",
            count,
            key,
            path,
            len(crowded),
        )


def _expand_shards(patterns: list[str], given_as: str) -> list[str]:
    """Expand braces (`{0000..0146}`) and globs to sorted tar files, each once; raises UserError for
    a pattern without any.
    """
    from webdataset.shardlists import expand_urls  # imports torch, where that is installed

    paths = []
    for pattern in patterns:
        for path in expand_urls(pattern):
            # a glob meets what macOS leaves beside the shards it copies
            matches = [m for m in sorted(glob.glob(path)) if is_data(os.path.basename(m))]
            if not matches:
                raise UserError(
                    f"{given_as} = {pattern}: no file {path} (tar files must be on a local disk)"
                )
            paths += matches
    once = list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
    if len(once) < len(paths):
        log.warning(
            "data      %d tar files of %s are listed more than once (by several patterns, or "
            "links): each is read once",
            len(paths) - len(once),
            given_as,
        )
    return once


# ---- the index --------------------------------------------------------------------------------


def _index(path: str, given_as: str) -> _Index:
    """The index of a tar file, from the cache where it has one of the same size and time."""
    try:
        about = os.stat(path)
        state = json.dumps([_VERSION, about.st_size, about.st_mtime_ns, IMAGE_SUFFIXES])
        kept = _cache_file(path)
        index = _load(kept, state)
        if index is None:
            index = _scan(path, given_as)
            _store(kept, state, index)
        return index
    except OSError as error:
        raise_trouble(path, error)
        raise UserError(f"{given_as}: cannot read {path}: {first_line(error)}") from error


def _cache_file(path: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    place = os.environ.get(CACHE_VARIABLE) or os.path.join(base, "vfm-distill")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return Path(place, "tars", f"{name}.npz")


def _load(file: Path, state: str) -> _Index | None:
    try:
        with np.load(file) as held:
            if str(held["state"]) != state:
                return None
            names = held["names"].tobytes().split(b"\0")[:-1]
            others = [json.loads(str(held[name])) for name in ("left_out", "crowded")]
            return _Index(list(map(os.fsdecode, names)), held["offsets"], held["sizes"], *others)
    except Exception:  # a cache: whatever is wrong with it, the tar file is read again
        return None


def _store(file: Path, state: str, index: _Index) -> None:
    temporary = file.with_name(f".{file.name}.{threading.get_native_id()}.tmp")
    names = b"".join(os.fsencode(name) + b"\0" for name in index.names)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            np.savez(
                out,
                state=state,
                names=np.frombuffer(names, np.uint8),
                offsets=index.offsets,
                sizes=index.sizes,
                left_out=json.dumps(index.left_out),
                crowded=json.dumps(index.crowded),
            )
        os.replace(temporary, file)
    except OSError as error:  # the index is not needed, it only saves time
        log.debug("cannot keep the index %s: %s", file, error)
        temporary.unlink(missing_ok=True)


def _scan(path: str, given_as: str) -> _Index:
    """Read a tar file's headers; raises UserError unless it is whole."""
    places: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                places.pop(name, None)  # of two members of one name the last counts, as for tar -x
                links.pop(name, None)
                if member.isreg() and not member.issparse():
                    places[name] = (member.offset_data, member.size)
                elif member.islnk():
                    links[name] = os.path.normpath(member.linkname)
                elif member.issym():
                    target = os.path.join(os.path.dirname(name), member.linkname)
                    links[name] = os.path.normpath(target)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{given_as}: cannot read {path} as an uncompressed tar file ({first_line(error)}): "
            f"{_what_to_do(path)}"
        ) from error
    _check_end(path, end, given_as)
    for name, target in links.items():
        for _ in range(8):  # a link to a link
            if target in links:
                target = links[target]
        if target in places and name not in places:
            places[name] = places[target]
    chosen, left_out, crowded = choose(places)
    dangling = sum(1 for name in links if name not in places and is_picture(os.path.basename(name)))
    if dangling:
        left_out["links to nothing in their tar file"] = dangling
    offsets, sizes = (np.array([places[n][i] for n in chosen], np.int64) for i in (0, 1))
    return _Index(chosen, offsets, sizes, dict(left_out), crowded)


def _what_to_do(path: str) -> str:
    """What to do about a file that is not an uncompressed tar file, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, name, command in (
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"\xfd7zXZ\0", "xz", "unxz"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    ):
        if start.startswith(magic):
            return f"it is compressed with {name}, unpack it with `{command}`"
    return "it is cut short or damaged, copy it again"


def _check_end(path: str, end: int, given_as: str) -> None:
    """Raise UserError unless a tar file ends as one does, with zeros from byte `end` on.

    tarfile takes a damaged header in the middle, or a file cut off between two members, for the
    end.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(end)
        tail = file.read(_TAIL + 1)
    if len(tail) < _BLOCK:
        raise UserError(
            f"{given_as}: {path} is cut short after {size:,} bytes (its end marker is missing): "
            "copy it again"
        )
    if any(tail[:_BLOCK]):
        raise UserError(f"{given_as}: {path} is damaged at byte {end:,}: copy it again")
    if any(tail):
        raise UserError(
            f"{given_as}: {path} goes on after its end marker at byte {end:,}: joined tar files "
            "are read up to there only, list them one by one or join them with `tar -A`"
        )
    if len(tail) > _TAIL:
        raise UserError(
            f"{given_as}: {path} has {end:,} bytes of members, the other {size - end:,} are zero: "
            "its copy was interrupted, copy it again"
        )

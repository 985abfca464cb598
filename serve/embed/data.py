"""What is embedded: the pictures of a folder, of tar shards, or of a list of paths and URIs, each
with its place in an order that does not change.
"""

import functools
import hashlib
import inspect
import itertools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from contract.errors import UserError, first_line, raise_trouble, suggest
from contract.images import IMAGE_SUFFIXES
from contract.picture_files import Names, is_picture, picture_files, size_and_time
from contract.tars import TarIndex

_PARQUET, _LISTS = (".parquet", ".pq", ".parq"), (".txt", ".lst", ".list")
_LONGEST_LINE = 8192
"""Of a list: a longer one is not a path."""


class Entry(NamedTuple):
    """One picture: what it is called in the table, and where its bytes are."""

    uri: str
    """A path, a URI, or TAR:MEMBER; "" for a row of a parquet without one."""
    tar: str = ""
    offset: int = 0
    size: int = 0
    """Place in a tar file."""


@dataclass(frozen=True)
class Data:
    """Pictures in order; `kind` says in words what they are from."""

    kind: str
    names: Sequence[str] | TarIndex

    def __len__(self) -> int:
        return len(self.names)

    def entries(self, start: int, stop: int) -> list[Entry]:
        """The pictures from `start` to before `stop`, or to the end."""
        numbers = range(start, min(stop, len(self)))
        if isinstance(self.names, TarIndex):
            return [Entry(self.names.name(n), *self.names.place(n)) for n in numbers]
        return [Entry(self.names[number]) for number in numbers]

    def digest(self) -> str:
        """sha256 over the list: names, and of tar files places, sizes and times; not over the
        pictures.
        """
        summary = hashlib.sha256()
        if isinstance(self.names, TarIndex):
            for path in self.names.tars:
                summary.update(repr(size_and_time(path)).encode())
        for start in range(0, len(self), 4096):
            for entry in self.entries(start, start + 4096):
                summary.update(repr(tuple(entry)).encode("utf-8", "surrogateescape"))
        return summary.hexdigest()


def is_uri(text: str) -> bool:
    """Whether a text is for fsspec: it begins with a protocol, `s3://`, or a chain of them,
    `simplecache::s3://`; other names may have `::` in them.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)", text)
    return match is not None and (match[2] == "://" or _chains(match[1]))


@functools.cache
def _chains(protocol: str) -> bool:
    """Whether fsspec has a protocol that reads what another link of a chain names: an archive, a
    cache.
    """
    from fsspec.registry import get_filesystem_class, known_implementations

    if protocol not in known_implementations:
        return False
    try:
        kinds = inspect.getmro(get_filesystem_class(protocol))
    except (ImportError, ValueError):  # `_check_protocol` says which package it needs
        return protocol in ("libarchive", "git")
    parameters = itertools.chain(*(inspect.signature(kind.__init__).parameters for kind in kinds))
    return not {"fo", "target_protocol"}.isdisjoint(parameters)


def _links(uri: str) -> list[str]:
    """A chain's links; `::` behind a protocol that reads from no other is part of a name. Raises
    UserError where fsspec would read another file than is named.
    """
    links = uri.split("::")
    chain = list(itertools.takewhile(_chains, (link.partition("://")[0] for link in links)))
    if not chain:
        return [uri]
    if len(links) == len(chain):
        raise UserError(f"{uri}: '{chain[-1]}' reads from a file that must follow it: add ::FILE")
    if len(links) > len(chain) + 1:
        raise UserError(f"{uri}: '::' in a name of a chain cannot be read: rename it")
    return links


def file_system_of(uri: str) -> tuple:
    """fsspec's file system of a URI, and its path there."""
    import fsspec

    if len(_links(uri)) > 1:
        return fsspec.core.url_to_fs(uri)
    # not url_to_fs, for which any `::` makes a chain
    kind = fsspec.get_filesystem_class(uri.partition("://")[0])
    return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)


def open_data(data: Sequence[str], column: str | None = None, root: str | None = None) -> Data:
    """List the pictures of DATA: one folder, or tar shards, lists or parquets, one or several.

    `column` is a parquet's with paths or URIs, `root` what relative ones in a list are below of
    (None: the list's folder). Raises UserError for what is missing, empty or cannot be read.
    """
    kinds = {_kind(one) for one in data}
    if len(kinds) > 1:
        raise UserError(f"DATA mixes {' and '.join(sorted(kinds))}: give one kind at a time")
    kind = kinds.pop()
    if column is not None and kind != "parquet":
        raise UserError(f"--column {column}: DATA is not a parquet, leave it out")
    if root is not None and kind not in ("parquet", "list"):
        raise UserError(f"--root {root} is for lists and parquets, leave it out")
    if kind == "tar shards":
        # whole paths, as of folders; `::` joins patterns
        patterns = ["::".join(map(os.path.abspath, one.split("::"))) for one in data]
        return Data(f"tar shards {' '.join(data)}", TarIndex(patterns, "DATA"))
    if kind == "folder":
        if len(data) > 1:
            raise UserError(f"DATA is {len(data)} folders: give the one that holds them")
        return Data(f"folder {data[0]}", _folder(data[0]))
    names: list[str] = []
    for one in data:
        rows = _parquet(one, column) if kind == "parquet" else _lines(one)
        base = root if root is not None else _folder_of(one)
        names += [_join(base, row) for row in rows]
    what = " ".join(data) + (f", column {column}" if column else "")
    if not any(names):
        raise UserError(f"DATA {what} lists no pictures: name another")
    _check_protocols(names)
    return Data(f"{kind} {what}", Names(names))


def _kind(one: str) -> str:
    base = one.rsplit("/", 1)[-1].lower()
    if not is_uri(one) and os.path.isdir(one):
        return "folder"
    if base.endswith(_PARQUET):
        return "parquet"
    if re.search(r"\.tar$|\.tar\}", base):
        if is_uri(one):
            raise UserError(
                f"DATA {one}: tar shards are read from a local disk: copy them, or list their "
                "pictures"
            )
        return "tar shards"
    if base.endswith(_LISTS):
        return "list"
    if is_uri(one):
        return "folder"
    if base.endswith((".gz", ".tgz", ".bz2", ".zst", ".xz")):
        raise UserError(f"DATA {one} is compressed: unpack it")
    if not os.path.exists(one):
        raise UserError(f"DATA {one}: no such folder or file (check the path)")
    raise UserError(
        f"DATA {one} is a single file: give a folder, tar shards (.tar), a list of paths (.txt) or "
        "a .parquet with --column"
    )


def _folder(folder: str) -> Names:
    """Paths or URIs of the pictures below a folder, sorted."""
    if is_uri(folder):
        system, path = _file_system(folder)
        try:
            found = sorted(system.find(path))
        except Exception as error:
            raise _unreadable(folder, error) from error
        names = [
            system.unstrip_protocol(one) for one in found if is_picture(posixpath.basename(one))
        ]
    else:
        names = picture_files(os.path.abspath(folder))
    if not names:
        raise UserError(f"DATA {folder} has no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return Names(names)


def _folder_of(one: str) -> str:
    return one.rsplit("/", 1)[0] if is_uri(one) else os.path.dirname(os.path.abspath(one))


def _join(base: str, row: str) -> str:
    """A row of a list as a path or URI."""
    if not row or is_uri(row) or os.path.isabs(row):
        return row
    return f"{base.rstrip('/')}/{row}" if is_uri(base) else os.path.join(os.path.abspath(base), row)


def _lines(one: str) -> Iterator[str]:
    """The lines of a list that are not empty."""
    data = read_uri(one) if is_uri(one) else _local_bytes(one)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"DATA {one} is not text in UTF-8 (byte {error.start})") from error
    # str.splitlines would end lines at characters that names may have, U+2028 and U+0085 say
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if len(line) > _LONGEST_LINE or "\0" in line:
            raise UserError(f"DATA {one}: line {number} is not a path or URI")
        if line.strip():
            yield line


def _local_bytes(one: str) -> bytes:
    try:
        return Path(one).read_bytes()
    except OSError as error:
        raise_trouble(one, error)
        raise UserError(f"DATA {one}: {error.strerror} (check the path)") from error


def _parquet(one: str, column: str | None) -> list[str]:
    """A column of a parquet as text, "" for null."""
    import pyarrow as pa
    from pyarrow import parquet

    if not is_uri(one) and not os.path.isfile(one):
        raise UserError(f"DATA {one}: no such file (check the path)")
    try:
        source = _open_uri(one) if is_uri(one) else open(one, "rb")
        with source:
            file = parquet.ParquetFile(source)
            schema = file.schema_arrow
            text = [field.name for field in schema if _is_text(pa, field.type)]
            column = _choose_column(one, column, schema.names, text)
            values = file.read(columns=[column]).column(0)
            return [value or "" for value in _texts(values, f"{one}: column {column}")]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"DATA {one} is not a whole parquet ({first_line(error)})") from error
    except OSError as error:
        raise _unreadable(one, error) from error


def _texts(values, what: str) -> list[str | None]:
    """A column's values; raises UserError for the first that is not UTF-8, which Parquet does not
    check.
    """
    result: list[str | None] = []
    try:
        for value in values:
            result.append(value.as_py())
    except UnicodeDecodeError as error:
        raise UserError(
            f"DATA {what} is not text in UTF-8 (row {len(result)}, counted from 0): write it again"
        ) from error
    return result


def _is_text(pa, kind) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or "string_view" in str(kind)


def _choose_column(one: str, column: str | None, names: list[str], text: list[str]) -> str:
    if column is None:
        if len(text) == 1:
            return text[0]
        raise UserError(
            f"DATA {one}: say with --column which holds paths or URIs (columns of text: "
            f"{', '.join(text) or 'none'})"
        )
    if column not in names:
        raise UserError(f"--column {column}: {one} has no such column: {suggest(column, names)}")
    if column not in text:
        raise UserError(
            f"--column {column} of {one} is not text (columns of text: {', '.join(text) or 'none'})"
        )
    return column


# ---- fsspec -----------------------------------------------------------------------------------


def _file_system(uri: str):
    """fsspec's file system of a URI and its path there; raises UserError where none can be had."""
    _check_protocol(uri)
    try:
        return file_system_of(uri)
    except Exception as error:  # credentials, addresses: as many kinds as there are systems
        raise _unreadable(uri, error) from error


def read_uri(uri: str) -> bytes:
    """All bytes of a URI; raises UserError for a list that cannot be read."""
    system, path = _file_system(uri)
    try:
        return system.cat_file(path)
    except Exception as error:
        raise _unreadable(uri, error) from error


def _open_uri(uri: str):
    system, path = _file_system(uri)
    try:
        return system.open(path, "rb")
    except Exception as error:
        raise _unreadable(uri, error) from error


def _unreadable(one: str, error: Exception) -> UserError:
    raise_trouble(one, error)
    reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
    return UserError(f"DATA {one} cannot be read: {reason} (check address and credentials)")


def _check_protocols(names: Sequence[str]) -> None:
    """Raise UserError for the first URI of a protocol that fsspec cannot read here."""
    seen = set()
    for name in names:
        if is_uri(name):
            protocol = re.match(r"[^:]+", name)[0]
            if protocol not in seen:
                seen.add(protocol)
                _check_protocol(name)


def _check_protocol(uri: str) -> None:
    from fsspec.registry import get_filesystem_class, known_implementations

    for link in _links(uri):
        protocol, colon, _ = link.partition("://")
        if not colon and not _chains(protocol):
            continue  # a path
        try:
            get_filesystem_class(protocol)
        except ValueError as error:
            near = suggest(protocol, known_implementations)
            raise UserError(f"{uri}: fsspec does not know '{protocol}': {near}") from error
        except ImportError as error:
            hint = known_implementations.get(protocol, {}).get("err") or first_line(error)
            raise UserError(f"{uri}: '{protocol}' needs another package: {hint}") from error

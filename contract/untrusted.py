"""Reading files that may come from anybody: no links, no pipes or devices, no more bytes than
expected, and JSON that has one meaning.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from contract.errors import UserError, first_line

AGAIN = "copy the whole bundle again, or export again"
"""What to do about most files that are not as they should be."""

_MOST_TENSORS = 2**30
"""Bytes of a file of tensors: 20,000 classes of 1,280 numbers have a tenth of that."""


def open_file(path: Path, again: str = AGAIN, links: bool = False) -> BinaryIO:
    """Open a regular file; nothing else is opened, and nothing is waited for.

    Raises UserError, which ends with what to do `again`, for what is missing, cannot be read, or is
    a pipe, a device or a folder; for a link too, unless `links` are followed.
    """
    no_follow = 0 if links else os.O_NOFOLLOW
    try:
        # devices and pipes may act when they are opened, and something else may be there by then
        mode = os.stat(path, follow_symlinks=links).st_mode
        if stat.S_ISREG(mode):
            opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | no_follow)
            file = os.fdopen(opened, "rb")
            if stat.S_ISREG(os.fstat(opened).st_mode):
                return file
            file.close()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {again}") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise UserError(f"{path} cannot be read ({error.strerror}): {again}") from error
        mode = stat.S_IFLNK
    if stat.S_ISLNK(mode):
        raise UserError(
            f"{path} is a link: copy the bundle again with the files themselves, or export again"
        )
    raise UserError(f"{path} is not a regular file: {again}")


def read_file(path: Path, most: int, again: str = AGAIN, links: bool = False) -> bytes:
    """A regular file's bytes; raises UserError as `open_file` does, and for more than `most`."""
    with open_file(path, again, links) as file:
        large = os.fstat(file.fileno()).st_size > most  # before there is memory for it
        data = b"" if large else file.read(most + 1)
    if large or len(data) > most:
        raise UserError(f"{path} has more than {most:,} bytes, which it must not: {again}")
    return data


def parse_json(data: bytes | str) -> Any:
    """JSON in UTF-8; raises ValueError also for a key twice, numbers that are not finite, and
    nesting too deep to read.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_tensors(
    path: Path, data: bytes | None = None, again: str = AGAIN, links: bool = False
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, or of its bytes where they were read already;
    raises UserError for a damaged one.
    """
    data = read_file(path, _MOST_TENSORS, again, links) if data is None else data
    try:
        tensors = load(data)
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # numpy has no name for some of the format's types
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {again}") from error
    return header.get("__metadata__") or {}, tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has the key '{twice[:60]}' twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number

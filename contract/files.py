"""Files that appear whole or not at all, and their hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from contract.errors import UserError


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, flush it to disk and rename it to `path`; the old file
    stays until then.

    Raises UserError (disk full, read-only, …) with nothing but the old file left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        # safetensors makes its files for their owner alone; servers run as somebody else
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's zip writer reports a full disk as RuntimeError, safetensors as its own error
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {str(error).splitlines()[0]} (free some space or choose another "
            "--output; the previous file is untouched)"
        ) from error


def sort_safetensors_metadata(path: Path) -> None:
    """Order the metadata of a safetensors file by key, in place.

    The library writes them in random order, and equal contents would not be equal bytes.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) > length:
            raise RuntimeError(f"{path}: its header grew from {length} to {len(data)} bytes")
        file.seek(8)
        file.write(data.ljust(length))

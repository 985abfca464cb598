"""Files and folders that appear whole or not at all, and files' hashes."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from contract.errors import UserError, first_line

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Of fcntl.h and linux/fs.h, for renameat2(2)."""


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file; nobody waits for a pipe."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    remedy: str = "free some space or choose another --output",
    private: bool = False,
) -> None:
    """Call `write` with a temporary path, flush it to disk and rename it to `path`; the old file
    stays until then.

    A `private` file is never readable by anybody but its owner. Raises UserError (disk full,
    read-only, …) that ends with the `remedy`, with nothing but the old file left behind.
    """
    write_all_atomically({path: write}, remedy, private)


def write_all_atomically(
    files: Mapping[Path, Callable[[Path], object]],
    remedy: str = "free some space or choose another --output",
    private: bool = False,
) -> None:
    """The same for files that belong together: all are on the disk before the first is renamed, in
    order.
    """
    # threads may write the same file; of a process's first one, this is the process's number
    own = threading.get_native_id()
    temporaries = {path: path.with_name(f".{path.name}.{own}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, write in files.items():
            temporary = temporaries[path]
            temporary.unlink(missing_ok=True)
            if private:
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            write(temporary)
            if not private:
                # safetensors makes its files for their owner alone; servers run as somebody else
                temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in files}:
            _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's zip writer reports a full disk as RuntimeError, safetensors as its own error
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write {path}: {reason} ({remedy}; the previous file is untouched)"
        ) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _umask() -> int:
    """What a new file is not allowed. Linux says so; else it can only be learnt by a change, which
    other threads would see.
    """
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^Umask:\s*([0-7]+)$", status, re.M)[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_place(place: Path, what: str) -> None:
    """Raise UserError, which begins with `what`, for a folder that must not be replaced whatever it
    holds: where a file system is mounted, the current and the home folder, and those above them.
    """
    if place.is_mount():
        raise UserError(f"{what} is where a file system is mounted: name a folder inside it")
    for kind, folder in (("current", Path.cwd), ("home", Path.home)):
        with contextlib.suppress(OSError, RuntimeError):  # the folder is gone, or there is none
            if folder().resolve().is_relative_to(place):
                raise UserError(f"{what} is or holds the {kind} folder: name one inside it")


@contextmanager
def new_folder(
    place: Path,
    what: str,
    replaceable: Callable[[], None] | None = None,
    durable: bool = True,
) -> Iterator[Path]:
    """A folder to fill, which becomes `place` when the body ends; nothing of it is left where the
    body fails.

    `place` must not exist or be an empty folder by then. With `replaceable`, which is called at the
    end and raises UserError for what must stay, it may be any folder: the two are exchanged in one
    step, and the old one is deleted. (Where a file system cannot exchange, the old one is
    `.NAME.old` between two renames; `tidy` takes it back.) `durable` folders are on the disk before
    they get their name. Raises UserError, which begins with `what`, where nothing can be written,
    and for a `place` that somebody else has filled meanwhile.
    """
    aside, held = place.with_name(f".{place.name}.{os.getpid()}.tmp"), None
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        try:
            aside.mkdir(parents=True)
            held = _hold(aside)
        except OSError as error:
            raise UserError(f"{what}: cannot make it ({error.strerror}): choose another") from error
        yield aside
        if durable:
            _flush_tree(aside)
        _put(aside, place, what, replaceable)
        if durable:
            _flush(place.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if held is not None:
            os.close(held)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: the new folder is in it
                parent.rmdir()


def tidy(place: Path, disposable: Callable[[Path], bool]) -> None:
    """Take back a folder whose replacement was killed half-way, and remove what other killed
    processes that were to make `place` left.

    `disposable` says whether an old folder beside a new one may be deleted.
    """
    old = _old_of(place)
    if not os.path.lexists(place) and old.is_dir():
        os.rename(old, place)
    elif old.is_dir() and not old.is_symlink() and disposable(old):
        shutil.rmtree(old, ignore_errors=True)
    if not place.parent.is_dir():
        return
    for path in list(place.parent.iterdir()):
        match = re.fullmatch(rf"\.{re.escape(place.name)}\.(\d+)\.tmp", path.name)
        if match and not path.is_symlink() and _abandoned(path, int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _put(aside: Path, place: Path, what: str, replaceable: Callable[[], None] | None) -> None:
    """Give `aside` the name `place`; what was there is then `aside`, or gone."""
    try:
        if replaceable and os.path.lexists(place):
            replaceable()
            if not _exchange(aside, place):
                _rename_twice(aside, place)
        else:
            os.rename(aside, place)  # onto nothing or an empty folder: the system refuses others
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(
                f"{what} was filled by somebody else meanwhile: choose another"
            ) from error
        raise UserError(
            f"{what}: cannot be put in place ({error.strerror}): choose another"
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _rename_twice(aside: Path, place: Path) -> None:
    """Replace `place` by way of `.NAME.old`, which `tidy` takes back if this is killed in
    between.
    """
    old = _old_of(place)
    try:
        os.rename(place, old)
        os.rename(aside, place)
    except BaseException:
        if not os.path.lexists(place):
            os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old_of(place: Path) -> Path:
    """What a folder is called while another takes its place."""
    return place.with_name(f".{place.name}.old")


def _hold(folder: Path) -> int:
    """Lock a folder, so that processes in other containers, where process ids are others, see that
    it is being filled.
    """
    held = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can lock
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def _abandoned(folder: Path, pid: int) -> bool:
    """Whether the process that filled a folder is gone."""
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
            return False
        except ProcessLookupError:
            pass
        except (OSError, OverflowError):
            return False
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    finally:
        os.close(held)
    return True


def _flush_tree(folder: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(Path(root, name))
        _flush(Path(root))


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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

"""The folder a bundle goes to: what may be replaced, and how the new bundle appears in one step,
whole or not at all.

It is written into `.NAME.PID.tmp` beside its place and then exchanged with what is there. Where a
file system cannot exchange, the old bundle is `.NAME.old` between two renames. What a killed export
left is put in order by the next one.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from contract.errors import Stopped, UserError
from contract.manifest import MANIFEST, entries, strangers

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of fcntl.h and linux/fs.h, for renameat2(2)."""


def check_output(output: Path, force: bool, read: Mapping[str, Path]) -> Path:
    """Where `--output` leads, links followed, and tidied up after a killed export.

    `read` are folders and files that the export reads, by what to call them. Raises UserError for
    an output that is or holds one of them, and for one that holds files: any without `force`, and
    even so any that are no bundle's.
    """
    try:
        place = output.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--output {output}: its links lead nowhere ({error}): choose another"
        ) from error
    for name, path in read.items():
        if path.resolve().is_relative_to(place):
            verb = "is" if path.resolve() == place else "holds"
            raise UserError(
                f"--output {output} {verb} {name} {path}, which is read: choose another"
            )
    if place.is_mount():
        raise UserError(
            f"--output {output} is where a file system is mounted: name a folder inside it"
        )
    try:
        tidy(place)
        check_replaceable(output, place, force)
    except OSError as error:
        raise UserError(
            f"--output {output}: {error.filename or place}: {error.strerror}: choose another"
        ) from error
    return place


def check_replaceable(output: Path, place: Path, force: bool) -> None:
    """Raise UserError for an output that is a file, or a folder whose files must stay."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    if result := stranger(place):
        raise UserError(
            f"--output {output} holds {result}, which is no part of a bundle: move it away, or "
            "choose another"
        )
    if any(place.iterdir()) and not force:
        raise UserError(
            f"--output {output} already holds files: add --force to replace it, or choose another"
        )


def stranger(folder: Path) -> str:
    """The first thing in a folder that no manifest there lists, "" for an empty folder and for a
    bundle of any format.
    """
    present, listed = entries(folder), []
    if stat.S_ISREG(present.get(MANIFEST, 0)):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            manifest = json.loads((folder / MANIFEST).read_bytes())
            listed = [MANIFEST, *manifest["files"].keys()] if manifest["seal"] else []
    odd = [name for name, mode in present.items() if name in listed and not stat.S_ISREG(mode)]
    if MANIFEST in present and not listed:
        odd.append(MANIFEST)
    return next(iter([*strangers(present, listed), *odd]), "")


@contextmanager
def appearing(output: Path, place: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `place` at the end; where the body fails or is stopped,
    nothing is left of it.

    SIGTERM and SIGHUP stop the body as Ctrl-C does. Raises UserError where nothing can be written,
    and where `place` has been filled by somebody else meanwhile.
    """
    aside, held = place.with_name(f".{place.name}.{os.getpid()}.tmp"), None
    made = [parent for parent in place.parents if not parent.exists()]
    with stoppable():
        try:
            try:
                aside.mkdir(parents=True)
                held = hold(aside)
            except OSError as error:
                raise UserError(
                    f"--output {output}: cannot make it ({error.strerror}): choose another"
                ) from error
            yield aside
            flush(aside)
            put(output, aside, place, force)
            made = []
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if held is not None:
                os.close(held)
            with contextlib.suppress(OSError):
                for parent in made:
                    parent.rmdir()


def put(output: Path, aside: Path, place: Path, force: bool) -> None:
    """Give `aside` the name `place`; what was there is then `aside`, or gone. Raises UserError
    where it cannot.
    """
    try:
        if force and os.path.lexists(place):
            check_replaceable(output, place, force)
            if not exchange(aside, place):
                rename_twice(aside, place)
        else:
            os.rename(aside, place)  # onto nothing or an empty folder: the system refuses others
        flush_folder(place.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(
                f"--output {output} was filled by somebody else meanwhile: choose another"
            ) from error
        raise UserError(
            f"--output {output}: cannot be put in place ({error.strerror}): choose another"
        ) from error


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def rename_twice(aside: Path, place: Path) -> None:
    """Replace `place` by way of `.NAME.old`, which `tidy` takes back if this is killed in
    between.
    """
    old = old_of(place)
    try:
        os.rename(place, old)
        os.rename(aside, place)
    except BaseException:
        if not os.path.lexists(place):
            os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def old_of(place: Path) -> Path:
    """What a bundle is called while another takes its place."""
    return place.with_name(f".{place.name}.old")


def tidy(place: Path) -> None:
    """Take back a bundle whose replacement was killed half-way, and remove what other killed
    exports to `place` left.
    """
    old = old_of(place)
    if not os.path.lexists(place) and old.is_dir():
        os.rename(old, place)
    elif old.is_dir() and not old.is_symlink() and not stranger(old):
        shutil.rmtree(old, ignore_errors=True)
    if not place.parent.is_dir():
        return
    for path in list(place.parent.iterdir()):
        match = re.fullmatch(rf"\.{re.escape(place.name)}\.(\d+)\.tmp", path.name)
        if match and not path.is_symlink() and abandoned(path, int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def hold(folder: Path) -> int:
    """Lock a folder, so that exports in other containers, where process ids are others, see that it
    is being filled.
    """
    held = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system can lock
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def abandoned(folder: Path, pid: int) -> bool:
    """Whether the export that filled a folder is gone."""
    if pid != os.getpid():
        try:
            os.kill(pid, 0)
            return False
        except ProcessLookupError:
            pass
        except (OSError, OverflowError):
            return False
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    finally:
        os.close(held)
    return True


def flush(folder: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(root))


def flush_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise, so that what follows is tidied up as after Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    numbers = (
        (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    changed = [
        number for number in numbers if signal.getsignal(number) is signal.SIG_DFL
    ]  # nohup's stays
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)

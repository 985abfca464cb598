"""One process at a time in a folder: a lock that the system drops when its holder ends, however."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contract.errors import UserError

log = logging.getLogger(__name__)

CLAIM = ".claim"
"""File in a claimed folder, with what is known of its holder as JSON."""

_REMEDY = "wait for it or stop it, or choose another --output"
_OTHER = "choose another --output"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def claimed(folder: Path, doing: str, remedy: str = _REMEDY, other: str = _OTHER) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, until the body ends; nothing is left of an
    empty one that was made.

    Raises UserError, naming the holder and a `remedy`, if another process (of any machine that
    shares the file system) holds it; for a folder that cannot be made or written to, for which
    `other` is the remedy; and for a claim that is a link or anything but a file.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    held = None
    try:
        held = _take(folder, doing, remedy, other)
        yield
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                # before the lock goes: a new holder makes a new file. Another folder may have taken
                # this one's place, with a holder of its own
                if os.lstat(folder / CLAIM).st_ino == os.fstat(held).st_ino:
                    (folder / CLAIM).unlink()
            os.close(held)
        for place in made:
            with contextlib.suppress(OSError):  # not empty: there is a run in it
                place.rmdir()


def is_free(folder: Path) -> bool:
    """Whether a folder is missing or has nothing but a claim."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name == CLAIM for path in folder.iterdir())


def _take(folder: Path, doing: str, remedy: str, other: str) -> int:
    """Descriptor of the locked file."""
    path = folder / CLAIM
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = os.open(path, _FLAGS, 0o666)
        except FileNotFoundError:
            continue  # somebody who made the folder, and had to give up, has just removed it
        except OSError as error:
            if _is_in_the_way(path):
                raise UserError(f"{path} is not a regular file: move it away") from error
            what = path if folder.is_dir() else folder
            raise UserError(f"cannot create {what}: {error.strerror} ({other})") from error
        if not stat.S_ISREG(os.fstat(held).st_mode):
            os.close(held)
            raise UserError(f"{path} is not a regular file: move it away")
        try:
            # a record lock: forked workers that outlive a killed process do not inherit it
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = _holder(held)
                os.close(held)
                raise UserError(f"{folder} is in use by {holder}: {remedy}") from error
            log.warning("%s: its file system cannot lock (%s)", folder, error.strerror)
        # whoever held it may have removed the file after it was opened here
        try:
            same = os.lstat(path).st_ino == os.fstat(held).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(held)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "doing": doing}
    about["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk is reported by what is written next
        os.truncate(held, 0)
        os.pwrite(held, json.dumps(about).encode(), 0)
    return held


def _is_in_the_way(path: Path) -> bool:
    """Whether there is something that is not a file: what it leads to may not be written to."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _holder(held: int) -> str:
    """Who holds the lock, in words."""
    try:
        about = json.loads(os.pread(held, 4096, 0))
        return (
            f"process {about['pid']} on {about['host']} ({about['doing']} since {about['since']})"
        )
    except (OSError, ValueError, KeyError, TypeError):  # it has not written it yet
        return "another process"

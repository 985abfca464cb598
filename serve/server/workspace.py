"""The temporary folder of a `serve.run`: private, and swept by a later start where its process was
killed.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.server.orphans import end_orphans

WORKSPACE = "serve-run-"
"""Prefix of the folders' names."""

REPOSITORY = "repository"
"""Name of a repository that is not kept, in its workspace."""

_LOCK = "lock"


@contextlib.contextmanager
def make_workspace(log: Callable[[str], None]) -> Iterator[Path]:
    """A temporary folder of this process alone, which is gone afterwards, as are those of this
    user's killed runs, whose locks are free, and the servers they left.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{WORKSPACE}*"):
        _remove_abandoned(old, log)
    with tempfile.TemporaryDirectory(prefix=WORKSPACE) as folder:
        new = Path(folder) / f"{_LOCK}.new"
        held = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            # locked before it has the name at which other starts look
            fcntl.flock(held, fcntl.LOCK_EX)
            new.rename(Path(folder) / _LOCK)
            yield Path(folder)
        finally:
            os.close(held)


def _remove_abandoned(folder: Path, log: Callable[[str], None]) -> None:
    """Delete a folder of a killed run. Anybody may put something of such a name there: what is not
    as `make_workspace` makes it is neither opened nor waited for.
    """
    with contextlib.suppress(OSError):  # another user's, or gone
        about = folder.lstat()
        private = stat.S_ISDIR(about.st_mode) and stat.S_IMODE(about.st_mode) == 0o700
        if not private or about.st_uid != os.getuid():
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        held = os.open(folder / _LOCK, flags)
        try:
            if stat.S_ISREG(os.fstat(held).st_mode):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a run that lives
                end_orphans(folder / REPOSITORY, log)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)

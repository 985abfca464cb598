"""Processes of this machine, as /proc tells of them; none where there is no /proc."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def command_line(pid: int) -> list[str]:
    """The words a process was started with; none for a zombie, or one that is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def processes() -> Iterator[int]:
    """Ids of this user's processes, without this one."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if path.stat().st_uid == os.geteuid() and int(path.name) != os.getpid():
                yield int(path.name)

"""The stub processes of Triton's python backend, one an instance of a model: which are alive, and
what they leave behind.

Triton does not say that one died (its model stays READY and every k-th request fails), so they are
looked at from outside. Linux's /proc is read; where a Triton starts them in another way, none are
found and nothing is concluded from that.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from serve.repository.processes import command_line

_STUB = "triton_python_backend_stub"
_REGION = "triton_python_backend_shm_region_"
SHARED_MEMORY = Path("/dev/shm")


class Stub(NamedTuple):
    """A living stub process, the version of a model that it runs, and its region in shared
    memory.
    """

    pid: int
    model: str
    version: str
    region: str


def find_stubs(server_pid: int) -> list[Stub]:
    """Living stub processes of a tritonserver. One that was killed stays a zombie, which has no
    command line.
    """
    return [stub for pid in _children(server_pid) if (stub := _read_stub(pid))]


def _read_stub(pid: int) -> Stub | None:
    """A process as a stub: `triton_python_backend_stub REPOSITORY/MODEL/VERSION/model.py REGION …`;
    None if it is none.
    """
    words = command_line(pid)
    if len(words) < 3 or Path(words[0]).name != _STUB or not words[2].startswith(_REGION):
        return None
    folder = Path(words[1]).parent
    return Stub(pid, folder.parent.name, folder.name, words[2])


def is_stub_of(words: list[str], repository: Path) -> bool:
    """Whether a command line is that of a stub process on a repository."""
    return (
        len(words) > 2
        and Path(words[0]).name == _STUB
        and Path(words[1]).parent.parent.parent == repository
    )


def _children(pid: int) -> Iterator[int]:
    """Ids of the processes that a process has started."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for thread in threads:
        with suppress(OSError, ValueError):  # threads end
            yield from map(int, (thread / "children").read_text().split())


def remove_regions(names: Iterable[str]) -> None:
    """Remove shared memory of stubs that are gone: tritonserver does so only for those that it
    ended itself.
    """
    for name in names:
        with suppress(OSError):
            (SHARED_MEMORY / name).unlink()


def remove_stale_regions() -> None:
    """Remove this user's regions that no process has open: left by servers that were killed."""
    ours = {path.name for path in SHARED_MEMORY.glob(f"{_REGION}*") if _owned(path)}
    for _ in range(2):
        if not (ours := ours - _used_regions()):
            return
        time.sleep(0.1)  # a server that starts now may have made one and not opened it yet
    remove_regions(ours)


def _used_regions() -> set[str]:
    result: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            result |= {Path(line.split()[-1]).name for line in lines if _REGION in line}
    return result


def _owned(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_uid == os.getuid()
    return False

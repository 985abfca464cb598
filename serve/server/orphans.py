"""Processes that a killed serve.run has left on a repository: found by their command line, ended by
their id.

They end by themselves (serve/server/child.py), but a tritonserver that still answers what it has
accepted holds its ports until then, and the next start need not wait for it.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from contract.errors import UserError
from serve.repository.processes import command_line, processes
from serve.repository.state import read_state
from serve.server.activity import read_stat
from serve.server.stubs import find_stubs, is_stub_of

_OWNER = "SERVE_RUN_OWNER"
"""In tritonserver's environment: the process that started it, as its id and when that began, since
ids are used again.
"""
FRONT = "serve.server.front"
"""The module that a front runs."""
_END_SECONDS = 10.0
"""A killed process is gone within a moment, unless it waits for a disk."""


def owner() -> dict[str, str]:
    """Environment by which a child can be told from an orphan later."""
    return {_OWNER: f"{os.getpid()}:{_began(os.getpid())}"}


def end_orphans(repository: Path, log: Callable[[str], None]) -> None:
    """End tritonserver and its processes where the serve.run that started them on a repository is
    gone, and wait until their ports are free.

    Raises UserError if it is not gone. Processes of other users, and those that serve.run has not
    started, are left alone.
    """
    folder = repository.resolve()
    ended = []
    for pid in processes():
        words = command_line(pid)
        if f"--model-repository={folder}" in words and Path(words[0]).name == "tritonserver":
            pid_of_owner, alive = _owner_of(pid)
            if not pid_of_owner:
                continue
            if alive:
                state = read_state(repository)
                where = f", gRPC on {state.grpc}" if state else ""
                raise UserError(
                    f"--repository {repository} is served by process {pid_of_owner}{where}: stop "
                    "it first"
                )
            log(
                f"ending tritonserver {pid}, which serve.run {pid_of_owner} left when it was killed"
            )
            stubs = [stub.pid for stub in find_stubs(pid)]
            _kill(pid)
            ended += [pid, *stubs]
        elif is_stub_of(words, folder) and not _has_server(pid):
            ended.append(pid)
        elif FRONT in words:
            pid_of_owner, alive = _owner_of(pid)
            if pid_of_owner and not alive:
                ended.append(pid)
    for pid in ended:
        _kill(pid)
    deadline = time.monotonic() + _END_SECONDS
    # its command line goes before its ports do
    while any(_began(pid) for pid in ended) and time.monotonic() < deadline:
        time.sleep(0.05)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _has_server(pid: int) -> bool:
    """Whether a stub's parent is a tritonserver."""
    with suppress(IndexError, ValueError):
        words = command_line(int(read_stat(Path(f"/proc/{pid}/stat"))[1]))
        return bool(words) and Path(words[0]).name == "tritonserver"
    return False


def _owner_of(pid: int) -> tuple[str, bool]:
    """Id of the process that started one, "" where it was not a serve.run; and whether it lives."""
    owner_pid, _, began = _read_owner(pid).partition(":")
    return (owner_pid, _began(int(owner_pid)) == began) if began else ("", False)


def _read_owner(pid: int) -> str:
    """The value of `owner` in a process's environment, "" if it has none."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = entry.decode(errors="replace").partition("=")
            if name == _OWNER:
                return value
    return ""


def _began(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" if it is gone, or waits to be reaped."""
    with suppress(IndexError):
        fields = read_stat(Path(f"/proc/{pid}/stat"))
        return "" if fields[0] in "ZX" else fields[19]
    return ""

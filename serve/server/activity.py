"""Whether a process is at work, as Linux's /proc shows it: processor time that it uses, threads
that wait for a processor or a disk. One that is starved by others is at work; one that was stopped,
or waits for a lock, is not.
"""

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE_SHARE = 0.01
"""Of one core: what timers of an idle process take is a hundredth of this."""


class Activity:
    """When a group of processes was last seen at work: `since`, in seconds of `now`'s clock."""

    def __init__(self, now: float) -> None:
        self.since = now
        self._used: dict[int, int] = {}

    def idle(self, pids: Iterable[int], now: float) -> float:
        """Seconds for which none of these processes was seen at work; the group may change. Looks
        should be frequent: a thread that waits for a processor is seen only while it waits.
        """
        used = {pid: ticks for pid in pids if (ticks := _ticks(pid)) >= 0}
        for pid in used:
            self._used.setdefault(pid, used[pid])
        spent = sum(ticks - self._used[pid] for pid, ticks in used.items())
        if spent > max(1, _IDLE_SHARE * _TICKS * (now - self.since)) or any(map(is_awake, used)):
            self.since, self._used = now, used
        return now - self.since


def main_thread_ns(pid: int) -> int | None:
    """Processor time of a process's first thread in nanoseconds; None where the kernel does not
    count it, or the process is gone.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that processes have used so far."""
    return sum(max(0, _ticks(pid)) for pid in pids) / _TICKS


def is_awake(pid: int) -> bool:
    """Whether a thread of a process runs, or waits for a processor or a disk."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False
    return any((read_stat(thread / "stat") or ["S"])[0] in "RD" for thread in threads)


def _ticks(pid: int) -> int:
    """Processor time of all threads, -1 for a process that is gone."""
    fields = read_stat(Path(f"/proc/{pid}/stat"))
    return int(fields[11]) + int(fields[12]) if fields else -1


def read_stat(path: Path) -> list[str]:
    """The fields after the command's name, of which the first is the state; none for a process or
    thread that is gone.
    """
    try:
        return path.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []

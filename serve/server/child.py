"""A child process that does not outlive this one, however this one ends."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_LAUNCH = """\
exec 3<&0 </dev/null
{
  read -r _
  kill -s TERM $$
  left=$1
  while [ "$left" -gt 0 ] && kill -0 $$; do sleep 1; left=$((left - 1)); done
  kill -s KILL -- -$$
} <&3 >/dev/null 2>&1 &
shift
exec "$@" 3<&-
"""
"""The shell becomes the command. Its watcher waits for the end of a pipe whose other end this
process holds, and stays in the group, so that it ends with it. A signal at the parent's death
(PR_SET_PDEATHSIG) would be a single one, to one process of the group, and lost where the command
hangs in its exit handlers.
"""


class Child(subprocess.Popen):
    """A command in a process group of its own, without standard input.

    If this process ends without `end`, even by SIGKILL, the command gets SIGTERM; after `grace`
    seconds, or as soon as it has ended, whatever is left of its group gets SIGKILL. Ctrl-C in a
    terminal does not reach it. Other arguments are Popen's. Raises OSError as Popen does for the
    shell; a command that cannot be run ends with status 126 or 127.
    """

    def __init__(self, command: Sequence[str], grace: int, **options: Any) -> None:
        theirs, self._held = os.pipe()
        try:
            super().__init__(
                ["/bin/sh", "-c", _LAUNCH, "child", str(grace), *command],
                stdin=theirs,
                start_new_session=True,
                **options,
            )
        except BaseException:
            os.close(self._held)
            raise
        finally:
            os.close(theirs)

    def end(self) -> None:
        """Kill what is left of the group at once, and wait for it; may be called twice."""
        if self._held < 0:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        os.close(self._held)
        self._held = -1

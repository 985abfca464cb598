"""The front of a server (serve.server.front) as a child process: start, start again when it dies,
and its end before tritonserver's.
"""

import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from contract.errors import UserError
from serve.errors import ServerError
from serve.server.child import Child
from serve.server.front import READY, FrontOptions
from serve.server.launch import Options
from serve.server.orphans import FRONT, owner

_START_SECONDS = 30.0
_LONGEST_PAUSE = 8.0
"""Between two starts of a front that keeps dying; the first follows at once."""
_STEADY_SECONDS = 60.0
_SILENT_SECONDS = 30.0
"""The front says something every two seconds."""
_ROOT = Path(__file__).resolve().parents[2]

_ARGUMENTS = {
    "grpc-keepalive-time": "grpc.keepalive_time_ms",
    "grpc-keepalive-timeout": "grpc.keepalive_timeout_ms",
    "grpc-keepalive-permit-without-calls": "grpc.keepalive_permit_without_calls",
    "grpc-http2-max-pings-without-data": "grpc.http2.max_pings_without_data",
    "grpc-http2-min-recv-ping-interval-without-data": (
        "grpc.http2.min_ping_interval_without_data_ms"
    ),
    "grpc-http2-max-ping-strikes": "grpc.http2.max_ping_strikes",
    "grpc-max-connection-age": "grpc.max_connection_age_ms",
    "grpc-max-connection-age-grace": "grpc.max_connection_age_grace_ms",
}
"""tritonserver's flags for connections with clients, which are the front's, by gRPC's names."""
_COMPRESSION = "grpc-infer-response-compression-level"


class Front:
    """A running front. `start` returns when it listens; `drain` and `stop` end it.

    One thread starts it, passes its log on and starts it again.
    """

    def __init__(
        self,
        options: FrontOptions,
        log: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        """`ended` is called once, when it was told to stop and has ended; `restarted` whenever
        another process took its place.
        """
        self.options, self.log, self.ended, self.restarted = options, log, ended, restarted
        self.process: Child | None = None
        self.stopping = False
        self._ready, self._lines = threading.Event(), []
        self._lock = threading.Lock()
        self._listening: Child | None = None
        """The process that said so, and takes signals: a younger one would end by them."""
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def start(self) -> None:
        """Raises ServerError with the front's last line if it does not listen."""
        self._thread.start()
        end = time.monotonic() + _START_SECONDS
        while not self._ready.wait(0.05):
            if not self._thread.is_alive() or time.monotonic() > end:
                self.stop()
                why = self._lines[-1] if self._lines else "no reason given"
                raise ServerError(f"the front does not start: {why}")

    def hold(self, held: bool) -> None:
        """Refuse all requests as while tritonserver is being started again, or let them in."""
        with self._lock:
            self.options = replace(self.options, held=held)
            self._tell()

    def _tell(self) -> None:
        """Tell a front that listens what is wanted; one that is being started hears it then."""
        if self._listening is not None:
            with suppress(ProcessLookupError):
                self._listening.send_signal(signal.SIGUSR1 if self.options.held else signal.SIGUSR2)

    def drain(self) -> None:
        """Refuse new requests and end when those in hand are answered. Safe in a signal handler."""
        self.stopping = True
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def stop(self) -> bool:
        """End it now; whether it had answered everything."""
        self.stopping = True
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.kill()
        self._thread.join(5)
        return self.process is None or self.process.returncode == 0

    def _run(self) -> None:
        pause = 0.0
        try:
            while not self.stopping:
                began = time.monotonic()
                try:
                    self._run_once()
                    status = self.process.returncode
                    how = f"signal {-status}" if status < 0 else f"exit status {status}"
                except OSError as error:  # no memory, no room for another process
                    how = str(error)
                    self._lines = [how]
                if self.stopping or not self._ready.is_set():
                    return
                self._say(f"front: it ended ({how}): starting it again in {pause:.0f} s")
                until = time.monotonic() + pause
                while time.monotonic() < until and not self.stopping:
                    time.sleep(0.05)
                steady = time.monotonic() - began > _STEADY_SECONDS
                pause = 0.0 if steady else min(_LONGEST_PAUSE, 2 * pause or 0.5)
        finally:
            if self.stopping:
                self.ended()

    def _say(self, line: str) -> None:
        # whatever becomes of the log, the front goes on
        with suppress(OSError):
            self.log(line)

    def _run_once(self) -> None:
        """Start it and pass its log on until it ends."""
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self.process = Child(
            [sys.executable, "-m", FRONT, self.options.to_json()],
            math.ceil(self.options.exit_seconds),
            env=os.environ | {"PYTHONPATH": path} | owner(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        if self.stopping:  # told so meanwhile
            self.drain()
        try:
            with self.process.stdout as stream:
                for line in filter(None, self._read_lines(stream)):
                    if line == READY:
                        self._listens()
                    else:
                        self._lines = [line]
                        self._say(line)
        finally:
            with self._lock:
                self._listening = None
        self.process.wait()
        self.process.end()

    def _listens(self) -> None:
        """It has said so: tell it what may have changed since it was given its options."""
        with self._lock:
            self._listening = self.process
            self._tell()
        if self._ready.is_set():
            self.restarted()
        self._ready.set()

    def _read_lines(self, stream: IO[bytes]) -> Iterator[str]:
        """Lines of its log until it ends. A front that says nothing for long is stuck: it is
        killed, and so started again.
        """
        start = b""
        while True:
            if not select.select([stream], [], [], _SILENT_SECONDS)[0]:
                self._say(f"front: no sign of life for {_SILENT_SECONDS:.0f} s: ending it")
                self.process.kill()
            data = stream.read(1 << 16)
            *lines, start = (start + data).split(b"\n")
            yield from (line.decode(errors="replace").rstrip() for line in lines)
            if not data:
                return


def front_options(options: Options, listen: str, upstream: str) -> FrontOptions:
    """A front for clients of a server with these options."""
    _, arguments, compression = split_flags(options.extra)
    result = FrontOptions(
        listen=listen,
        upstream=upstream,
        arguments=arguments,
        compression=compression,
        exit_seconds=options.exit_seconds,
    )
    if options.tls is None:
        return result
    key, certificate, root = (
        str(path.absolute()) if path else ""
        for path in (options.tls.key, options.tls.certificate, options.tls.root)
    )
    return replace(result, key=key, certificate=certificate, root=root)


def split_flags(flags: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int], str]:
    """tritonserver's flags without those of connections with clients; these as gRPC's channel
    arguments; and the compression of answers. Raises UserError for values that are not numbers.
    """
    left, arguments, compression = [], {}, "none"
    words = iter(flags)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (*_ARGUMENTS, _COMPRESSION):
            left.append(word)
            continue
        value = value if equals else next(words, "")
        if name == _COMPRESSION:
            compression = "none" if value == "none" else "gzip"
            continue
        try:
            arguments[_ARGUMENTS[name]] = int({"true": "1", "false": "0"}.get(value, value))
        except ValueError:
            raise UserError(f"-- --{name}={value}: give a whole number") from None
    return tuple(left), arguments, compression

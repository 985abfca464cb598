"""A tritonserver on a model repository: start, wait until ready, pass on its log, drain, and stop
at the end.
"""

import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from contract.errors import UserError
from serve.errors import ServerError
from serve.repository.state import GoldenState, State, remove_state, write_state
from serve.server.activity import Activity
from serve.server.child import Child
from serve.server.front import FrontOptions
from serve.server.front_process import Front, front_options, split_flags
from serve.server.launch import (
    RESTRICTED,
    Options,
    Tls,
    choose_ports,
    command_line,
    inner_address,
    is_loopback,
    listen,
)
from serve.server.loading import load_rest, one_line
from serve.server.orphans import owner
from serve.server.rest import Rest
from serve.server.stubs import find_stubs, remove_regions
from serve.server.triton import Tritonserver

__all__ = ["RESTRICTED", "Options", "Server", "Tls"]

_NOISE = re.compile(
    "CUDA driver version is insufficient|CUDA memory pool disabled|CudaDriverHelper has not been "
    "initialized|[Pp]inned (system )?memory|unable to create stream for|Failed to initialize "
    "NVML|DCGM|GPU metrics|Unable to get number of CUDA devices"
)
"""What tritonserver says on every machine without a GPU."""

_DRAINED = "All models are stopped"
"""Triton's log when every request that it accepted has been answered; what follows is unloading."""

_STARTS = 3
_CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""On a machine that is very busy, Triton 2.51's python backend now and then aborts while it starts
its processes (boost's lock_exception; server#8882): another start is made then, as the supervisor
does later.
"""

_HANG_SECONDS = 30.0
"""A start hangs in which nothing was logged and no process did anything for so long."""

_LOOK_SECONDS = 0.5

_UNLOAD_SECONDS = 5.0
"""For unloading, which never ends where a backend was killed."""

_WORK_SECONDS = 1.0
"""A process that did something so shortly before the end has not answered its request."""

_MESSAGE = re.compile(
    r"^((?P<level>[EWIF])\d{4} [\d:.]+|\d{4}-\d\d-\d\dT[\d:.]+Z (?P<iso>[EWIF])) +\d+ "
    r"[\w.]+:\d+\] +"
    r'"?(?P<text>.*?)"? *$'
)
"""A line of Triton's log in either of its formats: level and time, thread, place, message."""


class _Hang(ServerError):
    """A start that was cut because nothing happened."""


class Server:
    """One tritonserver process; `start`, then `stop`. It does not outlive this process."""

    def __init__(
        self,
        tritonserver: Tritonserver,
        repository: Path,
        options: Options,
        log: Callable[[str], None],
    ) -> None:
        self.tritonserver, self.repository, self.options, self.log = (
            tritonserver,
            repository.resolve(),
            options,
            log,
        )
        self.admin_key = secrets.token_urlsafe(24)
        self.restarts: dict[str, int] = {}
        self.server_restarts = 0
        self.process: Child | None = None
        self.narrowed: dict[str, str] = {}
        """Configurations of models of which a version had to be left out."""
        self.regions: set[str] = set()
        """Shared memory of stub processes; tritonserver does not remove that of those that were
        killed.
        """
        self.saving = threading.Lock()
        self.unsaved = False
        """Whether the state file is older than the counts, because its disk was full."""
        self.front: Front | None = None
        self.message_bytes = FrontOptions.message_bytes
        """Of a request, at most, where there is a front."""
        self.front_requests = FrontOptions.requests
        """That a front lets in at once."""
        self._inner = inner_address(options.front) if options.front else None
        """Where tritonserver answers gRPC behind a front: host or unix:PATH, and port."""
        self.check: Callable[[Rest], GoldenState] | None = None
        """Asked of every tritonserver before clients are let in; raises ServerError to keep them
        out.
        """
        self.golden: GoldenState | None = None
        """What came of it."""
        self.stopping = False
        self._ready = False
        self._drained = 0.0
        self._errors: list[str] = []
        self._complaints: list[str] = []
        self._heard = 0.0
        self._last = ""
        """The last line of the log, and when it came."""
        names = ("grpc", "http", "metrics")
        self.ports = choose_ports(
            {name: getattr(options, f"{name}_port") for name in names}, options.host
        )

    @property
    def grpc(self) -> str:
        """Where gRPC is answered, as an address for clients on this machine."""
        return self.address("grpc")

    @property
    def http(self) -> str:
        return self.address("http")

    @property
    def metrics(self) -> str:
        return self.address("metrics")

    def address(self, name: str) -> str:
        """HOST:PORT to connect to from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host_of(name), self.host_of(name))
        return f"[{host}]:{self.ports[name]}" if ":" in host else f"{host}:{self.ports[name]}"

    def host_of(self, name: str) -> str:
        """The address an endpoint listens on. HTTP has no TLS: where gRPC has it, HTTP is for this
        machine alone; so are HTTP and metrics of the embedded server, which is not patched.
        """
        private = (name == "http" and self.options.tls) or (
            name != "grpc" and self.tritonserver.embedded and not is_loopback(self.options.host)
        )
        return "127.0.0.1" if private else self.options.host

    @property
    def rest(self) -> Rest:
        return Rest(self.http, self.admin_key)

    @property
    def command(self) -> list[str]:
        listening = {name: (self.host_of(name), port) for name, port in self.ports.items()}
        options = self.options
        if self._inner:  # TLS and what else concerns clients' connections is the front's
            listening["grpc"] = self._inner
            options = options.model_copy(
                update={"tls": None, "extra": split_flags(options.extra)[0]}
            )
        return command_line(self.tritonserver, self.repository, options, listening, self.admin_key)

    def start(self) -> float:
        """Start and wait until every model answers; returns the seconds it took.

        Raises UserError for ports that are in use, ServerError with tritonserver's first reason if
        it does not come up.
        """
        self.check_ports()
        began = time.monotonic()
        if self.front:
            self.front.hold(True)
        for left in reversed(range(_STARTS)):
            try:
                self.start_once()
                break
            except BaseException as error:
                if self.process is None:
                    raise
                if isinstance(error, OSError):  # the connection broke: the process is about to end
                    with suppress(subprocess.TimeoutExpired):
                        self.process.wait(2)
                status = self.process.poll()
                self.kill()
                if isinstance(error, OSError) and status is None:
                    error = ServerError(f"tritonserver did not answer while it started ({error})")
                    again = "gave no answer"
                elif isinstance(error, _Hang):
                    again = f"did nothing for {_HANG_SECONDS:.0f} s"
                elif status in _CRASHES:
                    again = f"crashed while it started (signal {-status})"
                else:
                    raise
                if self.stopping or not left:
                    raise error
                self.log(f"tritonserver {again}: starting it again")
        if self.check:
            self.golden = self.check(self.rest)
        if self.front:
            self.front.hold(False)
        elif self._inner:
            self._start_front()
        if self._ready:
            self.try_save()
        else:
            self.save()  # a start that nobody could find is a mistake; a restart is not given up
        self._ready = True
        return time.monotonic() - began

    def _start_front(self) -> None:
        """Listen for clients, in front of a tritonserver that is ready."""
        host = self.host_of("grpc")
        outer = f"[{host}]:{self.ports['grpc']}" if ":" in host else f"{host}:{self.ports['grpc']}"
        inner = f"{self._inner[0]}:{self._inner[1]}"
        self.front = Front(
            replace(
                front_options(self.options, outer, inner),
                message_bytes=self.message_bytes,
                requests=self.front_requests,
                bytes=max(FrontOptions.bytes, 4 * self.message_bytes),
            ),
            self.log,
            self.end_tritonserver,
            self.try_save,
        )
        self.front.start()

    def start_once(self) -> None:
        """Launch tritonserver and wait until every model answers."""
        self._errors, self._complaints, self._drained = [], [], 0.0
        self._heard = time.monotonic()
        self.process = Child(
            self.command,
            self.options.exit_seconds,
            env={**os.environ, **self.tritonserver.environment, **owner()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(
            target=self.pass_on, args=(self.process.stdout,), daemon=True
        )
        self._reader.start()
        self.wait_ready(time.monotonic() + self.options.start_seconds)
        self.narrowed = load_rest(self.rest, self.repository, self.log)

    def check_ports(self) -> None:
        """Raise UserError for a port that something listens on: tritonserver finds out only after
        loading all models.
        """
        for name, port in self.ports.items():
            if name != "grpc" or self.front is None:
                listen(f"--{name}-port", self.host_of(name), port).close()

    def wait_ready(self, deadline: float) -> None:
        """Return when the server says READY; raises ServerError if it ends before, or is not by the
        deadline.
        """
        activity, idle, look = Activity(time.monotonic()), 0.0, 0.0
        while not self.rest.ready():
            if self.process.poll() is not None:
                raise self.explain_end()
            if self.stopping:
                raise ServerError("stopped before it was ready")
            now = time.monotonic()
            if now > deadline:
                raise ServerError(
                    f"tritonserver was not ready within {self.options.start_seconds:.0f} s "
                    "(--start-timeout gives it more)"
                )
            if now > look:
                look = now + _LOOK_SECONDS
                pids = [self.process.pid, *(stub.pid for stub in find_stubs(self.process.pid))]
                idle = min(activity.idle(pids, now), now - self._heard)
            if idle > _HANG_SECONDS:
                raise _Hang(
                    f"tritonserver hung {_STARTS} times while it started: "
                    f"{one_line(self._last) or 'it logged nothing'}"
                )
            time.sleep(0.05)

    def pass_on(self, stream: TextIO) -> None:
        """Pass the log on line by line, without GPU complaints on machines without one."""
        begun = False
        with stream:
            for line in map(str.rstrip, stream):
                self._heard, self._last = time.monotonic(), line
                message = _MESSAGE.match(line)
                begun = begun or message is not None
                if not begun:  # before the log begins: an error about flags, then its help
                    self._complaints.append(line)
                    continue
                if not self.options.gpu and _NOISE.search(line):
                    continue
                if _DRAINED in line:
                    self._drained = time.monotonic()
                if message and (message["level"] or message["iso"]) in "EF":
                    self._errors.append(message["text"])
                # whatever becomes of the log, tritonserver must not wait for a reader
                with suppress(OSError):
                    self.log(line.replace(self.admin_key, "…"))

    def explain_end(self) -> Exception:
        """The reason that tritonserver logged for ending before it was ready."""
        self._reader.join(5)
        if self._errors:
            return ServerError(f"tritonserver ended: {one_line(self._errors[0])}")
        if self._complaints and self.options.extra:
            message = next(
                (line for line in self._complaints if "option" in line), self._complaints[0]
            )
            message = message.removeprefix(f"{self.tritonserver.executable}: ")
            return UserError(
                f"tritonserver rejects the arguments after -- ({' '.join(self.options.extra)}): "
                f"{message}"
            )
        status = self.process.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ServerError(
            f"tritonserver ended: {' '.join(self._complaints[:1]) or 'its log gives no reason'} "
            f"({how})"
        )

    def save(self) -> None:
        """Write the state file; raises UserError where it cannot be written."""
        state = State(
            pid=os.getpid(),
            server_pid=self.process.pid,
            front_pid=self.front.process.pid if self.front else None,
            grpc=self.grpc,
            http=self.http,
            metrics=self.metrics,
            admin_key=self.admin_key,
            restarts=dict(self.restarts),
            server_restarts=self.server_restarts,
            golden=self.golden,
        )
        write_state(self.repository, state)

    def try_save(self) -> None:
        """Write the state file if that is possible, and note whether it was."""
        # the front's thread does so too: an older state must not come last
        with self.saving:
            try:
                self.save()
            except (OSError, UserError) as error:
                if not self.unsaved:
                    self.log(f"supervisor: counts of restarts are not written: {error}")
                self.unsaved = True
            else:
                self.unsaved = False

    def drain(self) -> None:
        """Stop accepting requests, and end when the accepted ones are answered. Safe in a
        signal handler.
        """
        self.stopping = True
        if self.front:
            self.front.drain()  # and tritonserver once that has ended
        else:
            self.end_tritonserver()

    def end_tritonserver(self) -> None:
        """Tell tritonserver to answer what it accepted, and to end."""
        if self.process and self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def stop(self) -> bool:
        """Drain, wait for the end, leave no process, memory or state file; returns whether all
        requests were answered.
        """
        if self.process is None:
            return True
        self.regions |= {stub.region for stub in find_stubs(self.process.pid)}
        if not self.stopping:
            self.drain()
        # Triton counts requests that wait, not those that a process has: what processes do tells
        now = time.monotonic()
        activity, deadline = Activity(now), now + self.options.exit_seconds + 5
        while self.process.poll() is None and now < deadline:
            activity.idle([stub.pid for stub in find_stubs(self.process.pid)], now)
            if self._drained and now - max(self._drained, activity.since) > _UNLOAD_SECONDS:
                break
            time.sleep(0.05)
            now = time.monotonic()
        at_work = now - activity.since < _WORK_SECONDS and self.process.returncode != 0
        self.kill()
        answered = self.front is None or self.front.stop()
        remove_state(self.repository)
        drained = self.process.returncode == 0 or (bool(self._drained) and not at_work)
        return not self._ready or (answered and drained)

    def kill(self) -> None:
        """Kill tritonserver and its stub processes."""
        if self.process is None:
            return
        self.process.end()
        self._reader.join(5)
        remove_regions(self.regions)
        self.regions.clear()

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

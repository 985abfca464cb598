"""A tritonserver on a model repository: started, waited for, its log passed on, drained and gone at the end."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from google.protobuf import text_format
from pydantic import BaseModel, ConfigDict, Field
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serve.errors import ServerError, UserError
from serve.rest import ADMIN_HEADER, Rest
from serve.state import State, remove_state, write_state
from serve.triton import Tritonserver

RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
"""Endpoints that change a server or read its memory: only for those who have the key. Statistics stay open."""

NOISE = re.compile(
    "CUDA driver version is insufficient|CUDA memory pool disabled|CudaDriverHelper has not been initialized|"
    "pinned system memory|unable to create stream for|Failed to initialize NVML|DCGM|GPU metrics|"
    "Unable to get number of CUDA devices"
)
"""What tritonserver says on every machine without a GPU."""

MESSAGE = re.compile(r'^(?P<level>[EWIF])\d{4} [\d:.]+ +\d+ [\w.]+:\d+\] +"?(?P<text>.*?)"? *$')
"""A line of Triton's log: level, date, time, thread, place, message."""

LAUNCH = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: however the parent ends, tritonserver drains and ends
os.getppid() == int(sys.argv[1]) or sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run by a Python of its own, because code between fork and exec is unsafe in a process with threads."""


class Tls(BaseModel):
    """PEM files for TLS on gRPC; with a `root` clients must show a certificate that it signed (mTLS)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path
    key: Path
    root: Path | None = None


class Options(BaseModel):
    """How a server listens and ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    grpc_port: int = Field(default=8001, ge=0, le=65535)
    """0: any that is free; so for the others."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    metrics_port: int = Field(default=8002, ge=0, le=65535)
    tls: Tls | None = None
    open_endpoints: tuple[str, ...] = ()
    """Those of RESTRICTED that need no key."""
    start_seconds: float = Field(default=120.0, gt=0)
    exit_seconds: int = Field(default=30, ge=1)
    """How long requests that were accepted may take to be answered after a stop."""
    cache_bytes: int = Field(default=64 * 2**20, ge=1)
    """Of the response cache, if a model has one."""
    gpu: bool = False
    extra: tuple[str, ...] = ()
    """Further arguments of tritonserver."""


class Server:
    """One tritonserver process; `start`, then `stop`, from the main thread: the process ends with the thread that made it."""

    def __init__(self, found: Tritonserver, repository: Path, options: Options, log: Callable[[str], None]) -> None:
        self.found, self.repository, self.options, self.log = found, repository.absolute(), options, log
        self.admin_key = secrets.token_urlsafe(24)
        self.restarts: dict[str, int] = {}
        self.server_restarts = 0
        self.process: subprocess.Popen | None = None
        self.stopping = threading.Event()
        self._errors: list[str] = []
        names = ("grpc", "http", "metrics")
        self.ports = choose_ports({name: getattr(options, f"{name}_port") for name in names}, options.host)

    @property
    def grpc(self) -> str:
        """Where gRPC is answered, as clients on this machine write it."""
        return self.address("grpc")

    @property
    def http(self) -> str:
        """Where HTTP is answered."""
        return self.address("http")

    @property
    def metrics(self) -> str:
        """Where Prometheus reads."""
        return self.address("metrics")

    def address(self, name: str) -> str:
        """HOST:PORT to connect to from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host_of(name), self.host_of(name))
        return f"[{host}]:{self.ports[name]}" if ":" in host else f"{host}:{self.ports[name]}"

    def host_of(self, name: str) -> str:
        """The address an endpoint listens on. HTTP has no TLS: where gRPC has it, HTTP is for this machine alone."""
        return "127.0.0.1" if name == "http" and self.options.tls else self.options.host

    @property
    def rest(self) -> Rest:
        """The HTTP endpoints, restricted ones included."""
        return Rest(self.http, self.admin_key)

    def command(self) -> list[str]:
        """tritonserver's command line."""
        options, found = self.options, self.found
        line = [str(found.executable), f"--model-repository={self.repository}"]
        if found.backends:
            line.append(f"--backend-directory={found.backends}")
        if found.caches:
            line.append(f"--cache-directory={found.caches}")
        for name, port in self.ports.items():
            line += [f"--{name}-address={self.host_of(name)}", f"--{name}-port={port}"]
        line += [
            "--model-control-mode=explicit", "--load-model=*",
            # a broken new version must not keep the old one from starting: `check_models` decides, not Triton
            "--exit-on-error=false", "--strict-readiness=false", "--disable-auto-complete-config",
            f"--exit-timeout-secs={options.exit_seconds}", "--metrics-config=summary_latencies=true",
            f"--allow-gpu-metrics={'true' if options.gpu else 'false'}",
        ]  # fmt: skip
        if not options.gpu:
            line.append("--pinned-memory-pool-byte-size=0")
        closed = ",".join(name for name in RESTRICTED if name not in options.open_endpoints)
        if closed:
            # gRPC and HTTP are restricted each on its own
            line += [f"--{flag}={closed}:{ADMIN_HEADER}={self.admin_key}"
                     for flag in ("grpc-restricted-protocol", "http-restricted-api")]  # fmt: skip
        if options.tls:
            line += [f"--grpc-use-ssl{'-mutual' if options.tls.root else ''}=true",
                     f"--grpc-server-cert={options.tls.certificate}", f"--grpc-server-key={options.tls.key}"]  # fmt: skip
            line += [f"--grpc-root-cert={options.tls.root}"] if options.tls.root else []
        if caches_answers(self.repository):
            line.append(f"--cache-config=local,size={options.cache_bytes}")
        return [*line, *options.extra]

    def start(self) -> float:
        """Start and wait until every model answers; returns the seconds it took.

        Raises UserError for ports that are in use, ServerError with tritonserver's first reason if it does not come up.
        """
        check_ports(self.ports, self.host_of)
        began = time.monotonic()
        self._errors.clear()
        launch = [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), *self.command()]
        self.process = subprocess.Popen(
            launch, env={**os.environ, **self.found.environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
            # a group of its own: Ctrl-C in a terminal reaches this process only, and stubs can be ended with it
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self.pass_on, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        try:
            self.wait_ready(began + self.options.start_seconds)
            self.check_models()
        except BaseException:
            self.kill()
            raise
        self.save()
        return time.monotonic() - began

    def wait_ready(self, deadline: float) -> None:
        """Return when the server says READY; raises ServerError if it ends before, or is not by the deadline."""
        while not self.rest.ready():
            if self.process.poll() is not None:
                self._reader.join(5)
                raise ServerError(f"tritonserver ended: {self.reason()}")
            if self.stopping.is_set():
                raise ServerError("stopped before it was ready")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready within {self.options.start_seconds:.0f} s (--start-timeout gives it more)"
                )
            time.sleep(0.05)

    def check_models(self) -> None:
        """Raise ServerError for a model without a ready version; a version that failed beside a good one is only told."""
        found: dict[str, list[dict]] = {}
        for entry in self.rest.index():
            found.setdefault(entry["name"], []).append(entry)
        broken = {}
        for name, entries in sorted(found.items()):
            failed = [entry for entry in entries if entry.get("state") != "READY"]
            if len(failed) == len(entries):
                broken[name] = one_line(failed[-1].get("reason", "no reason given"))
            for entry in failed if len(failed) < len(entries) else ():
                self.log(
                    f"warning: {name} version {entry.get('version')} did not load: {one_line(entry.get('reason', ''))}"
                )
        # an ensemble fails with its parts: the part's reason is the one to mend
        for name, reason in sorted(broken.items(), key=lambda item: "depends on" in item[1]):
            raise ServerError(f"model '{name}' did not load: {reason}")

    def pass_on(self, stream) -> None:  # noqa: ANN001 - a text stream
        """Pass the log on line by line, without the lines that mean nothing on this machine."""
        with stream:
            for line in map(str.rstrip, stream):
                if not self.options.gpu and NOISE.search(line):
                    continue
                said = MESSAGE.match(line)
                if said and said["level"] in "EF":
                    self._errors.append(said["text"])
                self.log(line.replace(self.admin_key, "…"))

    def reason(self) -> str:
        """Why tritonserver ended, as it said itself."""
        status = self.process.returncode
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return one_line(self._errors[0]) if self._errors else f"{how}, its log gives no reason"

    def save(self) -> None:
        """Write the state file; called whenever a count changes."""
        state = State(
            pid=os.getpid(), server_pid=self.process.pid, grpc=self.grpc, http=self.http, metrics=self.metrics,
            admin_key=self.admin_key, restarts=self.restarts, server_restarts=self.server_restarts,
        )  # fmt: skip
        write_state(self.repository, state)

    def drain(self) -> None:
        """Tell tritonserver to take no more and to end when what it has is answered. Safe in a signal handler."""
        self.stopping.set()
        if self.process and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Drain, wait for the end, and leave no process and no state file behind."""
        if self.process is None:
            return
        if not self.stopping.is_set():
            self.drain()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.options.exit_seconds + 10)
        self.kill()
        remove_state(self.repository)

    def kill(self) -> None:
        """End whatever is left of tritonserver and its stub processes, at once."""
        if self.process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def one_line(text: str) -> str:
    """The last line of a traceback, the first of anything else."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [""]
    return next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[0])


def caches_answers(repository: Path) -> bool:
    """Whether a model of the repository wants Triton's response cache."""
    for path in repository.glob("*/config.pbtxt"):
        if text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig()).response_cache.enable:
            return True
    return False


def choose_ports(asked: dict[str, int], host: str) -> dict[str, int]:
    """Ports with every 0 replaced by a free one; raises UserError if two are the same."""
    found, held = {}, []
    for name, port in asked.items():
        if port == 0:
            held.append(listen(host, 0))  # held until all are chosen, so that they differ
            port = held[-1].getsockname()[1]
        if port in found.values():
            other = next(key for key, value in found.items() if value == port)
            raise UserError(f"--{name}-port {port} is --{other}-port too: give each its own")
        found[name] = port
    for one in held:
        one.close()
    return found


def check_ports(ports: dict[str, int], host_of: Callable[[str], str]) -> None:
    """Raise UserError for a port that something listens on: tritonserver would only find out after loading all models."""
    for name, port in ports.items():
        try:
            listen(host_of(name), port).close()
        except PermissionError as error:
            raise UserError(f"port {port} is for the superuser: choose another with --{name}-port") from error
        except OSError as error:
            if isinstance(error, socket.gaierror) or "assign" in str(error):
                raise UserError(f"--host {host_of(name)}: this machine has no such address") from error
            raise UserError(
                f"port {port} is in use: choose another with --{name}-port, or stop what listens there"
            ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, as tritonserver's will."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()
    except OSError:
        found.close()
        raise
    return found

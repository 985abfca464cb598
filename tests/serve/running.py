"""`python -m serve.run` as a process of its own, and what it leaves behind; for the tests of
starting and watching.
"""

import contextlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc

from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.contents import MADE_WITH
from serve.repository.settings import Settings

ANY_PORTS = ("--grpc-port", 0, "--http-port", 0, "--metrics-port", 0)


def lasting_port() -> int:
    """A free port that stays free while nobody listens there: not of those that the kernel gives to
    outgoing connections.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, first)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class Saying(http.server.BaseHTTPRequestHandler):
    """What answers HTTP where a real server cannot be made to say so; see `answering`."""

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def answering(handler: type[Saying]) -> Iterator[str]:
    """The address of a server of a handler."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Run:
    """A started command. `lines` is its output so far; `grpc`, `http`, `metrics` are the addresses
    it printed.
    """

    def __init__(
        self,
        *arguments: object,
        ports: tuple = ANY_PORTS,
        temporary: Path | None = None,
        within: tuple[str, ...] = (),
    ) -> None:
        """`within`: a command that runs the command that follows it."""
        before, after = split(arguments)
        command = [sys.executable, "-m", "serve.run", *map(str, (*before, *ports, *after))]
        command = [*within, *command]
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": "1"}
            | ({"TMPDIR": str(temporary)} if temporary else {})
        )
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 90) -> re.Match:
        """The first match in the output, when it is there."""
        until(
            lambda: re.search(pattern, self.text, re.M) or self.process.poll() is not None, seconds
        )
        found = re.search(pattern, self.text, re.M)
        assert found, f"no {pattern!r} in:\n{self.text[-4000:]}"
        return found

    def ready(self) -> "Run":
        """Wait until it says so."""
        self.wait_for(r"^  python -m serve\.status")
        self.grpc, self.http, self.metrics = (
            self.wait_for(rf"^{name} +(?:http://)?([\d.]+:\d+)")[1]
            for name in ("grpc", "http", "metrics")
        )
        return self

    def end(self, number: int, seconds: float = 60) -> int:
        """Send a signal and wait for the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        self.reader.join(10)
        return status

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.reader.join(10)


def split(arguments: tuple) -> tuple[tuple, tuple]:
    """Arguments before `--`, and from there on."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at:]


def until(done: Callable[[], object], seconds: float) -> bool:
    """Wait for something; whether it came."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def processes(word: Path | str) -> list[int]:
    """Ids of tritonserver and stub processes that name a folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if Path(words[0]).name in ("tritonserver", "triton_python_backend_stub") and str(
            word
        ) in "\0".join(words):
            found.append(int(path.parent.name))
    return found


def small_repository(bundle: Path, folder: Path, instances: int = 2) -> Path:
    """A repository with a bundle's backbone, in so many processes, and the decoder alone: what
    starts within seconds. It has no front door.
    """
    settings = Settings(fused=False, instances=instances, threads=1, decoders=2, parts="apart")
    make_repository(read_bundle(bundle), folder, settings)
    about = json.loads((folder / MADE_WITH).read_text())
    for model in set(about["models"]) - {"backbone", "decode"}:
        shutil.rmtree(folder / model)
    about["models"] = ["backbone", "decode"]
    (folder / MADE_WITH).write_text(json.dumps(about))
    return folder


def few_models(repository: Path, *names: str) -> Path:
    """A repository of which a server loads these models alone, and starts within seconds."""
    about = json.loads((repository / MADE_WITH).read_text())
    about["models"] = list(names)
    (repository / MADE_WITH).write_text(json.dumps(about))
    return repository


class Load:
    """Clients that each ask again when answered, without any retries, until told to stop."""

    def __init__(self, url: str, size: int, clients: int = 4) -> None:
        self.url, self.size = url, size
        self.answers: list[tuple[float, float, str]] = []
        """When each request was sent and ended, and "" or the error's text."""
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.work) for _ in range(clients)]

    def work(self) -> None:
        with grpc.InferenceServerClient(self.url) as client:
            while not self.stop.is_set():
                sent, error = time.monotonic(), ask(client, self.size)
                self.answers.append((sent, time.monotonic(), error))
                if error:
                    time.sleep(0.02)

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    @property
    def errors(self) -> list[str]:
        return [text for *_, text in self.answers if text]


def ask(client: grpc.InferenceServerClient, size: int, request_id: str = "") -> str:
    """One request to the front door; "" or the error."""
    image = np.full((1, size, size, 3), 128, np.uint8)
    port = grpc.InferInput("image", image.shape, "UINT8")
    port.set_data_from_numpy(image)
    try:
        wanted = [grpc.InferRequestedOutput("backbone_global")]
        found = client.infer(
            "features", [port], outputs=wanted, request_id=request_id, client_timeout=30
        )
        assert np.isfinite(found.as_numpy("backbone_global")).all()
    except grpc.InferenceServerException as error:
        return str(error)
    return ""

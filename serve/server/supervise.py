"""Watching a running server: a dead backend is found and replaced, a tritonserver that died is
started again.

Triton goes on calling a model READY after the process behind it was killed, and loading it again
does nothing as long as its files are unchanged. So two things are looked at from outside: the stub
processes of the python backend, twice a second (one dead of several makes only every k-th request
fail), and the answer to a canary, an inference of zeros, wherever no real request was answered
since the last look. A model that fails either gets a file touched and is loaded again.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from contract.errors import first_line
from serve.errors import ServerError
from serve.repository.contents import STAGED
from serve.server.process import Server
from serve.server.rest import Refused, Tensor
from serve.server.stubs import Stub, find_stubs, remove_regions

_LOOK_SECONDS = 0.5
"""Between two looks at the processes."""
_SURVEY_SECONDS = 2.0
"""Between two looks at what was answered; a model that answered nothing in between gets a canary.
"""
CANARY_SHARE, CANARY_SECONDS = 0.05, 10.0
"""Canaries of a model take at most this share of the time, but there is one in so many seconds."""
_PATIENCE_SECONDS = 20.0
"""A model that gives no answer to anybody for so long (and for as long as many canaries take)
hangs.
"""
_GRACE_SECONDS = 10.0
"""Seconds a replaced backend has to finish its requests."""
_STEADY_SECONDS = 60.0
"""A model that stayed up so long is replaced at once when it dies; one that did not waits twice as
long each time.
"""
SERVER_STARTS, SERVER_WINDOW = 5, 600.0
"""A tritonserver that died is started again so often in so many seconds."""
PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde\x00\x00\x00\x0cIDATx\x9c"
    b"c```\x00\x00\x00\x04\x00\x01\xf6\x178U\x00\x00\x00\x00IEND\xaeB`\x82"
)
"""A black pixel as a PNG file: what models that read bytes get; one that wants text may refuse it,
and so is alive.
"""


@dataclass
class _Backend:
    """State of one version of a model."""

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    output: str
    instances: int
    """Expected stub processes; 0 for backends other than python."""
    answered: int = -1
    """Requests answered at the last look."""
    complete: bool = False
    """Whether all stub processes were seen at once since it was loaded."""
    short: int = 0
    """Looks in a row that missed some of them."""
    due: float = 0.0
    canary: Future | None = None
    canary_baseline: int = 0
    """Requests answered when the canary was sent."""
    canary_seconds: float = 0.0
    strikes: int = 0
    """Canaries in a row that failed."""
    replaced: float = -math.inf
    quick: int = 0
    """Deaths in a row that came soon after a replacement."""
    retry: float = 0.0
    reason: str = ""
    old: set[int] = field(default_factory=set)
    """Stub processes of before the last replacement."""


class Supervisor:
    """Looks after one server; `run` returns when it is stopped."""

    def __init__(self, server: Server, log: Callable[[str], None]) -> None:
        self.server, self.log = server, log
        self.backends: dict[tuple[str, str], _Backend] = {}
        self.counting = threading.Lock()
        self.pool = ThreadPoolExecutor(8, "canary")
        self.seen: set[Stub] = set()
        """Stub processes that were alive once and whose shared memory may still be there."""
        self.dismissed: dict[Stub, float] = {}
        self.deaths: list[float] = []
        self.survey_due = 0.0

    def run(self) -> None:
        """Look until the server is stopped; raises ServerError if tritonserver cannot be kept
        up.
        """
        try:
            while not self.server.stopping:
                if self.server.process.poll() is not None:
                    self.revive()
                else:
                    # a server that stops or dies during a look is handled in the next look
                    with suppress(OSError, Refused):
                        self.look(time.monotonic())
                time.sleep(_LOOK_SECONDS)
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def look(self, now: float) -> None:
        stubs = find_stubs(self.server.process.pid)
        self.seen.update(stubs)
        self.server.regions.update(stub.region for stub in stubs)
        if now >= self.survey_due:
            self.survey(now)
            self.survey_due = now + _SURVEY_SECONDS
        for backend in self.backends.values():
            self.count(backend, stubs)
            if backend.canary is not None and backend.canary.done():
                self.judge(backend, now)
        self.dismiss(stubs, now)
        dead = [
            backend for backend in self.backends.values() if backend.reason and now >= backend.retry
        ]
        list(self.pool.map(lambda backend: self.replace(backend, stubs), dead))

    def survey(self, now: float) -> None:
        """List the models and what they answered; send canaries to those that answered
        nothing.
        """
        result = {}
        for entry in self.server.rest.statistics():
            key = entry["name"], entry["version"]
            if key[0].startswith(STAGED):  # a rollout tries it and handles its failures
                continue
            backend = result[key] = self.backends.get(key) or describe(
                self.server.rest.config(*key), *key
            )
            answered = int(entry["inference_stats"]["success"]["count"])
            progress, backend.answered = answered != backend.answered, answered
            if backend.output and not progress and backend.canary is None and now >= backend.due:
                backend.canary, backend.canary_baseline = (
                    self.pool.submit(self.ask, backend),
                    answered,
                )
        self.backends = result

    def count(self, backend: _Backend, stubs: list[Stub]) -> None:
        """Give a backend a reason to be replaced if processes of it are missing."""
        alive = sum(
            (s.model, s.version) == (backend.model, backend.version) and s.pid not in backend.old
            for s in stubs
        )
        backend.complete |= alive >= backend.instances
        backend.short = backend.short + 1 if backend.complete and alive < backend.instances else 0
        # twice, because an instance that is being replaced in order may be between two processes
        if backend.short >= 2 and self.server.rest.model_ready(backend.model, backend.version):
            backend.reason = (
                f"{backend.instances - alive} of {backend.instances} backend processes died"
            )

    def ask(self, backend: _Backend) -> tuple[str, float]:
        """Send a canary; returns what is wrong ("" for nothing) and the seconds it took. Any
        sensible answer will do.
        """
        began, wrong = time.monotonic(), ""
        patience = max(_PATIENCE_SECONDS, 100 * backend.canary_seconds)
        try:
            self.server.rest.infer(
                backend.model, backend.version, backend.inputs, backend.output, patience
            )
        except Refused as error:
            if (
                error.status >= 500 and error.status != 503
            ):  # 503: its queue is full, so others are being answered
                wrong = first_line(error)
        except TimeoutError:
            wrong = f"no answer for {patience:.0f} s"
        except OSError:
            pass  # the server is gone, which the next look at its process shows
        return wrong, time.monotonic() - began

    def judge(self, backend: _Backend, now: float) -> None:
        """Evaluate a finished canary."""
        wrong, seconds = backend.canary.result()
        backend.canary = None
        if not wrong:
            backend.strikes, backend.canary_seconds = 0, seconds
            backend.due = now + min(CANARY_SECONDS, seconds / CANARY_SHARE)
            return
        backend.strikes += 1
        certain = "is not healthy" in wrong or (
            wrong.startswith("no answer") and backend.answered == backend.canary_baseline
        )
        if (certain or backend.strikes > 1) and self.server.rest.model_ready(
            backend.model, backend.version
        ):
            backend.reason = wrong

    def replace(self, backend: _Backend, stubs: list[Stub]) -> None:
        """Load a model again next to what is left of it; the old processes are ended when they had
        time to finish.
        """
        model, began = backend.model, time.monotonic()
        mine = [
            stub for stub in self.seen if (stub.model, stub.version) == (model, backend.version)
        ]
        self.log(
            f"supervisor: {model} version {backend.version}: {backend.reason}: loading it again"
        )
        if backend.reason.startswith("no answer"):
            end(
                [stub for stub in mine if stub in stubs]
            )  # they hang, and their clients would wait for ever
        backend.quick = backend.quick + 1 if began - backend.replaced < _STEADY_SECONDS else 0
        backend.retry = began + min(60, 2**backend.quick if backend.quick > 1 else 0)
        try:
            # Triton loads what has changed
            os.utime(min((self.server.repository / model / backend.version).iterdir()))
            self.server.rest.load(model, self.server.narrowed.get(model, ""))
            wrong = self.ask(backend)[0]
        except (OSError, Refused) as error:
            wrong = first_line(error)
        if self.server.stopping or self.server.process.poll() is not None:
            return
        now = time.monotonic()
        if wrong:
            backend.quick, backend.retry = backend.quick + 1, now + min(60, 2**backend.quick)
            self.log(
                f"supervisor: {model} did not recover: {wrong} (next attempt in "
                f"{backend.retry - now:.0f} s)"
            )
            return
        with self.counting:
            count = self.server.restarts[model] = self.server.restarts.get(model, 0) + 1
            self.server.save()
        self.log(f"supervisor: {model} is back after {now - began:.1f} s (restart {count})")
        backend.old |= {stub.pid for stub in mine}
        self.dismissed |= {stub: now + _GRACE_SECONDS for stub in mine}
        backend.replaced, backend.reason, backend.canary = now, "", None
        backend.complete, backend.short, backend.strikes = False, 0, 0

    def dismiss(self, stubs: list[Stub], now: float) -> None:
        """End processes of replaced backends: Triton waits for the one that died, and so never ends
        the others.
        """
        late = [stub for stub, until in self.dismissed.items() if now >= until]
        end([stub for stub in late if stub in stubs])
        remove_regions(stub.region for stub in late)
        self.seen.difference_update(late)
        for stub in late:
            del self.dismissed[stub]

    def revive(self) -> None:
        """Start a tritonserver that died; raises ServerError when it has died too often."""
        status = self.server.process.returncode
        how = (
            f"signal {-status} ({signal.Signals(-status).name})"
            if status < 0
            else f"exit status {status}"
        )
        while True:
            now = time.monotonic()
            self.deaths = [death for death in self.deaths if now - death < SERVER_WINDOW] + [now]
            count = len(self.deaths)
            if count > SERVER_STARTS:
                raise ServerError(
                    f"tritonserver died {count} times in {SERVER_WINDOW:.0f} s, last by {how}: "
                    "giving up"
                )
            delay = 2.0 ** (count - 1) - 1
            self.log(
                f"supervisor: tritonserver died by {how}: start {count} of {SERVER_STARTS} in "
                f"{delay:.0f} s"
            )
            self.server.kill()  # its stubs
            self.backends, self.seen, self.dismissed, self.survey_due = {}, set(), {}, 0.0
            until = now + delay
            while time.monotonic() < until and not self.server.stopping:
                time.sleep(0.1)
            if self.server.stopping:
                return
            try:
                seconds = self.server.start()
            except ServerError as error:
                how = str(error)
                continue
            if self.server.stopping:
                return
            self.server.server_restarts += 1
            self.server.save()
            self.log(
                f"supervisor: tritonserver is back after {seconds:.1f} s (restart "
                f"{self.server.server_restarts})"
            )
            return


def end(stubs: list[Stub]) -> None:
    for stub in stubs:
        with suppress(ProcessLookupError):
            os.kill(stub.pid, signal.SIGKILL)


def describe(config: dict[str, Any], model: str, version: str) -> _Backend:
    """What a model's configuration says of how to watch it. An ensemble has no backend; its steps
    are watched.
    """
    if config.get("platform") == "ensemble":
        return _Backend(model, version, (), "", 0)
    warm_up = {
        name: data["dims"]
        for sample in config.get("model_warmup", ())
        for name, data in sample["inputs"].items()
    }
    inputs = []
    for port in config["input"]:
        if port.get("optional"):
            continue
        # sizes that vary are those of the warm-up, which the model is known to take
        dims = warm_up.get(port["name"], port["dims"])
        sizes = tuple(max(1, int(size)) for size in dims)
        shape = (1, *sizes) if config.get("max_batch_size", 0) > 0 else sizes
        kind = port["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES")
        inputs.append(Tensor(port["name"], kind, shape, PICTURE))
    stubs = config["backend"] == "python"
    instances = (
        sum(group["count"] * max(1, len(group["gpus"])) for group in config["instance_group"])
        if stubs
        else 0
    )
    return _Backend(model, version, tuple(inputs), config["output"][0]["name"], instances)

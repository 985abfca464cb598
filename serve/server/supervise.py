"""Watching a running server: a dead backend is found and replaced, a tritonserver that died is
started again.

Triton goes on calling a model READY after the process behind it was killed, and loading it again
does nothing as long as its files are unchanged. So three things are looked at from outside: the
stub processes of the python backend, twice a second (one dead of several makes only every k-th
request fail); the answer to a canary, an inference of zeros, wherever no real request was answered
since the last look; and whether processes that have requests to answer do anything
(serve/server/backend.py). A model that fails gets a file touched and is loaded again.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from contract.errors import UserError, first_line
from serve.errors import ServerError
from serve.repository.contents import STAGED
from serve.server.activity import Activity, cpu_seconds
from serve.server.backend import Backend, Canary, describe
from serve.server.golden import GoldenRefused
from serve.server.process import Server
from serve.server.rest import Refused
from serve.server.space import FULL, Space
from serve.server.stubs import Stub, find_stubs, remove_regions

_LOOK_SECONDS = 0.5
"""Between two looks at the processes."""
_SURVEY_SECONDS = 2.0
"""Between two looks at what was answered; a model that answered nothing in between gets a canary.
"""
CANARY_SHARE, CANARY_SECONDS = 0.05, 10.0
"""Canaries of a model take at most this share of the time, but there is one in so many seconds."""
_CANARY_PATIENCE = 3600.0
"""Seconds after which a canary is forgotten; that its model hangs shows long before."""
_SILENT_SECONDS, _SILENT_LONG = 20.0, 300.0
"""A tritonserver hangs that answers nothing for so long, and does nothing; or whatever it does."""
_WORK_SECONDS = 5.0
"""A model was at work if one of its processes was seen at work within so many seconds."""
_GRACE_SECONDS = 10.0
"""Seconds a replaced backend has to finish its requests."""
_STEADY_SECONDS = 60.0
"""A model that stayed up so long is replaced at once when it dies; one that did not waits twice as
long each time.
"""
_RETRY_SECONDS = 60.0
"""The longest pause between two attempts to load a model."""
SERVER_STARTS, SERVER_WINDOW = 5, 600.0
"""A tritonserver that died is started again so often in so many seconds."""


@dataclass
class Answer:
    """What came back for a canary."""

    wrong: str = ""
    seconds: list[float] = field(default_factory=list)
    """What each of its inferences took."""
    full: bool = False
    """Whether it was refused because the queue is full."""


class Supervisor:
    """Looks after one server; `run` returns when it is stopped."""

    def __init__(self, server: Server, log: Callable[[str], None]) -> None:
        self.server, self.log = server, log
        self.backends: dict[tuple[str, str], Backend] = {}
        self.counting = threading.Lock()
        # canaries wait in their threads, as many as there are stub processes
        self.pool = ThreadPoolExecutor(256, "canary")
        self.seen: set[Stub] = set()
        """Stub processes that were alive once and whose shared memory may still be there."""
        self.dismissed: dict[Stub, float] = {}
        self.deaths: list[float] = []
        self.survey_due = 0.0
        self.space = Space(server.repository, log)
        self.heard = time.monotonic()
        """When tritonserver last answered."""
        self.activity = Activity(self.heard)

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
                    with suppress(OSError):
                        with suppress(Refused):  # an answer, too
                            self.look(time.monotonic())
                        self.heard = time.monotonic()
                    self.check_server(time.monotonic())
                time.sleep(_LOOK_SECONDS)
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def check_server(self, now: float) -> None:
        """End a tritonserver that hangs, so that it is started again."""
        idle = self.activity.idle([self.server.process.pid], now)
        silent = now - self.heard
        if silent > _SILENT_LONG or (silent > _SILENT_SECONDS and idle > _SILENT_SECONDS):
            self.log(f"supervisor: tritonserver gives no answer for {silent:.0f} s: killing it")
            self.server.kill()

    def look(self, now: float) -> None:
        stubs = find_stubs(self.server.process.pid)
        self.seen.update(stubs)
        self.server.regions.update(stub.region for stub in stubs)
        surveyed = now >= self.survey_due
        if surveyed:
            self.survey_due = now + _SURVEY_SECONDS
            self.check_space(now)
            self.survey(now)
        for backend in self.backends.values():
            self.count(backend, stubs)
            self.judge(backend, now)
            self.watch(backend, stubs, now, surveyed)
        self.dismiss(stubs, now)
        dead = [
            backend for backend in self.backends.values() if backend.reason and now >= backend.retry
        ]
        list(self.pool.map(lambda backend: self.replace(backend, stubs), dead))

    def check_space(self, now: float) -> None:
        """Say which folders are full; where there is room again, go on at once with what failed."""
        if self.space.look():
            for backend in self.backends.values():
                backend.retry = min(backend.retry, now)
        if self.server.unsaved:
            self.server.try_save()

    def survey(self, now: float) -> None:
        """List the models and what they answered; send canaries to those that answered
        nothing.
        """
        result = {}
        for entry in self.server.rest.statistics():
            key = entry["name"], entry["version"]
            if key[0].startswith(STAGED):  # a rollout tries it and handles its failures
                continue
            backend = result[key] = self.backends.get(key) or self.describe(*key)
            answered = int(entry["inference_stats"]["success"]["count"])
            progress, backend.answered = answered != backend.answered, answered
            if progress and not backend.instances:  # without processes, answers are what tells
                backend.work.since = now
            backend.executions = int(entry.get("execution_count", 0))
            # of several processes one may hang while the others answer
            wanted = not progress or backend.instances > 1
            if backend.output and wanted and not backend.canaries and now >= backend.due:
                self.send(backend, now)
        self.backends = result

    def describe(self, model: str, version: str) -> Backend:
        result = describe(self.server.rest.config(model, version), model, version)
        folder = self.server.repository / model / version
        result.calls_others = (folder / "calling_model.py").exists()
        return result

    def send(self, backend: Backend, now: float) -> None:
        """Send a canary."""
        pids = [stub.pid for stub in self.seen if backend.owns(stub)]
        backend.canaries.append(
            Canary(now, self.pool.submit(self.ask, backend), backend.answered, cpu_seconds(pids))
        )

    def watch(self, backend: Backend, stubs: list[Stub], now: float, surveyed: bool) -> None:
        """Give a backend a reason to be replaced if processes of it hang."""
        pids = [stub.pid for stub in stubs if backend.owns(stub)]
        if any(other.calls_others for other in self.backends.values()):
            backend.work.idle(pids, now)

        def elsewhere() -> bool:
            return any(
                other is not backend
                and (now - other.work.since < _WORK_SECONDS or other.is_waited_for(now))
                for other in self.backends.values()
            )

        if backend.wants_another(pids, now):
            self.send(backend, now)
        hung, how = backend.find_hung(pids, now, elsewhere)
        if not how and surveyed:
            hung, how = backend.find_missed(pids, now, elsewhere)
            if backend.missed:
                backend.due = now
        if how and self.server.rest.model_ready(backend.model, backend.version):
            backend.hung = hung
            backend.reason = f"{len(hung)} of {len(pids)} backend processes hang ({how})"

    def count(self, backend: Backend, stubs: list[Stub]) -> None:
        """Give a backend a reason to be replaced if processes of it are missing."""
        alive = sum(map(backend.owns, stubs))
        backend.complete |= alive >= backend.instances
        backend.short = backend.short + 1 if backend.complete and alive < backend.instances else 0
        # twice, because an instance that is being replaced in order may be between two processes
        if backend.short >= 2 and self.server.rest.model_ready(backend.model, backend.version):
            backend.reason = (
                f"{backend.instances - alive} of {backend.instances} backend processes died"
            )

    def ask(self, backend: Backend) -> Answer:
        """Send a canary and wait for its answer. Any sensible answer will do."""
        answer = Answer()
        for _ in range(backend.count()):
            began = time.monotonic()
            try:
                self.server.rest.infer(
                    backend.model,
                    backend.version,
                    backend.inputs,
                    backend.output,
                    _CANARY_PATIENCE,
                )
            except Refused as error:
                answer.full = error.status == 503  # its queue
                if error.status >= 500 and not answer.full:
                    answer.wrong = first_line(error)
            except OSError:
                break  # the server is gone, which the next look at its process shows
            answer.seconds.append(time.monotonic() - began)
            if answer.wrong or answer.full:
                break
        return answer

    def judge(self, backend: Backend, now: float) -> None:
        """Evaluate the canaries that were answered."""
        answers = [canary.done.result() for canary in backend.canaries if canary.done.done()]
        if not answers:
            return
        backend.canaries = [canary for canary in backend.canaries if not canary.done.done()]
        for answer in answers:
            if answer.full:
                backend.refused_since = min(backend.refused_since, now)
                continue
            backend.refused_since = math.inf
            if not answer.wrong:
                backend.strikes = 0
                if answer.seconds:
                    backend.canary_seconds = min(answer.seconds)
                    backend.due = now + min(CANARY_SECONDS, sum(answer.seconds) / CANARY_SHARE)
                continue
            if any(words in answer.wrong for words in FULL):
                # loading it again would take more room for a while
                backend.due = now + CANARY_SECONDS
                self.log(f"supervisor: {backend.model} cannot take a request: {answer.wrong}")
                continue
            backend.strikes += 1
            certain = "is not healthy" in answer.wrong
            if (certain or backend.strikes > 1) and self.server.rest.model_ready(
                backend.model, backend.version
            ):
                backend.reason = answer.wrong

    def replace(self, backend: Backend, stubs: list[Stub]) -> None:
        """Load a model again next to what is left of it; the old processes are ended when they had
        time to finish, those that hang at once.
        """
        model, began = backend.model, time.monotonic()
        mine = [
            stub for stub in self.seen if (stub.model, stub.version) == (model, backend.version)
        ]
        hung = [stub for stub in mine if stub.pid in backend.hung and stub in stubs]
        others = [stub for stub in stubs if backend.owns(stub) and stub not in hung]
        self.log(
            f"supervisor: {model} version {backend.version}: {backend.reason}: loading it again"
        )
        if not others:
            end(hung)  # their clients would wait for ever
        backend.quick = backend.quick + 1 if began - backend.replaced < _STEADY_SECONDS else 0
        backend.retry = began + min(_RETRY_SECONDS, 2**backend.quick if backend.quick > 1 else 0)
        try:
            # Triton loads what has changed
            os.utime(min((self.server.repository / model / backend.version).iterdir()))
            self.server.rest.load(model, self.server.narrowed.get(model, ""))
            wrong = self.try_out(backend)
        except (OSError, Refused) as error:
            wrong = first_line(error)
        if self.server.stopping or self.server.process.poll() is not None:
            return
        now = time.monotonic()
        if wrong:
            backend.failed += 1
            backend.retry = now + min(_RETRY_SECONDS, 2**backend.failed)
            if lack := self.space.explain():
                wrong = f"{lack} ({wrong})"
            self.log(
                f"supervisor: {model} did not recover: {wrong} (next attempt in "
                f"{backend.retry - now:.0f} s)"
            )
            return
        with self.counting:
            count = self.server.restarts[model] = self.server.restarts.get(model, 0) + 1
            self.server.try_save()
        self.log(f"supervisor: {model} is back after {now - began:.1f} s (restart {count})")
        end(hung)
        backend.old |= {stub.pid for stub in mine}
        self.dismissed |= {stub: now + _GRACE_SECONDS for stub in mine}
        backend.replaced = now
        backend.forget()

    def try_out(self, backend: Backend) -> str:
        """What is wrong with a model that was loaded; "" also where it is too busy to say."""
        done = self.pool.submit(self.ask, backend)
        with suppress(TimeoutError):
            return done.result(_GRACE_SECONDS).wrong
        return ""

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
            except GoldenRefused:  # another start would answer the same
                raise
            except (ServerError, UserError) as error:  # a port may have been taken meanwhile
                how = str(error)
                continue
            if self.server.stopping:
                return
            self.heard = time.monotonic()
            self.activity = Activity(self.heard)
            self.server.server_restarts += 1
            self.server.try_save()
            self.log(
                f"supervisor: tritonserver is back after {seconds:.1f} s (restart "
                f"{self.server.server_restarts})"
            )
            return


def end(stubs: list[Stub]) -> None:
    for stub in stubs:
        with suppress(ProcessLookupError):
            os.kill(stub.pid, signal.SIGKILL)

"""When a failed request is sent again: which failures, after how long, how often, and within what
budget.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tritonclient.utils import InferenceServerException

from serve.client.steps import Rpc, Sleep, Steps, Work
from serve.client.unreachable import ask_in_http, explain, is_cut_off
from serve.errors import (
    BadRequest,
    ClientError,
    DeadlineExceeded,
    NotAllowed,
    NotServed,
    ServerFailed,
    Unavailable,
)

_NOT_TRUSTED = ("handshake failed", "certificate", "ssl_error", "peer name")
_REFUSED = {
    "INVALID_ARGUMENT": BadRequest,
    "RESOURCE_EXHAUSTED": BadRequest,  # a message larger than gRPC takes
    "OUT_OF_RANGE": BadRequest,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": NotServed,
    "PERMISSION_DENIED": NotAllowed,
    "UNAUTHENTICATED": NotAllowed,
}


_REFUSALS = ("Exceeds maximum queue size", "Server is stopping", "has no available versions")
"""How Triton and the front of gRPC say "not now" of a request that nothing has worked on."""
_CANCELS = (2, 70)
"""Triton's first version (container 26.06) that is asked to cancel a request whose time is up.
Cancelling one while its answer is being sent crashes older servers (triton-inference-server/server
issues 7368 and 8034; 2.51 dies within a hundred such requests): those are left to finish, and the
client merely stops waiting.
"""


@dataclass(frozen=True)
class Retry:
    """How often and after how long: waits double from `first` to `longest` seconds, each shortened
    by up to half at random.

    The eight of the default take 4 to 9 seconds: longer than a supervised server needs to bring a
    dead backend back.
    """

    most: int = 8
    first: float = 0.2
    longest: float = 2.0

    def wait(self, number: int) -> float:
        """Seconds before retry `number` (0 is the first): clients that failed together do not come
        back together.
        """
        return min(self.longest, self.first * 2**number) * random.uniform(0.5, 1)


class Budget:
    """A token bucket that every retry takes from and every call adds a fraction to, shared by all
    calls of a client.

    Retries must not multiply the load of a struggling server: in the long run retries are at most
    `ratio` of the calls, and an outage of a busy client costs `burst` retries and no more.
    """

    def __init__(self, ratio: float = 0.2, burst: float = 100) -> None:
        self.ratio, self.burst = ratio, burst
        self.tokens = burst
        self.lock = threading.Lock()

    def add(self) -> None:
        with self.lock:
            self.tokens = min(self.burst, self.tokens + self.ratio)

    def take(self) -> bool:
        """Whether there is a retry left; takes it."""
        with self.lock:
            if self.tokens < 1:
                return False
            self.tokens -= 1
            return True


def may_cancel(version: str) -> bool:
    """Whether a server of a version may be asked to cancel a request; other makes may."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) >= _CANCELS


def _typed_error(error: InferenceServerException, request_id: str = "") -> tuple[ClientError, bool]:
    """A failure of tritonclient's as one of ours, and whether the same request may be sent again.

    Sending again is for failures that say "not now": every status UNAVAILABLE (starting, stopping,
    queue full, connection refused) and the other shapes that Triton gives the same state:

    * NOT_FOUND "has no available versions": a model that is being stopped or reloaded. An unknown
      model reads otherwise.
    * INTERNAL "Stub process … is not healthy": the python backend's process died. Nobody knows
      whether it had already
      computed the answer, which makes it unsafe to send again in general, and safe here: inference
      of these models has no
      effect but its answer, so that computing it twice is the same as once.
    """
    status = str(error.status() or "").removeprefix("StatusCode.")
    # Triton puts the id in some messages; ours come with it anyway
    message = re.sub(
        r"^\[request id: [^\]]*\] ", "", (error.message() or "no reason given").strip()
    )
    lower = message.lower()
    if status == "UNAVAILABLE":
        if "protocol is restricted" in lower:
            return NotAllowed(f"{message} (give the server's admin key)", request_id), False
        reason, again = explain(message)
        if reason:
            return (Unavailable if again else NotAllowed)(reason, request_id), again
        if any(word in lower for word in _NOT_TRUSTED):
            return NotAllowed(f"no TLS connection: {message}", request_id), False
        return Unavailable(message, request_id), True
    # so Triton ends some newcomers while it drains; a caller's own cancelling never comes here
    if status == "CANCELLED":
        return Unavailable(message, request_id), True
    if status == "NOT_FOUND" and "no available versions" in message:
        return Unavailable(message, request_id), True
    if status == "INTERNAL" and "Stub process" in message and "not healthy" in message:
        return Unavailable(message, request_id), True
    if status == "UNIMPLEMENTED":
        return NotServed(f"the server there is not Triton: {message}", request_id), False
    if status in _REFUSED:
        return _REFUSED[status](message, request_id), False
    return ServerFailed(f"{status}: {message}" if status else message, request_id), False


def _never_began(error: ClientError) -> bool:
    """Whether the server refused a request instead of working on it: it may be at one whose
    connection was lost, or whose ensemble failed in a part.
    """
    refused = (BadRequest, NotServed, NotAllowed)
    return isinstance(error, refused) or any(words in error.message for words in _REFUSALS)


def attempt(
    method: str,
    arguments: Mapping[str, Any],
    deadline: float,
    retry: Retry,
    budget: Budget,
    request_id: str = "",
    hurry: bool = False,
    cancels: bool = True,
    unsure: Callable[[], None] = lambda: None,
) -> Steps[Any]:
    """Call a method of the server until it answers, may not be called again, or `deadline`
    (time.monotonic) is near.

    What is left of the time goes to the server with each attempt, so that it drops work nobody
    waits for any more. `hurry`: a failing part of an ensemble is not waited for, because the caller
    will do without it. `cancels`: whether the server may be told when time is up. `unsure` is
    called after an attempt that the server may still be at. Raises a ClientError.
    """
    budget.add()
    began, tries = time.monotonic(), 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"no time was left for the request ({method})", request_id)
        try:
            if cancels:
                return (yield Rpc(method, {**arguments, "client_timeout": left}))
            return (yield Rpc(method, dict(arguments), patience=left))
        except InferenceServerException as raised:
            error, again = _typed_error(raised, request_id)
            if not _never_began(error):
                unsure()
            if again and tries == 0 and is_cut_off(error.message):
                if reason := (yield Work(partial(ask_in_http, error.message))):
                    raise NotAllowed(reason, request_id) from raised
            wait = retry.wait(tries)
            if isinstance(error, DeadlineExceeded):
                error.message = f"no answer in {time.monotonic() - began:.1f} s"
            if not again or (hurry and "in ensemble" in error.message):
                raise error from raised
            requested = "1 attempt" if tries == 0 else f"{tries + 1} attempts"
            if tries >= retry.most:
                reason = requested
            elif time.monotonic() + wait >= deadline:
                reason = f"{requested}, its time is up"
            elif not budget.take():
                reason = f"{requested}, the budget for retries is spent"
            else:
                reason = ""
            if reason:
                error.message += f" ({reason})"
                raise error from raised
        yield Sleep(wait)
        tries += 1

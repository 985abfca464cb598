"""Connections to a server that are replaced when they have gone silent, and in the children of a
fork.

A middle box (NAT, a load balancer) may forget a connection without telling either end: what is sent
is lost, and gRPC, which sees an open socket, sends the next request into it too. A forked child has
its parent's sockets and locks but none of gRPC's threads.
"""

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tritonclient.utils import InferenceServerException

from contract.errors import first_line
from serve.errors import BadRequest, ClientError

Result = TypeVar("Result")

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # serve.client.retry decides what is sent again: gRPC must neither do so by itself nor wait up
    # to two minutes to reconnect
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # otherwise all channels of a process share one connection, and a new one is no new connection
    ("grpc.use_local_subchannel_pool", 1),
    # The kernel gives up on what nobody acknowledges for so long, so that a request on a forgotten
    # connection is sent again before its deadline. The pings themselves are rare: servers hang up
    # on clients that ping more than once in five minutes.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 600_000),
]

TIME_IS_UP = ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")
"""Message and status that gRPC gives when a deadline passes."""

_SILENT = 1.0
"""Seconds that a request must have waited for its lost deadline to speak against the connection."""
_SILENT_TWICE = 0.5
"""The same for the second deadline in a row."""
AFTERWARDS = 300.0
"""Seconds after its deadline when a request that was left to itself has surely ended on the server;
on a forgotten connection it never would.
"""
_FORK_WAIT = 1.0
"""Seconds that `fork` waits for requests under way."""


@dataclass(eq=False)
class Line:
    """One connection, and what is known of it."""

    triton: Any
    """tritonclient's InferenceServerClient."""
    busy: int = 0
    """Requests under way."""
    heard: float = field(default_factory=lambda: time.monotonic())
    """When the server last answered anything."""
    lost: int = 0
    """Deadlines in a row that passed without a word."""
    sending: threading.Lock = field(default_factory=threading.Lock)
    """Held while a request is handed over to tritonclient without waiting for its answer."""


class Lines:
    """The connection of a client: `connect` makes it at the first request, and another one where
    that has gone silent. Threads may share it.

    What it returns to be closed, the caller closes: asyncio's clients are closed otherwise.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.connect = connect
        self.lock = threading.Lock()
        self.line: Line | None = None
        self.old: list[Line] = []

    def take(self) -> Line:
        """The connection for a request; goes with `watch` or `give`."""
        with self.lock:
            if self.line is None:
                self.line = Line(self.connect())
            self.line.busy += 1
            return self.line

    def judge(self, line: Line, began: float, error: BaseException | None) -> None:
        """Learn from a request's end: a deadline that passes while nothing at all is heard means
        that the next request is to have a new connection.
        """
        late = isinstance(error, InferenceServerException) and error.status() == TIME_IS_UP[1]
        with self.lock:
            now = time.monotonic()
            if not late:
                line.heard, line.lost = now, 0
                return
            if line.heard > began:  # others are answered: the server is slow
                line.lost = 0
                return
            line.lost += 1
            silent = now - began >= _SILENT or (line.lost > 1 and now - line.heard >= _SILENT_TWICE)
            if silent and line is self.line:
                self.line = None
                self.old.append(line)

    @contextlib.contextmanager
    def watch(self, line: Line) -> Iterator[None]:
        """Watch a request on a connection that was taken, and give that back at its end."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self.judge(line, began, error)
            raise
        else:
            self.judge(line, began, None)
        finally:
            self.give(line)

    def give(self, line: Line) -> None:
        """Take back a connection when a request has ended."""
        with self.lock:
            line.busy -= 1

    def spent(self) -> list[Line]:
        """Replaced connections, to be closed now that nothing is under way on them."""
        with self.lock:
            gone = [one for one in self.old if not one.busy]
            self.old = [one for one in self.old if one.busy]
        return gone

    def hang_up(self) -> list[Line]:
        """All connections, to be closed."""
        with self.lock:
            gone = [*self.old, self.line] if self.line else self.old
            self.line, self.old = None, []
        return gone

    def leave_to_parent(self) -> None:
        """In a forked child: never use or close these connections. Their sockets are the parent's
        too, and closing a channel shuts them down for both, so they are kept for ever.
        """
        for line in (*self.old, self.line):
            if line is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(line.triton))
        self.lock, self.line, self.old = threading.Lock(), None, []


def ours(error: Exception) -> Exception:
    """An exception of a call as one that serve.client.retry knows: gRPC raises its own, and plain
    ones for a channel that is closed.
    """
    if isinstance(error, (InferenceServerException, ClientError)):
        return error
    return InferenceServerException(f"the call failed: {first_line(error)}")


def closed() -> BadRequest:
    """The error of a call of a closed client."""
    return BadRequest("the client is closed: make a new one")


def close(lines: Iterable[Line]) -> None:
    """Close connections of the synchronous kind."""
    for line in lines:
        with contextlib.suppress(Exception):
            line.triton.close()


# Forks


class _Gate:
    """Lets no request of threads begin while the process forks, and lets `fork` wait for those
    under way, for a while: gRPC is fit for use in the child only if no thread was inside it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.under_way, self.forks = 0, 0
        self.used = False

    def enter(self) -> None:
        with self.changed:
            self.used = True
            self.changed.wait_for(lambda: not self.forks, 2 * _FORK_WAIT)
            self.under_way += 1

    def leave(self) -> None:
        with self.changed:
            self.under_way -= 1
            self.changed.notify_all()

    def shut(self) -> None:
        with self.changed:
            self.forks += 1
            self.changed.wait_for(lambda: not self.under_way, _FORK_WAIT)

    def open(self) -> None:
        with self.changed:
            self.forks -= 1
            self.changed.notify_all()


gate = _Gate()
_clients: weakref.WeakSet = weakref.WeakSet()
_child_of_user = False


def watch(client: Any) -> None:
    """Have a client's `renew` called in the children of a fork, before anything else is."""
    _clients.add(client)


def forked() -> bool:
    """Whether this process was forked from one that had called a server."""
    return _child_of_user


def _in_child() -> None:
    global gate, _child_of_user
    _child_of_user |= gate.used
    gate = _Gate()
    for client in list(_clients):
        client.renew()


# looked up when called: a child has a gate of its own
os.register_at_fork(
    before=lambda: gate.shut(), after_in_parent=lambda: gate.open(), after_in_child=_in_child
)


def within(call: Callable[[], Result], seconds: float) -> Result:
    """The result of a call that is left behind when it takes longer: in a forked child gRPC may
    miss its own deadlines.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise InferenceServerException(*TIME_IS_UP) from None

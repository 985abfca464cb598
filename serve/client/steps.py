"""What a client's work is made of, apart from how it waits: `serve.client` and `serve.client.aio`
carry out the same steps.

A piece of work is a generator: it yields a step, is given the step's result (or has its exception
thrown in), and returns the answer. So retries, splitting, breakers and checks are written once,
read from top to bottom and touch no socket.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Steps = Generator["Step", Any, Answer]


@dataclass(frozen=True)
class Rpc:
    """Call a method of tritonclient's InferenceServerClient: its synchronous and asyncio classes
    have the same.
    """

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)
    patience: float | None = None
    """Wait so many seconds, then go on with DEADLINE_EXCEEDED and leave the call to end by itself
    (`infer` only).
    """


@dataclass(frozen=True)
class Sleep:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call a function that keeps a core busy, such as decoding; asyncio gives it a thread."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Together:
    """Carry out pieces of work side by side, as many at a time as the client allows; the result is
    their answers in order.

    If one raises, those not yet begun are dropped. A piece may hold a Together of its own only with
    `at_once`, which waits for no place among the others.
    """

    parts: Sequence[Steps[Any]]
    at_once: bool = False


Step = Rpc | Sleep | Work | Together

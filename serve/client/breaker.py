"""A breaker a head: one that keeps failing is left alone for a while instead of holding up every
request.
"""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

_SUFFIXES = ("_token", "_patches", "_global", "_logits")


def head_of(output: str) -> str:
    """The head that gives an output: `clip_token` and `clip_patches` are of `clip`, `depth` is of
    `depth`.
    """
    output = re.sub(r"_s\d+$", "", output)  # a further map
    for suffix in _SUFFIXES:
        if output.endswith(suffix) and output != suffix:
            return output.removesuffix(suffix)
    return output


@dataclass
class Breaker:
    """Closed: requests pass. Open: none do, for `rest` seconds. Half-open: one passes, and decides.

    It opens at `failures` in a row. Every `allows()` that said yes must be followed by one of
    `succeeded`, `failed` and `undecided`. The clock is a parameter so that tests need not wait.
    """

    failures: int = 3
    rest: float = 10.0
    clock: Callable[[], float] = time.monotonic
    state: Literal["closed", "open", "half-open"] = field(default="closed", init=False)
    in_a_row: int = field(default=0, init=False)
    opened: float = field(default=0.0, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def allows(self) -> bool:
        with self.lock:
            if self.state == "open" and self.clock() - self.opened >= self.rest:
                self.state = "half-open"
                return True
            return self.state == "closed"

    def succeeded(self) -> None:
        with self.lock:
            self.state, self.in_a_row = "closed", 0

    def failed(self) -> None:
        with self.lock:
            self.in_a_row += 1
            if self.state == "half-open" or self.in_a_row >= self.failures:
                self.state, self.opened = "open", self.clock()

    def undecided(self) -> None:
        """A request ended without saying anything of this head: the next one may try."""
        with self.lock:
            if self.state == "half-open":
                self.state = "open"  # `opened` stays, so its rest is over

    @property
    def left(self) -> float:
        """Seconds until the next request may pass."""
        return max(0.0, self.opened + self.rest - self.clock()) if self.state == "open" else 0.0


class Breakers:
    """The breakers of a client, created on first use."""

    def __init__(self, failures: int = 3, rest: float = 10.0) -> None:
        self.failures, self.rest = failures, rest
        self.breakers: dict[str, Breaker] = {}
        self.lock = threading.Lock()

    def __getitem__(self, head: str) -> Breaker:
        with self.lock:
            return self.breakers.setdefault(head, Breaker(self.failures, self.rest))

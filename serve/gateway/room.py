"""How much the gateway takes on at a time."""

import contextlib
from collections.abc import Iterator

from serve.gateway.errors import ApiError
from serve.gateway.metrics import Metrics


class Room:
    """Requests under way and bytes of their bodies, both bounded: what comes beyond is refused at
    once, for a queue that only grows answers nobody in time.
    """

    def __init__(self, requests: int, size: int, metrics: Metrics) -> None:
        self._requests, self._bytes, self._metrics = requests, size, metrics
        self._held = self._held_bytes = 0

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """A place for a request whose body has at most so many bytes; raises ApiError if there is
        none.
        """
        if self._held >= self._requests or (self._held and self._held_bytes + size > self._bytes):
            raise ApiError(
                429,
                f"{self._held:,} requests are under way, which is what the gateway takes: try "
                "again",
                "overloaded",
                retry_after=1,
            )
        self._change(1, size)
        try:
            yield
        finally:
            self._change(-1, -size)

    def _change(self, requests: int, size: int) -> None:
        self._held += requests
        self._held_bytes += size
        self._metrics.in_hand.set(self._held)
        self._metrics.bytes.set(self._held_bytes)

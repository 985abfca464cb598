"""uvicorn's connections, with bounds on what a slow or silent client may hold."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD_SECONDS = 10.0
"""From a connection's start, or a request's first byte, to the end of its headers."""
_REST_SECONDS = 10.0
"""For the rest of a body whose answer was sent before it was read."""
_WRITE_SECONDS = 30.0
"""For a client to take what of an answer does not fit into the sockets' buffers."""
_HEAD_BYTES = 64 * 1024
MOST_CONNECTIONS = 1024
"""Open at a time; further ones are closed at once. Files that a process may open are few, too."""


class BoundedConnection(HttpToolsProtocol):
    """An HTTP/1.1 connection that is closed when its client takes too long.

    uvicorn itself ends idle connections only after a first request. The time for a body is the
    application's to watch.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._head = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._rest, self._write):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head is not None and self._head_bytes > _HEAD_BYTES:
            self._give_up()
        idle = self.cycle is not None and self.cycle.response_complete
        if idle and not any((self._head, self._rest, self.timeout_keep_alive_task)):
            # uvicorn stops this clock at any byte, also where no request begins with it
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        if self._head is None:
            self._head_bytes = 0
            self._head = self.loop.call_later(_HEAD_SECONDS, self._give_up)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle is not None and self.cycle.more_body:
            # what is left of the body is read and forgotten, so that the client, which may not look
            # before it has sent all, sees the answer
            self._rest = self.loop.call_later(_REST_SECONDS, self._give_up)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self.loop.call_later(_WRITE_SECONDS, self._give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write is not None:
            self._write.cancel()
            self._write = None

    def _give_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()

"""A gRPC proxy between the network and a tritonserver that its clients must not touch:
`python -m serve.server.front OPTIONS`, started by serve.server.front_process.

Triton before 2.70 crashes when a request is cancelled while it is being answered, which any client
with a short deadline does (triton-inference-server/server issues 7368 and 8034). So a request that
was passed on is left to finish, whatever its client does, and its answer is dropped. What is in
hand is bounded by count and bytes; beyond that a client hears UNAVAILABLE at once.

Messages pass as bytes and are not parsed. Metadata, status codes, messages and trailing metadata
pass unchanged. The module imports nothing of this project but the standard library and grpcio,
because it is started again while clients wait.
"""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

READY = "the front is ready"
"""Printed once it listens."""
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAMS = ("/inference.GRPCInferenceService/ModelStreamInfer", "/grpc.health.v1.Health/Watch")
"""Methods of more than one message; with others an answer cannot cross a message that is still
being sent, which gRPC's streams take for an error of their own.
"""

_LONGEST_SECONDS = 900.0
"""For a request passed on: longer than any answer takes, so that none is ever cancelled."""
_SLOW_SECONDS = 2.0
"""A body that takes longer to arrive makes room for others that wait."""
_WRITE_SECONDS = 60.0
"""A client that does not take its answer for so long is given up."""
_POLL_SECONDS = 0.02
_SIGN_SECONDS = 2.0
"""Between two empty lines in the log, by which the parent knows that the front is not stuck."""

_NO_METADATA = ("user-agent", "content-type", "te")
"""Of a connection, not of a request."""
_LOST = re.compile(
    r"\b(unix|ipv[46]):|failed to connect|recvmsg|sendmsg|[Ss]ocket closed|Stream removed|GOAWAY|"
    r"[Cc]onnection (reset|refused|closed)|[Bb]roken pipe"
)
"""How gRPC says that there is no server: with addresses that are no business of clients."""
_LOST_STREAM = re.compile("^Internal error from Core$")
"""How grpc.aio says that a stream ended while it wrote into it."""
_RESTARTING = "tritonserver is being started again: try again in a few seconds"
_STOPPING = "Server is stopping: try another one, or again later"

Status = tuple[grpc.StatusCode, str, tuple]
"""Code, details and trailing metadata of a call."""


@dataclass(frozen=True)
class FrontOptions:
    """How a front listens, and what it holds at most."""

    listen: str
    """HOST:PORT."""
    upstream: str
    """tritonserver's address, HOST:PORT or unix:PATH."""
    key: str = ""
    certificate: str = ""
    """PEM files; "": no TLS."""
    root: str = ""
    """PEM file of the authority that must have signed clients' certificates; "": any client."""
    arguments: dict[str, int] = field(default_factory=dict)
    """gRPC's channel arguments of the server."""
    compression: str = "none"
    """Of answers: none, gzip or deflate."""
    exit_seconds: float = 30.0
    """For requests in hand, after SIGTERM."""
    message_bytes: int = 256 * 2**20
    """Of a request, at most."""
    requests: int = 1024
    """In hand at once, at most."""
    bytes: int = 2**30
    """Of the requests and answers in hand, together, at most."""
    held: bool = False
    """Whether it begins with refusing everything, until SIGUSR2."""
    arriving: int = 16
    """Requests whose bodies are read at once: their sizes are not known before."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class _Place:
    """What one request takes of the bounds, until `release`."""

    def __init__(self, front: "Front") -> None:
        self.front, self.size, self.held = front, 0, True
        front.requests += 1

    def grow(self, size: int) -> None:
        self.size += size
        self.front.bytes += size

    def release(self, _: object = None) -> None:
        if self.held:
            self.held = False
            self.front.requests -= 1
            self.front.bytes -= self.size


class Front(grpc.GenericRpcHandler):
    """Passes every method on to one tritonserver."""

    def __init__(self, options: FrontOptions, channel: grpc.aio.Channel) -> None:
        self.options, self.channel = options, channel
        self.requests = self.bytes = 0
        """In hand: passed on and not answered, or answered and not taken."""
        self.stopping, self.held = False, options.held
        self.streams = self.coming = 0
        """Open streams, and requests whose bodies have not arrived."""
        self.arriving, self.waiting = asyncio.Semaphore(options.arriving), 0
        self.tasks: set[asyncio.Task] = set()
        self.refused, self.told = 0, 0.0

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        # as streams, which a single message is on the wire too: so a request can be refused before
        # its body is read
        path = call.method

        async def handle(_: object, context: grpc.aio.ServicerContext) -> None:
            if self.stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _STOPPING)
            if self.held:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _RESTARTING)
            # health and administration are answered, however many inferences there are
            streams, most = path in _STREAMS, self.options.requests
            held = self.streams if streams else self.requests + self.coming
            if held >= (most if streams or path == _INFER else 2 * most):
                await self.refuse(context, f"{held} requests are in hand")
            try:
                await (self.relay if streams else self.pass_on)(path, context)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the answer was not read")

        return grpc.stream_stream_rpc_method_handler(handle)

    async def refuse(self, context: grpc.aio.ServicerContext, why: str) -> None:
        """End a call with UNAVAILABLE; the log has a line every ten seconds."""
        self.refused += 1
        if time.monotonic() - self.told > 10:
            print(f"front: {why}; {self.refused} refused so far", flush=True)
            self.told = time.monotonic()
        message = f"Exceeds maximum queue size: {why}: try again later"
        await context.abort(grpc.StatusCode.UNAVAILABLE, message)

    async def read(self, context: grpc.aio.ServicerContext) -> Any:
        """A request's body, or EOF. Ends the call if it comes slowly while others wait."""
        self.waiting += 1
        try:
            await self.arriving.acquire()
        finally:
            self.waiting -= 1
        reading = asyncio.ensure_future(context.read())
        try:
            while not (await asyncio.wait({reading}, timeout=_SLOW_SECONDS))[0]:
                if self.waiting:
                    await self.refuse(context, f"{self.waiting} requests wait for slower ones")
            return reading.result()
        finally:
            reading.cancel()
            self.arriving.release()

    async def pass_on(self, path: str, context: grpc.aio.ServicerContext) -> None:
        """One request, one answer."""
        infers = path == _INFER
        self.coming += 1
        try:
            message = await (self.read(context) if infers else context.read())
        finally:
            self.coming -= 1
        if message is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request has no message")
        if self.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, _STOPPING)
        place, asking = _Place(self), None
        try:
            if infers and self.bytes + len(message) > self.options.bytes:
                await self.refuse(context, f"{self.bytes >> 20} MiB of requests are in hand")
            place.grow(len(message))
            asking = self.keep(self.ask(path, message, _passed_on(context.invocation_metadata())))
            del message
            answer, first, status = await asyncio.shield(asking)
            if first:
                await context.send_initial_metadata(first)
            if answer is not None:
                place.grow(len(answer))
                async with asyncio.timeout(_WRITE_SECONDS):
                    await context.write(answer)
            await _finish(context, status)
        finally:
            # of a client that has left, the request stays in hand until tritonserver answers it
            if asking is None or asking.done():
                place.release()
            else:
                asking.add_done_callback(place.release)

    def keep(self, work: Any) -> asyncio.Task:
        """A task that goes on when its client has left."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def ask(
        self, path: str, message: bytes, metadata: tuple
    ) -> tuple[bytes | None, tuple, Status]:
        """tritonserver's answer (None if it refuses), its initial metadata and status."""
        call = self.channel.unary_unary(path)(message, metadata=metadata, timeout=_LONGEST_SECONDS)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            return None, _passed_on(error.initial_metadata()), _status(error)
        status = grpc.StatusCode.OK, await call.details(), await call.trailing_metadata()
        return answer, _passed_on(await call.initial_metadata()), status

    async def relay(self, path: str, context: grpc.aio.ServicerContext) -> None:
        """Messages in both directions until both sides end."""
        places: deque[_Place] = deque()
        answers: asyncio.Queue = asyncio.Queue()
        call = self.channel.stream_stream(path)(
            metadata=_passed_on(context.invocation_metadata()),
        )
        sending = self.keep(self.send(context, call, places))
        gone = asyncio.Event()
        receiving = self.keep(self.receive(call, answers, places, gone))
        self.streams += 1
        try:
            while (answer := await answers.get()) is not None:
                async with asyncio.timeout(_WRITE_SECONDS):
                    await context.write(answer)
                if places:
                    places.popleft().release()
            await _finish(context, await receiving)
        finally:
            self.streams -= 1
            gone.set()
            sending.cancel()  # what was sent is answered; its `finally` ends the stream
            if receiving.done():  # and `send` went on for a moment
                _release(places)

    async def send(
        self, context: grpc.aio.ServicerContext, call: Any, places: deque[_Place]
    ) -> None:
        """Pass a client's messages on, as fast as there is room for them."""
        try:
            # not `read`: a stream that is idle holds up nobody
            while (message := await context.read()) is not grpc.aio.EOF and not call.done():
                while (
                    self.requests >= self.options.requests
                    or self.bytes + len(message) > self.options.bytes
                ):
                    await asyncio.sleep(_POLL_SECONDS)
                places.append(_Place(self))
                places[-1].grow(len(message))
                await self.keep_writing(call, message)
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the stream has ended, and `receive` knows how
        finally:
            self.keep(_half_close(call))

    async def keep_writing(self, call: Any, message: bytes) -> None:
        """Write a message; a cancelled `write` would cancel the call."""
        await asyncio.shield(self.keep(_write(call, message)))

    async def receive(
        self, call: Any, answers: asyncio.Queue, places: deque[_Place], gone: asyncio.Event
    ) -> Status:
        """Read tritonserver's messages to their end, and drop them once the client has `gone`;
        returns the status.
        """
        try:
            async for answer in call:
                if gone.is_set():
                    if places:
                        places.popleft().release()
                    continue
                if places:  # counted until it is taken
                    places[0].grow(len(answer))
                answers.put_nowait(answer)
            return await call.code(), await call.details(), await call.trailing_metadata()
        except grpc.aio.AioRpcError as error:
            return _status(error)
        finally:
            answers.put_nowait(None)
            _release(places)

    async def drain(self) -> bool:
        """Refuse what is new and wait for what is in hand; whether it was answered in time."""
        self.stopping = True
        end = time.monotonic() + self.options.exit_seconds
        while self.requests and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        return not self.requests


def _release(places: deque[_Place]) -> None:
    while places:
        places.popleft().release()


async def _write(call: Any, message: bytes) -> None:
    with suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
        await call.write(message)


async def _half_close(call: Any) -> None:
    with suppress(grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
        await call.done_writing()


def _passed_on(metadata: Iterable[tuple[str, Any]] | None) -> tuple[tuple[str, Any], ...]:
    """Metadata of a request or answer, without that of its connection."""
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if key not in _NO_METADATA and not key.startswith("grpc-")
    )


def _status(error: grpc.aio.AioRpcError) -> Status:
    code, details = error.code(), error.details() or ""
    lost = _LOST if code is grpc.StatusCode.UNAVAILABLE else _LOST_STREAM
    if lost.search(details):
        code, details = grpc.StatusCode.UNAVAILABLE, _RESTARTING
    return code, details, error.trailing_metadata() or ()


async def _finish(context: grpc.aio.ServicerContext, status: Status) -> None:
    """End a call as tritonserver did."""
    code, details, trailing = status
    trailing = tuple(trailing or ())
    if code is not grpc.StatusCode.OK:
        await context.abort(code, details or "", trailing)
    if trailing:
        context.set_trailing_metadata(trailing)


async def serve(options: FrontOptions) -> bool:
    """Listen until SIGTERM or SIGINT; whether every request in hand was answered then.

    Raises OSError for files that cannot be read, RuntimeError for an address in use.
    """
    to_triton = {
        "grpc.max_send_message_length": -1,
        "grpc.max_receive_message_length": -1,
        "grpc.enable_retries": 0,
        "grpc.initial_reconnect_backoff_ms": 100,
        # how long a connection may take to come up, too: a busy tritonserver is not a lost one
        "grpc.min_reconnect_backoff_ms": 5000,
        "grpc.max_reconnect_backoff_ms": 500,
    }
    to_clients = {
        "grpc.max_send_message_length": -1,
        "grpc.max_receive_message_length": options.message_bytes,
        "grpc.so_reuseport": 0,  # else two fronts share a port in silence
        # clients may look every five seconds whether the connection still works
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": 5000,
        **options.arguments,
    }
    compression = getattr(grpc.Compression, options.compression.capitalize(), None)
    async with grpc.aio.insecure_channel(options.upstream, list(to_triton.items())) as channel:
        front = Front(options, channel)
        server = grpc.aio.server(
            handlers=[front],
            options=list(to_clients.items()),
            compression=compression or grpc.Compression.NoCompression,
        )
        if options.certificate:
            server.add_secure_port(options.listen, _credentials(options))
        else:
            server.add_insecure_port(options.listen)
        await server.start()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        # a new tritonserver may answer before it has been found to answer rightly
        for number, held in ((signal.SIGUSR1, True), (signal.SIGUSR2, False)):
            loop.add_signal_handler(number, setattr, front, "held", held)
        print(READY, flush=True)
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _SIGN_SECONDS)
            print(flush=True)
        answered = await front.drain()
        await server.stop(_SLOW_SECONDS)
    return answered


def _credentials(options: FrontOptions) -> grpc.ServerCredentials:
    contents = []
    for path in (options.key, options.certificate, options.root):
        with open(path or os.devnull, "rb") as file:
            contents.append(file.read())
    key, certificate, root = contents
    return grpc.ssl_server_credentials(
        [(key, certificate)], root or None, require_client_auth=bool(root)
    )


def main(arguments: Sequence[str]) -> int:
    options = FrontOptions(**json.loads(arguments[0]))
    try:
        return 0 if asyncio.run(serve(options)) else 1
    except (OSError, RuntimeError) as error:
        print(f"front: {error}", flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

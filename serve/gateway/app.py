"""The endpoint as an ASGI application: what each path answers, and a line of log for each request.

POST /v1/embeddings          OpenAI's form, with pictures
GET  /v1/models[/NAME]       outputs of the server that are embeddings
GET  /health[/live|/ready]   for probes
GET  /metrics                for Prometheus
"""

import asyncio
import logging
import re
import time
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
import orjson
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from contract.errors import printable
from serve.client.aio import AsyncFeatureClient
from serve.client.tasks.text import embed_texts
from serve.errors import BadRequest, ClientError, NotFinite, Unavailable, shorten
from serve.gateway.errors import ApiError, from_client, not_finite, timed_out
from serve.gateway.keys import Keys
from serve.gateway.metrics import Metrics
from serve.gateway.offer import Embedding, Offer, Watch
from serve.gateway.requests import Asked, Inputs, RequestLimits, read_request
from serve.gateway.room import Room

Result = TypeVar("Result")
Input = TypeVar("Input", bytes, str)

LOG = logging.getLogger("serve.gateway")
BODIES = 16
"""Bodies of the largest size that are held at a time."""

_CLIENT_GONE = 499
"""nginx's status for a client that has hung up; it is logged and counted, not sent."""
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_PARSED_HERE = 256 * 1024
"""Bytes of a body that is read between two events; larger ones get a thread, so that a body of
many small parts does not hold up other requests.
"""


@dataclass(frozen=True)
class GatewaySettings:
    """Bounds of the endpoint."""

    limits: RequestLimits = RequestLimits()
    body: int = 32 * 2**20
    """Bytes of a request's body."""
    body_seconds: float = 30.0
    """For a client to send it."""
    requests: int = 64
    """Under way at a time."""
    timeout: float = 30.0
    """Seconds for what the server does for a request."""


@dataclass
class _Seen:
    """What the log says of a request."""

    request_id: str
    began: float
    key: int | None = None
    model: str = "-"
    inputs: int = 0
    received: int = 0
    code: str = "-"
    reason: str = ""
    status: int = 0
    sent: bool = False


class _ClientGone(Exception):
    """The client has hung up: nobody waits for an answer."""


class Gateway:
    """The application. `watch` has to be run beside it."""

    def __init__(
        self,
        client: AsyncFeatureClient,
        watch: Watch,
        keys: Keys,
        metrics: Metrics,
        settings: GatewaySettings = GatewaySettings(),
    ) -> None:
        self.client, self.watch, self.keys = client, watch, keys
        self.metrics, self.settings = metrics, settings
        self.room = Room(settings.requests, BODIES * settings.body, metrics)
        routes = [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/health", self.ready),
            Route("/metrics", self.exposed),
        ]
        self.paths = {route.path for route in routes}
        self.router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens in it, and log it."""
        if scope["type"] != "http":
            return
        given = Headers(scope=scope).get("x-request-id", "")
        seen = _Seen(
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, time.perf_counter()
        )
        scope |= {"app": self, "seen": seen}  # with an app, the router raises what it cannot route

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status, seen.sent = message["status"], True
                message["headers"].append((b"x-request-id", seen.request_id.encode()))
            await send(message)

        try:
            try:
                self.check_key(scope, seen)
                await self.router(scope, receive, send_on)
            except (_ClientGone, ApiError, HTTPException):
                raise
            except Exception as error:
                LOG.exception("request %s failed", seen.request_id)
                if seen.sent:
                    raise
                raise ApiError(500, "the gateway failed: see its log", "internal_error") from error
        except _ClientGone:
            seen.status, seen.code = _CLIENT_GONE, "client_gone"
        except ApiError as error:
            seen.code, seen.reason = error.code, error.reason
            await _error_response(error)(scope, receive, send_on)
        except HTTPException as error:
            name = "method_not_allowed" if error.status_code == 405 else "not_found"
            seen.code, phrase = name, HTTPStatus(error.status_code).phrase
            message = f"{phrase}: {scope['method']} {shorten(scope['path'], 80)}"
            response = _error_response(ApiError(error.status_code, message, name))
            response.headers.update(error.headers or {})
            await response(scope, receive, send_on)
        finally:
            self.count(scope, seen)

    def check_key(self, scope: Scope, seen: _Seen) -> None:
        """Raise ApiError for a request to /v1 without one of the keys, if there are keys."""
        if not self.keys or not scope["path"].startswith("/v1"):
            return
        seen.key = self.keys.number(Headers(scope=scope).get("authorization", ""))
        if seen.key is None:
            raise ApiError(
                401, "no valid API key: send Authorization: Bearer KEY", "invalid_api_key"
            )

    def count(self, scope: Scope, seen: _Seen) -> None:
        """A request's end, in the metrics and in the log."""
        path, seconds = scope["path"], time.perf_counter() - seen.began
        route = "/v1/models/{name}" if path.startswith("/v1/models/") else path
        route = route if route in self.paths else "other"
        self.metrics.requests.labels(route, str(seen.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if seen.code != "-":
            self.metrics.errors.labels(seen.code).inc()
        if seen.status == 200 and not route.startswith("/v1"):
            return  # probes come every few seconds
        peer = (scope.get("client") or ("-",))[0]
        LOG.info(
            f"{scope['method']} {printable(shorten(path, 80))} {seen.status} "
            f"{1000 * seconds:.1f}ms model={seen.model} inputs={seen.inputs} "
            f"bytes={seen.received} code={seen.code} key={seen.key or '-'} peer={peer} "
            f"id={seen.request_id}" + (f" reason={printable(seen.reason)}" if seen.reason else "")
        )

    # Paths

    async def embeddings(self, request: Request) -> Response:
        seen = request.scope["seen"]
        declared = _check_headers(request.headers, self.settings.body)
        offer = self.watch.offer
        with self.room.take(self.settings.body if declared is None else declared):
            body = await self.read_body(request)
            seen.received = len(body)
            limits = self.settings.limits
            if len(body) > _PARSED_HERE:
                asked = await asyncio.to_thread(read_request, body, limits)
            else:
                asked = read_request(body, limits)
            del body
            embedding = offer.choose(asked.model)
            seen.model, seen.inputs = embedding.name, len(asked.inputs.pictures)
            seen.inputs += len(asked.inputs.texts)
            _check_asked(asked, embedding)
            work = self.embed(embedding.name, asked.inputs, offer, seen.request_id)
            rows = await _unless_gone(request, work)
        for kind, inputs in asked.inputs._asdict().items():
            if inputs:
                self.metrics.inputs.labels(embedding.name, kind).inc(len(inputs))
        return _json(200, _answer(rows, asked.base64, embedding.name))

    async def models(self, request: Request) -> Response:
        offer = self.watch.offer
        listed = [offer.listed(embedding) for embedding in offer.embeddings.values()]
        return _json(200, {"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        offer = self.watch.offer
        return _json(200, offer.listed(offer.choose(request.path_params["name"])))

    async def live(self, request: Request) -> Response:
        return _json(200, {"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self.watch.reason is None:
            return _json(200, {"status": "ready"})
        reason = "the server behind the gateway does not answer"
        return _json(503, {"status": "not ready", "reason": reason})

    async def exposed(self, request: Request) -> Response:
        self.metrics.ready.set(self.watch.reason is None)
        page, kind = self.metrics.exposed(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": kind})

    # Work

    async def read_body(self, request: Request) -> bytes:
        """The body, within its bounds of bytes and seconds; raises ApiError."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.settings.body:
                        raise _body_too_large(self.settings.body)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            seconds = self.settings.body_seconds
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s", "body_timeout"
            ) from error

    async def embed(
        self, name: str, inputs: Inputs, offer: Offer, request_id: str
    ) -> list[np.ndarray]:
        """A vector [d] for every input, in order; raises ApiError."""

        async def picture_rows(files: list[bytes]) -> np.ndarray:
            # Decoders die of odd pictures: the server's are processes of their own, which are
            # replaced
            encoded = offer.decodes and offer.view is None
            options = {"encoded": encoded, "view": offer.view, "request_id": request_id}
            return (await self.client.features(files, [name], **options))[name]

        async def text_rows(texts: list[str]) -> np.ndarray:
            return await embed_texts(self.client, texts, request_id=request_id)

        rows: dict[int, np.ndarray] = {}
        began, places = time.perf_counter(), list(inputs.pictures)
        try:
            async with asyncio.timeout(self.settings.timeout):
                if inputs.pictures:
                    rows |= await _rows(inputs.pictures, picture_rows)
                if inputs.texts:
                    places = list(inputs.texts)
                    rows |= await _rows(inputs.texts, text_rows)
        except ClientError as error:
            if isinstance(error, Unavailable):
                self.watch.doubt()
            raise from_client(error, places) from error
        except TimeoutError as error:
            raise timed_out(f"no answer in {self.settings.timeout:g} s") from error
        self.metrics.server_seconds.observe(time.perf_counter() - began)
        return [rows[place] for place in sorted(rows)]


async def _rows(
    inputs: Mapping[int, Input], ask: Callable[[list[Input]], Awaitable[np.ndarray]]
) -> dict[int, np.ndarray]:
    """Vectors by place of what `ask` embeds. An answer that is not finite is asked for again input
    by input, and ApiError names the one that gives it.
    """
    try:
        return dict(zip(inputs, await ask(list(inputs.values())), strict=True))
    except NotFinite as error:
        if len(inputs) == 1:
            raise not_finite(*inputs, error.message) from error
    rows: dict[int, np.ndarray] = {}
    for place, given in inputs.items():
        try:
            rows |= await _rows({place: given}, ask)
        except BadRequest as error:  # it is about the first of one
            raise from_client(error, [place]) from error
    return rows


def _check_headers(headers: Headers, most: int) -> int | None:
    """Bytes of the body, None if they are not declared; raises ApiError for a body that is not
    taken.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            f"content type '{shorten(kind, 60)}' is not taken: send application/json",
            "unsupported_media_type",
        )
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "compressed bodies are not taken", "unsupported_media_type")
    declared = headers.get("content-length", "")
    if not declared.isdecimal():
        return None
    if int(declared) > most:
        raise _body_too_large(most)
    return int(declared)


def _body_too_large(most: int) -> ApiError:
    message = f"the body has more than the {most:,} bytes that are taken: send fewer pictures"
    return ApiError(413, message, "body_too_large")


def _check_asked(asked: Asked, embedding: Embedding) -> None:
    """Raise ApiError for what this embedding cannot be."""
    if asked.dimensions not in (None, embedding.width):
        raise ApiError(
            400,
            f"dimensions {asked.dimensions}: '{embedding.name}' has {embedding.width}, and vectors "
            "are not shortened",
            "invalid_value",
            "dimensions",
        )
    if asked.inputs.texts and not embedding.texts:
        place = min(asked.inputs.texts)
        raise ApiError(
            400,
            f"input[{place}] is text, and '{embedding.name}' takes pictures only: send "
            "data:image/jpeg;base64,…",
            "text_not_supported",
            f"input[{place}]",
        )


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled if the client hangs up; then raises
    _ClientGone.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _answer(rows: Sequence[np.ndarray], base64: bool, model: str) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": place,
                "embedding": b64encode(row.astype("<f4", copy=False).tobytes()).decode()
                if base64
                else np.ascontiguousarray(row),
            }
            for place, row in enumerate(rows)
        ],
        "model": model,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


def _json(status: int, value: object) -> Response:
    # numbers as short as they are the same float32 again: half the bytes of Python's, and a tenth
    # of the time
    data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, {"content-type": "application/json"})


def _error_response(error: ApiError) -> Response:
    response = _json(error.status, error.body())
    if error.retry_after is not None:
        response.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if error.status == 408:
        response.headers["connection"] = "close"
    return response

"""How a client behaves, and how one of its calls is made; every default is stated here."""

import operator
import uuid
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from contract.images import Limits
from contract.views import ViewPolicy
from serve.client.retry import Retry
from serve.client.served import ENCODED, FRONT_DOOR
from serve.client.shared_memory import Kind
from serve.client.tls import Tls
from serve.errors import BadRequest
from serve.server.rest import ADMIN_HEADER

ADMIN = f"triton-grpc-protocol-{ADMIN_HEADER}"
"""gRPC's header for the key of restricted endpoints; the part after `triton-grpc-protocol-` is the
server's to choose.
"""


_LONGEST_WAIT = 1_000_000
"""Seconds."""


@dataclass(frozen=True)
class ClientOptions:
    """How a client behaves: the keyword arguments of FeatureClient and AsyncFeatureClient."""

    timeout: float = 30.0
    """Seconds for each request (of at most the model's batch), all its attempts together."""
    retry: Retry = Retry()
    budget: tuple[float, float] = (0.2, 100)
    """Retries: so many a call in the long run, and so many at once (see serve.client.retry.Budget).
    """
    breaker: tuple[int, float] = (3, 10.0)
    """A head is left alone after so many failures in a row, for so many seconds."""
    concurrency: int = 4
    """Requests of one call that are under way at the same time."""
    shared_memory: Kind | None = None
    device: int = 0
    """GPU of CUDA shared memory."""
    admin_key: str | None = field(default=None, repr=False)
    """Key of the server's restricted endpoints; shared memory wants it where they are."""
    admin_header: str = ADMIN
    tls: Tls | None = None
    limits: Limits = Limits()
    """Of encoded pictures that are decoded here."""

    def __post_init__(self) -> None:
        _check_seconds("timeout", self.timeout)
        if not isinstance(self.concurrency, int) or self.concurrency < 1:
            raise BadRequest(f"concurrency={self.concurrency!r}: give 1 or more")
        for name, kind in (("retry", Retry), ("limits", Limits), ("tls", Tls | None)):
            if not isinstance(getattr(self, name), kind):
                raise BadRequest(
                    f"{name} is of type {type(getattr(self, name)).__name__}: give a "
                    f"{name.capitalize()}"
                )
        for name in ("admin_key", "admin_header"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, str) and value.isascii() and value.isprintable()
            ):
                raise BadRequest(f"{name}: give a text of printable ASCII characters")


@dataclass(frozen=True)
class RequestOptions:
    """How one call of `features` or of a task of serve.client.tasks is made.

    Raises BadRequest for values that make no sense together.
    """

    model: str = FRONT_DOOR
    encoded: bool = False
    """Send files as they are, to be decoded by the server at its own size."""
    partial: bool = False
    """Let heads that fail go missing (Answer.missing says why) instead of failing everything."""
    size: tuple[int, int] | None = None
    """Height and width, for models that take many; None: the pictures' own or the model's."""
    view: str | None = None
    """How pictures of other sizes are brought to that one (contract/views.py); None: as the bundle
    says, which is how its scores were taken."""
    timeout: float | None = None
    """Seconds for each request, all its attempts together; None: the client's."""
    request_id: str | None = None
    """Goes through Triton's log and is in every error; None: made up."""

    def __post_init__(self) -> None:
        if self.timeout is not None:
            _check_seconds("timeout", self.timeout)
        for name, value in (("model", self.model), ("request_id", self.request_id or "made up")):
            if not isinstance(value, str) or not value or not value.isprintable():
                raise BadRequest(f"{name}={value!r}: give a text of printable characters")
        if self.size is not None:
            object.__setattr__(self, "size", _checked_size(self.size))
        if self.encoded and self.model not in (FRONT_DOOR, ENCODED):
            raise BadRequest(
                f"encoded pictures are taken by '{FRONT_DOOR}' only, not by '{self.model}': leave "
                "encoded out"
            )
        if self.view is not None:
            try:
                ViewPolicy.parse(self.view)
            except ValueError as error:
                raise BadRequest(f"view: {error}") from error
        if self.encoded and self.view is not None:
            raise BadRequest(
                "view= and encoded=True: the server decodes to its own view; leave one of them out"
            )
        if self.encoded and self.size is not None:
            raise BadRequest(
                "size= and encoded=True: the server decodes to its own size; leave one of them out"
            )

    def complete(self, client: ClientOptions) -> "RequestOptions":
        """With the model that takes what is sent, the client's timeout and an id, where none was
        given.
        """
        return replace(
            self,
            model=ENCODED if self.encoded else self.model,
            timeout=self.timeout or client.timeout,
            request_id=self.request_id or uuid.uuid4().hex,
        )


def _check_seconds(name: str, value: object) -> None:
    """Raise BadRequest for what is not a number of seconds that can be waited for."""
    if not isinstance(value, Real) or not 0 < value <= _LONGEST_WAIT:
        raise BadRequest(f"{name}={value!r}: give seconds above 0, at most {_LONGEST_WAIT:,}")


def _checked_size(size: Any) -> tuple[int, int]:
    """A (height, width) of plain integers; raises BadRequest."""
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise BadRequest(f"size={size!r}: give (height, width), both above 0")
    return height, width


def check_url(url: Any) -> str:
    """HOST:PORT of a gRPC endpoint, or another target that gRPC knows; raises BadRequest for what
    is none.
    """
    if not isinstance(url, str) or not url.strip() or not url.isprintable():
        raise BadRequest(f"url={url!r}: give HOST:PORT of the server's gRPC port")
    scheme, _, rest = url.partition("://")
    if rest and scheme.lower() in ("http", "https", "grpc", "grpcs", "tcp"):
        raise BadRequest(
            f"url='{url}': give HOST:PORT of the server's gRPC port (8001 by default), without "
            f"'{scheme}://'"
        )
    return url.strip()

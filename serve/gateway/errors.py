"""Errors of the endpoint in OpenAI's form, and what the errors of serve.client become."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import (
    BadRequest,
    ClientError,
    DeadlineExceeded,
    NotServed,
    Unavailable,
    shorten,
)

_LONGEST = 500
"""Characters of a message: it may quote what a client sent."""
_TYPES = {429: "rate_limit_error"}
_WHICH = re.compile(r"^(?:in ensemble '\w+', )?(picture|label) (\d+)(?=:? )")
"""How serve.client and the server begin a message about one of several."""


@dataclass
class ApiError(Exception):
    """An error of the endpoint: an HTTP status, and what the body says."""

    status: int
    message: str
    code: str
    param: str | None = None
    """The field of the request that is wrong, `input[2]` say."""
    retry_after: int | None = None
    """Seconds, for errors that pass."""
    reason: str = ""
    """For the log: what strangers need not know of the server behind."""

    def body(self) -> dict[str, object]:
        """The body of the answer, as OpenAI writes it."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": shorten(self.message, _LONGEST),
                "type": _TYPES.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }


def from_client(error: ClientError, places: Sequence[int]) -> ApiError:
    """What a failed request to the server means to whoever asked the endpoint. `places` are the
    positions in the request's `input` of what was sent on together.
    """
    if isinstance(error, BadRequest):
        match = _WHICH.match(error.message)
        if match is None or int(match[2]) >= len(places):
            return ApiError(400, error.message, "invalid_input", "input")
        kind = "invalid_image" if match[1] == "picture" else "invalid_text"
        param = f"input[{places[int(match[2])]}]"
        message = error.message[match.end() :].lstrip(": ")
        return ApiError(400, f"{param}: {message}", kind, param)
    if isinstance(error, (Unavailable, NotServed)):
        return unavailable(error.message)
    if isinstance(error, DeadlineExceeded):
        return timed_out(error.message)
    message = "the server behind the gateway failed"
    return ApiError(502, message, "server_failed", reason=error.message)


def not_finite(place: int, reason: str) -> ApiError:
    """The model gives no vector for one input; asking again does not help."""
    message = f"input[{place}]: the model's answer about it is not finite: leave it out"
    return ApiError(422, message, "not_finite", f"input[{place}]", reason=reason)


def unavailable(reason: str) -> ApiError:
    """The server behind the gateway cannot be used now."""
    message = "the server behind the gateway does not answer: try again"
    return ApiError(503, message, "server_unavailable", retry_after=2, reason=reason)


def timed_out(reason: str) -> ApiError:
    """The server behind the gateway took too long."""
    message = "the server behind the gateway did not answer in time"
    return ApiError(504, message, "timeout", reason=reason)

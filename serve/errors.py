"""Errors of requests and servers; `contract.errors.exit_status` turns each into one line and a
status.
"""

from contract.errors import Failure, UserError


class ServerError(Failure):
    """The server could not be started or failed; commands turn it into one line and exit status
    1.
    """


class ClientError(Exception):
    """Base of the errors of a request; keeps the request's id, which Triton's log has too, in
    case of a failure.
    """

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(message)
        self.message, self.request_id = message, request_id

    def __str__(self) -> str:
        return f"{self.message} [request {self.request_id}]" if self.request_id else self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class BadRequest(ClientError, UserError):
    """The request is invalid: a picture, an output, a size, a label."""


class NotServed(ClientError, UserError):
    """The server has no such model."""


class NotAllowed(ClientError, UserError):
    """The server refuses this client: TLS, certificates, a restricted endpoint's key."""


class Unavailable(ClientError, ServerError):
    """No server, a server that is starting, stopping or overloaded, or a head whose breaker is
    open: try again later.
    """


class DeadlineExceeded(ClientError, ServerError):
    """No answer within the time limit of all attempts."""


class ServerFailed(ClientError, ServerError):
    """The server answered with a failure of its own."""


class WrongAnswer(ClientError, ServerError):
    """An answer that does not match the request: names, types, shapes, numbers that are not
    finite.
    """

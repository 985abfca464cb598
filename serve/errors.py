"""Errors of requests and servers; `contract.errors.exit_status` turns each into one line and a
status.
"""

import importlib.util
from collections.abc import Sequence

from contract.errors import Failure, UserError


class ServerError(Failure):
    """The server could not be started or failed; commands turn it into one line and exit status
    1.
    """


_LONGEST, _LONGEST_ID = 220, 60
"""Characters of a message and of a request's id in an error: a text that someone sent by mistake
for a path is megabytes long, and so is what a server quotes of it.
"""


class ClientError(Exception):
    """Base of the errors of a request; keeps the request's id, which Triton's log has too, in
    case of a failure.

    The message is one line, and together with the id shorter than 300 characters.
    """

    def __init__(self, message: str, request_id: str = "") -> None:
        self.message, self.request_id = message, request_id
        super().__init__(self.message, request_id)

    @property
    def message(self) -> str:
        return self._message

    @message.setter
    def message(self, message: str) -> None:
        self._message = shorten(message, _LONGEST)

    def __str__(self) -> str:
        shown = shorten(self.request_id, _LONGEST_ID)
        return f"{self.message} [request {shown}]" if shown else self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


def need_packages(command: str, packages: Sequence[str], extra: str) -> None:
    """Raise UserError for the first package that a command needs and that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{command} needs {package}, which is not installed: pip install "
                f"'vfm-distill[{extra}]'"
            )


def shorten(text: str, most: int) -> str:
    """A text as one printable line of at most so many characters, with what is too long left out of
    its middle.
    """
    if len(text) > most:  # first of all, for it may be megabytes
        end = most // 3
        text = f"{text[: most - end - 3]} … {text[-end:]}"
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


class BadRequest(ClientError, UserError):
    """The request is invalid: a picture, an output, a size, a label."""


class BadPicture(BadRequest):
    """A `picture`, by the name that messages call it, that cannot be read or is not taken."""

    picture = ""


def bad_picture(message: str, picture: str, request_id: str = "") -> BadPicture:
    error = BadPicture(message, request_id)
    error.picture = picture
    return error


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


class NotFinite(WrongAnswer):
    """An `output` that holds NaN or infinity: the picture's, or the model's fault."""

    output = ""


def with_remedy(error: Unavailable | NotAllowed, url: str) -> Unavailable | NotAllowed:
    """What a command says where nobody answers at an address, or this client is refused there."""
    if isinstance(error, NotAllowed):
        error.message += " (see --ssl, --ssl-root, --ssl-certificate, --ssl-key, --admin-key)"
    elif "connect" in error.message or "resolving" in error.message:
        return type(error)(
            f"no server answers at {url}: start one with python -m serve.run BUNDLE, or name "
            "another with --url"
        )
    return error

"""What goes wrong in serving, and how a command says so: a user's mistake is one line and exit status 2."""

import errno
import os
import select
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user asked for: the message names the thing, the value and the remedy."""


class ServerError(RuntimeError):
    """The server could not be started or failed; commands turn it into one line and exit status 1."""


class ClientError(Exception):
    """Base of what a request can end in; keeps the request's id, which Triton's log has too, in case of a failure."""

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(message)
        self.message, self.request_id = message, request_id

    def __str__(self) -> str:
        return f"{self.message} [request {self.request_id}]" if self.request_id else self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class BadRequest(ClientError, UserError):
    """What was asked cannot be answered as it is: a picture, an output, a size, a label."""


class NotServed(ClientError, UserError):
    """The server has no such model."""


class NotAllowed(ClientError, UserError):
    """The server refuses this client: TLS, certificates, a restricted endpoint's key."""


class Unavailable(ClientError, ServerError):
    """No server, a server that is starting, stopping or overloaded, or a head whose breaker is open: try again later."""


class DeadlineExceeded(ClientError, ServerError):
    """No answer in the time that was given to all attempts together."""


class ServerFailed(ClientError, ServerError):
    """The server answered with a failure of its own."""


class WrongAnswer(ClientError, ServerError):
    """An answer that is not what was asked for: names, types, shapes, numbers that are not finite."""


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; a mistake of the user's, a failing server or Ctrl-C becomes one line on standard error."""
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT  # as shells count
    except UserError as error:
        status, message = 2, str(error)
    except ServerError as error:
        status, message = 1, str(error)
    except OSError as error:
        if error.errno == errno.EPIPE and nobody_reads():
            return 128 + signal.SIGPIPE
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        status = 2
        message = f"{error.filename or 'a file'}: {error.strerror} (make room, mend its permissions, or name another)"
    print(f"error: {message}", file=sys.stderr)
    return status


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone (`| head`); if so Python will not try it again as it ends."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone

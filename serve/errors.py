"""What goes wrong in serving, and how a command says so: a user's mistake is one line and exit status 2."""

import errno
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user asked for: the message names the thing, the value and the remedy."""


class ServerError(RuntimeError):
    """The server could not be started or failed; commands turn it into one line and exit status 1."""


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; a mistake of the user's or a failing server becomes one line on standard error."""
    try:
        return command() or 0
    except UserError as error:
        status, message = 2, str(error)
    except ServerError as error:
        status, message = 1, str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        status = 2
        message = f"{error.filename or 'a file'}: {error.strerror} (make room, mend its permissions, or name another)"
    print(f"error: {message}", file=sys.stderr)
    return status

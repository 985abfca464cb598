"""What goes wrong, and how a command says so: a user's mistake is one line and exit status 2."""

import difflib
import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in what the user typed or gave: the message names the thing, the value and the
    remedy.
    """


class Failure(RuntimeError):
    """The work itself failed (training diverged, graphs disagree, a server died); commands turn it
    into one line and exit status 1.
    """


class Stopped(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does, SIGTERM say: made with its number."""


def suggest(value: str, known: Iterable[str], show: int = 8) -> str:
    """Return "did you mean 'x'?" for the known name nearest to `value`, else the first known
    names.
    """
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    listed = ", ".join(known[:show]) + (", …" if len(known) > show else "")
    return f"known: {listed}"


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; a mistake of the user's, a failure of training or Ctrl-C becomes one line on
    standard error.
    """
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr)
        return 128 + (
            error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        )  # as shells count
    except UserError as error:
        status = 2
        # A DataLoader worker's error comes with its traceback in front; the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix("contract.errors.UserError: ")
        # what a stranger's file says may be in it, and must not move a terminal's cursor
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_has_gone():
            return 128 + signal.SIGPIPE
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        status = 2
        message = (
            f"{error.filename or 'a file'}: {error.strerror} (make room, fix its permissions, or "
            "name another)"
        )
    except Failure as error:
        status = 1
        message = str(error)
    # Most mistakes are every rank's, but a picture may be damaged on one alone: each says its own.
    rank = os.environ.get("RANK", "0")
    print(
        f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr
    )
    return status


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe whose reader has gone (`| head`); if so Python will not try
    it again as it ends.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def first_line(error: BaseException | str) -> str:
    """The first line of an exception's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(messages: list[str]) -> str:
    """Join messages to one line, each once."""
    return "; ".join(dict.fromkeys(" ".join(message.split()) for message in messages))

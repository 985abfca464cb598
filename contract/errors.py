"""What goes wrong, and how a command says so: a user's mistake is one line and exit status 2."""

import difflib
import errno
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable

_TRACEBACK = re.compile(r"\ACaught \w+ in .*\n[a-z_.]+\.[A-Z]\w+: ", re.DOTALL)
"""In front of what a DataLoader's worker raised."""


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


_MACHINE = {
    errno.EMFILE: "raise `ulimit -n`, or use fewer workers",
    errno.ENFILE: "the machine has too many files open: stop what holds them",
    errno.ENOMEM: "free some memory, or use fewer workers",
    errno.EIO: "its disk or the connection to it fails, the file may be whole: check the disk",
    errno.ESTALE: "mount the network folder again",
    errno.ETIMEDOUT: "check the connection to its network folder",
    errno.ENOTCONN: "mount the network folder again",
    errno.EHOSTDOWN: "check the connection to its network folder",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "its file system is mounted read-only: name another place",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
}
"""Errors that say nothing about the contents of a file, and what to do about each."""

_NUMBER = re.compile(r"\[Errno (\d{1,4})\] | \((?:os error )?(\d{1,4})\)")
"""How Python (in front of its words), safetensors and torch (behind them) write an error's number
into a text.
"""


def machine_trouble(error: BaseException) -> str | None:
    """The machine's reason behind an error and its remedy, "Too many open files (raise `ulimit
    -n`, …)"; None where the file itself may be at fault.

    Whoever reads files must not call them damaged, skip them or advise deleting them where this
    has an answer.
    """
    no_memory = isinstance(error, OSError) and str(error).startswith("out of memory")  # Pillow's
    if no_memory or isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return f"{os.strerror(errno.ENOMEM)} ({_MACHINE[errno.ENOMEM]})"
    numbers = [e.errno for e in (error, error.__cause__) if isinstance(e, OSError)]
    numbers += _numbers_in(str(error))
    number = next((number for number in numbers if number in _MACHINE), None)
    return f"{os.strerror(number)} ({_MACHINE[number]})" if number is not None else None


def _numbers_in(text: str) -> list[int]:
    """Error numbers in a text; of other numbers they are told by the system's own words for them,
    as decoders write some in brackets too.
    """
    numbers = []
    for match in _NUMBER.finditer(text):
        number = int(match[1] or match[2])
        words = os.strerror(number)
        if (
            text.startswith(words, match.end())
            if match[1]
            else text.endswith(words, 0, match.start())
        ):
            numbers.append(number)
    return numbers


def raise_trouble(what: object, error: BaseException) -> None:
    """Raise UserError, "cannot read WHAT: …", where an error is the machine's (`machine_trouble`);
    first of all wherever a file is about to be called damaged.
    """
    trouble = machine_trouble(error)
    if trouble:
        raise UserError(f"cannot read {what}: {trouble}") from error


_LONGEST_NAME = 100
"""Characters of a name that is compared with others: difflib takes seconds for megabytes."""


def near_names(value: str, known: Iterable[str]) -> list[str]:
    """The known name nearest to `value`, or none; a text that is too long for a name has none."""
    if len(value) > _LONGEST_NAME:
        return []
    return difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)


def suggest(value: str, known: Iterable[str], show: int = 8) -> str:
    """Return "did you mean 'x'?" for the known name nearest to `value`, else the first known
    names.
    """
    known = sorted(known)
    near = near_names(value, known)
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
        message = _TRACEBACK.sub("", str(error), count=1)
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_has_gone():
            return 128 + signal.SIGPIPE
        trouble = machine_trouble(error)
        if trouble is None:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            trouble = f"{error.strerror} (make room, fix its permissions, or name another)"
        status = 2
        message = f"{error.filename or 'a file'}: {trouble}"
    except Failure as error:
        status = 1
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        status = 1
        message = (
            f"out of memory ({first_line(error)}): use a smaller batch or picture size, or stop "
            "what else uses the device"
        )
    # Most mistakes are every rank's, but a picture may be damaged on one alone: each says its own.
    rank = os.environ.get("RANK", "0")
    # a file's name, say, may hold line breaks and worse
    message = printable(" ".join(line.strip() for line in message.splitlines()))
    print(
        f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr
    )
    return status


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of the CPU or GPU ran out, and nothing about its cause."""
    # torch, which has a class and several messages for it, is not imported here
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


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


def printable(text: str) -> str:
    """A text in which what a stranger's file says cannot steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(messages: list[str]) -> str:
    """Join messages to one line, each once."""
    return "; ".join(dict.fromkeys(" ".join(message.split()) for message in messages))

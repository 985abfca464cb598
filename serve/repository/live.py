"""Whether a server runs on a repository: by its state file, or by its command line where it has not
written one yet, has lost it, or was started by hand.
"""

from pathlib import Path

from contract.errors import UserError
from serve.repository.processes import command_line, processes
from serve.repository.state import read_state

_FLAGS = ("--model-repository", "--model-store")


def refuse_served(repository: Path, what: str, remedy: str) -> None:
    """Raise UserError, beginning with `what`, where a server runs on a repository. What a server
    has left that runs no more is no obstacle.
    """
    state = read_state(repository)
    if state:
        raise UserError(f"{what} is served by process {state.pid}, gRPC on {state.grpc}: {remedy}")
    for pid in processes():
        if repository.resolve() in _served_by(pid):
            raise UserError(f"{what} is served by tritonserver, process {pid}: {remedy}")


def _served_by(pid: int) -> list[Path]:
    """The repositories on a tritonserver's command line, none of another process."""
    words = command_line(pid)
    if not words or Path(words[0]).name != "tritonserver":
        return []
    result = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in _FLAGS:
            try:
                # relative to where it was started
                place = Path(f"/proc/{pid}/cwd").resolve() / (value if equals else following)
                result.append(place.resolve())
            except (OSError, RuntimeError):  # gone meanwhile
                continue
    return result

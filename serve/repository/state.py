"""`.serve.json`: what a running server leaves in its repository, so that status, rollouts and
second starts find it.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.errors import UserError
from contract.files import write_atomically
from serve.repository.contents import STATE
from serve.repository.processes import command_line

_MOST_BYTES = 2**20


class GoldenState(BaseModel):
    """What came of the golden photographs at the last start."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    outcome: Literal["passed", "conspicuous", "outside", "skipped", "missing"]
    version: int = 0
    """Of the repository, 0 where it has no front door."""
    runtime: str = ""
    """What computed the answers."""
    messages: tuple[str, ...] = ()
    """What is outside its bounds, or conspicuous within them."""
    seconds: float = 0.0


class State(BaseModel):
    """A running server. The file is readable by its owner alone: the key allows to load and
    unload models.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    """The process that started tritonserver and watches it."""
    server_pid: int
    front_pid: int | None = None
    """The front that clients reach gRPC through, if there is one."""
    grpc: str
    http: str
    metrics: str
    admin_key: str = Field(repr=False)
    restarts: dict[str, int] = Field(default_factory=dict)
    """How often a model's dead backend was replaced, by model."""
    server_restarts: int = 0
    golden: GoldenState | None = None
    """None of a server that was not started by serve.run."""


def write_state(repository: Path, state: State) -> None:
    """Put the file there in one step, never readable by others."""
    text = state.model_dump_json(indent=1)
    write_atomically(
        repository / STATE,
        lambda temporary: temporary.write_text(text, encoding="utf-8"),
        remedy="free some space or choose another --repository",
        private=True,
    )


def read_state(repository: Path) -> State | None:
    """The server that runs on a repository, None if none does; raises UserError for a file that may
    not be read.
    """
    path = repository / STATE
    try:
        # a pipe of this name would otherwise be waited for
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(opened, "rb") as file:
            state = State.model_validate_json(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UserError(
            f"{path} belongs to another user: run this as the user who started the server"
        ) from error
    except ValidationError:
        return None  # not ours, or of a version before this
    return state if _runs(state.server_pid, repository) else None


def remove_state(repository: Path) -> None:
    """Take the file away, if it is there."""
    (repository / STATE).unlink(missing_ok=True)


def _runs(pid: int, repository: Path) -> bool:
    """Whether a process of this id is a tritonserver on a repository: ids are used again."""
    words = command_line(pid)
    wanted = f"--model-repository={repository.resolve()}"
    return bool(words) and "tritonserver" in words[0] and wanted in words

"""What a repository of serve.repository holds, by the list it was made with: its models and
versions, what servers and rollouts keep there, and what does not belong to it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contract.claim import CLAIM
from contract.errors import UserError
from contract.golden import GOLDEN
from contract.names import Name
from contract.untrusted import parse_json, read_file
from serve.repository.settings import Settings

CONFIG = "config.pbtxt"
STAGED = "staged_"
"""Prefix of the names under which a rollout tries a version."""
MADE_WITH = "made_with.json"
STATE = ".serve.json"
"""What a running server leaves (serve/repository/state.py)."""
_LOCK = ".rollout.lock"
_ASIDE = ".set_aside"
"""Folder of what a killed rollout left; the next rollout deletes it."""

_MOST_BYTES = 2**20
"""Of made_with.json."""
_DATA = {
    CONFIG,
    GOLDEN,
    "model.json",
    "model.plan",
    "classes.npz",
    "detection.json",
    "templates.json",
    "text_encoder.json",
    "vocab.txt",
    "vocabulary.gz",
    "zero_shot.json",
}
_GRAPHS = re.compile(r"[a-z][a-z0-9_]*\.onnx(\.data)?")
"""Graphs of a model that holds several, and their weights."""
_CACHE = re.compile(r"(__pycache__|TensorrtExecutionProvider_).*|TensorrtCache.*")
"""What Python and onnxruntime put beside a model when it is loaded."""
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(\d+\.tmp|old)")
"""What contract/files.py calls a file or folder until it is whole."""


class MadeWith(BaseModel):
    """made_with.json, in the repository's folder: what it was rendered from. It says that the
    folder is ours, and which of those in it are.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    bundle: str
    """The bundle's version."""
    settings: Settings
    models: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    signed_by: str = ""
    """Fingerprint of the key that vouched for the bundle, "" where none was asked for."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, known: object) -> object:
        """Repositories were of a model a graph before `parts` could say so."""
        match known:
            case {"settings": dict(settings)} if "parts" not in settings:
                return known | {"settings": settings | {"parts": "apart"}}
        return known

    def write(self, repository: Path) -> None:
        (repository / MADE_WITH).write_text(
            json.dumps(self.model_dump(mode="json"), indent=1), encoding="utf-8"
        )


def read_made_with(repository: Path) -> MadeWith:
    """Read it; raises UserError for any other folder."""
    message = f"{repository} is not a repository of serve.repository: render one, or name another"
    if not os.path.lexists(repository / MADE_WITH):
        raise UserError(message)
    try:
        result = MadeWith.model_validate(
            parse_json(read_file(repository / MADE_WITH, _MOST_BYTES, "render it again"))
        )
    except (ValidationError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(message) from error
    if result.models:
        return result
    # of a version that did not list them
    names = [
        path.parent.name
        for path in sorted(repository.glob(f"*/{CONFIG}"))
        if re.fullmatch(r"[a-z][a-z0-9_]*", path.parent.name)
        and not path.parent.name.startswith(STAGED)
    ]
    return result.model_copy(update={"models": tuple(names)})


def destination(folder: Path, name: str) -> Path:
    """Where a file of a version goes: there are only so many names."""
    if not _is_own_file(name):
        raise ValueError(f"{name} is not a file of a repository")
    return folder / name


def is_filled(folder: Path) -> bool:
    """Whether a folder is there and has anything in it, but for the claim of somebody at work."""
    return folder.is_dir() and any(path.name != CLAIM for path in folder.iterdir())


def foreign_file(repository: Path) -> str:
    """The first thing in a folder that serve.repository, a server or a rollout did not make, ""
    where there is none.
    """
    names = sorted(os.listdir(repository))
    if not names:
        return ""
    try:
        models = read_made_with(repository).models
    except UserError:
        return next((name for name in names if name != MADE_WITH), MADE_WITH)
    for name in names:
        path = repository / name
        if name in (MADE_WITH, STATE, CLAIM, _LOCK) or _temporary_of(name) in (MADE_WITH, STATE):
            if not _is_file(path):
                return name
        elif name == _ASIDE and _is_folder(path):
            for inner in sorted(os.listdir(path)):
                if odd := _foreign_in_model(path / inner):
                    return f"{name}/{inner}/{odd}".rstrip("/.")
        elif name.removeprefix(STAGED) not in models:
            return name
        elif odd := _foreign_in_model(path):
            return f"{name}/{odd}".removesuffix("/.")
    return ""


def strangers(repository: Path, models: tuple[str, ...]) -> list[str]:
    """Folders in a repository that are not of its models, nor of a server or rollout."""
    return sorted(
        entry.name
        for entry in os.scandir(repository)
        if entry.is_dir() and entry.name not in (*models, _ASIDE)
    )


def set_aside(repository: Path, log: Callable[[str], None]) -> None:
    """Move what a killed rollout left out of the way, and name it and all else that a server on
    this repository does not load.

    Raises UserError while a rollout is under way, and for a model whose folder is missing.
    """
    models = read_made_with(repository).models
    for name in models:
        if not (repository / name / CONFIG).is_file():
            raise UserError(f"{repository} lacks its model '{name}': render it again")
    others = strangers(repository, models)
    left = [name for name in others if name.startswith(STAGED) and name[len(STAGED) :] in models]
    foreign = [name for name in others if name not in left]
    if foreign:
        log(f"not served: {', '.join(foreign)} (in {repository}, not of its models)")
    if not left:
        return
    try:
        with rollout_lock(repository):
            aside = repository / _ASIDE
            aside.mkdir(exist_ok=True)
            for name in left:
                place = aside / name
                for number in range(2, 1000):
                    if not os.path.lexists(place):
                        break
                    place = aside / f"{name}.{number}"
                os.rename(repository / name, place)
    except RolloutUnderWay:  # it goes on after the server that it began with was killed
        log(f"not served: {', '.join(left)}, of a rollout that is under way")
    else:
        log(f"set aside: {', '.join(left)}, which a killed rollout left (now in {aside})")


def remove_staged(repository: Path, models: tuple[str, ...]) -> None:
    """Delete what rollouts staged, also killed ones; raises UserError for what they did not
    make.
    """
    aside = repository / _ASIDE
    staged = [repository / f"{STAGED}{name}" for name in models]
    if _is_folder(aside):
        staged += [aside / name for name in os.listdir(aside)]
    for path in staged:
        if not os.path.lexists(path):
            continue
        if odd := _foreign_in_model(path):
            raise UserError(
                f"{(path / odd).resolve()} is not of a rollout, and in the way of one: move it away"
            )
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        aside.rmdir()


class RolloutUnderWay(UserError):
    """Another process is changing the repository."""


@contextlib.contextmanager
def rollout_lock(repository: Path) -> Iterator[None]:
    """One rollout at a time; raises RolloutUnderWay for a repository that is being changed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    path = repository / _LOCK
    try:
        held = os.open(path, flags, 0o600)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): move it away") from error
    try:
        if not stat.S_ISREG(os.fstat(held).st_mode):
            raise UserError(f"{path} is not a regular file: move it away")
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise RolloutUnderWay(f"{repository}: another rollout is under way: wait for it") from error
    finally:
        os.close(held)


def _foreign_in_model(folder: Path) -> str:
    """The first thing in a model's folder that was not made for it, "." for what is no folder."""
    if not _is_folder(folder):
        return "."
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if _is_file(path):
            if CONFIG not in (name, _temporary_of(name)):
                return name
        elif not (name.isdecimal() or _temporary_of(name).isdecimal()) or not _is_folder(path):
            return name
        else:
            for inner in sorted(os.listdir(path)):
                if not (_is_file(path / inner) and _is_own_file(inner)) and not _CACHE.fullmatch(
                    inner
                ):
                    return f"{name}/{inner}"
    return ""


def _is_own_file(name: str) -> bool:
    """Whether a file of this name is put into a version's folder."""
    return name in _DATA or name in _code() or bool(_GRAPHS.fullmatch(name))


@cache
def _code() -> set[str]:
    """Names of the project's own modules, any of which may be copied beside a model."""
    from serve.repository.model_config import CONTRACT, TEMPLATES

    return {path.name for folder in (TEMPLATES, CONTRACT) for path in folder.rglob("*.py")}


def _temporary_of(name: str) -> str:
    """What a file or folder that is not whole yet will be called, "" for others."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else ""


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_folder(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISDIR(path.lstat().st_mode)

"""Code of the user's own, named `python:package.module:function` on a command line or in a file."""

import hashlib
import importlib.util
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from contract.errors import UserError, first_line, out_of_memory, suggest
from contract.files import file_sha256

PYTHON = "python:"

RAISED = (Exception, SystemExit)
"""What a user's code may raise; a script without a `__main__` guard ends itself as it is
imported.
"""

REMOTE = "trust_remote_code"
"""Argument of transformers' loaders that has code of a repository run."""

_INSTALLED = {
    Path(folder).resolve()
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    )
}
"""Folders of the standard library and of installed packages, whose versions are another matter."""

_FORM = re.compile(r"python:([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def code_of(name: str, kwargs: Mapping[str, Any]) -> str | None:
    """The code that a teacher or decoder of this name and these `kwargs` runs, beside that of
    installed libraries; None for none.
    """
    if name.startswith(PYTHON):
        return name
    return f"that of {name} ({REMOTE}: true)" if kwargs.get(REMOTE) else None


def check_trust(whose: str, name: str, kwargs: Mapping[str, Any], trust_code: bool) -> None:
    """Raise UserError where a run's file names code (`code_of`), unless the user trusts it: whoever
    made the file chose what is imported, and what it is called with. `whose` says which file.
    """
    code = code_of(name, kwargs)
    if code and not trust_code:
        raise UserError(
            f"{whose} whose code is {code}: add --trust-code to have it imported and run, if you "
            "trust that code and whoever made the file"
        )


def import_callable(reference: str) -> Callable[..., Any]:
    """What `python:package.module:function` names; imports that module, which runs its code.

    Raises UserError for another form, a module that does not import, a name that it lacks, and what
    cannot be called.
    """
    match = _FORM.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference} is not of the form python:PACKAGE.MODULE:FUNCTION")
    module_name, name = match.groups()
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(
                f"{reference}: there is no module '{error.name}' (install it, or run from the "
                "folder that it is in)"
            ) from error
        raise UserError(f"{reference}: {module_name} needs '{error.name}': install it") from error
    except SystemExit as error:
        raise UserError(
            f"{reference}: importing {module_name} ends the program ({_words(error)}): put what it "
            "does as a script below `if __name__ == '__main__':`"
        ) from error
    # a module may raise anything while it is imported
    except Exception as error:
        raise UserError(
            f"{reference}: importing {module_name} raised {_words(error)}: correct it"
        ) from error
    try:
        function = getattr(module, name)
    except AttributeError as error:
        known = [each for each in vars(module) if not each.startswith("_")]
        raise UserError(
            f"{reference}: {module_name} has no '{name}': {suggest(name, known)}"
        ) from error
    if not callable(function):
        raise UserError(f"{reference} is not a function but {_kind(function)}: name a function")
    return function


def call(reference: str, arguments: Mapping[str, Any]) -> object:
    """What a callable returns for keyword `arguments`; raises UserError where it raises."""
    function = import_callable(reference)
    try:
        return function(**arguments)
    except RAISED as error:
        if out_of_memory(error):
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(f"{reference} called with ({given}) raised {_words(error)}") from error


def call_for_module(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The nn.Module that a callable returns for keyword `arguments`; raises UserError where it
    raises or returns something else.
    """
    result = call(reference, arguments)
    if not isinstance(result, nn.Module):
        raise UserError(f"{reference} returned {_kind(result)}, not an nn.Module: correct it")
    return result


def code_sha256(reference: str) -> str | None:
    """Hash of the source file that `python:package.module:function` names, whose package is
    imported for it; None where it has none.
    """
    try:
        spec = importlib.util.find_spec(_module_of(reference))
    except RAISED:  # whatever a package does as it is imported; loading says it
        return None
    path = Path(spec.origin) if spec and spec.origin else None
    return file_sha256(path) if path and path.is_file() else None


def network_sha256(net: nn.Module, reference: str = "") -> str | None:
    """Hash of the contents of the source files behind a network: those of the classes of all its
    modules, with their bases, and that which the `reference` it came from names. Installed
    libraries count only where they are of the same package. None where there is no file.
    """
    package = _module_of(reference).partition(".")[0]
    names = {kind.__module__ for part in net.modules() for kind in type(part).__mro__}
    hashes = {code_sha256(reference)} if reference else set()
    for name in names:
        file = getattr(sys.modules.get(name), "__file__", None)
        path = Path(file).resolve() if file else None
        own = path and path.is_file() and not any(map(path.is_relative_to, _INSTALLED))
        if path and (own or name.partition(".")[0] == package):
            hashes.add(file_sha256(path))
    known = sorted(hashes - {None})  # not their names: files may move
    return hashlib.sha256(" ".join(known).encode()).hexdigest() if known else None


def _module_of(reference: str) -> str:
    return reference.removeprefix(PYTHON).partition(":")[0]


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _words(error: BaseException) -> str:
    """Kind, message and place of an error in somebody's code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({first_line(error)}, {frame.filename}:{frame.lineno})"

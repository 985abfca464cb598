"""The folder a bundle goes to: what may be replaced, and how the new bundle appears in one step,
whole or not at all (contract/files.py). What a killed export left is put in order by the next one.
"""

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from contract.errors import Stopped, UserError
from contract.files import check_place, new_folder, tidy
from contract.manifest import MANIFEST, manifest_bytes
from contract.names import SIGNATURE
from contract.untrusted import parse_json
from export.bundle_files import entries, strangers


def check_output(output: Path, force: bool, read: Mapping[str, Path]) -> Path:
    """Where `--output` leads, links followed, and tidied up after a killed export.

    `read` are folders and files that the export reads, by what to call them. Raises UserError for
    an output that is or holds one of them, and for one that holds files: any without `force`, and
    even so any that are not a bundle's.
    """
    try:
        place = output.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--output {output}: its links lead nowhere ({error}): choose another"
        ) from error
    for name, path in read.items():
        if path.resolve().is_relative_to(place):
            verb = "is" if path.resolve() == place else "holds"
            raise UserError(
                f"--output {output} {verb} {name} {path}, which is read: choose another"
            )
    check_place(place, f"--output {output}")
    try:
        tidy(place, lambda old: not _stranger(old))
        _check_replaceable(output, place, force)
    except OSError as error:
        raise UserError(
            f"--output {output}: {error.filename or place}: {error.strerror}: choose another"
        ) from error
    return place


def _check_replaceable(output: Path, place: Path, force: bool) -> None:
    """Raise UserError for an output that is a file, or a folder whose files must stay."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise UserError(f"--output {output} is a file: give a folder")
    if result := _stranger(place):
        raise UserError(
            f"--output {output} holds {result}, which is not part of a bundle: move it away, or "
            "choose another"
        )
    if any(place.iterdir()) and not force:
        raise UserError(
            f"--output {output} already holds files: add --force to replace it, or choose another"
        )


def _stranger(folder: Path) -> str:
    """The first thing in a folder that no manifest there lists, "" for an empty folder and for a
    bundle of any format.
    """
    present, listed = entries(folder), []
    if stat.S_ISREG(present.get(MANIFEST, 0)):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            manifest = parse_json(manifest_bytes(folder))
            names = [MANIFEST, SIGNATURE, *manifest["files"].keys()]
            listed = names if manifest["seal"] else []
    odd = [name for name, mode in present.items() if name in listed and not stat.S_ISREG(mode)]
    if MANIFEST in present and not listed:
        odd.append(MANIFEST)
    return next(iter([*strangers(present, listed), *odd]), "")


@contextmanager
def appearing(output: Path, place: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `place` at the end; where the body fails or is stopped,
    nothing is left of it.

    SIGTERM and SIGHUP stop the body as Ctrl-C does. Raises UserError where nothing can be written,
    and where `place` has been filled by somebody else meanwhile.
    """
    replaceable = partial(_check_replaceable, output, place, force) if force else None
    with _stoppable(), new_folder(place, f"--output {output}", replaceable) as aside:
        yield aside


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise, so that what follows is tidied up as after Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    numbers = (
        (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    changed = [
        number for number in numbers if signal.getsignal(number) is signal.SIG_DFL
    ]  # nohup's stays
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)

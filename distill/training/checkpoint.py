"""Resumable checkpoints of a run folder.

A checkpoint is `checkpoint/step_00000100.pt` (tensors only, read with `weights_only=True`) and a
JSON sidecar with its sha256, written after it. Both appear by rename, so a kill at any moment
leaves the previous checkpoint intact; a `.pt` without a valid sidecar is ignored.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from contract.errors import UserError, raise_trouble
from contract.files import write_atomically
from distill.config import Recipe
from distill.recipe_io import dump_recipe

log = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the file; raise it with a named `_upgrade_` function when it changes."""


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe, from which --resume continues, into the run folder."""
    # accepting other pictures is meant for once
    data = recipe.data.model_copy(update={"changed": "refuse"})
    text = dump_recipe(recipe.model_copy(update={"data": data}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    if not path.is_file() or path.read_text() != text:
        write_atomically(path, lambda temporary: temporary.write_text(text))


class CheckpointWriter:
    """Writes checkpoints of a run into `folder` while training goes on, one at a time; a context
    manager, whose end waits for the last one.

    Keeps the newest `keep`. What went wrong with one is raised by the next `write`, or at the end.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` optimizer steps, as it is now; waits for the one before.

        Raises UserError if that could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, step, _snapshot(state))

    def wait(self) -> None:
        """Wait until everything is on the disk; raises UserError if it could not be."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else the error on its way out came first
                raise
        finally:
            self._thread.shutdown()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, digest = self.folder / f"step_{step:08d}.pt", hashlib.sha256()

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                hashed = _Hashed(file, digest)
                torch.save({"format": _FORMAT, "step": step, **state}, hashed)

        write_atomically(path, save)
        about = {"step": step, "sha256": digest.hexdigest(), "torch": torch.__version__}
        sidecar = json.dumps(about)
        write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(sidecar))
        complete = sorted(self.folder.glob("step_*.json"))
        for old in complete[: -self.keep]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


class _Hashed:
    """A file that is hashed as it is written: reading gigabytes back takes as long again."""

    def __init__(self, file: BinaryIO, digest: "hashlib._Hash") -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _snapshot(value: Any) -> Any:
    """A copy, on the CPU, that training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _snapshot(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_snapshot(part) for part in value)
    return value


def load_checkpoint(folder: Path, step: int | None = None) -> dict[str, Any] | None:
    """Read the newest checkpoint (or that of `step`) whose bytes match their recorded hash, on the
    CPU; None if there is none.

    A damaged one is named in the log and the one before it used. Raises UserError where all are
    damaged. The run may be training meanwhile.
    """
    damaged = []
    name = "step_*.json" if step is None else f"step_{step:08d}.json"
    for sidecar in sorted(folder.glob(name), reverse=True):
        path = sidecar.with_suffix(".pt")
        try:
            with open(path, "rb") as file:  # stays readable if the run drops it meanwhile
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest == json.loads(sidecar.read_text())["sha256"]:
                    file.seek(0)
                    return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise_trouble(path, error)
        log.warning("checkpoint %s does not match its recorded sha256: ignored", path)
        damaged.append(path.name)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): train again into "
            "another --output"
        )
    return None

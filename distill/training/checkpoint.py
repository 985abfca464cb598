"""Resumable checkpoints of a run folder.

A checkpoint is `checkpoint/step_00000100.pt` (tensors only, read with `weights_only=True`) and a
JSON sidecar with its sha256, written after it. Both appear by rename, so a kill at any moment
leaves the previous checkpoint intact; a `.pt` without a valid sidecar is ignored.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from contract.errors import UserError, raise_trouble
from contract.files import file_sha256, write_atomically
from distill.config import Recipe
from distill.recipe_io import dump_recipe

log = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the file; raise it with a named `_upgrade_` function when it changes."""


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Make the run folder and write the resolved recipe into it, from which --resume continues."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the run folder {folder}: {error.strerror} (choose another --output)"
        ) from error
    write_atomically(
        folder / "recipe.yaml", lambda temporary: temporary.write_text(dump_recipe(recipe))
    )


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` optimizer steps and drop all but the newest `keep`
    checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    write_atomically(
        path, lambda temporary: torch.save({"format": _FORMAT, "step": step, **state}, temporary)
    )
    sidecar = json.dumps({"step": step, "sha256": file_sha256(path), "torch": torch.__version__})
    write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(sidecar))
    complete = sorted(folder.glob("step_*.json"))
    for old in complete[:-keep]:
        old.unlink()
        old.with_suffix(".pt").unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint whose bytes match their recorded hash, on the CPU; None if there
    is none yet.

    A damaged one is named in the log and the one before it used. Raises UserError where all are
    damaged.
    """
    damaged = []
    for sidecar in sorted(folder.glob("step_*.json"), reverse=True):
        path = sidecar.with_suffix(".pt")
        try:
            intact = file_sha256(path) == json.loads(sidecar.read_text())["sha256"]
        except (OSError, ValueError, KeyError) as error:
            raise_trouble(path, error)
            intact = False
        if intact:
            return torch.load(path, map_location="cpu", weights_only=True)
        log.warning("checkpoint %s does not match its recorded sha256: ignored", path)
        damaged.append(path.name)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): train again into "
            "another --output"
        )
    return None

"""Files of a run folder that hold weights: resumable checkpoints, and the final student.

A checkpoint is `checkpoint/step_00000100.pt` (tensors only, read with `weights_only=True`) and a JSON sidecar with its
sha256, written after it. Both appear by rename, so a kill at any moment leaves the previous checkpoint whole; a
`.pt` without a valid sidecar does not count.
"""

import json
import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from distill.config import Recipe
from distill.errors import UserError
from distill.features import FeatureDims
from distill.methods import build_method
from distill.recipe_io import dump_recipe, parse_recipe
from distill.weights import file_sha256, tensors_sha256

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of both files; raise it with a named `_upgrade_` function when either changes."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, flush it to disk and rename it to `path`; the old file stays until then.

    Raises UserError (disk full, read-only, …) with nothing but the old file left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        # safetensors makes its files for their owner alone; servers run as somebody else
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's zip writer reports a full disk as RuntimeError, safetensors as its own error
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {str(error).splitlines()[0]} (free some space or choose another --output; "
            "the previous file is untouched)"
        ) from error


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Make the run folder and write the resolved recipe into it, from which --resume continues."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror} (choose another --output)") from error
    write_atomically(folder / "recipe.yaml", lambda temporary: temporary.write_text(dump_recipe(recipe)))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` optimizer steps and drop all but the newest `keep` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, "step": step, **state}, temporary))
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
    """Read the newest checkpoint whose bytes match their recorded hash, on the CPU; None if there is none yet.

    A damaged one is named in the log and the one before it used. Raises UserError where all are damaged.
    """
    damaged = []
    for sidecar in sorted(folder.glob("step_*.json"), reverse=True):
        path = sidecar.with_suffix(".pt")
        try:
            whole = file_sha256(path) == json.loads(sidecar.read_text())["sha256"]
        except (OSError, ValueError, KeyError):
            whole = False
        if whole:
            return torch.load(path, map_location="cpu", weights_only=True)
        log.warning("checkpoint %s does not match its recorded sha256: ignored", path)
        damaged.append(path.name)
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged ({', '.join(damaged)}): train into another --output")
    return None


def git_commit() -> str:
    """Commit of the code that is running, or "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def save_student(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe, dims: dict, step: int) -> Path:
    """Write `student.safetensors`: the method's weights, and in its metadata all that is needed to rebuild it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {
        "format": str(FORMAT),
        "sha256": tensors_sha256(contiguous),
        "recipe": dump_recipe(recipe),
        "teacher_dims": json.dumps({label: list(dim) for label, dim in dims.items()}),
        "step": str(step),
        "commit": git_commit(),
    }
    path = folder / "student.safetensors"
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))
    return path


@dataclass(frozen=True)
class Run:
    """A finished run, rebuilt from its folder: `method` is in eval mode, on the CPU."""

    folder: Path
    recipe: Recipe
    dims: dict[str, FeatureDims]
    method: nn.Module


def load_run(folder: str | Path) -> Run:
    """Rebuild a run's method from `student.safetensors` alone, strictly.

    Raises UserError for a folder that is no finished run or a file that is damaged.
    """
    folder = Path(folder)
    path = folder / "student.safetensors"
    if not path.is_file():
        reason = "its training has not finished" if (folder / "recipe.yaml").exists() else "it is no run folder"
        raise UserError(f"{folder} has no student.safetensors: {reason} (give a folder made by distill.run)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or half-written ({error}): train again or copy it again") from error
    if "recipe" not in metadata or "teacher_dims" not in metadata:
        raise UserError(f"{path} was not written by distill.run: its metadata has no recipe")
    if tensors_sha256(weights) != metadata.get("sha256"):
        raise UserError(f"{path} does not match its recorded sha256: it is damaged; train again or copy it again")
    recipe = parse_recipe(metadata["recipe"], str(path))
    dims = {label: FeatureDims(*dim) for label, dim in json.loads(metadata["teacher_dims"]).items()}
    # The file holds every weight: nothing is to be fetched, whatever the recipe started from.
    student = recipe.student.model_copy(update={"pretrained": False})
    method = build_method(recipe.model_copy(update={"student": student}), dims)
    try:
        method.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own recipe: {str(error).splitlines()[1].strip()}") from error
    return Run(folder, recipe, dims, method.eval())

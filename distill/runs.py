"""What a run ships, `student.safetensors`, and the run rebuilt from it."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from contract.errors import UserError
from contract.files import write_atomically
from distill.config import Recipe
from distill.features import FeatureDims
from distill.methods import build_method
from distill.models.weights import tensors_sha256
from distill.recipe_io import dump_recipe, parse_recipe

FORMAT = 1
"""Version of the file; raise it with a named `_upgrade_` function when it changes."""


def git_commit() -> str:
    """Commit of the code that is running, or "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def save_student(
    folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe, dims: dict, step: int
) -> Path:
    """Write `student.safetensors`: the method's weights, and in its metadata all that is needed to
    rebuild it.
    """
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
        reason = (
            "its training has not finished"
            if (folder / "recipe.yaml").exists()
            else "it is no run folder"
        )
        raise UserError(
            f"{folder} has no student.safetensors: {reason} (give a folder made by distill.run)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged or half-written ({error}): train again or copy it again"
        ) from error
    if "recipe" not in metadata or "teacher_dims" not in metadata:
        raise UserError(f"{path} was not written by distill.run: its metadata has no recipe")
    if tensors_sha256(weights) != metadata.get("sha256"):
        raise UserError(
            f"{path} does not match its recorded sha256: it is damaged; train again or copy it "
            "again"
        )
    recipe = parse_recipe(metadata["recipe"], str(path))
    dims = {label: FeatureDims(*dim) for label, dim in json.loads(metadata["teacher_dims"]).items()}
    # The file holds every weight: nothing is to be fetched, whatever the recipe started from.
    student = recipe.student.model_copy(update={"pretrained": False})
    method = build_method(recipe.model_copy(update={"student": student}), dims)
    try:
        method.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own recipe: {str(error).splitlines()[1].strip()}"
        ) from error
    return Run(folder, recipe, dims, method.eval())

"""What a run ships, `student.safetensors`, and the run rebuilt from it."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from contract.errors import UserError, first_line
from contract.files import write_atomically
from distill.config import Recipe
from distill.features import FeatureDims
from distill.methods import build_method
from distill.methods.lengths import with_lengths
from distill.methods.method import Method
from distill.models.meta import building
from distill.models.weights import misfit, read_tensors, save_tensors, tensors_sha256
from distill.recipe_files import RecipeDumper, RecipeLoader
from distill.recipe_io import dump_recipe, parse_recipe

FORMAT = 3
"""Version of both files; raise it with a named `_upgrade_` function when it changes. 2: the recipe
holds the section of its own method alone. 3: normalisers have lengths,
`umt.space_dim: auto` is another width."""

STUDENT = "student.safetensors"
EMA = "ema.safetensors"
FILES = {"student": STUDENT, "ema": EMA}


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
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    method: Method,
    recipe: Recipe,
    dims: Mapping[str, FeatureDims],
    step: int,
) -> Path:
    """Write `student.safetensors`: the weights that ship, and in its metadata all that is needed to
    rebuild them.

    `weights` are a state dict of `method`, whose `train_only` parts are left out. A method with a
    momentum network has its weights in `ema.safetensors` too, under the same names (or the other
    way round, see `Method.ships_averaged`).
    """
    parts = tuple(f"{name}." for name in method.train_only)
    shipped = {name: tensor for name, tensor in weights.items() if not f"{name}.".startswith(parts)}
    files = {STUDENT: shipped}
    averaged = method.averaged()
    if averaged:
        files[EMA] = shipped | dict(averaged)
    if method.ships_averaged:
        files = {STUDENT: files[EMA], EMA: shipped}
    for name, tensors in files.items():
        metadata = {
            "format": str(FORMAT),
            "sha256": tensors_sha256(tensors),
            "recipe": dump_recipe(recipe),
            "teacher_dims": json.dumps({label: _widths(dim) for label, dim in dims.items()}),
            "step": str(step),
            "commit": git_commit(),
        }
        write_atomically(
            folder / name, lambda temporary, t=tensors, m=metadata: save_tensors(temporary, t, m)
        )
    return folder / STUDENT


@dataclass(frozen=True)
class Run:
    """A finished run, rebuilt from its folder: `method` is in eval mode, on the CPU, without the
    parts that never ship.
    """

    folder: Path
    recipe: Recipe
    dims: dict[str, FeatureDims]
    method: Method
    step: int | None
    """Optimizer steps behind its weights; None where the file does not say."""
    sha256: str
    """Of the tensors in its file, by which heads know the student that they were trained for."""


def load_run(folder: str | Path, weights: Literal["student", "ema"] = "student") -> Run:
    """Rebuild a run's method from `student.safetensors` alone, or from the momentum network's
    weights in `ema.safetensors`, strictly.

    Raises UserError for a folder that is not a finished run or a file that is damaged.
    """
    folder = Path(folder)
    path = folder / FILES[weights]
    if not path.is_file():
        raise UserError(_why_missing(folder, path.name))
    tensors, metadata = read_tensors(path, "train again or copy it again")
    if not {"recipe", "teacher_dims", "sha256"} <= set(metadata):
        raise UserError(f"{path} was not written by distill.run: its metadata has no recipe")
    version = int(metadata["format"]) if metadata.get("format", "").isdecimal() else 0
    metadata = _upgraded(path, metadata)
    recipe = parse_recipe(metadata["recipe"], str(path))
    dims = {
        label: FeatureDims(summary, patches, tuple(maps))
        for label, (summary, patches, *maps) in json.loads(metadata["teacher_dims"]).items()
    }
    try:
        with building():  # before memory is taken for whatever size the recipe says
            sketch = build_shipped(recipe, dims)
        if version < 3:
            tensors = with_lengths(tensors, sketch)
        wrong = misfit(sketch, tensors)
    except (UserError, RuntimeError) as error:  # sizes that torch cannot count, say
        wrong = first_line(error)
    if wrong:
        raise UserError(f"{path} does not fit its own recipe: {wrong}")
    method = build_shipped(recipe, dims)
    method.load_state_dict(tensors, strict=True)
    step = metadata.get("step", "")
    steps = int(step) if step.isdecimal() else None
    return Run(folder, recipe, dims, method.eval(), steps, metadata["sha256"])


def build_shipped(recipe: Recipe, dims: Mapping[str, FeatureDims]) -> Method:
    """A method without the parts that never ship, whose weights are still to be loaded: nothing is
    fetched, whatever the recipe started from.
    """
    student = recipe.student.model_copy(update={"pretrained": False, "checkpoint": None})
    return build_method(recipe.model_copy(update={"student": student}), dims, inference=True)


def _widths(dims: FeatureDims) -> list[int | None]:
    """Widths of the summary, of the patches, and of each further map."""
    return [dims.summary, dims.patches, *dims.maps]


def _why_missing(folder: Path, name: str) -> str:
    if name == EMA and (folder / STUDENT).is_file():
        return f"{folder} has no {EMA}: its method trains no momentum network (use the student)"
    reason = (
        "its training has not finished"
        if (folder / "recipe.yaml").exists()
        else "it is not a run folder"
    )
    return f"{folder} has no {name}: {reason} (give a folder made by distill.run)"


def _upgraded(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Metadata in the present format; raises UserError for that of a later version."""
    version = metadata.get("format", "")
    if version not in ("1", "2", str(FORMAT)):
        raise UserError(
            f"{path} has format {version or 'none'}, but this version reads 1 to {FORMAT}: update "
            "vfm-distill"
        )
    if version == "1":
        metadata = _upgrade_1(metadata)
    return _upgrade_2(metadata) if version != str(FORMAT) else metadata


def _upgrade_1(metadata: dict[str, str]) -> dict[str, str]:
    """Format 1 kept the sections of both methods of its time in the recipe, and no other."""
    values = yaml.load(metadata["recipe"], Loader=RecipeLoader)
    for name in {"umt", "plain"} - {values["method"]}:
        values.pop(name, None)
    return metadata | {
        "format": "2",
        "recipe": yaml.dump(values, Dumper=RecipeDumper, sort_keys=False),
    }


def _upgrade_2(metadata: dict[str, str]) -> dict[str, str]:
    """In format 2 `umt.space_dim: auto` was the widest teacher's; `with_lengths` adds the tensors
    that it lacked.
    """
    values = yaml.load(metadata["recipe"], Loader=RecipeLoader)
    if values.get("umt", {}).get("space_dim") == "auto":
        widest = max(patches for _, patches, *_ in json.loads(metadata["teacher_dims"]).values())
        values["umt"]["space_dim"] = widest
    return metadata | {"recipe": yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)}

"""What a run ships, `student.safetensors`, and the run rebuilt from it."""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open

from contract.errors import UserError, first_line
from contract.files import write_all_atomically, write_atomically
from contract.licences import LicenceRecord
from distill.config import Recipe, TeacherConfig
from distill.features import FeatureDims
from distill.licences import KEY, dump_licences, inherited, recorded
from distill.methods import build_method
from distill.methods.lengths import with_lengths
from distill.methods.method import Method
from distill.models.meta import building
from distill.models.user_code import check_trust, code_of
from distill.models.weights import misfit, read_tensors, save_tensors, tensors_sha256
from distill.recipe_files import RecipeDumper, RecipeLoader
from distill.recipe_io import dump_recipe, parse_recipe
from distill.training.checkpoint import load_checkpoint

FORMAT = 3
"""Version of both files; raise it with a named `_upgrade_` function when it changes. 2: the recipe
holds the section of its own method alone. 3: normalisers have lengths,
`umt.space_dim: auto` is another width."""

STUDENT = "student.safetensors"
EMA = "ema.safetensors"
FILES = {"student": STUDENT, "ema": EMA}
BEST = {STUDENT: "student.best.safetensors", EMA: "ema.best.safetensors"}
"""Of the step that a run's monitor scored best."""


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


def shipped_files(
    weights: Mapping[str, torch.Tensor], method: Method
) -> dict[str, dict[str, torch.Tensor]]:
    """What ships of a method with such `weights` (a state dict), by the name of its file: without
    `train_only` parts.

    A method with a momentum network has its weights in `ema.safetensors` too, under the same names
    (or the other way round, see `Method.ships_averaged`).
    """
    parts = tuple(f"{name}." for name in method.train_only)
    shipped = {name: tensor for name, tensor in weights.items() if not f"{name}.".startswith(parts)}
    averaged = method.averaged()
    if not averaged:
        return {STUDENT: shipped}
    momentum = shipped | dict(averaged)
    if method.ships_averaged:
        return {STUDENT: momentum, EMA: shipped}
    return {STUDENT: shipped, EMA: momentum}


def save_student(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    method: Method,
    recipe: Recipe,
    dims: Mapping[str, FeatureDims],
    step: int,
    finish: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> Path:
    """Write the `shipped_files` of `weights`, each as `finish` returns it, and in the metadata all
    that is needed to rebuild them.
    """
    for name, shipped in shipped_files(weights, method).items():
        tensors = finish(shipped)
        metadata = _metadata(tensors, recipe, dims, step)
        write_atomically(
            folder / name, lambda temporary, t=tensors, m=metadata: save_tensors(temporary, t, m)
        )
    return folder / STUDENT


def _metadata(
    tensors: dict[str, torch.Tensor],
    recipe: Recipe,
    dims: Mapping[str, FeatureDims],
    step: int,
) -> dict[str, str]:
    """All that is needed to rebuild a network with such tensors."""
    return {
        "format": str(FORMAT),
        "sha256": tensors_sha256(tensors),
        "recipe": dump_recipe(recipe),
        "teacher_dims": dump_dims(dims),
        "step": str(step),
        "commit": git_commit(),
        KEY: dump_licences(inherited(recipe)),
    }


def save_best(
    folder: Path,
    files: Mapping[str, dict[str, torch.Tensor]],
    recipe: Recipe,
    dims: Mapping[str, FeatureDims],
    step: int,
    record: Mapping[str, Any],
) -> None:
    """Write the `shipped_files` of a step as the run's best ones, and in their metadata the
    `record` of its scores.
    """
    writers = {}
    # the student's last: its record is the one that is read, so that files of two steps, which a
    # kill between two renames leaves, are replaced when the run comes to that step again
    for name in sorted(files, key=lambda name: name == STUDENT):
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in files[name].items()}
        metadata = _metadata(tensors, recipe, dims, step) | {"monitor": json.dumps(record)}
        writers[folder / BEST[name]] = lambda path, t=tensors, m=metadata: save_tensors(path, t, m)
    write_all_atomically(writers)


def best_record(folder: Path) -> dict[str, Any] | None:
    """The `record` of a run's best weights, with their "step"; None where there are none, or none
    that can be read.
    """
    path = folder / BEST[STUDENT]
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["monitor"]) | {"step": int(metadata["step"])}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def refit_best(
    folder: Path, fit: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Bring a run's best weights to the state that a finished run's have, by `fit`, once."""
    for name in BEST.values():
        path = folder / name
        if not path.is_file():
            continue
        tensors, metadata = read_tensors(path, "remove it")
        if "fitted" in metadata:
            continue
        tensors = fit(tensors)
        metadata |= {"fitted": "true", "sha256": tensors_sha256(tensors)}
        write_atomically(
            path, lambda temporary, t=tensors, m=metadata: save_tensors(temporary, t, m)
        )


@dataclass(frozen=True)
class Run:
    """A run, rebuilt from its folder: `method` is in eval mode, on the CPU, without the parts that
    never ship.
    """

    folder: Path
    recipe: Recipe
    dims: dict[str, FeatureDims]
    method: Method
    step: int | None
    """Optimizer steps behind its weights; None where the file does not say."""
    sha256: str
    """Of the tensors in its file, by which heads know the student that they were trained for."""
    licences: tuple[LicenceRecord, ...] = ()
    """What the student inherits of the weights that it learnt from."""
    finished: bool = True
    """False for the weights of a checkpoint."""
    best: Mapping[str, Any] | None = None
    """Of the weights that the run's monitor scored best, the record of their scores."""

    @property
    def weights(self) -> str:
        """Which weights these are, for the user."""
        if self.finished:
            return f"of the finished run {self.folder}"
        if self.best:
            return f"of step {self.step}, the best by {self.best['name']}: {self.best['score']:.4f}"
        return (
            f"of step {self.step}'s checkpoint, not of a finished run: lengths of heads are fitted "
            "at its end"
        )

    @property
    def trust_option(self) -> str:
        """What a command that builds its teachers again needs, " --trust-code" or nothing."""
        codes = (code_of(config.name, config.kwargs) for config in self.recipe.teachers)
        return " --trust-code" if any(codes) else ""

    def teachers(
        self, trust_code: bool, label: str | None = None
    ) -> list[tuple[int, TeacherConfig]]:
        """The number and entry of each teacher of its recipe, or of the one with `label`, to build
        it again.

        Raises UserError for one that runs code of its own, unless that is trusted.
        """
        chosen = [
            (index, config)
            for index, config in enumerate(self.recipe.teachers)
            if label in (None, config.label)
        ]
        for _, config in chosen:
            whose = f"{self.folder} has a teacher '{config.label}'"
            check_trust(whose, config.name, config.kwargs, trust_code)
        return chosen


Checkpoint = int | Literal["latest", "best"]
"""Which of a run's checkpoints: that of a step, the newest, or what its monitor scored best."""


def parse_checkpoint(text: str | None) -> Checkpoint | None:
    """The value of a command's --checkpoint; raises UserError."""
    if text in (None, "latest", "best"):
        return text
    if not text.isdecimal():
        raise UserError(f"--checkpoint {text}: give the number of a step, latest or best")
    return int(text)


def load_run(
    folder: str | Path,
    weights: Literal["student", "ema"] = "student",
    checkpoint: Checkpoint | None = None,
) -> Run:
    """Rebuild a run's method from `student.safetensors` alone, or from the momentum network's
    weights in `ema.safetensors`, strictly; or from a checkpoint, as the run would ship it if it
    ended there; or from the files of its best step.

    Raises UserError for a folder that is not a finished run (or has no such checkpoint), or a file
    that is damaged.
    """
    folder, best = Path(folder), checkpoint == "best"
    if checkpoint is not None and not best:
        return _load_unfinished(folder, FILES[weights], checkpoint)
    path = folder / (BEST[FILES[weights]] if best else FILES[weights])
    if not path.is_file():
        raise UserError(_why_missing(folder, path.name))
    tensors, metadata = read_tensors(path, "train again or copy it again")
    if not {"recipe", "teacher_dims", "sha256"} <= set(metadata):
        raise UserError(f"{path} was not written by distill.run: its metadata has no recipe")
    version = int(metadata["format"]) if metadata.get("format", "").isdecimal() else 0
    metadata = _upgraded(path, metadata)
    recipe = parse_recipe(metadata["recipe"], str(path))
    dims = _parse_dims(metadata["teacher_dims"])
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
    record = json.loads(metadata["monitor"]) if best else None
    licences = recorded(metadata, path)
    return Run(
        folder, recipe, dims, method.eval(), steps, metadata["sha256"], licences, not best, record
    )


def build_shipped(recipe: Recipe, dims: Mapping[str, FeatureDims]) -> Method:
    """A method without the parts that never ship, whose weights are still to be loaded."""
    return build_method(_offline(recipe), dims, inference=True)


def _offline(recipe: Recipe) -> Recipe:
    """The recipe with a random student: a file of a run holds every weight, and nothing is fetched,
    whatever it started from. Nor has it a backward pass to compute anything again in.
    """
    changes = {"pretrained": False, "checkpoint": None, "grad_checkpointing": False}
    student = recipe.student.model_copy(update=changes)
    return recipe.model_copy(update={"student": student})


def _load_unfinished(folder: Path, name: str, checkpoint: Checkpoint) -> Run:
    """The run that a checkpoint would ship."""
    place = folder / "checkpoint"
    saved = load_checkpoint(place, None if checkpoint == "latest" else checkpoint)
    if saved is None:
        steps = sorted(int(path.stem.removeprefix("step_")) for path in place.glob("step_*.json"))
        known = f"it has {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise UserError(f"{folder} has no such checkpoint ({checkpoint}): {known}")
    if "teacher_dims" not in saved:
        raise UserError(
            f"{place}: its checkpoints are of an earlier version, which did not record the widths "
            "of teachers: continue the run to its next checkpoint"
        )
    recipe, dims = parse_recipe(saved["recipe"], str(place)), _parse_dims(saved["teacher_dims"])
    whole = build_method(_offline(recipe), dims)
    state = with_lengths(saved["model"], whole)
    whole.load_state_dict(state)
    if average := saved.get("average"):  # as the loop ships it
        prefix = "module."
        state = {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}
        state = with_lengths(state, whole)
    files = shipped_files(state, whole)
    if name not in files:
        raise UserError(f"{folder}: its method trains no momentum network (use the student)")
    method = build_shipped(recipe, dims)
    method.load_state_dict(files[name], strict=True)
    sha256 = tensors_sha256(files[name])
    licences = inherited(recipe)
    return Run(folder, recipe, dims, method.eval(), saved["step"], sha256, licences, False)


def _parse_dims(text: str) -> dict[str, FeatureDims]:
    """Inverse of `dump_dims`."""
    return {
        label: FeatureDims(summary, patches, tuple(maps))
        for label, (summary, patches, *maps) in json.loads(text).items()
    }


def dump_dims(dims: Mapping[str, FeatureDims]) -> str:
    """The widths of each teacher's summary, patches and further maps as JSON."""
    return json.dumps({label: [d.summary, d.patches, *d.maps] for label, d in dims.items()})


def _why_missing(folder: Path, name: str) -> str:
    if name == BEST[EMA] and (folder / BEST[STUDENT]).is_file():
        return f"{folder} has no {name}: its method trains no momentum network (use the student)"
    if name in BEST.values() and (folder / "recipe.yaml").exists():
        return (
            f"{folder} has no {name}: nothing has been scored while it trained (set monitor.data, "
            "or use --checkpoint latest)"
        )
    if name == EMA and (folder / STUDENT).is_file():
        return f"{folder} has no {EMA}: its method trains no momentum network (use the student)"
    if not folder.exists():
        return f"{folder} does not exist: give a run folder, made by distill.run"
    if not (folder / "recipe.yaml").exists():
        return f"{folder} has no {name}: it is not a run folder (give one made by distill.run)"
    return (
        f"{folder} has no {name}: its training has not finished (continue it; distill.evaluate, "
        "distill.visualize and export.run read it as it is with --checkpoint latest)"
    )


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

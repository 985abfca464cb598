"""The weights a student's network starts from, of a file, a package, or an earlier run, and the
mean and deviation of the pictures that they expect.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contract.errors import UserError
from distill.config import StudentConfig, TeacherConfig
from distill.models.hub import HUB
from distill.models.packaged import PACKAGE, checkpoint_path
from distill.models.published import Normalization, normalization_of
from distill.models.weight_files import read_state_dict, tensor_names
from distill.models.weights import read_tensors

_NETWORK = "student.net."
"""In front of a network's names in the file of a run."""


def run_file(checkpoint: str) -> Path | None:
    """`student.safetensors` of a run folder; None for a checkpoint that is not a folder. Raises
    UserError for a folder without the file.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return None
    path = folder / "student.safetensors"
    if not path.is_file():
        raise UserError(
            f"student.checkpoint = {checkpoint} has no student.safetensors: give the folder of a "
            "finished run, or a file of weights"
        )
    return path


def network_state(checkpoint: str) -> dict[str, Tensor]:
    """A network's tensors from a recipe's `student.checkpoint`; raises UserError for a file that is
    missing, damaged, or of a run whose student is not a timm network.
    """
    path = run_file(checkpoint) or checkpoint_path(checkpoint)
    if not is_of_a_run(path):
        return read_state_dict(path)
    tensors, _ = read_tensors(path, "train that run again, or copy it again")
    state = {
        name.removeprefix(_NETWORK): tensor
        for name, tensor in tensors.items()
        if name.startswith(_NETWORK)
    }
    if not state:
        raise UserError(f"student.checkpoint = {checkpoint}: this run's student has no network")
    return state


def checkpoint_names(checkpoint: str | None) -> tuple[str, ...]:
    """Names of the tensors in the local file of a checkpoint; none for a package or folder, and for
    what cannot be read, which loading says.
    """
    local = checkpoint and not checkpoint.startswith((PACKAGE, HUB))
    return tensor_names(checkpoint) if local else ()


def student_normalization(
    student: StudentConfig, teachers: Sequence[TeacherConfig]
) -> Normalization | None:
    """What the weights that a student starts from expect; None for random ones.

    An earlier run's have its own, and those of a teacher's file the teacher's.
    """
    if not (student.pretrained or student.checkpoint):
        return None
    role = None
    if student.checkpoint:
        before = _normalization_of_run(student.checkpoint)
        if before:
            return before
        same = [t for t in teachers if t.checkpoint == student.checkpoint]
        if same:
            role, mean, std = same[0].role, same[0].mean, same[0].std
            if mean and std:
                return Normalization(mean, std, f"as teacher '{same[0].label}' of that file")
    return normalization_of(
        student.name, student.checkpoint, role, checkpoint_names(student.checkpoint)
    )


def student_note(student: StudentConfig, teachers: Sequence[TeacherConfig]) -> str | None:
    """The mean and deviation that a student takes from its weights, and why; None where the recipe
    says them.
    """
    chosen = student_normalization(student, teachers)
    if chosen is None or (student.mean, student.std) != chosen[:2]:
        return None
    return f"student: pictures are normalised by {chosen.words} (student.mean and .std set others)"


def _normalization_of_run(checkpoint: str) -> Normalization | None:
    """What the student of an earlier run was fed; None for another file."""
    path = Path(checkpoint)
    path = path / "student.safetensors" if path.is_dir() else path
    try:
        student = yaml.safe_load(run_metadata(path)["recipe"])["student"]
        mean, std = (tuple(map(float, student[key])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return Normalization(mean, std, f"the run of {checkpoint} had it")


def is_of_a_run(path: Path) -> bool:
    """Whether a file is the student.safetensors of a run."""
    return {"recipe", "teacher_dims"} <= set(run_metadata(path))


def run_metadata(path: Path) -> dict[str, str]:
    """Metadata of a .safetensors file; none of what is missing, damaged or of another kind."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # damaged: reading it whole says so

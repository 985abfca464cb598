"""The weights a student's network starts from: of a file, a package, or an earlier run."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from contract.errors import UserError
from distill.models.packaged import checkpoint_path
from distill.models.weight_files import read_state_dict
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
    if not _is_of_a_run(path):
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


def _is_of_a_run(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return {"recipe", "teacher_dims"} <= set(file.metadata() or {})
    except (OSError, SafetensorError):
        return False  # damaged: reading it whole says so

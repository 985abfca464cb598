"""Options of the text side of zero-shot classification."""

from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from contract.errors import UserError
from export.options import Options, spelled

_CLIP_ONLY = ("model", "pretrained", "templates", "teacher", "with_encoder")


class TextOptions(Options):
    """Which labels to embed, with which CLIP (`model`, `pretrained`) or which teacher's classifier
    (`classifier`, `run`).

    Raises UserError, in one line, for a missing option and for options of both kinds.
    """

    output: Path
    """A bundle, or any folder; created if missing."""
    labels: Path
    """Text file with a class per line: NAME, or NAME<tab>WORDS."""
    batch_size: int = 64
    """Prompts that are encoded at a time."""

    model: str | None = None
    """open_clip's name, or a .json file of its configuration format."""
    pretrained: str | None = None
    """open_clip's tag of the weights, a local file, or `random`."""
    templates: Path | None = None
    """Text file with a sentence per line, {} for the label; None: eight general ones."""
    teacher: str | None = None
    """The bundle's CLIP teacher, if it has several of one width."""
    with_encoder: bool = False
    """Whether to write the text tower as ONNX too."""

    classifier: str | None = None
    """Label of the teacher of `run` whose classifier to use."""
    run: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _require(cls, values: dict[str, Any]) -> dict[str, Any]:
        from_teacher = values.get("classifier") or values.get("run")
        source = ("classifier", "run") if from_teacher else ("model", "pretrained")
        for name in ("output", *source, "labels"):
            if values.get(name) is None:
                raise UserError(
                    f"{spelled(name)} is required (python -m export.text --help has examples)"
                )
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give 1 or more")
        for name in _CLIP_ONLY if self.classifier else ():
            if getattr(self, name):
                raise UserError(
                    f"{spelled(name)} is for a CLIP and --classifier uses none: leave one of them "
                    "out"
                )
        return self

"""The bundle's manifest: what is in it, where it came from, how well it agrees. No torch: serving reads it.

`manifest.json` is written last, so a folder that has one is whole; every other file is listed in it with its sha256.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import UserError

FORMAT = 1
"""Version of the schema; raise it with a named `_upgrade_` function when it changes."""

MANIFEST = "manifest.json"
Precision = Literal["fp32", "fp16", "bf16", "int8"]


class Record(BaseModel):
    """Base of everything in a manifest: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorRecord(Record):
    """An input or output: name, element type, shape (numbers, or names of what varies), meaning."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


class GraphRecord(Record):
    """One ONNX graph. `about` says what a task head knows: its classes, unit, what it reads."""

    name: str
    file: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    precision: Precision
    opset: int
    about: dict[str, Any] = Field(default_factory=dict)


class TeacherRecord(Record):
    """A teacher: label in outputs, network, role, widths, where its weights came from, their licence as far as known."""

    label: str
    network: str
    role: str
    token_dim: int
    patch_dim: int
    weights: str
    licence: str


class StudentRecord(Record):
    """The student: its network, method, widths, training size, and the sha256 of its weights."""

    network: str
    method: str
    width: int
    stride: int
    image_size: int
    sha256: str
    trained_steps: int | None = None


class Preprocessing(Record):
    """What the graphs do to `image` themselves, for the reader's information: nobody else may do it again."""

    layout: str = "NHWC, RGB, uint8"
    scale: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Resolution(Record):
    """Sizes a graph takes. Fixed: `height` x `width`. Dynamic: any multiples of `stride` up to these."""

    dynamic: bool
    height: int
    width: int
    stride: int
    checked: tuple[tuple[int, int], ...]


class ParityRecord(Record):
    """Agreement of one output with the torch student, the worst over the pictures of a batch."""

    graph: str
    output: str
    runtime: str
    batch: int
    height: int
    width: int
    cosine: float
    max_abs: float
    worst_image: str
    passed: bool


class Manifest(Record):
    """Everything about a bundle."""

    format: int = FORMAT
    student: StudentRecord
    teachers: tuple[TeacherRecord, ...]
    precision: Precision
    preprocessing: Preprocessing
    resolution: Resolution
    max_batch: int
    graphs: tuple[GraphRecord, ...]
    engines: tuple[dict[str, Any], ...] = ()
    parity: tuple[ParityRecord, ...]
    files: dict[str, str]
    made: dict[str, str]
    seal: str = ""
    """sha256 over all of the above, so that a changed manifest is found too."""

    def sealed(self) -> "Manifest":
        """A copy that carries its own hash."""
        return self.model_copy(update={"seal": self._digest()})

    def _digest(self) -> str:
        content = self.model_copy(update={"seal": ""}).model_dump_json()
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def whole(self) -> bool:
        """Whether the seal is that of the content."""
        return self.seal == self._digest()

    def graph(self, name: str) -> GraphRecord:
        """The graph of a name; raises UserError if the bundle lacks it."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise UserError(f"the bundle has no graph '{name}': it has {', '.join(g.name for g in self.graphs)}")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(bundle: Path) -> Manifest:
    """Read BUNDLE/manifest.json; raises UserError for a folder that is no bundle, or a manifest that is damaged."""
    path = bundle / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle} is no bundle: it has no {MANIFEST} (make one with python -m export.run)")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not whole JSON ({error}): export again") from error
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise UserError(f"{path} is of format {content.get('format')}, this version reads {FORMAT}: export again")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: {key}: {problem['msg']} (export again)") from error
    if not manifest.whole:
        raise UserError(f"{path} does not match its own seal: it was changed after the export; export again")
    return manifest


def add_files(bundle: Path, names: Sequence[str]) -> None:
    """Enter files written into a bundle later (class embeddings, say) in its manifest, by rename.

    A folder without a manifest is left as it is. Raises UserError for a manifest that is damaged.
    """
    if not (bundle / MANIFEST).exists():
        return
    manifest = read_manifest(bundle)
    files = manifest.files | {name: sha256_of(bundle / name) for name in names}
    text = manifest.model_copy(update={"files": files}).sealed().model_dump_json(indent=1)
    aside = bundle / f".{MANIFEST}.tmp"
    aside.write_text(text)
    aside.replace(bundle / MANIFEST)


def verify_files(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with each listed file ("" where nothing is), and with files that are not listed."""
    found = {}
    for name, expected in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            found[name] = "missing"
        else:
            found[name] = "" if sha256_of(path) == expected else "does not match its sha256"
    present = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    return found | {name: "not in the manifest" for name in sorted(present - set(manifest.files) - {MANIFEST})}

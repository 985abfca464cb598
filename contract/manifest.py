"""The bundle's manifest: what is in it, where it came from, how well it agrees. No torch: serving
reads it.

`manifest.json` is written last, so a folder that has one is whole; every other file is listed in it
with its sha256.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import to_json

from contract.engine_record import EngineRecord, Record, first_problem
from contract.errors import UserError, one_line
from contract.files import file_sha256, write_atomically
from contract.licences import LicenceRecord
from contract.names import (
    MANIFEST,
    SIGNATURE,
    About,
    Axis,
    FileName,
    GraphFile,
    Name,
    Sha256,
    Side,
    ViewText,
)
from contract.parity_record import ParityRecord
from contract.signature import (
    BACKBONE,
    DETECTOR,
    FUSED,
    INTERACTION,
    TEXT_DETECTOR,
    check_axes,
    head_graph,
)
from contract.tasks import TASKS
from contract.untrusted import parse_json, read_file
from contract.views import SQUASH, ViewPolicy

FORMAT = 7
"""Version of the schema. 2: types of each graph's weights, engines' records. 4: a teacher may have
no token. 5: a detector. 6: inherited licences. 7: a view, `openvino_precision`, positions and
neighbours in parity records. Raise it when the schema changes.
"""

Precision = Literal["fp32", "fp16", "bf16", "int8"]

_MOST_BYTES = 32 * 2**20
"""Of a manifest: one of a hundred graphs has a fortieth of that."""
_MOST_ELEMENTS = 2**31
"""Of a tensor for one picture."""
_MOST_ORIGINS = 1000
"""Of a student's licences."""


class TensorRecord(Record):
    """An input or output: name, element type, shape (numbers, or names of what varies), meaning."""

    name: Name
    dtype: Literal["uint8", "int64", "float32", "bool"]
    shape: Annotated[tuple[Axis, ...], Field(min_length=1, max_length=8)]
    """The first axis is the batch."""
    meaning: str

    @field_validator("shape")
    @classmethod
    def _possible(cls, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if math.prod(axis for axis in shape if isinstance(axis, int)) > _MOST_ELEMENTS:
            raise ValueError(f"{shape} is more than a tensor can hold")
        return shape

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape without the batch, -1 where it varies."""
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.shape[1:])


class GraphRecord(Record):
    """One ONNX graph. `about` says what a task head knows: its classes, unit, what it reads."""

    name: Name
    file: GraphFile
    inputs: Annotated[tuple[TensorRecord, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorRecord, ...], Field(min_length=1)]
    precision: Precision
    """As requested; small graphs may compute in float32 all the same."""
    dtypes: tuple[Name, ...]
    """Types of the graph's weights and other constants (initialisers), sorted."""
    opset: int
    about: About = Field(default_factory=dict)

    @field_validator("inputs", "outputs")
    @classmethod
    def _named(cls, tensors: tuple[TensorRecord, ...], info: ValidationInfo) -> Any:
        check_axes({tensor.name: tensor.shape for tensor in tensors}, info.field_name == "inputs")
        return tensors


class BundledEngine(EngineRecord):
    """An engine of a bundle: its sidecar, the graph it was built of and its file."""

    graph: Name
    file: FileName

    @property
    def record(self) -> EngineRecord:
        """What the sidecar says."""
        return EngineRecord(**{name: getattr(self, name) for name in EngineRecord.model_fields})


class TeacherRecord(Record):
    """A teacher: label in outputs, network, role, widths, where its weights came from, their
    licence as far as known.
    """

    label: Name
    network: str
    role: str
    token_dim: int | None
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
    trained_steps: int | None
    """Optimizer steps of the run, None where it does not say."""


class Preprocessing(Record):
    """What the graphs do to `image` themselves, for the reader's information: no one else may do it
    again.
    """

    layout: str = "NHWC, RGB, uint8"
    scale: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


LIMITS = ("stride", "height", "width", "min_height", "min_width")
"""Of a resolution, what a model that reads pictures checks their sides against."""


class Resolution(Record):
    """Sizes a graph takes. Fixed: `height` x `width`. Dynamic: any multiples of `stride` from the
    smallest up to these.

    (Engines refuse others; graphs also take smaller and larger ones, which were not compared.)
    """

    dynamic: bool
    height: Side
    width: Side
    min_height: Side
    min_width: Side
    stride: Side
    checked: tuple[tuple[int, int], ...]

    @property
    def limits(self) -> dict[str, int]:
        """What a model that reads pictures checks their sides against."""
        return {name: getattr(self, name) for name in LIMITS}


class CalibrationRecord(Record):
    """Where the ranges of int8 come from: `method` of choosing them, on which pictures; `sha256` is
    over their pixels.
    """

    method: str
    source: str
    pictures: int
    sizes: tuple[tuple[int, int], ...]
    held_out: bool
    """Whether parity was measured on other pictures than these."""
    sha256: str


class DetectorRecord(Record):
    """What makes detections of a teacher's predicted maps: the rest of that teacher's detector.

    `text` reads a prompt (contract/detection.py), `boxes` the outputs `maps` of the teacher's head
    and what `text` gives. Both are float32 whatever the bundle's precision.
    """

    teacher: Name
    source: str
    """Where the detector came from: the name of a folder, or of a model on a hub."""
    sha256: Sha256
    """Of its weights."""
    maps: tuple[Name, ...]
    """Outputs of the teacher's head, finest first."""
    vocabulary: FileName
    text: GraphRecord
    boxes: GraphRecord

    @model_validator(mode="after")
    def _check(self) -> "DetectorRecord":
        """Both graphs have the names and tensors that serving knows them by."""
        prompt = ("self_mask", "position_ids")
        for graph, name, inputs, outputs in (
            (self.text, TEXT_DETECTOR, ("ids", *prompt), ("text",)),
            (self.boxes, DETECTOR, (*self.maps, "text", "text_mask", *prompt), ("logits", "boxes")),
        ):
            reads, gives = (
                tuple(port.name for port in ports) for ports in (graph.inputs, graph.outputs)
            )
            if (graph.name, reads, gives) != (name, inputs, outputs):
                raise ValueError(f"graph '{graph.name}' is not the {name} that it should be")
        return self

    @property
    def graphs(self) -> tuple[GraphRecord, GraphRecord]:
        """Both, in the order in which they run."""
        return self.text, self.boxes


class Manifest(Record):
    """Everything about a bundle."""

    format: int = FORMAT
    student: StudentRecord
    teachers: tuple[TeacherRecord, ...]
    precision: Precision
    preprocessing: Preprocessing
    resolution: Resolution
    view: ViewText = str(SQUASH)
    """How pictures are brought to that size (contract/views.py): as for the student's scores."""
    max_batch: Annotated[int, Field(ge=1, le=2**16)]
    graphs: tuple[GraphRecord, ...]
    engines: tuple[BundledEngine, ...] = ()
    parity: tuple[ParityRecord, ...]
    calibration: CalibrationRecord | None = None
    detector: DetectorRecord | None = None
    openvino_precision: Literal["f32", "bf16"] = "f32"
    """What OpenVINO may compute in where the graphs say float32: bf16 if export compared it so on a
    processor that has it, and it kept to the bounds.
    """
    licences: Annotated[tuple[LicenceRecord, ...], Field(max_length=_MOST_ORIGINS)] | None = None
    """What the student inherits and from whom, None where the bundle does not say."""
    files: dict[FileName, Sha256]
    made: dict[str, str]
    seal: str = ""
    """sha256 over all of the above, so that a changed manifest is found too."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        """Files are listed; graphs are of known kinds, once each, and give what they are for."""
        parts = (*self.graphs, *self.engines, *(self.detector.graphs if self.detector else ()))
        files = [part.file for part in parts]
        if self.detector:
            files.append(self.detector.vocabulary)
            if self.detector.teacher not in {teacher.label for teacher in self.teachers}:
                raise ValueError(f"its detector is of no teacher ('{self.detector.teacher}')")
        for file in files:
            if file not in self.files:
                raise ValueError(f"'{file}' is not among the files")
        names = [graph.name for graph in self.graphs]
        heads = {head_graph(teacher.label) for teacher in self.teachers}
        for graph in self.graphs:
            if graph.name not in {BACKBONE, INTERACTION, FUSED, *TASKS, *heads}:
                raise ValueError(f"'{graph.name}' is no part of a student with these teachers")
            task = TASKS.get(graph.name)
            if task and task.output not in {tensor.name for tensor in graph.outputs}:
                raise ValueError(f"'{graph.name}' does not give '{task.output}'")
        if BACKBONE not in names or len({*names}) < len(names):
            raise ValueError("graphs must be one 'backbone' and others, each once")
        for engine in self.engines:
            if engine.graph not in names:
                raise ValueError(f"an engine is of '{engine.graph}', which is no graph here")
        return self

    def runtime(self, name: str) -> str:
        """The runtime of a name as `contract/graph_call.py` opens these graphs in it."""
        faster = name == "openvino" and self.openvino_precision == "bf16"
        return "openvino-bf16" if faster else name

    def sealed(self) -> "Manifest":
        """A copy that carries its own hash."""
        return self.model_copy(update={"seal": _seal(json.loads(self.to_bytes()))})

    def to_bytes(self) -> bytes:
        """manifest.json, to the byte."""
        return self.model_dump_json(indent=1).encode()

    @property
    def policy(self) -> ViewPolicy:
        """`view`, to be applied."""
        return ViewPolicy.parse(self.view)

    def graph(self, name: str) -> GraphRecord:
        """The graph of a name; raises UserError if the bundle lacks it."""
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise UserError(
            f"the bundle has no graph '{name}': it has {', '.join(g.name for g in self.graphs)}"
        )


def manifest_bytes(bundle: Path) -> bytes:
    """What BUNDLE/manifest.json holds; raises UserError for a folder without one."""
    if not os.path.lexists(bundle / MANIFEST):
        raise UserError(
            f"{bundle} is not a bundle: {MANIFEST} is missing. Create one with `python -m "
            "export.run`"
        )
    return read_file(bundle / MANIFEST, _MOST_BYTES)


def read_manifest(bundle: Path, data: bytes | None = None) -> Manifest:
    """Read BUNDLE/manifest.json, of this format or an older one that can be upgraded; `data` are
    its bytes where they were read already.

    Raises UserError for a folder without one, and for a manifest that is damaged or was changed.
    """
    path = bundle / MANIFEST
    data = manifest_bytes(bundle) if data is None else data
    try:
        content = parse_json(data)
    except ValueError as error:
        raise UserError(
            f"{path} is not whole JSON ({error}): copy the bundle again, or export again"
        ) from error
    version = content.get("format") if isinstance(content, dict) else type(content).__name__
    if type(version) is not int or version not in (*_ADDED, FORMAT):
        raise UserError(
            f"{path} is of format {one_line([str(version)])[:40]}, this version reads "
            f"{_known_formats()}: export again"
        )
    # The seal is of the bytes as they were written, so it is compared before any upgrade.
    try:
        whole = content.get("seal") == _seal(content) and to_json(content, indent=1) == data
    except ValueError:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        whole = False
    if not whole:
        raise UserError(
            f"{path} does not match its own seal: it was changed after the export; export again"
        )
    try:
        manifest = Manifest.model_validate(content | {"format": FORMAT})
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)} (export again)") from error
    return manifest if version == FORMAT else manifest.sealed()


def _seal(content: dict[str, Any]) -> str:
    """sha256 over a manifest's compact JSON with an empty seal."""
    return hashlib.sha256(to_json(content | {"seal": ""})).hexdigest()


_ADDED = {
    3: "a teacher's token_dim may be null",
    4: "an optional detector",
    5: "optional licences",
    6: "a view, squash for those before; openvino_precision, f32 for those before; "
    "optional figures of positions and neighbours in parity records",
}
"""Older formats that are read, and what the one after each adds; nothing else differs."""


def _known_formats() -> str:
    *older, last = sorted((*_ADDED, FORMAT))
    return f"{', '.join(map(str, older))} and {last}"


def add_files(bundle: Path, names: Sequence[str]) -> bool:
    """Enter files written into a bundle later (class embeddings, say) in its manifest, by rename;
    returns whether it was signed, which it is no longer.

    A folder without a manifest is left as it is. Raises UserError for a manifest that is damaged.
    """
    if not (bundle / MANIFEST).exists():
        return False
    manifest = read_manifest(bundle)
    files = manifest.files | {name: file_sha256(bundle / name) for name in names}
    data = manifest.model_copy(update={"files": files}).sealed().to_bytes()
    signed = (bundle / SIGNATURE).is_file()
    if signed:
        (bundle / SIGNATURE).unlink()
    write_atomically(bundle / MANIFEST, lambda temporary: temporary.write_bytes(data))
    return signed

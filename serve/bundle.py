"""A bundle as serving sees it: the parts of its manifest that are needed, its seal and its files'
hashes. No torch.

The manifest is written by `contract/manifest.py`; serving imports nothing of it, so that a serving
machine needs neither torch nor the training code. A test holds both descriptions together.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from contract.errors import UserError

FORMAT = 3
"""Version of the manifest's schema that this file reads."""

MANIFEST = "manifest.json"
IMAGE = "image"
FUSED = "fused"
BACKBONE = "backbone"


class Record(BaseModel):
    """Base of what is read: frozen; keys that serving does not need are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Tensor(Record):
    """An input or output: name, element type, shape (numbers, or names of what varies; the first is
    the batch).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str = ""

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape without the batch, -1 where it varies."""
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.shape[1:])


class Graph(Record):
    """One ONNX graph of the bundle."""

    name: str
    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    about: dict[str, Any] = Field(default_factory=dict)


class Teacher(Record):
    """A teacher whose outputs the student predicts."""

    label: str
    network: str
    role: str
    token_dim: int
    patch_dim: int
    licence: str = "unknown"


class Student(Record):
    """The student's network and the sha256 of its weights."""

    network: str
    method: str
    sha256: str


class Resolution(Record):
    """Sizes taken. Fixed: `height` x `width`. Dynamic: any multiples of `stride` from the smallest
    up to these.
    """

    dynamic: bool
    height: int
    width: int
    min_height: int
    min_width: int
    stride: int

    @property
    def limits(self) -> dict[str, int]:
        """What a model that reads pictures checks their sides against."""
        return {
            name: getattr(self, name)
            for name in ("stride", "height", "width", "min_height", "min_width")
        }


class Manifest(Record):
    """What serving reads of a manifest."""

    student: Student
    teachers: tuple[Teacher, ...]
    precision: str
    resolution: Resolution
    max_batch: int
    graphs: tuple[Graph, ...]
    engines: tuple[dict[str, Any], ...] = ()
    files: dict[str, str]


class Bundle:
    """A folder with a whole manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """Graphs by name."""
        return {graph.name: graph for graph in self.manifest.graphs}

    @cached_property
    def parts(self) -> tuple[Graph, ...]:
        """Every graph but `fused`, in an order in which each follows those it reads from."""
        return tuple(graph for graph in self.manifest.graphs if graph.name != FUSED)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """What a client may ask for: the outputs that no other graph reads."""
        internal = {tensor.name for graph in self.parts for tensor in graph.inputs}
        return tuple(
            tensor
            for graph in self.parts
            for tensor in graph.outputs
            if tensor.name not in internal
        )

    @property
    def version(self) -> str:
        """A short name of exactly this bundle, for logs."""
        return hashlib.sha256(json.dumps(self.manifest.files, sort_keys=True).encode()).hexdigest()[
            :12
        ]

    def file(self, name: str) -> Path:
        """A listed file whose bytes are those the manifest lists; raises UserError otherwise."""
        listed = self.manifest.files.get(name)
        if listed is None:
            raise UserError(f"{self.path}: its manifest lists no {name} (export again)")
        path, inside = self.path / name, PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(
                f"{self.path}: its manifest lists {name}, which is no file of a bundle (export "
                "again)"
            )
        steps = [
            self.path.joinpath(*inside.parts[: count + 1]) for count in range(len(inside.parts))
        ]
        if any(step.is_symlink() for step in steps):
            raise UserError(
                f"{path} is a link: copy the bundle again with the files themselves, or export "
                "again"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the bundle again, whole, or export again")
        if sha256_of(path) != listed:
            raise UserError(
                f"{path} does not match its sha256 in {MANIFEST}: copy the bundle again, or export "
                "again"
            )
        return path


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bundle(path: Path) -> Bundle:
    """Read BUNDLE/manifest.json; raises UserError for a folder that is no bundle, or a manifest
    that was changed.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path} is no bundle: it has no {MANIFEST} (make one with python -m export.run)"
        )
    data = file.read_bytes()
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not whole JSON ({error}): copy the bundle again, or export again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        result = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{file} is of format {result}, this version serves {FORMAT}: export again")
    # the seal is taken over pydantic's compact JSON with an empty seal; the file has it indented by
    # one, and nothing else
    try:
        sealed, written = to_json(content | {"seal": ""}), to_json(content, indent=1)
    except ValueError:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        sealed = written = b""
    if hashlib.sha256(sealed).hexdigest() != content.get("seal") or written != data:
        raise UserError(
            f"{file} does not match its own seal: it was changed after the export; export again"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{file}: {key}: {problem['msg']} (export again)") from error
    return Bundle(path, manifest)

"""A bundle as serving sees it: its manifest, its graphs by name, and files whose hashes are
checked.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

from contract.errors import UserError
from contract.files import file_sha256
from contract.manifest import MANIFEST, GraphRecord, Manifest, TensorRecord, read_manifest
from contract.signature import FUSED, is_internal
from contract.text_encoder import TEXT_ENCODER


class Bundle:
    """A folder with a whole manifest. Each of its files is hashed once, when it is first used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @cached_property
    def graphs(self) -> dict[str, GraphRecord]:
        return {graph.name: graph for graph in self.manifest.graphs}

    @cached_property
    def parts(self) -> tuple[GraphRecord, ...]:
        """Every graph but `fused`, in an order in which each follows those it reads from."""
        return tuple(graph for graph in self.manifest.graphs if graph.name != FUSED)

    @cached_property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """What a client may ask for: the outputs that no other graph reads."""
        read = {tensor.name for graph in self.parts for tensor in graph.inputs}
        return tuple(
            tensor
            for graph in self.parts
            for tensor in graph.outputs
            if tensor.name not in read and not is_internal(tensor.name)
        )

    @property
    def version(self) -> str:
        """A short name of exactly this bundle, for logs."""
        return hashlib.sha256(json.dumps(self.manifest.files, sort_keys=True).encode()).hexdigest()[
            :12
        ]

    @cached_property
    def problem(self) -> str:
        """What `export.check` would find wrong with the graphs, "" if nothing; needs onnx. Raises
        UserError as `file` does.
        """
        from contract.bundle_check import encoder_problem, graph_problem

        for name in self.manifest.files:  # a copy's damage is told before what follows from it
            if name.endswith((".onnx", ".onnx.data")):
                self.file(name)
        detector = self.manifest.detector
        for graph in (*self.manifest.graphs, *(detector.graphs if detector else ())):
            if problem := graph_problem(self.path, self.manifest, graph):
                return f"{graph.file}: {problem}"
        if TEXT_ENCODER in self.manifest.files:
            return encoder_problem(self.path, self.manifest, TEXT_ENCODER)
        return ""

    def file(self, name: str) -> Path:
        """A listed file whose bytes are those the manifest lists; raises UserError otherwise."""
        listed = self.manifest.files.get(name)
        if listed is None:
            raise UserError(f"{self.path}: its manifest does not list {name}: export again")
        path = self.path / name
        if name in self._verified:
            return path
        if path.is_symlink():
            raise UserError(
                f"{path} is a link: copy the bundle again with the files themselves, or export "
                "again"
            )
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the whole bundle again, or export again")
        if file_sha256(path) != listed:
            raise UserError(
                f"{path} does not match its sha256 in {MANIFEST}: copy the bundle again, or export "
                "again"
            )
        self._verified.add(name)
        return path


def read_bundle(path: Path) -> Bundle:
    """Open a folder of export.run; raises UserError as `read_manifest` does."""
    return Bundle(path, read_manifest(path))

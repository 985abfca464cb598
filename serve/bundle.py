"""A bundle as serving sees it: its manifest, its graphs by name, and files whose hashes are
checked.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from contract.bundle_check import encoder_problem, graph_problem
from contract.errors import UserError
from contract.graph_check import MOST_BYTES
from contract.manifest import (
    MANIFEST,
    GraphRecord,
    Manifest,
    TensorRecord,
    manifest_bytes,
    read_manifest,
)
from contract.signature import FUSED, is_internal
from contract.signing import PublicKey, signer
from contract.text_encoder import TEXT_ENCODER
from contract.untrusted import open_file, read_file


class BundleFile(NamedTuple):
    """A listed file, to be copied."""

    path: Path
    sha256: str

    def copy(self, target: Path) -> None:
        """Copy it; raises UserError where its bytes are no longer those that were checked."""
        digest = hashlib.sha256()
        with open_file(self.path) as file, open(target, "xb") as result:
            while data := file.read(2**20):
                digest.update(data)
                result.write(data)
        if digest.hexdigest() != self.sha256:
            raise _damaged(self.path)


class Bundle:
    """A folder with a whole manifest. Each of its files is hashed when it is first used, and once
    more while it is copied, for it may be changed in between.
    """

    def __init__(self, path: Path, manifest: Manifest, key: PublicKey | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.signed_by = key.fingerprint if key else ""
        """The key that vouches for it, "" where none was asked for."""
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
        detector = self.manifest.detector
        graphs = (*self.manifest.graphs, *(detector.graphs if detector else ()))
        for name in self.manifest.files:  # a copy's damage is told before what follows from it
            if name.endswith(".onnx.data"):
                self.file(name)
        for graph in graphs:
            # the bytes that are checked are those that were hashed
            data = self.read(graph.file, MOST_BYTES)
            if problem := graph_problem(self.path, self.manifest, graph, data):
                return f"{graph.file}: {problem}"
        if TEXT_ENCODER in self.manifest.files:
            return encoder_problem(self.path, self.manifest, TEXT_ENCODER, self.read)
        return ""

    def read(self, name: str, most: int = MOST_BYTES) -> bytes:
        """The bytes of a listed file, which are those the manifest lists; raises UserError
        otherwise.
        """
        listed = self._listed(name)
        data = read_file(self.path / name, most)
        if hashlib.sha256(data).hexdigest() != listed:
            raise _damaged(self.path / name)
        self._verified.add(name)
        return data

    def file(self, name: str) -> Path:
        """A listed file whose bytes are those the manifest lists; raises UserError otherwise."""
        listed, path = self._listed(name), self.path / name
        if name not in self._verified:
            with open_file(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != listed:
                    raise _damaged(path)
            self._verified.add(name)
        return path

    def part(self, name: str) -> BundleFile:
        """The same for a file that is to be copied."""
        return BundleFile(self.file(name), self._listed(name))

    def _listed(self, name: str) -> str:
        if name not in self.manifest.files:
            raise UserError(f"{self.path}: its manifest does not list {name}: export again")
        return self.manifest.files[name]


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} does not match its sha256 in {MANIFEST}: copy the bundle again, or export again"
    )


def read_bundle(path: Path, trust: Sequence[PublicKey] = ()) -> Bundle:
    """Open a folder of export.run; raises UserError as `read_manifest` does, and for one that none
    of the keys to `trust` has signed.
    """
    data = manifest_bytes(path)
    key = signer(path, data, trust)
    bundle = Bundle(path, read_manifest(path, data), key)
    # whoever asks for a signature wants all of what was signed
    for name in bundle.manifest.files if key else ():
        bundle.file(name)
    return bundle

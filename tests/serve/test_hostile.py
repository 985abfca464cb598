"""Bundles that were made to harm: what their manifests name stays in its place, and no code of
theirs is put into a repository.
"""

import json
import random
import shutil
from pathlib import Path

import onnx
import pytest
from pydantic_core import to_json

from contract.errors import UserError
from contract.files import file_sha256
from contract.manifest import MANIFEST, _seal, add_files, read_manifest
from contract.text_encoder import TEXT_ENCODER, read_text_encoder
from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.models import build_models
from serve.repository.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
OURS = {
    file_sha256(path)
    for folder in ("triton_models", "contract")
    for path in (ROOT / folder).rglob("*.py")
}
"""Of all code that a repository may hold."""

NAMES = (
    "../../outside",
    "/tmp/outside",
    "head_/../../outside",
    "model.py",
    "graph_model.py",
    "config.pbtxt",
    "1/model.py",
    "a\x00b",
    "a\nb",
    ".",
    "..",
    "",
    "é",
    "features",
    "decode",
    "zero_shot",
    "CON",
    "x" * 5000,
    MANIFEST,
    "backbone",
    "fused",
)
VALUES = (*NAMES, -1, 0, 1, 2**40, 2**70, 1.5, float("inf"), None, True, [], {}, ["a"], {"a": "b"})


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Where in a JSON value something is, itself left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


def mutate(content: dict, where: list[tuple], chosen: random.Random) -> dict:
    """A copy with one to three values or keys replaced, or removed."""
    content = json.loads(json.dumps(content))
    for _ in range(chosen.randint(1, 3)):
        *path, last = chosen.choice(where)
        node = content
        try:
            for key in path:
                node = node[key]
            how = chosen.randrange(4)
            if how == 0 and isinstance(node, dict):
                node[chosen.choice(NAMES)] = node.pop(last)
            elif how == 1:
                del node[last]
            else:
                node[last] = chosen.choice(VALUES)
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
    return content


def write_sealed(folder: Path, content: dict) -> None:
    """A manifest with the seal that belongs to it, as anybody can make it."""
    content = content | {"seal": ""}
    (folder / MANIFEST).write_bytes(to_json(content | {"seal": _seal(content)}, indent=1))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def copy(small_bundle, tmp_path) -> Path:
    """A bundle that a test may break, in a folder of its own."""
    return shutil.copytree(small_bundle, tmp_path / "in" / "bundle")


@pytest.mark.slow
def test_changed_manifests_write_nothing_outside_and_bring_no_code(copy, tmp_path):
    chosen, content = random.Random(0), json.loads((copy / MANIFEST).read_bytes())
    where, rendered = places(content), 0
    before = None
    for turn in range(2_000):
        write_sealed(copy, mutate(content, where, chosen))
        before = before or set(contents(tmp_path))
        try:
            bundle = read_bundle(copy)
            models = build_models(bundle, Settings())
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000, turn
            continue
        for model in models:
            assert model.name.isidentifier() and all("/" not in name for name in model.files)
            code = [data for name, data in model.files.items() if name.endswith(".py")]
            assert all(isinstance(path, Path) and file_sha256(path) in OURS for path in code)
        if rendered < 20:
            rendered += 1
            make_repository(bundle, tmp_path / "out", Settings(), durable=False)
            shutil.rmtree(tmp_path / "out")
    assert rendered == 20, "some changes are harmless, and these were rendered"
    assert set(contents(tmp_path)) == before


@pytest.mark.parametrize("kind", ["file", "domain", "function", "inner", "sequence"])
def test_a_graph_that_reaches_beyond_itself_is_refused(copy, tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(4096))
    model = onnx.load(copy / "head_mae.onnx")
    if kind == "file":
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../secret")
    elif kind == "domain":
        model.graph.node[0].domain = "com.example"
        model.opset_import.add(domain="com.example", version=1)
    elif kind == "function":
        model.functions.add(name="Add", domain="")
    elif kind == "sequence":
        value = onnx.helper.make_tensor_sequence_value_info("more", onnx.TensorProto.FLOAT, [2])
        model.graph.input.append(value)
    else:
        value = onnx.TensorProto(data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        value.external_data.add(key="location", value="/etc/hostname")
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=value))
    (copy / "head_mae.onnx").write_bytes(model.SerializeToString())
    add_files(copy, ["head_mae.onnx"])
    words = "which is not its own file" if kind in ("file", "inner") else "not ONNX's own"
    words = "not a tensor" if kind == "sequence" else words
    with pytest.raises(UserError, match=words):
        build_models(read_bundle(copy), Settings())


def test_a_text_encoder_cannot_bring_code(tmp_path):
    about = {"format": 1, "text_weights_sha256": "0" * 64, "graph": {"file": "model.py"}}
    (tmp_path / TEXT_ENCODER).write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not describe an encoder: graph.file"):
        read_text_encoder(tmp_path / TEXT_ENCODER)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graphs": []}, "backbone"),
        ({"max_batch": 10**9}, "max_batch"),
        ({"files": {"model.onnx": "0"}}, "files"),
        ({"teachers": []}, "is no part of a student with these teachers"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(copy, change, words):
    content = json.loads((copy / MANIFEST).read_bytes()) | change
    write_sealed(copy, content)
    with pytest.raises(UserError, match=words):
        read_manifest(copy)

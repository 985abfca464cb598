"""Bundles that were made to harm: what their manifests name stays in its place, and no code of
theirs is put into a repository.
"""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from pydantic_core import to_json

from contract.errors import UserError
from contract.files import file_sha256
from contract.manifest import MANIFEST, _seal, add_files, read_manifest
from contract.text_encoder import TEXT_ENCODER, read_text_encoder
from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.models import build_models
from serve.repository.settings import Settings
from tests.serve.made_bundle import graph_bytes, make_bundle


def write_sealed(folder: Path, content: dict) -> None:
    """A manifest with the seal that belongs to it, as anybody can make it."""
    content = content | {"seal": ""}
    (folder / MANIFEST).write_bytes(to_json(content | {"seal": _seal(content)}, indent=1))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A bundle that a test may break, in a folder of its own."""
    return make_bundle(tmp_path / "in" / "bundle")


def constant(name: str, *dims: int, kind: int = TensorProto.FLOAT, **content) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=dims, **content)


def outside(model: ModelProto, **entries: str) -> None:
    """Put a constant's values into another file."""
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def own_domain(model: ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.add(domain="com.example", version=1)


def inner(model: ModelProto, node: onnx.NodeProto) -> None:
    """Put a node into a branch."""
    out = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    branch = onnx.helper.make_graph([node], "branch", [], [out])
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(yes)
    both = {"then_branch": branch, "else_branch": branch}
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["branched"], **both))


def compute(model: ModelProto, *dims: int) -> None:
    """Add a tensor of zeros, of which the file holds the shape alone."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(dims), "wanted"))
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["wanted"], ["zeros"]))


def axes_without_end(model: ModelProto) -> None:
    """Add a picture of as many axes as a tensor has values."""
    compute(model, 2**31)
    model.graph.node.append(
        onnx.helper.make_node("Cast", ["zeros"], ["many"], to=TensorProto.INT64)
    )
    model.graph.node.append(onnx.helper.make_node("Reshape", ["values", "many"], ["end"]))


def sequence(model: ModelProto) -> None:
    value = onnx.helper.make_tensor_sequence_value_info("more", TensorProto.FLOAT, [2])
    model.graph.input.append(value)


GRAPHS: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "another file": (
        lambda model: outside(model, location="../../secret"),
        "which is not its own file",
    ),
    "an absolute file": (
        lambda model: outside(model, location="/etc/hostname"),
        "which is not its own file",
    ),
    "a file that is not listed": (
        lambda model: outside(model, location="head_clip.onnx.data"),
        "which is not its own file",
    ),
    "another file in a branch": (
        lambda model: inner(
            model,
            onnx.helper.make_node(
                "Constant",
                [],
                ["y"],
                value=TensorProto(
                    data_type=1,
                    dims=[2],
                    data_location=TensorProto.EXTERNAL,
                    external_data=[{"key": "location", "value": "/etc/hostname"}],
                ),
            ),
        ),
        "which is not its own file",
    ),
    "own operators": (own_domain, "not ONNX's own"),
    "own operators in a branch": (
        lambda model: inner(
            model, onnx.helper.make_node("Run", ["clip"], ["y"], domain="com.microsoft")
        ),
        "not ONNX's own",
    ),
    "a function": (lambda model: model.functions.add(name="Add", domain=""), "not ONNX's own"),
    "training": (lambda model: model.training_info.add(), "a part for training"),
    "a sequence": (sequence, "not a tensor"),
    "terabytes": (
        lambda model: model.graph.initializer.append(constant("x", 2**31, 2**10, raw_data=b"12")),
        "weights 'x' of 2147483648x1024 values",
    ),
    "gigabytes that are not there": (
        lambda model: model.graph.initializer.append(constant("x", 2**31, raw_data=b"12")),
        "weights 'x' hold 2 of 8589934592",
    ),
    "numbers that are not there": (
        lambda model: model.graph.initializer.append(constant("x", 2**20, float_data=[1.0])),
        "weights 'x' hold 1 of 1048576",
    ),
    "less than nothing": (
        lambda model: model.graph.initializer.append(constant("x", -4, -1, raw_data=bytes(16))),
        "weights 'x' of -4x-1 values",
    ),
    "nothing times too much": (
        lambda model: model.graph.initializer.append(constant("x", 0, 2**60)),
        "weights 'x' of 0x1152921504606846976 values",
    ),
    "an unknown type": (
        lambda model: model.graph.initializer.append(constant("x", 1, kind=99, raw_data=b"1")),
        r"unknown type \(99\)",
    ),
    "parts": (
        lambda model: model.graph.initializer.append(
            constant("x", 1, float_data=[1.0], segment=TensorProto.Segment(begin=0, end=2**60))
        ),
        "in parts",
    ),
    "sparse weights": (
        lambda model: model.graph.sparse_initializer.add(dims=[2**40]),
        "sparse weights",
    ),
    "terabytes that are computed": (lambda model: compute(model, 2**20, 2**20), "'zeros' of"),
    "a stated shape of terabytes": (
        lambda model: model.graph.value_info.append(
            onnx.helper.make_tensor_value_info("values", TensorProto.FLOAT, [2**40])
        ),
        "'values' of 1099511627776 values",
    ),
    "a stated shape of less than nothing": (
        lambda model: model.graph.value_info.append(
            onnx.helper.make_tensor_value_info("values", TensorProto.FLOAT, [-5])
        ),
        "'values' of -5 values",
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_that_reaches_beyond_itself_or_is_absurd_is_refused(copy, tmp_path, kind):
    change, words = GRAPHS[kind]
    (tmp_path / "secret").write_bytes(bytes(4096))
    model = onnx.load(copy / "head_clip.onnx")
    change(model)
    (copy / "head_clip.onnx").write_bytes(model.SerializeToString())
    add_files(copy, ["head_clip.onnx"])
    with pytest.raises(UserError, match=words):
        build_models(read_bundle(copy), Settings())


@pytest.mark.slow
def test_a_short_graph_whose_shapes_fill_all_memory_is_refused(copy):
    model = onnx.load(copy / "head_clip.onnx")
    axes_without_end(model)
    (copy / "head_clip.onnx").write_bytes(model.SerializeToString())
    add_files(copy, ["head_clip.onnx"])
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="shapes that take more than 1 GiB"):
        build_models(read_bundle(copy), Settings())
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"offset": "4"}, ""),
        ({"offset": "8"}, "past the end"),
        ({"offset": "9" * 400}, "past the end"),
        ({"offset": "-4"}, "at no place"),
        ({"length": "8"}, "hold 8 of 12"),
    ],
)
def test_weights_beside_a_graph_must_be_inside_their_file(copy, entries, words):
    (copy / "head_clip.onnx.data").write_bytes(bytes(16))
    model = onnx.load(copy / "head_clip.onnx")
    outside(model, location="head_clip.onnx.data", **entries)
    (copy / "head_clip.onnx").write_bytes(model.SerializeToString())
    add_files(copy, ["head_clip.onnx", "head_clip.onnx.data"])
    problem = read_bundle(copy).problem
    assert words in problem if words else not problem


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large"])
@pytest.mark.parametrize("name", ["manifest.json", "backbone.onnx", "class_embeddings.safetensors"])
def test_what_is_no_file_is_refused_and_not_waited_for(copy, tmp_path, kind, name):
    path = copy / name
    path.rename(tmp_path / "kept")
    if kind == "link":
        path.symlink_to(tmp_path / "kept")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(2**32)  # of nothing: it takes no room
    with pytest.raises(UserError, match=kind if kind == "link" else "regular|bytes"):
        build_models(read_bundle(copy), Settings())


def test_what_is_copied_is_what_was_checked(copy, tmp_path):
    bundle = read_bundle(copy)
    build_models(bundle, Settings())
    (copy / "head_clip.onnx").write_bytes(b"another graph")
    with pytest.raises(UserError, match="head_clip.onnx does not match its sha256"):
        make_repository(bundle, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_axes_of_no_known_size_are_refused(copy):
    """Both the manifest and the graph say so, as the one who made them would have it."""
    content = json.loads((copy / MANIFEST).read_bytes())
    for number, graph in enumerate(content["graphs"]):
        if graph["name"] == "head_clip":
            graph["inputs"][0]["shape"][1] = "rows_0"
            (copy / graph["file"]).write_bytes(graph_bytes(graph))
            content["files"][graph["file"]] = file_sha256(copy / graph["file"])
            content["graphs"][number] = graph
    write_sealed(copy, content)
    with pytest.raises(UserError, match="'features' may not have an axis 'rows_0'"):
        build_models(read_bundle(copy), Settings())


def test_a_text_encoder_cannot_bring_code(tmp_path):
    about = {"format": 1, "text_weights_sha256": "0" * 64, "graph": {"file": "model.py"}}
    (tmp_path / TEXT_ENCODER).write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not describe an encoder: graph.file"):
        read_text_encoder(tmp_path / TEXT_ENCODER)


def test_names_of_classes_do_not_steer_terminals(copy):
    content = json.loads((copy / MANIFEST).read_bytes())
    next(graph for graph in content["graphs"] if graph["name"] == "segmentation")["about"] = {
        "classes": ["cat", "\x1b[2J"]
    }
    write_sealed(copy, content)
    with pytest.raises(UserError, match=r"graphs.3.about") as caught:
        read_manifest(copy)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"graphs": []}, "backbone"),
        ({"max_batch": 10**9}, "max_batch"),
        ({"files": {"model.onnx": "0"}}, "files"),
        ({"teachers": [], "detector": None}, "is no part of a student with these teachers"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(copy, change, words):
    content = json.loads((copy / MANIFEST).read_bytes()) | change
    write_sealed(copy, content)
    with pytest.raises(UserError, match=words):
        read_manifest(copy)

"""What can be said of a bundle's files without a runtime: whether each graph is valid ONNX of the
standard operators, has the inputs and outputs of the manifest, and reads no file but its own.

`export.check` prints it; serving refuses a bundle for it, because a bundle may come from anybody.
Needs onnx, no torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError, first_line
from contract.manifest import GraphRecord, Manifest
from contract.text_encoder import read_text_encoder

if TYPE_CHECKING:
    import onnx

_DOMAINS = ("", "ai.onnx")
"""Of operators that a graph may have: those of ONNX itself, which runtimes do not load from
files.
"""


def graph_problem(bundle: Path, manifest: Manifest, record: GraphRecord) -> str:
    """What is wrong with a graph's file, "" if nothing is."""
    model, problem = _open_graph(bundle, manifest, record.file, record.opset)
    if model is None:
        return problem
    for values, tensors in (
        (model.graph.input, record.inputs),
        (model.graph.output, record.outputs),
    ):
        result = [_describe(value) for value in values]
        wanted = [(t.name, t.dtype, tuple(t.shape)) for t in tensors]
        if result != wanted:
            return f"{result} where the manifest says {wanted}"
    if weight_dtypes(model) != record.dtypes:
        return (
            f"weights of {', '.join(weight_dtypes(model))}, the manifest says "
            f"{', '.join(record.dtypes)}"
        )
    return ""


def encoder_problem(bundle: Path, manifest: Manifest, name: str) -> str:
    """What is wrong with the text encoder that a file of `export.text` describes, "" if nothing
    is.
    """
    try:
        about = read_text_encoder(bundle / name)
    except UserError as error:
        return str(error)
    for part in (about.graph, about.tokenizer.vocabulary):
        if part.file not in manifest.files:
            return f"{part.file} is not in the manifest"
        if manifest.files[part.file] != part.sha256:  # the files are held against the manifest
            return f"{part.file} is not the one that {name} describes"
    model, problem = _open_graph(bundle, manifest, about.graph.file, about.graph.opset)
    if model is None:
        return problem
    wanted = [(port.name, port.dtype, port.shape) for port in (about.input, about.output)]
    result = [_describe(value) for value in (*model.graph.input, *model.graph.output)]
    return "" if result == wanted else f"{result} where {name} says {wanted}"


def weight_dtypes(model: "onnx.ModelProto") -> tuple[str, ...]:
    """Types of a graph's initializers, sorted."""
    import onnx

    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    # the checker lets numbers pass that no type has
    names |= {kind: f"type {kind}" for kind in kinds - {*onnx.TensorProto.DataType.values()}}
    return tuple(
        sorted(names.get(kind) or onnx.TensorProto.DataType.Name(kind).lower() for kind in kinds)
    )


def _open_graph(
    bundle: Path, manifest: Manifest, file: str, opset: int
) -> "tuple[onnx.ModelProto | None, str]":
    """A graph's model without its external weights, or None and what is wrong with the file."""
    import onnx

    path = bundle / file
    if file not in manifest.files:
        return None, "its file is not in the manifest"
    if path.is_symlink() or not path.is_file():
        return None, "its file is missing"
    try:
        model = onnx.load(path, load_external_data=False)
        # before the checker, which opens the files that weights are said to be in
        if problem := _reach(model, file, manifest):
            return None, problem
        onnx.checker.check_model(str(path), full_check=True)
    # protobuf, checker and shape inference each raise their own
    except Exception as error:
        return None, f"not valid ONNX ({first_line(error)})"
    result = next((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), None)
    return (model, "") if result == opset else (None, f"opset {result}, the manifest says {opset}")


def _reach(model: "onnx.ModelProto", file: str, manifest: Manifest) -> str:
    """What a graph wants beside itself and its own weights, "" if nothing."""
    import onnx

    weights = f"{file}.data"
    # a library of operators would be loaded by the name of its domain, and a function replaces one
    foreign = [entry.domain for entry in model.opset_import if entry.domain not in _DOMAINS]
    if foreign or model.functions:
        name = (foreign or [model.functions[0].name])[0]
        return f"operators that are not ONNX's own ('{name[:60]}')"
    for message in _messages(model.graph):
        if isinstance(message, onnx.NodeProto) and message.domain not in _DOMAINS:
            return f"operators that are not ONNX's own ('{message.domain[:60]}')"
        if isinstance(message, onnx.TensorProto):
            kept = {entry.key: entry.value for entry in message.external_data}
            outside = message.data_location == onnx.TensorProto.EXTERNAL or kept
            if outside and (kept.get("location") != weights or weights not in manifest.files):
                return f"weights in '{kept.get('location', '')[:60]}', which is not its own file"
    return ""


def _messages(graph: "onnx.GraphProto") -> "Iterator[onnx.NodeProto | onnx.TensorProto]":
    """Every node and tensor of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield sparse.values
                yield sparse.indices
            for inner in (attribute.g, *attribute.graphs):
                yield from _messages(inner)


def _describe(value: "onnx.ValueInfoProto") -> tuple[str, str, tuple[int | str, ...]]:
    """Name, element type and shape of a graph's input or output."""
    import onnx

    if value.type.WhichOneof("value") != "tensor_type":  # a sequence, say, is legal ONNX
        return value.name, "not a tensor", ()
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:  # undefined, or a number that no type has, which the checker lets pass
        kind = f"type {tensor.elem_type}"
    return value.name, kind, shape

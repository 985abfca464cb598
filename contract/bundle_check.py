"""What can be said of a bundle's files without a runtime: whether each graph is valid ONNX of the
standard operators, has the inputs and outputs of the manifest, and reads no file but its own.

`export.check` prints it; serving refuses a bundle for it, because a bundle may come from anybody.
Needs onnx, no torch.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError, first_line
from contract.graph_check import DOMAINS, MOST_BYTES, absurd, reach
from contract.manifest import GraphRecord, Manifest
from contract.text_encoder import read_text_encoder
from contract.untrusted import open_file, read_file

if TYPE_CHECKING:
    import onnx


def graph_problem(
    bundle: Path, manifest: Manifest, record: GraphRecord, data: bytes | None = None
) -> str:
    """What is wrong with a graph's file, "" if nothing is; `data` are its bytes where they were
    read already.
    """
    model, problem = _open_graph(bundle, manifest, record.file, record.opset, data)
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


def encoder_problem(
    bundle: Path, manifest: Manifest, name: str, read: Callable[[str], bytes] | None = None
) -> str:
    """What is wrong with the text encoder that a file of `export.text` describes, "" if nothing
    is; `read` gives a file's bytes where more than reading it is to be done.
    """
    try:
        about = read_text_encoder(bundle / name, read(name) if read else None)
    except UserError as error:
        return str(error)
    for part in (about.graph, about.tokenizer.vocabulary):
        if part.file not in manifest.files:
            return f"{part.file} is not in the manifest"
        if manifest.files[part.file] != part.sha256:  # the files are held against the manifest
            return f"{part.file} is not the one that {name} describes"
    data = read(about.graph.file) if read else None
    model, problem = _open_graph(bundle, manifest, about.graph.file, about.graph.opset, data)
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
    return tuple(
        sorted(names.get(kind) or onnx.TensorProto.DataType.Name(kind).lower() for kind in kinds)
    )


def _open_graph(
    bundle: Path, manifest: Manifest, file: str, opset: int, data: bytes | None
) -> "tuple[onnx.ModelProto | None, str]":
    """A graph's model without its external weights, or None and what is wrong with the file."""
    import onnx

    path, weights = bundle / file, f"{file}.data"
    if file not in manifest.files:
        return None, "its file is not in the manifest"
    try:
        data = read_file(path, MOST_BYTES) if data is None else data
        size = 0
        if weights in manifest.files:
            with open_file(bundle / weights) as beside:
                size = os.fstat(beside.fileno()).st_size
    except UserError as error:
        return None, str(error)
    try:
        model = onnx.load_model_from_string(data)
        # before the checker, which opens the files that weights are said to be in
        if problem := reach(model, weights, size):
            return None, problem
        # the checker finds weights beside a file, and reads no others by now
        onnx.checker.check_model(str(path) if size else data)
        if problem := absurd(model):
            return None, problem
    # protobuf, checker and shape inference each raise their own
    except Exception as error:
        return None, f"not valid ONNX ({first_line(error)})"
    result = next((entry.version for entry in model.opset_import if entry.domain in DOMAINS), None)
    return (model, "") if result == opset else (None, f"opset {result}, the manifest says {opset}")


def _describe(value: "onnx.ValueInfoProto") -> tuple[str, str, tuple[int | str, ...]]:
    """Name, element type and shape of a graph's input or output."""
    import onnx

    if value.type.WhichOneof("value") != "tensor_type":  # a sequence, say, is legal ONNX
        return value.name, "not a tensor", ()
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape

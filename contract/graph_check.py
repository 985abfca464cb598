"""What an ONNX graph must not hold, whoever made it: operators that would be loaded from elsewhere,
weights in other files, and sizes that no server has memory for.

Needs onnx, no torch.
"""

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

DOMAINS = ("", "ai.onnx")
"""Of operators that a graph may have: those of ONNX itself, which runtimes do not load from
files.
"""
MOST_BYTES = 2**31
"""Of a graph's file: what protobuf can read."""

_MOST_SIDE, _MOST_VALUES = 2**31, 2**34
"""Of any tensor, also of one that is only computed: attention over 20,000 positions in 16 heads has
a third of that.
"""
_MOST_AXES, _MOST_MEMORY = 64, 2**30
"""Of a tensor; and bytes that following shapes may take: weights are left out of it."""
_LIGHT = 2**16
"""Bytes of initialisers whose values may say a shape."""

_BITS = {
    "FLOAT": 32,
    "DOUBLE": 64,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "INT8": 8,
    "INT16": 16,
    "INT32": 32,
    "INT64": 64,
    "UINT8": 8,
    "UINT16": 16,
    "UINT32": 32,
    "UINT64": 64,
    "BOOL": 8,
    "FLOAT8E4M3FN": 8,
    "FLOAT8E4M3FNUZ": 8,
    "FLOAT8E5M2": 8,
    "FLOAT8E5M2FNUZ": 8,
    "INT4": 4,
    "UINT4": 4,
}
"""Of an element, by the types that weights may have."""
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def reach(model: "onnx.ModelProto", weights: str, size: int) -> str:
    """What a graph wants beside itself and `size` bytes of its own file of weights, "" if nothing;
    also weights that are not as large as they say.
    """
    import onnx

    # a library of operators would be loaded by the name of its domain, and a function replaces one
    foreign = [entry.domain for entry in model.opset_import if entry.domain not in DOMAINS]
    if foreign or model.functions:
        name = (foreign or [model.functions[0].name])[0]
        return f"operators that are not ONNX's own ('{name[:60]}')"
    if model.training_info:
        return "a part for training, which nobody runs"
    for message in _messages(model.graph):
        if isinstance(message, onnx.NodeProto):
            if message.domain not in DOMAINS:
                return f"operators that are not ONNX's own ('{message.domain[:60]}')"
        elif isinstance(message, onnx.SparseTensorProto):
            return "sparse weights, which no export makes"
        elif problem := _tensor_problem(message, weights, size):
            return problem
    return ""


def absurd(model: "onnx.ModelProto") -> str:
    """A size that no tensor of a server has, among those stated and those that follow from them, ""
    if there is none.

    Raises what onnx raises for graphs whose shapes contradict one another.
    """
    import onnx

    # first those stated: what follows from them could fill the memory
    if problem := _large_shape(model.graph):
        return problem
    try:
        with _bounded_memory():
            inferred = onnx.shape_inference.infer_shapes(
                _without_weights(model), check_type=True, strict_mode=True, data_prop=True
            )
            return _large_shape(inferred.graph)
    except MemoryError:
        return f"shapes that take more than {_MOST_MEMORY >> 30} GiB to follow"


def _large_shape(graph: "onnx.GraphProto") -> str:
    """A shape that is too large or negative, "" if there is none."""
    for name, shape in _shapes(graph):
        values = math.prod(max(1, side) for side in shape[:_MOST_AXES])
        if len(shape) > _MOST_AXES or min(shape, default=0) < 0 or values > _MOST_VALUES:
            return f"'{name[:60]}' of {'x'.join(map(str, shape[:_MOST_AXES]))[:100]} values"
    return ""


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process take only so much more memory: a short graph may have shapes of billions of
    axes, and following them would take all there is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = soft
    with contextlib.suppress(OSError):  # not on every system is this told
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        known = [most for most in (soft, hard) if most != resource.RLIM_INFINITY]
        limit = min(used + _MOST_MEMORY, *known) if known else used + _MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _tensor_problem(tensor: "onnx.TensorProto", weights: str, size: int) -> str:
    """What is wrong with a tensor's sizes and where its values are, "" if nothing is."""
    import onnx

    name, dims = f"'{tensor.name[:60]}'", list(tensor.dims)
    kept = {entry.key: entry.value for entry in tensor.external_data}
    outside = tensor.data_location == onnx.TensorProto.EXTERNAL or kept
    if outside and (kept.get("location") != weights or not size):
        return f"weights in '{kept.get('location', '')[:60]}', which is not its own file"
    values = math.prod(dims)
    if any(not 0 <= side <= _MOST_SIDE for side in dims) or values > _MOST_VALUES:
        return f"weights {name} of {'x'.join(map(str, dims))[:100]} values"
    if tensor.HasField("segment"):
        return f"weights {name} in parts, which no runtime reads"
    if tensor.data_type == onnx.TensorProto.STRING:
        has = len(tensor.string_data)
        return "" if has == values and not outside else f"texts {name}: {has} of {values}"
    bits = _BITS.get(_kind(tensor.data_type))
    if bits is None:
        return f"weights {name} of an unknown type ({tensor.data_type})"
    wanted = -(-values * bits // 8)
    if outside:
        numbers = [kept.get("offset", "0"), kept.get("length", str(wanted))]
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            return f"weights {name} at no place in '{weights}'"
        if any(len(number) > 18 for number in numbers) or sum(map(int, numbers)) > size:
            return f"weights {name} past the end of '{weights}'"
        has = int(numbers[1])
    elif tensor.HasField("raw_data"):
        has = len(tensor.raw_data)
    else:
        # narrow types are one to an int32, or several of four bits
        counts = sum(len(getattr(tensor, field)) for field in _TYPED)
        wanted, has = (-(-values * bits // 8) if bits < 8 else values), counts
    return "" if has == wanted else f"weights {name} hold {has} of {wanted} bytes or values"


def _kind(number: int) -> str:
    """The name of an element type, "" for a number that is none."""
    import onnx

    kinds = onnx.TensorProto.DataType
    return kinds.Name(number) if number in kinds.values() else ""


def _messages(graph: "onnx.GraphProto") -> "Iterator[Message]":
    """Every node and tensor, sparse ones too, of a graph and of the graphs inside its nodes."""
    for inner in _graphs(graph):
        yield from inner.initializer
        yield from inner.sparse_initializer
        for node in inner.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    yield attribute.sparse_tensor
                yield from attribute.sparse_tensors


def _graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """A graph and all those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inside = [attribute.g] if attribute.HasField("g") else []
            for inner in (*inside, *attribute.graphs):
                yield from _graphs(inner)


def _shapes(graph: "onnx.GraphProto") -> Iterator[tuple[str, list[int]]]:
    """Name and sizes of every tensor whose shape a graph, or one inside it, states; 1 for what
    varies.
    """
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info):
            kind = value.type
            while kind.WhichOneof("value") in ("sequence_type", "optional_type"):
                kind = getattr(kind, kind.WhichOneof("value")).elem_type
            if kind.WhichOneof("value") in ("tensor_type", "sparse_tensor_type"):
                shape = getattr(kind, kind.WhichOneof("value")).shape
                yield (
                    value.name,
                    [d.dim_value if d.HasField("dim_value") else 1 for d in shape.dim],
                )


def _without_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy whose large initialisers are empty: shapes do not follow from them."""
    import onnx

    result = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = result.graph
    graph.name = model.graph.name
    for part in ("node", "input", "output", "value_info"):
        getattr(graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= _LIGHT and not tensor.external_data:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return result

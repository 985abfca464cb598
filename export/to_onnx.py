"""From a module to an ONNX file: dynamic axes by name, a known opset, nothing of this machine
inside.
"""

import logging
import signal
import stat
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnxscript.optimizer import fold_constants
from torch import nn
from torch.export import Dim

from contract.detection import WINDOW
from contract.errors import UserError, first_line, out_of_memory
from contract.signature import TEXT_TOKENS, Port, Signature, layer_side
from export.modules import Part
from export.resample import dense_resampling
from export.trace_once import tables_kept, uncollected
from export.traceable import traceable

OPSET = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}
"""By precision. 20 is read by every runtime; from 23 on attention is one node, which TensorRT-RTX
refuses in float32; before 22 ONNX has no convolution in bf16.
"""

_FOLDED = 64
"""Without the exporter's optimizations, constants up to this many bytes are computed at export:
axes, which TensorRT needs as numbers, but not weights.
"""

_LONGEST = 15 * 60
"""Seconds of CPU time that tracing one graph may take. The largest networks need two minutes;
symbolic sizes that every layer rounds once more have no end.
"""

_AGAIN = 10
"""Seconds of CPU time until tracing that goes on is stopped once more: Python drops an exception
raised in a `__del__` or in a callback from C.
"""

INLINE_LIMIT = 1_800_000_000
"""Bytes of weights up to which they lie inside the file; protobuf's limit is 2 GiB."""

log = logging.getLogger(__name__)


class _Overtime(BaseException):
    """Tracing took too long. Not an Exception: torch.export answers these with another attempt."""


@contextmanager
def _bounded(graph: str) -> Iterator[None]:
    """Raise UserError once tracing `graph` has taken `_LONGEST` seconds; without effect outside the
    main thread, where there are no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Overtime

    # of CPU time, unlike an alarm: a busy machine does not shorten it
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _LONGEST, _AGAIN)
    try:
        yield
    except _Overtime:
        raise UserError(
            f"graph '{graph}': torch has traced it for {_LONGEST / 60:g} minutes and is not done: "
            "export one size (a single --resolutions), which has no symbolic sizes"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _example(port: Port, sizes: dict[str, int]) -> torch.Tensor:
    """An input for tracing, with `sizes` for axes that vary."""
    shape = [axis if isinstance(axis, int) else sizes[axis] for axis in port.axes]
    if port.dtype == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8)
    if port.dtype == "int64":
        return torch.randint(2, shape)
    if port.dtype == "bool":
        return torch.ones(shape, dtype=torch.bool)
    return torch.randn(shape)


def _dynamic_axes(
    signature: Signature, stride: int, max_batch: int
) -> tuple[dict[int, object], ...]:
    """torch.export's dynamic shapes of every input; one `Dim` per axis name."""
    dims: dict[str, object] = {
        # no upper bound below the number of examples; a batch of one is an ordinary one
        "batch": Dim("batch", min=1, max=max(2, max_batch)),
        "rows": Dim("rows", min=2, max=1024),
        "columns": Dim("columns", min=2, max=1024),
        "tokens": Dim("tokens", min=2, max=1 << 20),
        TEXT_TOKENS: Dim(TEXT_TOKENS, min=4, max=WINDOW),
    }
    # multiples of the stride: the rest of other sides would be dropped silently
    dims["height"], dims["width"] = stride * dims["rows"], stride * dims["columns"]
    for axis in _map_axes(signature, dims):
        side, _, pixels = axis.partition("_")
        # torch.export has no rounding up; the graph's own input says how large such a map is
        known = stride % int(pixels) == 0
        dims[axis] = stride // int(pixels) * dims[side] if known else Dim(axis, min=1, max=4096)
    return tuple(
        {place: dims[axis] for place, axis in enumerate(port.axes) if isinstance(axis, str)}
        for port in signature.inputs
    )


def _map_axes(signature: Signature, known: Collection[str]) -> list[str]:
    """The inputs' axes that are not `known`: those of maps of other strides than the student's."""
    names = {axis for port in signature.inputs for axis in port.axes if isinstance(axis, str)}
    return sorted(names - set(known))


def _trace(part: Part, stride: int, max_batch: int, opset: int, optimize: bool) -> onnx.ModelProto:
    """Trace a part with torch.export and translate it, with the exporter's optimizations or, if not
    `optimize`, constants folded alone; raises UserError where torch cannot.
    """
    signature = part.signature
    # two pictures, not square: the exporter could take a batch or side of 1, or equal sides, as
    # constants
    sizes = {"batch": 2, "rows": 6, "columns": 4, "height": 6 * stride, "width": 4 * stride}
    prefix = getattr(part.module, "prefix", 0)
    sizes["tokens"], sizes[TEXT_TOKENS] = 24 + prefix, 10
    for axis in _map_axes(signature, sizes):
        sizes[axis] = layer_side(axis, sizes["rows"], sizes["columns"], stride)
    arguments = tuple(_example(port, sizes) for port in signature.inputs)
    axes = _dynamic_axes(signature, stride, max_batch)
    # for torch.export, modules that take *inputs have one argument, a tuple
    shapes = (axes,) if _has_star(part.module) else axes
    log.info("tracing   %s", signature.graph)
    with (
        _bounded(signature.graph),
        dense_resampling(),
        traceable(),
        tables_kept(),
        uncollected(),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        try:
            program = torch.onnx.export(
                part.module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=optimize,
                input_names=[port.name for port in signature.inputs],
                output_names=[port.name for port in signature.outputs],
            )
        # the exporter has a dozen error types of its own, none of them public
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UserError(
                f"graph '{signature.graph}' cannot be exported ({_reason(error)}): this "
                "architecture is not supported"
            ) from error
    if not optimize:
        fold_constants(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    return program.model_proto


def _reason(error: BaseException) -> str:
    """The first line of what an error comes from: torch's own says how to report it."""
    while error.__cause__:
        error = error.__cause__
    return first_line(error)


def _has_star(module: nn.Module) -> bool:
    return module.forward.__code__.co_flags & 0x04 != 0


def clean(model: onnx.ModelProto, about: dict[str, str]) -> onnx.ModelProto:
    """Remove stack traces and local paths, and add metadata.

    Reshapes lose `allowzero`, which matters to empty tensors alone and keeps equal nodes from being
    found equal.
    """
    del model.metadata_props[:]
    model.doc_string = ""
    for graph in graphs(model):
        graph.doc_string = ""
        for items in (graph.node, graph.initializer, graph.value_info, graph.input, graph.output):
            for item in items:
                item.doc_string = ""
                if hasattr(item, "metadata_props"):
                    del item.metadata_props[:]
        for node in graph.node:
            if node.op_type == "Reshape":
                del node.attribute[:]  # it has no other
        del graph.metadata_props[:]
    for key, value in sorted(about.items()):
        model.metadata_props.add(key=key, value=value)
    return model


def graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The main graph and every subgraph or function body that holds nodes."""
    result = [model.graph]
    for graph in result:
        for node in graph.node:
            result += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return result + list(model.functions)  # type: ignore[operator] - functions have nodes too


def _unmade(model: onnx.ModelProto) -> set[str]:
    """Tensors that nodes read and nothing makes."""
    read, made = {""}, {""}
    for graph in graphs(model):
        for node in graph.node:
            read.update(node.input)
            made.update(node.output)
        made.update(value if isinstance(value, str) else value.name for value in graph.input)
        if isinstance(graph, onnx.GraphProto):
            made.update(tensor.name for tensor in graph.initializer)
            made.update(tensor.values.name for tensor in graph.sparse_initializer)
    return read - made


def _name_axes(model: onnx.ModelProto, signature: Signature) -> None:
    # torch calls varying axes s39*s94 and the like
    for values, ports in (
        (model.graph.input, signature.inputs),
        (model.graph.output, signature.outputs),
    ):
        for value, port in zip(values, ports, strict=True):
            for dim, axis in zip(value.type.tensor_type.shape.dim, port.axes, strict=True):
                if isinstance(axis, str):
                    dim.ClearField("dim_value")
                    dim.dim_param = axis
                else:
                    dim.ClearField("dim_param")
                    dim.dim_value = axis


def check(model: onnx.ModelProto, path: Path, signature: Signature, wanted: int) -> None:
    """Raise UserError unless the file at `path` is a valid graph of this signature and opset."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset != wanted:  # torch only warns when it falls back to another opset
        raise UserError(
            f"graph '{signature.graph}': torch exported opset {opset}, but {wanted} was requested: "
            "install newer torch and onnxscript (constraints.txt lists versions that work)"
        )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(
            f"graph '{signature.graph}' is not valid ONNX ({first_line(error)})"
        ) from error
    resized = [
        n.name
        for n in model.graph.node
        if n.op_type == "Resize" and any(a.name == "antialias" and a.i for a in n.attribute)
    ]
    if resized:
        raise UserError(
            f"graph '{signature.graph}' holds an antialiased Resize ({resized[0]}), which TensorRT "
            "refuses"
        )
    if any(n.op_type == "GridSample" for part in graphs(model) for n in part.node):
        raise UserError(
            f"graph '{signature.graph}' holds a GridSample, which TensorRT computes wrongly in "
            "attention"
        )
    for got, ports, kind in (
        (model.graph.input, signature.inputs, "input"),
        (model.graph.output, signature.outputs, "output"),
    ):
        names = [value.name for value in got]
        if names != [port.name for port in ports]:
            raise UserError(
                f"graph '{signature.graph}' has {kind}s {names}, its signature has "
                f"{[port.name for port in ports]}"
            )


def save(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write a graph, its weights beside it (`NAME.onnx.data`) past 2 GB; returns the files."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= INLINE_LIMIT:
        onnx.save(model, path)
        return [path]
    data = path.with_name(path.name + ".data")
    onnx.save(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name
    )
    data.chmod(stat.S_IMODE(path.stat().st_mode))  # onnx makes it readable by its owner only
    return [path, data]


def export_part(
    part: Part,
    stride: int,
    max_batch: int,
    path: Path,
    about: dict[str, str],
    opset: int = OPSET["fp32"],
) -> list[Path]:
    """Trace, clean, name, write and check one graph; returns its files."""
    # folding batch norms into convolutions makes float32 weights of bf16 ones
    model = _trace(part, stride, max_batch, opset, optimize=opset != OPSET["bf16"])
    if _unmade(model):  # onnxscript 0.7 loses the bounds of some Clips that follow one another
        model = _trace(part, stride, max_batch, opset, optimize=False)
    clean(model, about)
    _name_axes(model, part.signature)
    files = save(model, path)
    check(model, path, part.signature, opset)
    return files

"""The graph `fused`: the others in their chain, composed to one."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import cast_cast_rule, no_op_cast_rule

from contract.signature import FUSED, Signature
from export.modules import Part
from export.to_onnx import check, clean, save

_SIMPLER = ir.passes.Sequential(
    # a task on a teacher's output holds that teacher's head too
    CommonSubexpressionEliminationPass(),
    # what only other graphs read of the backbone
    RemoveUnusedNodesPass(),
    ShapeInferencePass(),
    # between graphs values are float32, whatever the precision inside them
    RewritePass([cast_cast_rule, no_op_cast_rule]),
)


def write_fused(
    parts: Sequence[Part], paths: dict[str, Path], about: dict[str, str], opset: int
) -> list[Path]:
    """Compose `fused`, with metadata `about`, of the other graphs at their `paths`, so that it
    computes exactly what they compute; returns its files.

    (Tracing everything once more would take as long as all the others together.)
    """
    own = [part for part in parts if part.signature.graph != FUSED]
    (whole,) = (part.signature for part in parts if part.signature.graph == FUSED)
    models = {part.signature.graph: onnx.load(paths[part.signature.graph]) for part in own}
    model = ir.to_proto(_SIMPLER(ir.from_proto(compose(whole, own, models))).model)
    model = clean(model, about)
    files = save(model, paths[FUSED])
    check(model, paths[FUSED], whole, opset)
    return files


def compose(
    signature: Signature, parts: Sequence[Part], models: dict[str, onnx.ModelProto]
) -> onnx.ModelProto:
    """The graph of a `signature`, composed of the graphs of `parts` in their order.

    Inputs and outputs keep their names, everything inside is called `<graph>/<name>`. Weights that
    several graphs hold are kept once.
    """
    first = models[parts[0].signature.graph]
    whole = onnx.ModelProto(ir_version=first.ir_version, opset_import=first.opset_import)
    whole.graph.name = signature.graph
    values, held, kept = {}, {}, set()
    for part in parts:
        label, graph = part.signature.graph, onnx.GraphProto()
        graph.CopyFrom(models[label].graph)
        ports = {value.name: value for value in (*graph.input, *graph.output)}
        same = {}
        for tensor in graph.initializer:
            data = tensor.raw_data if len(tensor.raw_data) >= 64 else _content(tensor)
            key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(data).digest())
            same[tensor.name] = held.setdefault(key, f"{label}/{tensor.name}")
        _rename(
            graph,
            lambda name, p=ports, s=same, g=label: (
                name if name in p or not name else s.get(name, f"{g}/{name}")
            ),
        )
        for tensor in graph.initializer:
            if tensor.name not in kept:
                kept.add(tensor.name)
                whole.graph.initializer.append(tensor)
        whole.graph.node.extend(graph.node)
        values |= ports
    whole.graph.input.extend(values[port.name] for port in signature.inputs)
    whole.graph.output.extend(values[port.name] for port in signature.outputs)
    return whole


def _content(tensor: onnx.TensorProto) -> bytes:
    """What a small tensor holds, in whichever field, without its name."""
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    bare.ClearField("name")
    return bare.SerializeToString(deterministic=True)


def _rename(graph: onnx.GraphProto, name: Callable[[str], str]) -> None:
    """Rename every tensor and node of a graph; subgraphs (If, Loop) do not occur here."""
    for node in graph.node:
        node.name = name(node.name)
        node.input[:] = [name(value) for value in node.input]
        node.output[:] = [name(value) for value in node.output]
    for tensor in graph.initializer:
        tensor.name = name(tensor.name)

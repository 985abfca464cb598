"""What the model of one graph takes from a bundle: its files, its engine, and the sizes of its
inputs.
"""

import json
import re

from contract.detection import WINDOW
from contract.errors import UserError
from contract.manifest import GraphRecord
from contract.signature import TEXT_TOKENS, layer_side
from serve.bundle import Bundle, BundleFile


def usual_sizes(bundle: Bundle) -> dict[str, int]:
    """The axes that vary, at the largest size the bundle was checked at."""
    resolution = bundle.manifest.resolution
    rows, columns = resolution.height // resolution.stride, resolution.width // resolution.stride
    # `tokens` may count a class position too; warm-up only needs a size that runs
    result = {
        "height": resolution.height,
        "width": resolution.width,
        "rows": rows,
        "columns": columns,
        "positions": rows * columns,
        "tokens": rows * columns + 1,
        TEXT_TOKENS: WINDOW,
    }
    detector = bundle.manifest.detector
    graphs = (*bundle.parts, *(detector.graphs if detector else ()))
    axes = {axis for graph in graphs for tensor in graph.inputs for axis in tensor.shape[1:]}
    for axis in axes - set(result):
        if isinstance(axis, str):
            # `rows_4` is a row every 4 pixels
            if not re.fullmatch(r"(rows|columns)_[1-9]\d{0,4}", axis):
                raise UserError(
                    f"{bundle.path}: '{axis}' is not the name of a size that varies: export again"
                )
            result[axis] = layer_side(axis, rows, columns, resolution.stride)
    return result


def graph_files(bundle: Bundle, graph: GraphRecord) -> dict[str, str]:
    """Names in the bundle of a graph's files, by those in a repository: its weights may be in a
    file of their own.
    """
    weights = f"{graph.file}.data"
    return {"model.onnx": graph.file} | (
        {weights: weights} if weights in bundle.manifest.files else {}
    )


def weight(bundle: Bundle, graph: GraphRecord) -> int:
    """Bytes of a graph."""
    return sum((bundle.path / name).stat().st_size for name in graph_files(bundle, graph).values())


def graph_json(bundle: Bundle, graph: GraphRecord) -> bytes:
    """model.json: what the python model must know of its graph."""
    sizes = usual_sizes(bundle)
    facts = {
        "sha256": {
            name: bundle.manifest.files[listed]
            for name, listed in graph_files(bundle, graph).items()
        },
        "bundle": bundle.version,
        "student": bundle.manifest.student.sha256,
        "inputs": [tensor.name for tensor in graph.inputs],
        "outputs": [tensor.name for tensor in graph.outputs],
        "largest": [
            [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1:]]
            for tensor in graph.inputs
        ],
        **bundle.manifest.resolution.limits,
    }
    return json.dumps(facts, indent=1).encode()


def engine_of(bundle: Bundle, graph: GraphRecord) -> BundleFile:
    """The engine of full TensorRT for a graph; UserError if there is none, or only
    TensorRT-RTX's.
    """
    flavours = {
        engine.flavour: engine for engine in bundle.manifest.engines if engine.graph == graph.name
    }
    if "tensorrt" not in flavours:
        has = (
            f" (only of {', '.join(sorted(flavours))}, which Triton cannot load)"
            if flavours
            else ""
        )
        raise UserError(
            f"{bundle.path}: no engine of full TensorRT for '{graph.name}'{has}: export with "
            "--formats onnx,tensorrt on the GPU that serves, or choose --backend python or "
            "onnxruntime"
        )
    return bundle.part(flavours["tensorrt"].file)

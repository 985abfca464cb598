"""What the model of one graph takes from a bundle: its files, its engine, and the sizes of its
inputs.
"""

import json

from contract.detection import WINDOW
from contract.errors import UserError
from contract.manifest import BundledEngine, GraphRecord
from contract.signature import INTERACTION, SPACES, TEXT_TOKENS, layer_side
from serve.bundle import Bundle

CLASS_TOKENS = "class_tokens"
"""Fact of the interaction: how many of its `tokens` are no positions of the map."""
_MOST_CLASS_TOKENS = 64
"""Registers included: far more than any student has."""


def usual_sizes(bundle: Bundle) -> dict[str, int]:
    """The axes that vary, at the largest size the bundle was checked at."""
    return sizes_at(bundle, bundle.manifest.resolution.height, bundle.manifest.resolution.width)


def sizes_at(bundle: Bundle, height: int, width: int) -> dict[str, int]:
    """The axes that vary, for pictures of a size."""
    resolution, detector = bundle.manifest.resolution, bundle.manifest.detector
    graphs = (*bundle.parts, *(detector.graphs if detector else ()))
    rows, columns = height // resolution.stride, width // resolution.stride
    result = {
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
        "positions": rows * columns,
        "tokens": rows * columns + _class_tokens(bundle),
        TEXT_TOKENS: WINDOW,
    }
    axes = {axis for graph in graphs for tensor in graph.inputs for axis in tensor.shape[1:]}
    for axis in axes - set(result):
        if isinstance(axis, str):  # `rows_4` is a row every 4 pixels
            result[axis] = layer_side(axis, rows, columns, resolution.stride)
    return result


def _class_tokens(bundle: Bundle) -> int:
    """Tokens of a student beside those of its map. An engine's profile ends at the last of them."""
    interaction = bundle.graphs.get(INTERACTION)
    if interaction and CLASS_TOKENS in interaction.about:
        told = interaction.about[CLASS_TOKENS]
        if type(told) is not int or not 0 <= told <= _MOST_CLASS_TOKENS:
            raise UserError(
                f"{bundle.path}: its interaction has {told!r:.40} class tokens, 0 to "
                f"{_MOST_CLASS_TOKENS} are possible: export again"
            )
        return told
    # bundles of before do not say, but their engines do; graphs take one more without harm
    resolution = bundle.manifest.resolution
    positions = (resolution.height // resolution.stride) * (resolution.width // resolution.stride)
    shapes = [
        profile.shapes[SPACES].max
        for engine in bundle.manifest.engines
        for profile in engine.profiles
        if SPACES in profile.shapes
    ]
    told = shapes[0][1] - positions if shapes and len(shapes[0]) > 1 else 1
    return told if 0 <= told <= _MOST_CLASS_TOKENS else 1


def graph_files(bundle: Bundle, graph: GraphRecord, name: str = "model.onnx") -> dict[str, str]:
    """Names in the bundle of a graph's files, by those in a repository, where the graph is called
    `name`: its weights may be in a file of their own.
    """
    weights = f"{graph.file}.data"
    return {name: graph.file} | ({weights: weights} if weights in bundle.manifest.files else {})


def weight(bundle: Bundle, graph: GraphRecord) -> int:
    """Bytes of a graph."""
    return sum((bundle.path / name).stat().st_size for name in graph_files(bundle, graph).values())


def graph_json(
    bundle: Bundle,
    graph: GraphRecord,
    options: dict[str, str] | None = None,
    runtime: str = "",
) -> bytes:
    """model.json: what the python model must know of its graph; `options` are those of
    onnxruntime's TensorRT provider, `runtime` is "" where the configuration alone has it.
    """
    facts = {
        **graph_facts(bundle, graph_files(bundle, graph), graph),
        "inputs": [tensor.name for tensor in graph.inputs],
        "outputs": [tensor.name for tensor in graph.outputs],
        **({"provider_options": options} if options else {}),
        **({"runtime": runtime} if runtime else {}),
    }
    return json.dumps(facts, indent=1).encode()


def graph_facts(bundle: Bundle, files: dict[str, str], first: GraphRecord) -> dict:
    """What every model of graphs knows; `files` are its own by their names there, `first` is the
    graph that reads its inputs.
    """
    sizes = usual_sizes(bundle)
    return {
        "sha256": {name: bundle.manifest.files[listed] for name, listed in files.items()},
        "bundle": bundle.version,
        "student": bundle.manifest.student.sha256,
        "largest": [
            [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1:]]
            for tensor in first.inputs
        ],
        **bundle.manifest.resolution.limits,
    }


def engine_of(bundle: Bundle, graph: GraphRecord) -> BundledEngine:
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
    return flavours["tensorrt"]

"""The models of zero-shot detection: a bundle's detector as two graphs, and the model that takes
pictures and labels.
"""

import json

from tritonclient.grpc.model_config_pb2 import ModelConfig

from contract.errors import UserError
from contract.manifest import DetectorRecord, GraphRecord
from contract.signature import BACKBONE, DETECTOR
from serve.bundle import Bundle
from serve.repository.graph_files import graph_files, graph_json
from serve.repository.model_config import (
    CALLING_CODE,
    CONTRACT,
    GRAPH_CODE,
    TEMPLATES,
    add_tensor,
    bound_queue,
    keep_batches,
    place,
    place_on_cpu,
    read_template,
    tune_batching,
)
from serve.repository.settings import Settings

_VOCABULARY = "vocab.txt"
"""In the repository, whatever the bundle calls it."""

DETECTION = "detection"
"""Triton's name of the model that clients ask."""


def detection_parts(bundle: Bundle, settings: Settings) -> list[tuple]:
    """Configurations and files of `text_detector`, `detector` and `detection`; none where the
    bundle has no detector.

    Raises UserError for a detector that reads what the bundle does not give.
    """
    detector = bundle.manifest.detector
    if detector is None:
        return []
    outputs = {tensor.name for tensor in bundle.outputs}
    if missing := [name for name in detector.maps if name not in outputs]:
        raise UserError(
            f"{bundle.path}: its detector reads '{missing[0]}', which no head gives: export again"
        )
    graphs = [_graph(bundle, graph, settings) for graph in detector.graphs]
    return [*graphs, _detection(bundle, detector, settings)]


def _graph(bundle: Bundle, graph: GraphRecord, settings: Settings) -> tuple:
    """One of the detector's graphs, in the python backend and in onnxruntime whatever the others
    run in.
    """
    config = read_template(graph.name)
    for tensor in graph.inputs:
        add_tensor(config.input, tensor)
    for tensor in graph.outputs:
        add_tensor(config.output, tensor)
    keep_batches(config)
    config.parameters["threads"].string_value = str(settings.threads)
    if settings.backend == "python":
        place(config, settings, 1)  # its environment has CUDA's onnxruntime, or no graph would load
    else:
        place_on_cpu(config)  # NVIDIA's image gets the CPU's onnxruntime alone
    # once for each list of labels, whose text features are kept: no request waits for others there
    tune_batching(config, settings, delayed=graph.name == DETECTOR)
    files = {name: bundle.part(listed) for name, listed in graph_files(bundle, graph).items()}
    code = {
        "model.py": TEMPLATES / graph.name / "1" / "model.py",
        **GRAPH_CODE,
        "model.json": graph_json(bundle, graph),
    }
    return config, files | code


def _detection(
    bundle: Bundle, detector: DetectorRecord, settings: Settings
) -> tuple[ModelConfig, dict]:
    """The model that takes pictures and labels."""
    config = read_template(DETECTION)
    add_tensor(config.input, bundle.graphs[BACKBONE].inputs[0])
    config.input[-1].dims.insert(0, -1)  # the batch: written out where Triton does not batch
    bound_queue(config, settings)
    resolution = bundle.manifest.resolution
    about = {
        "sha256": bundle.manifest.files[detector.vocabulary],
        "maps": detector.maps,
        "max_batch": settings.max_batch or bundle.manifest.max_batch,
        **resolution.limits,
    }
    # `features` answers in the version that serves, the detector is of this one's: of two bundles
    # with detectors that differ, one would read the other's maps for a moment
    answer = {
        "teacher": detector.teacher,
        "detector": detector.sha256,
        "height": resolution.height,
        "width": resolution.width,
    }
    config.parameters["about"].string_value = json.dumps(answer)
    files = {
        "model.py": TEMPLATES / DETECTION / "1" / "model.py",
        "detection.py": CONTRACT / "detection.py",
        **CALLING_CODE,
        _VOCABULARY: bundle.part(detector.vocabulary),
        "detection.json": json.dumps(about).encode(),
    }
    return config, files

"""The models of a student whose graphs are together in one process, `features`: that, and those
that call it.
"""

import json

from contract.signature import BACKBONE
from contract.tasks import TASKS, Task
from serve.bundle import Bundle
from serve.repository.about import about_bundle, cell_of, facts_digest, tell_facts
from serve.repository.golden import golden_file
from serve.repository.graph_files import graph_facts, graph_files, usual_sizes
from serve.repository.model_config import (
    CALLING_CODE,
    CONTRACT,
    GRAPH_CODE,
    TEMPLATES,
    TYPES,
    Model,
    add_port,
    add_tensor,
    keep_batches,
    place,
    read_template,
    tune_batching,
    warm_up,
)
from serve.repository.settings import Settings

_STUDENT, _ENCODED, _TASK = "student", "student_encoded", "student_task"
"""Folders of triton_models/."""


def student_model(bundle: Bundle, settings: Settings) -> Model:
    """`features`: every graph but `fused`, of which a batch runs those that it needs."""
    config = read_template(_STUDENT)
    config.name = "features"
    image = bundle.graphs[BACKBONE].inputs[0]
    add_tensor(config.input, image)
    for tensor in bundle.outputs:
        add_tensor(config.output, tensor)
    place(config, settings, settings.instances)
    tune_batching(config, settings, delayed=True)
    if settings.warmup:
        warm_up(config, [image], usual_sizes(bundle))
    else:
        config.ClearField("model_warmup")
    keep_batches(config)
    config.parameters["runtime"].string_value = bundle.manifest.runtime(settings.runtime)
    config.parameters["threads"].string_value = str(settings.threads)
    config.parameters["about"].string_value = json.dumps(about_bundle(bundle))
    listed: dict[str, str] = {}
    for graph in bundle.parts:
        listed |= graph_files(bundle, graph, _file(graph.name))
    facts = graph_facts(bundle, listed, bundle.graphs[BACKBONE]) | {
        "view": bundle.manifest.view,
        "parts": [
            {
                "name": graph.name,
                "file": _file(graph.name),
                "inputs": [tensor.name for tensor in graph.inputs],
                "outputs": [tensor.name for tensor in graph.outputs],
            }
            | ({"facts": facts_digest(bundle, TASKS[graph.name])} if graph.name in TASKS else {})
            for graph in bundle.parts
        ],
    }
    files = {name: bundle.part(source) for name, source in listed.items()}
    code = {
        "model.py": TEMPLATES / _STUDENT / "1" / "model.py",
        **GRAPH_CODE,
        "model.json": json.dumps(facts, indent=1).encode(),
    }
    return Model(config, files | code | golden_file(bundle), pinned=True)


def _file(graph: str) -> str:
    """Name of a graph's file in the repository."""
    return f"{graph}.onnx"


_DECODED_AT_ONCE = 64
"""Requests of encoded pictures in hand, at most: each may hold a batch of large files."""


def encoded_model(bundle: Bundle, settings: Settings) -> Model:
    """`features_encoded`: bytes of pictures in, the outputs of `features` out."""
    config = read_template(_ENCODED)
    config.name = "features_encoded"
    most = min(_DECODED_AT_ONCE, settings.max_queue)
    config.parameters["max_queue"].string_value = str(most)
    add_port(config.input, "encoded", "TYPE_STRING", [1])
    for tensor in bundle.outputs:
        add_tensor(config.output, tensor)
    config.parameters["about"].string_value = json.dumps(about_bundle(bundle))
    files = {
        "model.py": TEMPLATES / _ENCODED / "1" / "model.py",
        **CALLING_CODE,
        "model.json": json.dumps({"view": bundle.manifest.view}).encode(),
    }
    return Model(config, files, pinned=True)


def task_model(bundle: Bundle, task: Task, settings: Settings) -> Model:
    """A picture in, a map of its size out, made of a head's output."""
    config = read_template(_TASK)
    config.name = task.name
    add_tensor(config.input, bundle.graphs[BACKBONE].inputs[0])
    add_port(config.output, task.map.name, TYPES[task.map.dtype], (-1, -1, *task.map.axes))
    tell_facts(config, bundle, task)
    config.parameters["max_queue"].string_value = str(settings.max_queue)
    about = {
        "bundle": bundle.version,
        "task": task.name,
        "facts": facts_digest(bundle, task),
        "output": task.output,
        "function": task.map.function,
        "cell": cell_of(bundle, task),
        "max_batch": settings.max_batch or bundle.manifest.max_batch,
        **bundle.manifest.resolution.limits,
    }
    files = {
        "model.py": TEMPLATES / _TASK / "1" / "model.py",
        **CALLING_CODE,
        "dense.py": CONTRACT / "dense.py",
        "model.json": json.dumps(about, indent=1).encode(),
    }
    return Model(config, files, pinned=True)

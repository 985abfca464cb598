"""From a bundle to Triton's model configurations: which models there are, and how the ensembles
join them.

Names, types and dims come from the manifest; everything else from the templates in triton_models/,
which are valid configurations themselves
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto).
"""

import json
from collections.abc import Sequence, Set

from tritonclient.grpc.model_config_pb2 import ModelConfig

from contract.errors import UserError
from contract.manifest import GraphRecord
from contract.signature import BACKBONE, FUSED, IDENTITY, IMAGE
from contract.tasks import TASKS, Task, map_tasks
from serve.bundle import Bundle
from serve.repository.about import about_bundle, cell_of, tell_facts
from serve.repository.detection import detection_parts
from serve.repository.golden import golden_file
from serve.repository.graph_files import graph_files, graph_json, usual_sizes, weight
from serve.repository.model_config import (
    CONTRACT,
    GRAPH_CODE,
    TEMPLATES,
    TYPES,
    Model,
    add_port,
    add_rows,
    add_tensor,
    bound_queue,
    give_identity,
    join,
    keep_batches,
    keep_latest,
    pin,
    place,
    place_on_cpu,
    queue_size,
    read_identity,
    read_template,
    step,
    tune_batching,
    warm_up,
)
from serve.repository.native import (
    NATIVE,
    capture_graphs,
    check_native,
    guarded,
    native_graph,
    provider_options,
)
from serve.repository.settings import Settings
from serve.repository.student import encoded_model, student_model, task_model
from serve.repository.zero_shot import zero_shot_parts

_UNBATCHED = "unbatched"
"""Parameter of models that take no batches, read by the lint."""
_LARGE = 0.25
"""Graphs of at least this part of the backbone's bytes get as many instances and threads as that:
UMT's interaction is one.
"""


def served_name(graph: str) -> str:
    """Triton's name of a graph: that of a task goes to the model that takes pictures, its head is
    TASK_head.
    """
    return f"{graph}_head" if graph in TASKS else graph


def _template_of(graph: str) -> str:
    """The folder of triton_models/ a graph is rendered from."""
    if graph in TASKS:
        return "task_head"
    return "head" if graph.startswith("head_") else graph


def build_models(bundle: Bundle, settings: Settings) -> list[Model]:
    """Every model of a repository, in an order in which each follows those it is made of.

    Raises UserError for files that do not match their hashes or hold another graph than the
    manifest says, missing engines, unchecked batch sizes.
    """
    most = settings.max_batch or bundle.manifest.max_batch
    if most > bundle.manifest.max_batch:
        raise UserError(
            f"--max-batch {most}: the bundle was checked up to {bundle.manifest.max_batch} (export "
            f"with --max-batch {most})"
        )
    if bundle.problem:
        raise UserError(
            f"{bundle.path} is not what its manifest says: {bundle.problem[:500]} (export again, "
            "or get it from where it was exported)"
        )
    check_native(bundle, settings)
    models = student(bundle, settings) if settings.together else ensembles(bundle, settings)
    if settings.fused and FUSED in bundle.graphs:
        models.append(graph_model(bundle, bundle.graphs[FUSED], settings))
    further = [*zero_shot_parts(bundle, settings), *detection_parts(bundle, settings)]
    models += [Model(config, files) for config, files in further]
    if settings.backend in NATIVE:
        models = guarded(bundle, models, settings)
    for model in models:
        if _UNBATCHED not in model.config.parameters:
            model.config.max_batch_size = most
        if model.config.backend == "tensorrt":
            capture_graphs(model.config)
        if model.pinned:
            pin(model.config, settings.version)
        else:
            keep_latest(model.config)
        if model.name in settings.response_cache:
            model.config.response_cache.enable = True
    unknown = sorted(set(settings.response_cache) - {model.name for model in models})
    if unknown:
        names = ", ".join(model.name for model in models)
        raise UserError(f"--response-cache {unknown[0]}: no such model (choose from {names})")
    return models


def ensembles(bundle: Bundle, settings: Settings) -> list[Model]:
    """A model for each graph but `fused`, and the ensembles that join them."""
    models = [graph_model(bundle, graph, settings) for graph in bundle.parts]
    models.append(features(bundle, settings, encoded=False))
    if _is_encoded(bundle, settings):
        models += [decoder(bundle, settings), features(bundle, settings, encoded=True)]
    for task in map_tasks():
        if task.name in bundle.graphs:
            models += [_map_model(bundle, task, settings), _task_ensemble(bundle, task, settings)]
    return models


def _is_encoded(bundle: Bundle, settings: Settings) -> bool:
    """Whether encoded pictures are answered too: not where a picture has several views."""
    return settings.encoded and bundle.manifest.policy.kind != "tiles"


def student(bundle: Bundle, settings: Settings) -> list[Model]:
    """The model that holds all graphs but `fused`, and those that call it."""
    models = [student_model(bundle, settings)]
    if _is_encoded(bundle, settings):
        models += [decoder(bundle, settings), encoded_model(bundle, settings)]
    tasks = [task for task in map_tasks() if task.name in bundle.graphs]
    return models + [task_model(bundle, task, settings) for task in tasks]


def graph_model(bundle: Bundle, graph: GraphRecord, settings: Settings) -> Model:
    """One graph: in the python backend with its code, or in a native backend of Triton."""
    folder = _template_of(graph.name)
    config = read_template(folder)
    config.name = served_name(graph.name)
    for tensor in graph.inputs:
        add_tensor(config.input, tensor)
    for tensor in graph.outputs:
        add_tensor(config.output, tensor)
    files = {name: bundle.part(listed) for name, listed in graph_files(bundle, graph).items()}
    large = weight(bundle, graph) >= _LARGE * weight(bundle, bundle.graphs[BACKBONE])
    threads = str(settings.threads if large else 1)
    place(config, settings, settings.instances if large else 1)
    first = graph.name in (BACKBONE, FUSED)
    # in native backends `guard` comes before them
    later = settings.backend in NATIVE or not first
    tune_batching(config, settings, later=later, delayed=first)
    if settings.warmup:
        warm_up(config, graph.inputs, usual_sizes(bundle))
    else:
        config.ClearField("model_warmup")
    if settings.backend == "python":
        if graph.name == BACKBONE:
            give_identity(config)
        elif graph.name != FUSED:
            read_identity(config)
        keep_batches(config)
        runtime = bundle.manifest.runtime(settings.runtime)
        config.parameters["runtime"].string_value = runtime
        config.parameters["threads"].string_value = threads
        code = {
            "model.py": TEMPLATES / folder / "1" / "model.py",
            **GRAPH_CODE,
            "model.json": graph_json(
                bundle, graph, _provider_options(bundle, graph, settings), runtime
            ),
        }
        return Model(config, files | code)
    config.backend = settings.backend
    return Model(*native_graph(bundle, graph, config, files, threads))


def _provider_options(
    bundle: Bundle, graph: GraphRecord, settings: Settings
) -> dict[str, str] | None:
    """What model.json tells the runtime beyond its name."""
    if settings.runtime != "tensorrt":
        return None
    return provider_options(bundle, graph, settings.max_batch or bundle.manifest.max_batch)


def features(bundle: Bundle, settings: Settings, encoded: bool) -> Model:
    """The front door: an ensemble of all parts, of which Triton runs those that the requested
    outputs need.
    """
    # An ensemble rather than a Python model that calls the others: Triton leaves out the steps
    # whose outputs are not needed, batches every step over requests, and runs steps side by side.
    config = read_template("features_encoded" if encoded else "features")
    if encoded:
        add_port(config.input, "encoded", "TYPE_STRING", [1])
        step(config, "decode", settings.version, {"encoded": "encoded"}, {IMAGE: IMAGE})
    else:
        add_tensor(config.input, bundle.graphs[BACKBONE].inputs[0])
    for tensor in bundle.outputs:
        add_tensor(config.output, tensor)
    _join_all(config, bundle.parts, {tensor.name for tensor in bundle.outputs}, settings)
    config.parameters["about"].string_value = json.dumps(about_bundle(bundle))
    return Model(config, {} if encoded else golden_file(bundle), pinned=True)


def _task_ensemble(bundle: Bundle, task: Task, settings: Settings) -> Model:
    """A picture in, a map of its size out: what the task's head needs, the head, the map."""
    values, answer = task.output, task.map.name
    config = read_template("task")
    config.name = task.name
    add_tensor(config.input, bundle.graphs[BACKBONE].inputs[0])
    _add_map(config, task)
    reads = {values: values, IMAGE: IMAGE}
    outputs = {values}
    if settings.backend == "python":
        reads[IDENTITY] = IDENTITY
        outputs.add(IDENTITY)
    _join_all(config, needed(bundle, task.name), outputs, settings)
    step(config, _map_name(task), settings.version, reads, {answer: answer})
    tell_facts(config, bundle, task)
    return Model(config, pinned=True)


def _join_all(
    config: ModelConfig, graphs: Sequence[GraphRecord], outputs: Set[str], settings: Settings
) -> None:
    """Append graphs to an ensemble, each with those of its outputs that the others read or that are
    `outputs`.
    """
    kept = outputs | {tensor.name for graph in graphs for tensor in graph.inputs}
    for graph in graphs:
        join(config, served_name(graph.name), graph, settings.version, kept)
        if settings.backend == "python" and len(graphs) > 1:
            last = config.ensemble_scheduling.step[-1]
            ports = last.output_map if graph.name == BACKBONE else last.input_map
            ports[IDENTITY] = IDENTITY


def needed(bundle: Bundle, last: str) -> list[GraphRecord]:
    """The graphs that one graph needs, itself included, in order."""
    missing, result = {tensor.name for tensor in bundle.graphs[last].inputs}, [bundle.graphs[last]]
    for graph in reversed(bundle.parts):
        if graph.name != last and missing & {tensor.name for tensor in graph.outputs}:
            result.insert(0, graph)
            missing |= {tensor.name for tensor in graph.inputs}
    return result


def _map_name(task: Task) -> str:
    """Triton's name of the step that makes a task's map."""
    return f"{task.name}_map"


def _add_map(config: ModelConfig, task: Task) -> None:
    add_port(config.output, task.map.name, TYPES[task.map.dtype], (-1, -1, *task.map.axes))


def _map_model(bundle: Bundle, task: Task, settings: Settings) -> Model:
    """The step that makes a map of a head's output."""
    config, graph = read_template("task_map"), bundle.graphs[task.name]
    config.name = _map_name(task)
    values = next(tensor for tensor in graph.outputs if tensor.name == task.output)
    for tensor in (values, bundle.graphs[BACKBONE].inputs[0]):
        add_rows(config.input, tensor.name, TYPES[tensor.dtype], tensor.dims)
    if settings.backend == "python":
        read_identity(config, rows=True)
    add_rows(config.output, task.map.name, TYPES[task.map.dtype], (-1, -1, *task.map.axes))
    _set_sizes(config, bundle)
    _set_batch(config, bundle, settings)
    config.parameters["cell"].string_value = str(cell_of(bundle, task))
    files = {
        "model.py": TEMPLATES / "task_map" / "1" / "model.py",
        **GRAPH_CODE,
        "dense.py": CONTRACT / "dense.py",
        "model.json": json.dumps({"bundle": bundle.version}).encode(),
    }
    config.parameters["function"].string_value = task.map.function
    place_on_cpu(config)
    policy = config.dynamic_batching.default_queue_policy
    policy.max_queue_size = queue_size(settings, later=True)
    return Model(config, files)


def decoder(bundle: Bundle, settings: Settings) -> Model:
    config = read_template("decode")
    add_rows(config.output, IMAGE, "TYPE_UINT8", bundle.graphs[BACKBONE].inputs[0].dims)
    _set_sizes(config, bundle)
    _set_batch(config, bundle, settings)
    for name, value in {
        "max_bytes": settings.max_image_bytes,
        "max_pixels": settings.max_image_pixels,
    }.items():
        config.parameters[name].string_value = str(value)
    place_on_cpu(config, settings.decoders)
    bound_queue(config, settings)
    files = {
        "model.py": TEMPLATES / "decode" / "1" / "model.py",
        **GRAPH_CODE,
        "images.py": CONTRACT / "images.py",
        "views.py": CONTRACT / "views.py",
        "model.json": json.dumps({"view": bundle.manifest.view}).encode(),
    }
    return Model(config, files)


def _set_batch(config: ModelConfig, bundle: Bundle, settings: Settings) -> None:
    """Set the parameter that limits the pictures of a request where Triton does not."""
    most = settings.max_batch or bundle.manifest.max_batch
    config.parameters["max_batch"].string_value = str(most)


def _set_sizes(config: ModelConfig, bundle: Bundle) -> None:
    """Set the parameters of the bundle's largest and smallest sides and their stride."""
    for name, value in bundle.manifest.resolution.limits.items():
        config.parameters[name].string_value = str(value)

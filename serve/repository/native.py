"""Graphs in Triton's own backends, onnxruntime and tensorrt: their configurations, what cannot be
rendered for them, and the steps that stand guard around them.

The python backend refuses sizes that a graph answers wrongly, and answers that are not finite; the
native backends know neither. So ensembles begin with the model `guard`, and whatever leaves the
graphs for a client or another model passes `finite`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import TYPE_FP32, ModelConfig

from contract.errors import UserError
from contract.manifest import GraphRecord, TensorRecord
from contract.signature import BACKBONE, FUSED, IMAGE
from serve.bundle import Bundle
from serve.repository.contents import CONFIG, read_made_with
from serve.repository.graph_files import engine_of, sizes_at, usual_sizes
from serve.repository.model_config import (
    GRAPH_CODE,
    TEMPLATES,
    add_port,
    add_tensor,
    place_on_cpu,
    queue_size,
    read_template,
    step,
    tune_batching,
    warm_up,
)
from serve.repository.settings import Settings

if TYPE_CHECKING:
    from serve.repository.models import Model

NATIVE = ("onnxruntime", "tensorrt")
"""Backends that run a graph without python code."""
GUARD, FINITE = "guard", "finite"
FUSED_GRAPH = "fused_graph"
"""The graph behind the ensemble `fused`, where that is guarded."""
RAW = "raw_"
"""Prefix of an output that `finite` has not seen yet."""
GUARDED = "guarded_image"
VERSION_COMPATIBLE = "version_compatible"
"""Parameter of a model whose engine needs VERSION_FLAG."""
VERSION_FLAG = "--backend-config=tensorrt,version-compatible=true"
POOL_BYTES = 2**30
"""GPU memory for what one graph gives to another. Triton's own 64 MiB hold what a ViT-B's graphs
give for some ten pictures; beyond it they go over the bus to the host and back.
"""
_GRAPHS_UP_TO = 8
"""Batches of 1 to so many, and the largest, are captured as CUDA graphs: launching kernels costs
most where they are small.
"""
_PRECISION_FLAGS = {
    # normalisation in float32, as in the graph
    "fp16": {"trt_fp16_enable": "1", "trt_layer_norm_fp32_fallback": "1"},
    "bf16": {"trt_bf16_enable": "1"},
    "int8": {"trt_int8_enable": "1"},
}
"""What onnxruntime's TensorRT provider must be told of a graph's types, up to TensorRT 10."""


def check_native(bundle: Bundle, settings: Settings) -> None:
    """Raise UserError for a bundle whose graphs the runtime cannot load."""
    runs = settings.runtime if settings.backend == "python" else settings.backend
    if bundle.manifest.precision == "bf16" and runs == "onnxruntime":
        option = "--runtime" if settings.backend == "python" else "--backend"
        remedy = (
            "--backend tensorrt or --runtime tensorrt"
            if settings.kind == "gpu"
            else "--backend python --runtime openvino (pip install openvino)"
        )
        # CPUs, 1.31: Conv, MatMul, Add, Softmax and nearly all else. CUDA: Conv of opset 22 is in
        # none up to 1.22, and which version has all that a student needs was not tried
        raise UserError(
            f"{bundle.path} is bf16, and {option} onnxruntime has no bf16 kernels for it (Conv of "
            f"opset 22, on CPUs also MatMul): choose {remedy}, or export with --precision fp16"
        )


def native_graph(
    bundle: Bundle, graph: GraphRecord, config: ModelConfig, files: dict, threads: str
) -> tuple[ModelConfig, dict]:
    """Finish the configuration of a graph in one of NATIVE; returns it and the model's files."""
    config.ClearField("parameters")
    if config.backend == "onnxruntime":
        config.default_model_filename = "model.onnx"
        config.parameters["intra_op_thread_count"].string_value = threads
        if any(group.gpus for group in config.instance_group):
            # by rule of thumb: the backend's default tries every algorithm of every convolution
            # anew for each batch size that it has not seen, while requests wait
            config.parameters["cudnn_conv_algo_search"].string_value = "1"
        return config, files
    engine = engine_of(bundle, graph)
    if engine.options.strip_weights:
        raise UserError(
            f"{bundle.path}: the engine of '{graph.name}' was built without weights, which Triton "
            "cannot put back: export again without --strip-weights, or choose --backend onnxruntime"
        )
    if engine.options.version_compatible:
        config.parameters[VERSION_COMPATIBLE].string_value = "true"
    config.default_model_filename = "model.plan"
    for group in config.instance_group:
        group.profile.append("0")
    return config, {"model.plan": bundle.part(engine.file)}


def capture_graphs(config: ModelConfig) -> None:
    """Have the CUDA graphs of an engine captured; to be called when max_batch_size is known."""
    # With a dynamic batcher Triton captures batches of 1 and max_batch_size alone, and runs all
    # others without a graph. Naming sizes here, and not as preferred_batch_size, leaves the batcher
    # as it is: it would split five requests into four and one.
    most = config.max_batch_size
    config.optimization.cuda.graphs = True
    for size in sorted({*range(1, min(most, _GRAPHS_UP_TO) + 1), most}):
        config.optimization.cuda.graph_spec.add(batch_size=size)


def native_flags(repository: Path) -> list[str]:
    """What tritonserver's command line needs for the models of a repository."""
    models = read_made_with(repository).models
    configs = [
        text_format.Parse((repository / name / CONFIG).read_text(encoding="utf-8"), ModelConfig())
        for name in models
    ]
    native = [config for config in configs if config.backend in NATIVE]
    groups = [group for config in native for group in config.instance_group]
    gpus = sorted({gpu for group in groups for gpu in group.gpus})
    result = [f"--cuda-memory-pool-byte-size={gpu}:{POOL_BYTES}" for gpu in gpus]
    if any(VERSION_COMPATIBLE in config.parameters for config in native):
        # such an engine brings code that TensorRT runs, which it only does where it is told to
        result.append(VERSION_FLAG)
    return result


def provider_options(bundle: Bundle, graph: GraphRecord, most: int) -> dict[str, str]:
    """Options of onnxruntime's TensorRT provider for a graph and batches up to `most`: without
    shapes it builds an engine anew for each size it has not seen, while requests wait.
    """
    limits = bundle.manifest.resolution
    ranges = {
        "min": (1, sizes_at(bundle, limits.min_height, limits.min_width)),
        "opt": (most, usual_sizes(bundle)),
        "max": (most, usual_sizes(bundle)),
    }
    shapes = {
        f"trt_profile_{which}_shapes": ",".join(
            f"{tensor.name}:{_shape(tensor, batch, sizes)}" for tensor in graph.inputs
        )
        for which, (batch, sizes) in ranges.items()
    }
    return _PRECISION_FLAGS.get(graph.precision, {}) | shapes


def _shape(tensor: TensorRecord, batch: int, sizes: Mapping[str, int]) -> str:
    """A tensor's shape as the provider reads it, 4x64x64x3."""
    axes = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1:]]
    return "x".join(map(str, (batch, *axes)))


def guarded(bundle: Bundle, models: Sequence["Model"], settings: Settings) -> list["Model"]:
    """The models of a repository with `guard` and `finite` among them, and the ensembles that go
    through these; each follows those it is made of.
    """
    door = next(model for model in models if model.name == "features")
    part = next(model for model in models if model.name == BACKBONE)
    parts, ensembles = [], []
    for model in models:
        if model.name == FUSED:
            # as the front door is one: an ensemble without files
            ensembles.append(replace(door, config=_ensemble_of(model.config, settings), files={}))
            model.config.name = FUSED_GRAPH
        (ensembles if model.config.platform == "ensemble" else parts).append(model)
    graphs = {model.name: model.config for model in parts if model.config.backend in NATIVE}
    checked: dict[str, Sequence[int]] = {}
    for model in ensembles:
        _guard_pictures(model.config, settings)
        if settings.nan_check:
            checked |= _check_outputs(model.config, graphs, settings)
    added = [_guard(bundle, settings)] + ([_finite(checked, settings)] if checked else [])
    parts += [replace(part, config=config, files=files) for config, files in added]
    return [*parts, *ensembles]


def _ensemble_of(graph: ModelConfig, settings: Settings) -> ModelConfig:
    """An ensemble of one graph, under the graph's name and with its inputs and outputs."""
    config = ModelConfig(name=graph.name, platform="ensemble")
    for ports, own in ((graph.input, config.input), (graph.output, config.output)):
        for port in ports:
            own.add(name=port.name, data_type=port.data_type, dims=port.dims)
    reads, gives = (
        {port.name: port.name for port in ports} for ports in (graph.input, graph.output)
    )
    step(config, FUSED_GRAPH, settings.version, reads, gives)
    return config


def _guard_pictures(config: ModelConfig, settings: Settings) -> None:
    """Put `guard` before all that reads a client's pictures. (`decode` makes them of one size.)"""
    if IMAGE not in {port.name for port in config.input}:
        return
    steps = list(config.ensemble_scheduling.step)
    for each in steps:
        for inner, outer in each.input_map.items():
            if outer == IMAGE:
                each.input_map[inner] = GUARDED
    config.ClearField("ensemble_scheduling")
    step(config, GUARD, settings.version, {IMAGE: IMAGE}, {IMAGE: GUARDED})
    config.ensemble_scheduling.step.extend(steps)


def _check_outputs(
    config: ModelConfig, graphs: Mapping[str, ModelConfig], settings: Settings
) -> dict[str, Sequence[int]]:
    """Put `finite` behind whatever the graphs give to clients and to other models; returns its
    dims by name.
    """
    steps = list(config.ensemble_scheduling.step)
    config.ClearField("ensemble_scheduling")
    leaving = {port.name for port in config.output}
    for each in steps:
        if each.model_name not in graphs:
            leaving |= set(each.input_map.values())
    result: dict[str, Sequence[int]] = {}
    for each in steps:
        found = {}
        for port in graphs[each.model_name].output if each.model_name in graphs else ():
            outer = each.output_map.get(port.name, "")
            if outer in leaving and port.data_type == TYPE_FP32:
                each.output_map[port.name] = RAW + outer
                found[outer] = tuple(port.dims)
        config.ensemble_scheduling.step.append(each)
        for name in found:
            step(config, FINITE, settings.version, {RAW + name: RAW + name}, {name: name})
        result |= found
    return result


def _guard(bundle: Bundle, settings: Settings) -> tuple[ModelConfig, dict]:
    """The model that refuses sizes."""
    config, image = read_template(GUARD), bundle.graphs[BACKBONE].inputs[0]
    add_tensor(config.input, image)
    add_tensor(config.output, image)
    # see graph_model in models.py
    config.input[0].reshape.shape[:] = [1, *config.input[0].dims]
    for name, value in bundle.manifest.resolution.limits.items():
        config.parameters[name].string_value = str(value)
    place_on_cpu(config)
    tune_batching(config, settings)
    if settings.warmup:
        warm_up(config, [image], usual_sizes(bundle))
    else:
        config.ClearField("model_warmup")
    return config, _code(GUARD)


def _finite(outputs: Mapping[str, Sequence[int]], settings: Settings) -> tuple[ModelConfig, dict]:
    """The model that refuses NaN and infinity."""
    config = read_template(FINITE)
    for name, dims in outputs.items():
        add_port(config.input, RAW + name, "TYPE_FP32", dims)
        config.input[-1].optional = True
        add_port(config.output, name, "TYPE_FP32", dims)
    tune_batching(config, settings, later=True)
    if settings.batching:
        # one request may have a step of this model for each output, and none may find it full
        size = queue_size(settings, later=True) * len(outputs)
        config.dynamic_batching.default_queue_policy.max_queue_size = size
    return config, _code(FINITE)


def _code(folder: str) -> dict:
    return {"model.py": TEMPLATES / folder / "1" / "model.py", **GRAPH_CODE}

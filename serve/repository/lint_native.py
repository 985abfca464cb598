"""Rules for configurations of Triton's own backends, which check less than the python backend's
models do; each message says what would happen.

What the backends do is from their sources (tensorrt_backend's instance_state.cc,
onnxruntime_backend's onnxruntime.cc, core's ensemble_scheduler): neither runs here.
"""

from collections.abc import Callable, Iterator, Mapping

from tritonclient.grpc.model_config_pb2 import TYPE_FP32, ModelConfig, ModelInstanceGroup

from contract.signature import IMAGE
from serve.repository.native import FINITE, GUARD, NATIVE

_Configs = Mapping[str, ModelConfig]


def _captured_sizes(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Triton captures the sizes that are named, or with a batcher that prefers none, two."""
    cuda = config.optimization.cuda
    if not cuda.graphs:
        return
    if config.backend != "tensorrt":
        yield "optimization.cuda.graphs: only the tensorrt backend captures CUDA graphs"
    preferred = config.dynamic_batching.preferred_batch_size
    if config.HasField("dynamic_batching") and not (cuda.graph_spec or preferred):
        yield (
            "optimization.cuda.graphs without graph_spec or preferred_batch_size: of what the "
            f"batcher makes, batches of 1 and {config.max_batch_size} alone would run as graphs"
        )
    sizes = [spec.batch_size for spec in cuda.graph_spec]
    for size in sizes:
        if not 1 <= size <= config.max_batch_size:
            yield (
                f"graph_spec of batch_size {size}: the model would not load (give 1 to "
                f"{config.max_batch_size})"
            )
    if len(set(sizes)) < len(sizes) and not any(spec.input for spec in cuda.graph_spec):
        yield "graph_spec: one batch_size twice is captured once, with a warning"


def _devices(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Where instances may be."""
    for group in config.instance_group:
        if config.backend == "tensorrt" and group.kind != ModelInstanceGroup.KIND_GPU:
            yield "the tensorrt backend runs on GPUs alone: the model would not load (KIND_GPU)"
        if group.profile and config.backend != "tensorrt":
            yield "optimisation profiles are the tensorrt backend's: the model would not load"
        if len(set(group.gpus)) < len(group.gpus) or any(gpu < 0 for gpu in group.gpus):
            yield (
                f"instances on GPUs {list(group.gpus)}: name each once, from 0 on (count says how "
                "many are on each)"
            )


def _plain_inputs(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """A graph's inputs reach it as they are."""
    for port in config.input if config.backend in NATIVE else ():
        if port.HasField("reshape"):
            yield f"input '{port.name}' is reshaped: the graph takes it as the manifest says"
        if port.allow_ragged_batch:
            yield (
                f"input '{port.name}' allows ragged batches: requests of several sizes would reach "
                "the graph as one row of numbers"
            )


def _files(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Each backend has a name of its own for the file it looks for."""
    expected = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}.get(config.backend)
    if expected and config.default_model_filename != expected:
        yield f"default_model_filename is not {expected}, which is what the version's folder has"


def _cache_on_a_gpu(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Triton hashes inputs that lie in the host's memory, and keeps outputs that do."""
    on_gpu = any(group.kind == ModelInstanceGroup.KIND_GPU for group in config.instance_group)
    if config.response_cache.enable and config.backend in NATIVE and on_gpu:
        yield (
            "response_cache on a graph on a GPU: what other models give it stays there, where "
            "Triton's cache does not look (only models of the python backend have any use of it)"
        )


def _pictures_are_guarded(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """No client's picture goes into a native graph unseen."""
    for step in config.ensemble_scheduling.step:
        if IMAGE not in {port.name for port in config.input}:
            return
        part = configs.get(step.model_name)
        native = part is not None and part.backend in NATIVE
        if native and IMAGE in step.input_map.values():
            yield (
                f"step '{step.model_name}' reads '{IMAGE}' as the client sent it: sizes that the "
                f"graph answers wrongly would be answered (put step '{GUARD}' before it)"
            )


def _outputs_are_checked(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """No number leaves a native graph unseen, unless there is no such check on purpose."""
    if FINITE not in configs:
        return
    steps = config.ensemble_scheduling.step
    parts = {step.model_name: configs.get(step.model_name) for step in steps}
    native = {name for name, part in parts.items() if part is not None and part.backend in NATIVE}
    readers = {port.name: "clients" for port in config.output}
    for step in steps:
        if step.model_name not in native | {FINITE}:
            readers |= {outer: f"step '{step.model_name}'" for outer in step.input_map.values()}
    for step in steps:
        ports = parts[step.model_name].output if step.model_name in native else ()
        floats = {port.name for port in ports if port.data_type == TYPE_FP32}
        for inner, outer in sorted(step.output_map.items()):
            if inner in floats and outer in readers:
                yield (
                    f"'{outer}' goes from graph '{step.model_name}' to {readers[outer]}: NaN and "
                    f"infinity would pass for features (put step '{FINITE}' between)"
                )


NATIVE_RULES: tuple[Callable[[ModelConfig, _Configs], Iterator[str]], ...] = (
    _captured_sizes,
    _devices,
    _plain_inputs,
    _files,
    _cache_on_a_gpu,
    _pictures_are_guarded,
    _outputs_are_checked,
)

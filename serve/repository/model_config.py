"""Small steps of writing a Triton ModelConfig: ports, versions, instances, batching, warm-up,
ensemble steps.

The messages are those of
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto, which
tritonclient ships.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from contract.manifest import GraphRecord, TensorRecord
from contract.signature import IDENTITY
from serve.bundle import BundleFile
from serve.repository.settings import Settings

TEMPLATES = Path(__file__).parents[2] / "triton_models"
CONTRACT = Path(__file__).parents[2] / "contract"
"""Whose numpy-only modules are copied beside a model that needs them."""
GRAPH_CODE = {
    "graph_model.py": TEMPLATES / "graph_model.py",
    "graph_call.py": CONTRACT / "graph_call.py",
}
"""What the code of nearly every model imports from beside it."""
CALLING_CODE = {**GRAPH_CODE, "calling_model.py": TEMPLATES / "calling_model.py"}
"""The same of a model that calls others."""
TYPES = {
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
    "bool": "TYPE_BOOL",
}
"""Triton's names of the manifest's element types."""
FRONT_QUEUES = 4
"""Requests that a front lets in at once, in times `--max-queue`."""


@dataclass
class Model:
    """A folder of the repository: its configuration and the files of its version, by name (paths
    are copied).
    """

    config: ModelConfig
    files: dict[str, bytes | Path | BundleFile] = field(default_factory=dict)
    pinned: bool = False
    """Whether its configuration is of one version of the bundle, and it serves that alone."""

    @property
    def name(self) -> str:
        return self.config.name


def read_template(folder: str) -> ModelConfig:
    result = ModelConfig()
    result.CopyFrom(_parse_template(folder))
    return result


@cache
def _parse_template(folder: str) -> ModelConfig:
    return text_format.Parse(
        (TEMPLATES / folder / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig()
    )


def add_port(ports, name: str, kind: str, dims: Iterable[int]) -> None:
    """Append an input or output; `kind` is Triton's name of its type."""
    ports.add(name=name, data_type=DataType.Value(kind), dims=dims)


def add_rows(ports, name: str, kind: str, dims: Iterable[int]) -> None:
    """Append an input or output of a model without batches, with the batch written out."""
    add_port(ports, name, kind, (-1, *dims))


def add_tensor(ports, tensor: TensorRecord) -> None:
    """Append a tensor of the manifest as an input or output, without its batch."""
    add_port(ports, tensor.name, TYPES[tensor.dtype], tensor.dims)


def give_identity(config: ModelConfig) -> None:
    """Append the output by which the steps of an ensemble know whose bundle a tensor is."""
    add_port(config.output, IDENTITY, "TYPE_INT64", [1])


def read_identity(config: ModelConfig, rows: bool = False) -> None:
    """Append it as an input, which only ensembles give; `rows`: of a model without batches."""
    (add_rows if rows else add_port)(config.input, IDENTITY, "TYPE_INT64", [1])
    config.input[-1].optional = True


def keep_batches(config: ModelConfig) -> None:
    """Let a python model see batches of 0.

    Triton lets one pass where the bytes are those of one picture, without its first axis, and then
    fails all requests of a batch, for it takes the next axis (64 rows, say) for the batch: an axis
    of 1 comes before it.
    """
    for port in config.input:
        port.reshape.shape[:] = [1, *port.dims]


def pin(config: ModelConfig, version: int) -> None:
    """Serve exactly this version (ensembles: their steps are of one version, so that parts of one
    student stay together).
    """
    config.version_policy.specific.versions[:] = [version]


def keep_latest(config: ModelConfig, versions: int = 2) -> None:
    """Serve the latest versions. Not a list of them: Triton would reload all where one was added,
    for the config changed.
    """
    config.version_policy.latest.num_versions = versions


def place(config: ModelConfig, settings: Settings, count: int) -> None:
    """So many instances, on the CPU or on every device."""
    group = ModelInstanceGroup(count=count, kind=ModelInstanceGroup.KIND_CPU)
    if settings.kind == "gpu":
        group.kind = ModelInstanceGroup.KIND_GPU
        group.gpus.extend(settings.devices)
    config.instance_group.append(group)


def place_on_cpu(config: ModelConfig, count: int = 1) -> None:
    """Instances of a model that has no use for a GPU."""
    config.instance_group.append(ModelInstanceGroup(count=count, kind=ModelInstanceGroup.KIND_CPU))


def tune_batching(
    config: ModelConfig, settings: Settings, *, later: bool = False, delayed: bool = False
) -> None:
    """Carry over the settings of the dynamic batcher, or take it away; `later`: see `queue_size`.

    `delayed`: the model is one of those whose delay the settings may choose.
    """
    if not settings.batching:
        config.ClearField("dynamic_batching")
        return
    if settings.queue_delay_us is not None and delayed:
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay_us
    size = queue_size(settings, later)
    config.dynamic_batching.default_queue_policy.max_queue_size = size


def queue_size(settings: Settings, later: bool) -> int:
    """Requests that may wait for a model. `later`: one that follows others in ensembles."""
    # Triton 2.51 ends in a segmentation fault where a step's queue is full while other steps of the
    # same request run. So it is the first steps that refuse; the queues of later ones take whatever
    # a front lets in (as many as FRONT_QUEUES allow), and some for the supervisor and python models
    return FRONT_QUEUES * settings.max_queue + 64 if later else settings.max_queue


def bound_queue(config: ModelConfig, settings: Settings) -> None:
    """Let no more requests wait for a model without batches than its template says, or the
    settings if they say fewer.
    """
    policy = config.dynamic_batching.default_queue_policy
    policy.max_queue_size = min(policy.max_queue_size, settings.max_queue)


def warm_up(config: ModelConfig, inputs: Sequence[TensorRecord], sizes: dict[str, int]) -> None:
    """Zeros of the usual size for every input of the template's sample; `sizes` gives axes that
    vary.
    """
    for sample in config.model_warmup:
        for tensor in inputs:
            entry = sample.inputs[tensor.name]
            entry.data_type = DataType.Value(TYPES[tensor.dtype])
            entry.dims.extend(
                axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape[1:]
            )
            entry.zero_data = True


def step(
    config: ModelConfig, model: str, version: int, reads: dict[str, str], gives: dict[str, str]
) -> None:
    """Append a step to an ensemble; the maps go from the model's names to the ensemble's."""
    # a pinned version: during a rollout two versions are loaded, and the parts of one student
    # belong together
    config.ensemble_scheduling.step.add(
        model_name=model, model_version=version, input_map=reads, output_map=gives
    )


def join(config: ModelConfig, model: str, graph: GraphRecord, version: int, kept: Set[str]) -> None:
    """Append a graph to an ensemble; tensors have the same names everywhere. Triton refuses outputs
    that are not read.
    """
    reads = {tensor.name: tensor.name for tensor in graph.inputs}
    gives = {tensor.name: tensor.name for tensor in graph.outputs if tensor.name in kept}
    step(config, model, version, reads, gives)

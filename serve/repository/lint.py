"""Rules for configurations that Triton loads but serves wrongly; each message says what would
happen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tritonclient.grpc.model_config_pb2 import TYPE_STRING, ModelConfig

from contract.signature import IDENTITY
from serve.repository.lint_native import NATIVE_RULES

_Configs = Mapping[str, ModelConfig]
_UNBATCHED = "unbatched"
"""Parameter of models whose first axis is a request's own batch."""


def lint(configs: _Configs) -> list[str]:
    """Problems of a repository's models, one sentence each."""
    return [
        f"{name}: {message}"
        for rule in _RULES
        for name, config in configs.items()
        for message in rule(config, configs)
    ]


def _shared_output(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """A tensor is for a client or for a step, never both."""
    outputs = {port.name for port in config.output}
    for step in config.ensemble_scheduling.step:
        for tensor in sorted(outputs & set(step.input_map.values())):
            yield (
                f"'{tensor}' is an output and is read by step '{step.model_name}': requests that "
                'leave it out would fail with "unexpected deadlock" (give clients an output of '
                "another name)"
            )


def _side_input(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Whatever a client sends goes into the first step."""
    steps = config.ensemble_scheduling.step
    for port in config.input if steps else ():
        if port.name not in steps[0].input_map.values():
            yield (
                f"input '{port.name}' is not read by the first step: Triton would prune that step "
                "for requests that do not need this input (give it to a model of its own)"
            )


def response_cache(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Triton's cache uses only the bytes of the inputs as its key."""
    if not config.response_cache.enable:
        return
    if config.platform == "ensemble":
        yield "response_cache on an ensemble: answers would be those of another request's outputs"
    if len(config.output) != 1:
        yield (
            f"response_cache on a model of {len(config.output)} outputs: the key leaves out which "
            "were requested, so a request would get another's answer"
        )
    if any(size < 0 for port in config.input for size in port.dims):
        yield "response_cache on inputs whose shape varies: the key leaves out the shape"
    if any(port.data_type == TYPE_STRING for port in config.input):
        yield (
            "response_cache on strings: their lengths are part of the shape, which the key "
            "leaves out"
        )


def _explicit_batch(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Left out, Triton's auto-complete picks 4, and an ensemble cannot pass larger batches to its
    steps.
    """
    if config.max_batch_size < 1 and _UNBATCHED not in config.parameters:
        yield (
            "max_batch_size is not set: set it (or the parameter `unbatched` for a model without "
            "batches)"
        )
    for step in config.ensemble_scheduling.step:
        part = configs.get(step.model_name)
        if part is None or (_UNBATCHED in part.parameters):
            continue
        if part.max_batch_size < config.max_batch_size:
            yield (
                f"max_batch_size {config.max_batch_size} is more than the {part.max_batch_size} "
                f"of step '{step.model_name}'"
            )


def _bounded_queue(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Without a limit a server that falls behind takes requests until memory ends."""
    # a batching model without dynamic_batching is what --no-batching asks for
    has_queue = config.HasField("dynamic_batching") or _UNBATCHED in config.parameters
    if has_queue and not config.dynamic_batching.default_queue_policy.max_queue_size:
        yield (
            "dynamic_batching without max_queue_size: an overloaded server would never reject "
            "requests"
        )


def _strings_alone(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """A python model gets strings one request at a time."""
    batches = config.HasField("dynamic_batching") and config.max_batch_size > 0
    if batches and any(port.data_type == TYPE_STRING for port in config.input):
        yield (
            "dynamic_batching of strings: Triton fails all requests of a batch for one whose "
            "strings are malformed (set max_batch_size 0 and the parameter `unbatched`)"
        )


def _warm_up_data(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Random bytes are NaN where floats are read."""
    for sample in config.model_warmup:
        for name, data in sample.inputs.items():
            if data.random_data:
                yield (
                    f"warm-up of '{name}' by random_data: bytes that are NaN would be refused and "
                    "the model not load"
                )


def _row_ports(config: ModelConfig, ports: Iterable[Any]) -> dict[str, tuple]:
    """Type and dims of ports by name, without the batch that a model without batches writes out."""
    start = 1 if _UNBATCHED in config.parameters else 0
    return {port.name: (port.data_type, tuple(port.dims)[start:]) for port in ports}


def _joined_steps(config: ModelConfig, configs: _Configs) -> Iterator[str]:
    """Every step exists, all of one version, and each tensor it reads is made before it with the
    same type and dims.
    """
    versions = {step.model_version for step in config.ensemble_scheduling.step}
    if len(versions) > 1 or any(version < 1 for version in versions):
        yield (
            f"its steps are of versions {sorted(versions)}: name one, or a rollout joins parts of "
            "two students"
        )
    available = {port.name: (port.data_type, tuple(port.dims)) for port in config.input}
    for step in config.ensemble_scheduling.step:
        part = configs.get(step.model_name)
        if part is None:
            yield f"step '{step.model_name}' is not a model of this repository"
            continue
        reads, gives = _row_ports(part, part.input), _row_ports(part, part.output)
        # who asks a part directly need not give its identity, an ensemble must
        optional = {port.name for port in part.input if port.optional} - {IDENTITY}
        for inner in sorted(set(reads) - set(step.input_map) - optional):
            yield f"step '{step.model_name}' gets no '{inner}'"
        for inner, outer in sorted(step.input_map.items()):
            if available.get(outer) != reads.get(inner):
                yield (
                    f"step '{step.model_name}' reads '{inner}' {reads.get(inner)}, '{outer}' is "
                    f"{available.get(outer)}"
                )
        available |= {outer: gives.get(inner) for inner, outer in step.output_map.items()}
    if config.platform == "ensemble":
        for port in config.output:
            if available.get(port.name) != (port.data_type, tuple(port.dims)):
                yield f"output '{port.name}' is not made by any step with its type and dims"


_RULES: tuple[Callable[[ModelConfig, _Configs], Iterator[str]], ...] = (
    _shared_output,
    _side_input,
    response_cache,
    _explicit_batch,
    _bounded_queue,
    _strings_alone,
    _warm_up_data,
    _joined_steps,
    *NATIVE_RULES,
)

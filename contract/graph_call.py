"""An ONNX graph as a function, in OpenVINO or onnxruntime: on the server and in one's own process.

Needs numpy and the runtime only: `serve.repository` copies this file beside the models that call
graphs.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""A graph: from its inputs to its outputs, in order."""


BF16 = "-bf16"
"""After `openvino`: what a graph computes in float32 may be computed in bf16 by CPUs that have it
(AVX-512-bf16, AMX), because export compared it so (`Manifest.openvino_precision`).
"""


def inference_precision(core: Any, runtime: str) -> str:
    """What OpenVINO is told to compute in: bf16 where the runtime's name says so and this processor
    has it, else float32.

    By itself it would decide what is near enough; parity is of what the graph says.
    """
    if not runtime.endswith(BF16):
        return "f32"
    return "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def used_runtime(runtime: str) -> str:
    """The runtime that a name comes to on this processor: `openvino-bf16` may be `openvino`."""
    if not runtime.endswith(BF16):
        return runtime
    import openvino

    precision = inference_precision(openvino.Core(), runtime)
    return runtime if precision == "bf16" else runtime.removesuffix(BF16)


def open_graph(
    graph: Path,
    runtime: str,
    threads: int,
    device: int | None,
    views: bool = False,
    tensorrt: Mapping[str, str] | None = None,
) -> Call:
    """Open a graph in a runtime: on a GPU by its number, or on so many threads of the CPU.

    `views`: what it returns may be memory of the runtime, which the next call overwrites: that
    saves OpenVINO a copy of every output, and is for one thread. Without, threads may share it.

    `openvino-bf16` computes in bf16 where the processor has it, else as `openvino` in float32;
    `tensorrt` is onnxruntime's provider of that name, and its options: the shapes to build for, the
    types to compute in. Raises RuntimeError where onnxruntime has no
    working provider for the device.
    """
    if runtime.removesuffix(BF16) == "openvino":
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": inference_precision(core, runtime),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        model = core.compile_model(str(graph), "CPU", settings)
        names, outputs = [port.any_name for port in model.inputs], model.outputs
        one_by_one = threading.Lock()  # a compiled model has one request, whoever calls it

        def run(feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
            with one_by_one:
                result = model(dict(zip(names, feeds, strict=True)), share_outputs=views)
                return [result[port] for port in outputs]

        return run
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # threads that spin while idle take the cores from other models
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list = ["CPUExecutionProvider"]
    if device is not None:
        # what was compared at export; by itself it multiplies float32 in TF32
        cuda = {"device_id": device, "use_tf32": "0"}
        providers = [("CUDAExecutionProvider", cuda), *providers]
        if runtime == "tensorrt":
            providers.insert(
                0,
                (
                    "TensorrtExecutionProvider",
                    {"device_id": device, **engine_cache(graph), **(tensorrt or {})},
                ),
            )
    session = onnxruntime.InferenceSession(str(graph), options, providers=providers)
    requested = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != requested:  # it falls back to the CPU silently
        raise RuntimeError(
            f"onnxruntime has no working {requested} here: install onnxruntime-gpu and CUDA's "
            "libraries"
        )
    names = [port.name for port in session.get_inputs()]
    return lambda feeds: session.run(None, dict(zip(names, feeds, strict=True)))


def engine_cache(graph: Path) -> dict[str, str]:
    """Options of onnxruntime's TensorRT provider that keep its engines beside the graph for the
    next start; none are kept where nothing can be written there.
    """
    # not in the temporary folder: an engine is code, and whoever else can write there could leave
    # one of that name
    if not os.access(graph.parent, os.W_OK):
        return {"trt_engine_cache_enable": "0"}
    return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(graph.parent)}

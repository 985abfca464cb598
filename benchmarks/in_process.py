"""A graph called in this process, without a server: what serving is measured against."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def open_graph(graph: Path, runtime: str, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function from pictures uint8 [B, H, W, 3] to the graph's outputs, with the settings the
    server's models have.
    """
    if runtime == "openvino":
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        model = openvino.Core().compile_model(str(graph), "CPU", settings)
        return lambda image: list(model({"image": image}).values())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def latencies(
    call: Callable[[np.ndarray], object], image: np.ndarray, seconds: float
) -> list[float]:
    """Seconds of each call, one after the other for so long."""
    call(image)
    result, end = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        call(image)
        result.append(time.perf_counter() - begun)
    return result

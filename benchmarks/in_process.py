"""Graphs called in this process, without a server: what serving is measured against."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from contract.graph_call import open_graph
from serve.bundle import Bundle


def open_image_graph(
    graph: Path, runtime: str, threads: int
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function from pictures uint8 [B, H, W, 3] to the graph's outputs, as the server's models
    call it.
    """
    call = open_graph(graph, runtime, threads, None)
    return lambda image: call([image])


def open_parts(
    bundle: Bundle, runtime: str, threads: int, outputs: Sequence[str]
) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function from pictures to some outputs, by those of the bundle's graphs that they need, one
    after the other.
    """
    wanted, graphs = set(outputs), []
    for graph in reversed(bundle.parts):
        if wanted & {tensor.name for tensor in graph.outputs}:
            wanted |= {tensor.name for tensor in graph.inputs}
            graphs.insert(0, (graph, open_graph(bundle.path / graph.file, runtime, threads, None)))

    def call(image: np.ndarray) -> list[np.ndarray]:
        known = {"image": image}
        for graph, run in graphs:
            result = run([known[tensor.name] for tensor in graph.inputs])
            known |= dict(zip([tensor.name for tensor in graph.outputs], result, strict=True))
        return [known[name] for name in outputs]

    return call


def latencies(
    call: Callable[[np.ndarray], object], image: np.ndarray, seconds: float, pause: float = 0
) -> list[float]:
    """Seconds of each call, one after the other for so long, with pauses between them."""
    call(image)
    result, end = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        call(image)
        result.append(time.perf_counter() - begun)
        if pause:
            time.sleep(pause)
    return result

"""How a bundle is served: backend, runtime, instances, threads, batching, limits. Defaults live
here and nowhere else.
"""

import importlib.util
import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from contract.errors import UserError

_Backend = Literal["python", "onnxruntime", "tensorrt"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt"]


class Settings(BaseModel):
    """Everything that configures a repository beyond the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: _Backend = "python"
    """`python` runs everywhere; `onnxruntime` and `tensorrt` are Triton's own backends, in NVIDIA's
    image.
    """
    runtime: Runtime = "onnxruntime"
    """What the python backend runs graphs in; `tensorrt` is onnxruntime's TensorRT provider."""
    kind: Literal["cpu", "gpu"] = "cpu"
    devices: tuple[int, ...] = (0,)
    instances: int = Field(default=1, ge=1)
    """Processes (python) or executions (native) of the backbone and other large graphs; the small
    ones have one.
    """
    threads: int = Field(default=1, ge=1)
    """CPU threads of each instance of the backbone and other large graphs."""
    decoders: int = Field(default=1, ge=1)
    """Processes that decode JPEG, PNG and WebP, on CPUs also where graphs run on GPUs."""
    max_batch: int | None = Field(default=None, ge=1)
    """At most the bundle's."""
    queue_delay_us: int | None = Field(default=None, ge=0)
    """How long a request waits for others; None: as the templates say."""
    max_queue: int = Field(default=256, ge=1)
    batching: bool = True
    warmup: bool = True
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    response_cache: tuple[str, ...] = ()
    """Models whose answers Triton keeps; only such as the lint allows."""
    parts: Literal["auto", "together", "apart"] = "auto"
    """The graphs of a student: in one model, or each in its own, joined by ensembles. See
    `together`.
    """
    nan_check: bool = True
    """Whether answers of graphs in Triton's own backends are checked, at the price of a copy; those
    of the python backend always are.
    """
    version: int = Field(default=1, ge=1)
    fused: bool = True
    encoded: bool = True

    @property
    def together(self) -> bool:
        """Whether one model holds the student's graphs: in the python backend on CPUs, where models
        are processes and every tensor between them would be copied.
        """
        if self.parts == "auto":
            return self.backend == "python" and self.kind == "cpu"
        return self.parts == "together"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


MOST_THREADS = 8
"""Threads of an instance on CPUs, at most. (More than two cores were not measured.)"""


def instances_and_threads(instances: int | None, threads: int | None, free: int) -> tuple[int, int]:
    """Instances and threads, derived from the free cores where not given.

    Two instances share the same cores: one computes while the other copies, and a request that is
    alone has all cores.
    """
    if instances is None:
        instances = 1 if free == 1 else 2 * -(-free // (threads or MOST_THREADS))
    return instances, threads or max(1, min(free, 2 * free // instances, MOST_THREADS))


def runtimes_here() -> tuple[Runtime, ...]:
    """CPU runtimes that are installed in this environment."""
    return tuple(name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name))


def choose_runtime(requested: str, kind: str) -> Runtime:
    """The runtime of the python backend. On CPUs OpenVINO where it is installed: see
    docs/results/serving.md.

    Raises UserError for a runtime that is not installed, or not for this kind of device.
    """
    here = runtimes_here()
    if requested == "auto":
        return "openvino" if kind == "cpu" and "openvino" in here else "onnxruntime"
    if requested == "openvino" and kind == "gpu":
        raise UserError(
            "--runtime openvino runs on CPUs: choose onnxruntime or tensorrt, or --kind cpu"
        )
    if requested == "tensorrt" and kind == "cpu":
        raise UserError(
            "--runtime tensorrt runs on GPUs: add --kind gpu, or choose openvino or onnxruntime"
        )
    if requested in ("openvino", "onnxruntime") and requested not in here:
        raise UserError(f"--runtime {requested}: it is not installed here: pip install {requested}")
    return requested

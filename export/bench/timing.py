"""What `export.bench` times: a graph's module in torch, the graph in onnxruntime and OpenVINO, its
engines in TensorRT.

All do the same work on the same photographs. Inputs lie on the device that computes, and a call
ends when its outputs are complete.
"""

import copy
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from contract.errors import UserError
from contract.manifest import Manifest, Precision
from contract.signature import IMAGE
from distill.data.pictures import PackagedPhotos
from export.agreement import TOLERANCE, compare
from export.graph import build_parts, open_student
from export.photographs import shown
from export.runtimes.available import cpu_runtime
from export.runtimes.base import Bound, Outputs, Runtime
from export.runtimes.engine import EngineRuntime, as_array
from export.runtimes.onnx import LEVELS, CudaRuntime, OnnxRuntime
from export.runtimes.openvino import OpenVINO

_Setting = TypeVar("_Setting", str, int)

_TRIES = 3
"""Timed calls of each setting."""

_WARM_UP = {"cpu": 1, "cuda": 10}
"""Untimed calls, by device: a GPU raises its clocks and chooses convolution kernels first."""


@dataclass(frozen=True)
class Work:
    """A graph in one runtime on one device, with the settings that were chosen for it: a row of the
    table.
    """

    name: str
    device: str
    precision: Precision
    bound: Bound
    settings: str = ""


class Feeds:
    """Inputs of graphs: photographs, and what the bundle's graphs before them compute from
    these.
    """

    def __init__(self, bundle: Path, manifest: Manifest, graphs: list[str]) -> None:
        wanted = {tensor.name for graph in graphs for tensor in manifest.graph(graph).inputs} - {
            IMAGE
        }
        self.before = []
        for record in reversed(manifest.graphs):  # the last first: its inputs are needed too
            if wanted & {tensor.name for tensor in record.outputs}:
                self.before.insert(0, record)
                wanted |= {tensor.name for tensor in record.inputs}
        self.runtime = cpu_runtime(
            {record.name: bundle / record.file for record in self.before}, manifest.precision
        )
        self.photos, self.size = (
            PackagedPhotos(),
            (manifest.resolution.height, manifest.resolution.width),
        )
        self.view = manifest.policy

    def of(self, batch: int) -> Outputs:
        """By name: the image [B, H, W, 3] and the other tensors that the graphs read."""
        photos = (self.photos.load(number % len(self.photos)) for number in range(batch))
        known = {IMAGE: np.stack([shown(photo, self.size, self.view) for photo in photos])}
        for record in self.before:
            result = self.runtime.run(
                record.name, {tensor.name: known[tensor.name] for tensor in record.inputs}
            )
            known |= zip((tensor.name for tensor in record.outputs), result, strict=True)
        return known


class TorchStudent:
    """The student of a run folder, as the modules that its graphs were traced from; raises
    UserError if the bundle is of another student.
    """

    def __init__(
        self, run: Path, manifest: Manifest, compiled: bool, trust_code: bool = False
    ) -> None:
        student = open_student(run, trust_code=trust_code)
        if student.sha256 != manifest.student.sha256:
            raise UserError(
                f"--run {run}: its student is not the bundle's (give the run that was exported)"
            )
        parts = build_parts(student, manifest.resolution.height, manifest.resolution.width)
        self.modules = {part.signature.graph: part.module.eval() for part in parts}
        self.compiled = compiled

    def works(self, graph: str, feeds: Outputs, device: str, threads: int | None) -> list[Work]:
        """torch eager and torch.compile; on a GPU also eager in fp16 autocast."""
        module, where, count, settings = self.modules[graph], "", 0, ""
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # float32 here as in the other runtimes
            module, where = copy.deepcopy(module).cuda(), " cuda"
            bound = _bind_torch(module, feeds, device)
        else:
            makers = {
                n: partial(_bind_torch, module, feeds, device, threads=n)
                for n in _thread_counts(threads)
            }
            count, bound = fastest(makers)
            settings = _threads_text(count)
        result = [Work(f"torch eager fp32{where}", device, "fp32", bound, settings)]
        if self.compiled:
            # at its second shape a module would be compiled for any shape, which is slower
            torch.compiler.reset()
            bound = _bind_torch(torch.compile(module, dynamic=False), feeds, device, threads=count)
            result.append(Work(f"torch.compile fp32{where}", device, "fp32", bound, settings))
        if device == "cuda":
            result.append(
                Work(
                    "torch autocast fp16 cuda",
                    device,
                    "fp16",
                    _bind_torch(module, feeds, device, half=True),
                )
            )
        return result


def _bind_torch(
    module: Callable, feeds: Outputs, device: str, half: bool = False, threads: int = 0
) -> Bound:
    """A module with its inputs on a device, run without gradients; `threads` 0 leaves torch's
    number.
    """
    inputs = [torch.from_numpy(value).to(device) for value in feeds.values()]
    last: list[torch.Tensor] = []

    def call() -> None:
        if threads and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast(device, torch.float16, enabled=half):
            result = module(*inputs)
        last[:] = result if isinstance(result, tuple) else (result,)
        if device == "cuda":
            torch.cuda.synchronize()

    return Bound(call, lambda: [as_array(tensor) for tensor in last])


def _thread_counts(requested: int | None) -> list[int]:
    """Numbers of threads to try: `requested`, or all cores and half of them."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return [requested] if requested else sorted({cores, max(1, cores // 2)})


def _threads_text(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def cpu_works(
    graph: str,
    path: Path,
    precision: Precision,
    feeds: Outputs,
    threads: int | None,
    runtime: str = "openvino",
) -> list[Work]:
    """A graph in onnxruntime and, if installed, in OpenVINO, each in the fastest of a few settings.

    onnxruntime: two optimisation levels; OpenVINO: two hints; both: all cores or half of them, or
    `threads`. `runtime`: how a server opens the graph in OpenVINO.
    """
    result, files, counts = [], {graph: path}, _thread_counts(threads)
    if precision != "bf16":  # its CPU provider has no bf16 convolutions
        makers = {
            f"optimisation {level}, {_threads_text(n)}": partial(_bind_onnx, files, feeds, level, n)
            for level in LEVELS
            for n in counts
        }
        settings, bound = fastest(makers)
        result.append(Work(f"onnxruntime {precision}", "cpu", precision, bound, settings))
    if importlib.util.find_spec("openvino"):
        makers = {
            f"hint {hint.lower()}, {_threads_text(n)}": partial(
                _bind_openvino,
                files,
                feeds,
                {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": n},
                runtime,
            )
            for hint in ("LATENCY", "THROUGHPUT")
            for n in counts
        }
        settings, bound = fastest(makers)
        result.append(Work(f"{runtime} {precision}", "cpu", precision, bound, settings))
    return result


def _bind_onnx(files: dict[str, Path], feeds: Outputs, level: str, threads: int) -> Bound:
    return OnnxRuntime(files, level, threads).bind(*files, feeds)


def _bind_openvino(files: dict[str, Path], feeds: Outputs, settings: dict, runtime: str) -> Bound:
    return OpenVINO(files, settings, runtime).bind(*files, feeds)


def fastest(makers: dict[_Setting, Callable[[], Bound]]) -> tuple[_Setting, Bound]:
    """The setting whose fastest call takes least, and the graph bound in it."""
    tried = []
    for setting, make in makers.items():
        bound = make()
        bound.call()  # not timed: allocates, fills caches
        tried.append((min(_seconds_of(bound.call) for _ in range(_TRIES)), setting, bound))
        tried = [min(tried, key=lambda entry: entry[0])]  # frees the memory of the others
    return tried[0][1:]


def gpu_runtimes(bundle: Path, manifest: Manifest, graph: str) -> tuple[list[Runtime], list[str]]:
    """A graph in onnxruntime's CUDA provider and its engines, and why others cannot run here."""
    makers: list[Callable[[], Runtime]] = [
        partial(CudaRuntime, {graph: bundle / manifest.graph(graph).file})
    ]
    for entry in manifest.engines:
        if entry.graph == graph:
            makers.append(partial(EngineRuntime, {graph: bundle / entry.file}))
    result, left_out = [], []
    for make in makers:
        try:
            result.append(make())
        except UserError as error:
            left_out.append(str(error))
    return result, left_out


def gpu_works(
    runtimes: list[Runtime], graph: str, precision: Precision, feeds: Outputs
) -> tuple[list[Work], list[str]]:
    """A graph in every runtime of a GPU, and why others do not take these inputs."""
    result, left_out = [], []
    for runtime in runtimes:
        try:
            bound = runtime.bind(graph, feeds)
        except UserError as error:
            left_out.append(str(error))
            continue
        name = (
            f"onnxruntime {precision} cuda"
            if isinstance(runtime, CudaRuntime)
            else f"{runtime.name} {precision}"
        )
        result.append(Work(name, "cuda", precision, bound))
    return result, left_out


def _seconds_of(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_all(works: list[Work], rounds: int, batch: int) -> list[dict]:
    """Latencies of all works; those of one device take turns.

    Ratios of medians are to torch eager on the same device. Cosines, the least of any output and
    picture, are to torch eager on the first device. Both are None without torch among the works.
    """
    for work in works:
        for _ in range(_WARM_UP[work.device]):
            work.bound.call()
    times: dict[str, list[float]] = {work.name: [] for work in works}
    for device in dict.fromkeys(work.device for work in works):
        for _ in range(rounds):
            for work in works:
                if work.device == device:
                    times[work.name].append(_seconds_of(work.bound.call))
    middle = {name: statistics.median(values) for name, values in times.items()}
    eager = {work.device: work for work in reversed(works) if work.name.startswith("torch eager")}
    wanted = next(
        (work.bound.read() for work in works if work.name.startswith("torch eager")), None
    )
    rows = []
    for work in works:
        ordered = sorted(times[work.name])
        base = eager.get(work.device)
        cosine = _least_cosine(work.bound.read(), wanted) if wanted else None
        rows.append(
            {
                "runtime": work.name,
                "device": work.device,
                "precision": work.precision,
                "settings": work.settings,
                "p50_ms": 1e3 * middle[work.name],
                "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
                "images_per_second": batch / middle[work.name],
                "speedup": middle[base.name] / middle[work.name] if base else None,
                "cosine": cosine,
                "agrees": None if cosine is None else cosine >= TOLERANCE[work.precision],
            }
        )
    return rows


def _least_cosine(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return min(float(compare(a, b)[0].min()) for a, b in zip(got, wanted, strict=True))

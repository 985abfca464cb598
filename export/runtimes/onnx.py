"""onnxruntime on the CPU and on the GPU."""

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from contract.errors import UserError, one_line
from contract.gpu import compute_capabilities
from export.runtimes.base import Bound, Exported, Outputs, Runtime, on_cpu

log = logging.getLogger(__name__)

LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""onnxruntime's graph optimization levels, by name."""

CUDA = "CUDAExecutionProvider"
_FAILURES = (
    RuntimeError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
# onnxruntime's errors have no common base class


class OnnxRuntime(Runtime):
    """Graphs in onnxruntime on the CPU; `threads` 0 means one per core."""

    name = "onnxruntime-cpu"
    device = "cpu"

    @classmethod
    def checking(cls, exported: Exported) -> list[Runtime]:
        # the CPU provider has no bf16 convolutions
        if exported.graphs is None or exported.precision == "bf16":
            return []
        return [on_cpu(cls(exported.graphs), exported.precision)]

    def __init__(self, files: dict[str, Path], level: str = "all", threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = LEVELS[level]
        options.intra_op_num_threads = threads
        # idle threads that spin take cores from whatever runs beside
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {graph: self._open(path, options) for graph, path in files.items()}

    def _open(
        self, path: Path, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        with self._one_line_errors(path.stem):
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """Put a graph's inputs on the device; outputs stay there until they are read."""
        session = self.sessions[graph]
        binding = session.io_binding()

        def call() -> None:
            with self._one_line_errors(graph):
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        def read() -> list[np.ndarray]:
            with self._one_line_errors(graph):
                return binding.copy_outputs_to_cpu()

        with self._one_line_errors(graph):
            for name, value in feeds.items():
                there = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.ascontiguousarray(value), self.device, 0
                )
                binding.bind_ortvalue_input(name, there)
            for output in session.get_outputs():
                binding.bind_output(output.name, self.device, 0)
        return Bound(call, read)

    @contextlib.contextmanager
    def _one_line_errors(self, graph: str) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise UserError(f"{self.name}: graph '{graph}': {one_line([str(error)])}") from error


class CudaRuntime(OnnxRuntime):
    """Graphs in onnxruntime's CUDA provider, on the first GPU; raises UserError where it would fall
    back to the CPU.
    """

    name = "onnxruntime-cuda"
    device = "cuda"

    @classmethod
    def checking(cls, exported: Exported) -> list[Runtime]:
        if exported.graphs is None or not compute_capabilities():
            return []
        try:
            return [cls(exported.graphs)]
        except UserError as error:
            log.warning("parity    not checked in %s", error)
            return []

    def __init__(self, files: dict[str, Path], level: str = "all") -> None:
        if reason := no_cuda_provider():
            raise UserError(f"{self.name}: {reason}")
        # from 1.21: loads the CUDA libraries that pip installed
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        super().__init__(files, level)

    def _open(
        self, path: Path, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        # onnxruntime only logs that it falls back to the CPU; here that is an error, reported once
        onnxruntime.set_default_logger_severity(4)
        try:
            with self._one_line_errors(path.stem):
                session = onnxruntime.InferenceSession(
                    str(path), options, providers=[(CUDA, {"use_tf32": "0"})], enable_fallback=0
                )
        finally:
            onnxruntime.set_default_logger_severity(2)
        if CUDA not in session.get_providers():
            raise UserError(
                f"{self.name}: onnxruntime {onnxruntime.__version__} cannot load its CUDA provider "
                "and would run on the CPU: install the CUDA and cuDNN it was built for (pip "
                "install 'onnxruntime-gpu[cuda,cudnn]')"
            )
        return session


def no_cuda_provider() -> str:
    """Why onnxruntime cannot use a GPU here, with the remedy; "" if it may be able to."""
    if not compute_capabilities():
        return "no CUDA GPU is visible here (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    if CUDA not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} is built without CUDA: "
            "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return ""

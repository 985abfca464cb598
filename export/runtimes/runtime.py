"""What runs a bundle's graphs and engines: onnxruntime and OpenVINO on the CPU, onnxruntime and
TensorRT on the GPU.

Each runs a graph by name. `run` takes and gives arrays; `bind` leaves inputs and outputs where they
are computed, so that the graph alone is timed. TF32 is off: float32 means float32 wherever outputs
are compared.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from contract.errors import UserError
from contract.gpu import compute_capabilities
from contract.manifest import Precision
from export.tensorrt import bindings as gpu
from export.tensorrt.build import read_record, record_path, verify_engine
from export.tensorrt.engines import not_for_here, outside, profile_for

log = logging.getLogger(__name__)

Outputs = dict[str, np.ndarray]

LEVELS = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""onnxruntime's graph optimisation levels, by name."""

CUDA = "CUDAExecutionProvider"
FAILURES = (
    RuntimeError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
"""What onnxruntime raises; its errors have no base of their own."""


class Bound(NamedTuple):
    """A graph with its inputs in place: `call` runs it and waits for it, `read` gives the outputs
    of the last call.
    """

    call: Callable[[], None]
    read: Callable[[], list[np.ndarray]]


class Runtime:
    """Runs graphs by name."""

    name: str
    """As parity records and tables have it."""

    def has(self, graph: str) -> bool:
        """Whether a graph is compared here."""
        return True

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """Put a graph's inputs in place; raises UserError for inputs it does not take."""
        raise NotImplementedError

    def run(self, graph: str, feeds: Outputs) -> list[np.ndarray]:
        """Outputs of a graph, in its order; raises UserError, in one line, for whatever the runtime
        complains of.
        """
        bound = self.bind(graph, feeds)
        bound.call()
        return bound.read()


class OnnxRuntime(Runtime):
    """Graphs in onnxruntime on the CPU; `threads` 0 is one a core."""

    name = "onnxruntime-cpu"
    device = "cpu"

    def __init__(self, files: dict[str, Path], level: str = "all", threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = LEVELS[level]
        options.intra_op_num_threads = threads
        # idle threads that spin take cores from whatever runs beside
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {graph: self.open(path, options) for graph, path in files.items()}

    def open(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        """A session on a graph's file."""
        with self.in_one_line(path.stem):
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """Put a graph's inputs on the device; outputs stay there until they are read."""
        session = self.sessions[graph]
        binding = session.io_binding()

        def call() -> None:
            with self.in_one_line(graph):
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        def read() -> list[np.ndarray]:
            with self.in_one_line(graph):
                return binding.copy_outputs_to_cpu()

        with self.in_one_line(graph):
            for name, value in feeds.items():
                there = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.ascontiguousarray(value), self.device, 0
                )
                binding.bind_ortvalue_input(name, there)
            for output in session.get_outputs():
                binding.bind_output(output.name, self.device, 0)
        return Bound(call, read)

    @contextlib.contextmanager
    def in_one_line(self, graph: str) -> Iterator[None]:
        """Turn what onnxruntime raises into a UserError."""
        try:
            yield
        except FAILURES as error:
            raise UserError(
                f"{self.name}: graph '{graph}': {gpu.one_line([str(error)])}"
            ) from error


class CudaRuntime(OnnxRuntime):
    """Graphs in onnxruntime's CUDA provider, on the first GPU; raises UserError where it would fall
    back to the CPU.
    """

    name = "onnxruntime-cuda"
    device = "cuda"

    def __init__(self, files: dict[str, Path], level: str = "all") -> None:
        if reason := no_cuda_provider():
            raise UserError(f"{self.name}: {reason}")
        if hasattr(
            onnxruntime, "preload_dlls"
        ):  # from 1.21: finds the CUDA libraries that pip installed
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        super().__init__(files, level)

    def open(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        """A session whose nodes run on the GPU; onnxruntime itself would say no more than a line in
        a log.
        """
        onnxruntime.set_default_logger_severity(4)  # what is wrong is said below, once
        try:
            with self.in_one_line(path.stem):
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


class OpenVINO(Runtime):
    """Graphs in OpenVINO on the CPU: it runs bf16 graphs, which onnxruntime's CPU provider does
    not.

    `settings` are the CPU plugin's; without any it computes in float32.
    """

    name = "openvino-cpu"

    def __init__(self, files: dict[str, Path], settings: dict[str, Any] | None = None) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise UserError("OpenVINO is not installed: pip install openvino") from error

        core = openvino.Core()
        # full precision of what the graph says: the check is of the graph, not of the plugin's
        # shortcuts
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if settings is None else settings
        self.models = {}
        for graph, path in files.items():
            with gpu.signal_stack_kept():
                try:
                    self.models[graph] = core.compile_model(str(path), "CPU", settings)
                except RuntimeError as error:
                    raise UserError(
                        f"{self.name}: graph '{graph}': {gpu.one_line([str(error)])}"
                    ) from error

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """An infer request of its own, on the arrays as they are."""
        request = self.models[graph].create_infer_request()
        places = range(len(self.models[graph].outputs))

        def call() -> None:
            try:
                request.infer(feeds, share_inputs=True, share_outputs=True)
            except RuntimeError as error:
                raise UserError(
                    f"{self.name}: graph '{graph}': {gpu.one_line([str(error)])}"
                ) from error

        return Bound(
            call, lambda: [request.get_output_tensor(place).data.copy() for place in places]
        )


class EngineRuntime(Runtime):
    """Engines of one flavour on the GPU they were built for, each opened once; torch holds what
    goes in and comes out.

    Raises UserError, before an engine is opened, for one of another GPU, without weights, or
    damaged.
    """

    def __init__(self, engines: dict[str, Path]) -> None:
        self.records = {graph: verify_engine(path) for graph, path in engines.items()}
        for graph, record in self.records.items():
            if reason := not_for_here(record):
                raise UserError(f"{engines[graph]}: {reason}")
        (self.name,) = {record.flavour for record in self.records.values()}
        if not torch.cuda.is_available():
            raise UserError(
                f"{self.name}: torch, which holds the engines' buffers, sees no GPU: install torch "
                "for CUDA"
            )
        trt = gpu.load_bindings(self.name)
        self.logger = gpu.collecting_logger(trt)
        self.stream = torch.cuda.Stream()
        # engines die with their runtime, contexts with their engine
        self.kept, self.contexts = [], {}
        for graph, path in engines.items():
            record = self.records[graph]
            engine, runtime = gpu.load_engine(
                trt, path, record.built, record.options.version_compatible, self.logger
            )
            self.contexts[graph] = self.open_context(trt, graph, engine)
            self.kept += [runtime, engine]

    def open_context(self, trt: Any, graph: str, engine: Any) -> Any:
        """What executes an engine; raises UserError without the memory for it."""
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX would compile kernels for a shape beside the first calls, and they are
            # what is timed
            config = engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise gpu.failure(f"{self.name}: graph '{graph}' cannot be set up", self.logger.errors)
        return context

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """Copy a graph's inputs to the GPU and make room for its outputs there."""
        context, record = self.contexts[graph], self.records[graph]
        shapes = {name: value.shape for name, value in feeds.items()}
        profile = profile_for(record, shapes)
        if profile is None:
            raise UserError(f"{self.name}: graph '{graph}': {outside(record, shapes)}")
        for tensor in record.inputs:
            if feeds[tensor.name].dtype.name != tensor.dtype:
                given = feeds[tensor.name].dtype.name
                raise UserError(
                    f"{self.name}: graph '{graph}': '{tensor.name}' is {given}, it takes "
                    f"{tensor.dtype}"
                )
        inputs = {
            t.name: torch.from_numpy(np.ascontiguousarray(feeds[t.name])).cuda()
            for t in record.inputs
        }
        self.place(graph, profile, inputs)
        outputs = {}
        for tensor in record.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if min(shape, default=0) < 0:
                raise gpu.failure(
                    f"{self.name}: graph '{graph}': no shape for '{tensor.name}'",
                    self.logger.errors,
                )
            outputs[tensor.name] = torch.empty(
                shape, dtype=getattr(torch, tensor.dtype), device="cuda"
            )

        def call() -> None:
            # every time anew: another bound graph may have used the context in between
            self.place(graph, profile, inputs | outputs)
            self.stream.wait_stream(torch.cuda.current_stream())
            if not context.execute_async_v3(self.stream.cuda_stream):
                raise gpu.failure(f"{self.name}: graph '{graph}' does not run", self.logger.errors)
            try:
                self.stream.synchronize()
            except RuntimeError as error:
                reasons = [*self.logger.errors, str(error)]
                raise gpu.failure(
                    f"{self.name}: graph '{graph}' failed on the GPU", reasons
                ) from error

        return Bound(call, lambda: [as_array(outputs[tensor.name]) for tensor in record.outputs])

    def place(self, graph: str, profile: int, tensors: dict[str, torch.Tensor]) -> None:
        """Tell a context its profile, the inputs' shapes and where everything lies."""
        context, failed = self.contexts[graph], []
        self.logger.errors.clear()
        if context.active_optimization_profile != profile:
            if not context.set_optimization_profile_async(profile, self.stream.cuda_stream):
                failed.append(f"profile {profile}")
            self.stream.synchronize()
        for tensor in self.records[graph].inputs:
            shape = tuple(tensors[tensor.name].shape)
            if not context.set_input_shape(tensor.name, shape):
                failed.append(f"input '{tensor.name}' {list(shape)}")
        failed += [
            name
            for name, tensor in tensors.items()
            if not context.set_tensor_address(name, tensor.data_ptr())
        ]
        if failed:
            raise gpu.failure(
                f"{self.name}: graph '{graph}' refuses {', '.join(failed)}", self.logger.errors
            )


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any device as an array; numpy has no bfloat16, so that becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def no_cuda_provider() -> str:
    """Why onnxruntime cannot use a GPU here, with the remedy; "" where it might."""
    if not compute_capabilities():
        return "no CUDA GPU is visible here (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    if CUDA not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} is built without CUDA: "
            "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return ""


def cpu_runtime(files: dict[str, Path], precision: Precision) -> Runtime:
    """The runtime that checks graphs of a precision on the CPU; its name says so where it computes
    in another.
    """
    try:
        # onnxruntime's CPU provider has no bf16 convolutions
        runtime = OpenVINO(files) if precision == "bf16" else OnnxRuntime(files)
    except UserError as error:
        raise UserError(f"bf16 graphs are run in OpenVINO on the CPU. {error}") from error
    if precision in ("fp16", "bf16"):
        runtime.name += " (fp32 arithmetic)"
    return runtime


def runtimes_here(
    precision: Precision,
    graphs: dict[str, Path] | None = None,
    engines: dict[str, dict[str, Path]] | None = None,
) -> list[Runtime]:
    """The runtimes that check a bundle's graphs, and its engines by flavour, on this machine.

    Graphs: a CPU always and, where there is a GPU, onnxruntime's CUDA provider. Engines: where
    there is a GPU that they were built for. What a GPU machine leaves out is logged with its
    reason.
    """
    result: list[Runtime] = []
    if graphs:
        result.append(cpu_runtime(graphs, precision))
        if compute_capabilities():
            try:
                result.append(CudaRuntime(graphs))
            except UserError as error:
                log.warning("parity    not checked in %s", error)
    for flavour, files in (engines or {}).items():
        reason = not_for_here(read_record(record_path(next(iter(files.values())))))
        if reason:
            log.info("parity    %s engines were not run: %s", flavour, reason)
        else:
            result.append(EngineRuntime(files))
    return result

"""TensorRT engines on the GPU."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contract.errors import UserError
from export.runtimes.base import Bound, Exported, Outputs, Runtime
from export.tensorrt import bindings as gpu
from export.tensorrt.build import read_record, record_path, verify_engine
from export.tensorrt.engines import not_for_here, outside, profile_for

log = logging.getLogger(__name__)


class EngineRuntime(Runtime):
    """Engines of one flavour on the GPU they were built for, each opened once; torch holds inputs
    and outputs.

    Raises UserError, before an engine is opened, for one of another GPU, without weights, or
    damaged.
    """

    @classmethod
    def checking(cls, exported: Exported) -> list[Runtime]:
        result: list[Runtime] = []
        for flavour, files in (exported.engines or {}).items():
            reason = not_for_here(read_record(record_path(next(iter(files.values())))))
            if reason:
                log.info("parity    %s engines were not run: %s", flavour, reason)
            else:
                result.append(cls(files))
        return result

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
            self.contexts[graph] = self._open_context(trt, graph, engine)
            self.kept += [runtime, engine]

    def _open_context(self, trt: Any, graph: str, engine: Any) -> Any:
        """An engine's execution context; raises UserError if there is not enough memory."""
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # by default TensorRT-RTX compiles a shape's kernels during the first calls, which are
            # timed
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
        """Copy a graph's inputs to the GPU and allocate its outputs there."""
        context, record = self.contexts[graph], self.records[graph]
        shapes = {name: value.shape for name, value in feeds.items()}
        profile = profile_for(record, shapes)
        if profile is None:
            raise UserError(f"{self.name}: graph '{graph}': {outside(record, shapes)}")
        for tensor in record.inputs:
            if feeds[tensor.name].dtype.name != tensor.dtype:
                given = feeds[tensor.name].dtype.name
                raise UserError(
                    f"{self.name}: graph '{graph}': '{tensor.name}' is {given}, but must be "
                    f"{tensor.dtype}"
                )
        inputs = {
            t.name: torch.from_numpy(np.ascontiguousarray(feeds[t.name])).cuda()
            for t in record.inputs
        }
        self._place(graph, profile, inputs)
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
            # on every call: another bound graph may have used the context in between
            self._place(graph, profile, inputs | outputs)
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

    def _place(self, graph: str, profile: int, tensors: dict[str, torch.Tensor]) -> None:
        """Set a context's profile, the inputs' shapes and all addresses."""
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

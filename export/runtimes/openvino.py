"""OpenVINO on the CPU."""

import ctypes
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contract.errors import UserError, first_line, one_line
from contract.graph_call import inference_precision
from export.runtimes.base import Bound, Exported, Outputs, Runtime, on_cpu

log = logging.getLogger(__name__)


class SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Restore this thread's signal stack.

    OpenVINO sets its own and, once several runtimes have been opened and closed, leaves one that no
    longer exists: the next signal, such as Ctrl-C, would crash the process instead of stopping it.
    """
    libc, before = ctypes.CDLL(None), SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class OpenVINO(Runtime):
    """Graphs in OpenVINO on the CPU, which runs bf16 graphs as onnxruntime's CPU provider does not.

    `settings` are the CPU plugin's; the default computes in float32, with `runtime` openvino-bf16
    in bf16 where the processor has it.
    """

    name = "openvino-cpu"

    @classmethod
    def checking(cls, exported: Exported) -> list[Runtime]:
        if exported.graphs is None or exported.precision != "bf16":
            return []
        try:
            return [on_cpu(cls(exported.graphs), exported.precision)]
        except UserError as error:
            raise UserError(f"bf16 graphs are run in OpenVINO on the CPU. {error}") from error

    @classmethod
    def faster(cls, exported: Exported) -> "list[OpenVINO]":
        """Graphs of bf16 with what they leave in float32 computed in bf16; none where they are of
        another precision, the processor or OpenVINO is missing, or OpenVINO does not open them: it
        only would have been faster.
        """
        # int8 leaves little in float32, and turning that into bf16 and back makes it slower
        if exported.graphs is None or exported.precision != "bf16":
            return []
        if importlib.util.find_spec("openvino") is None:
            return []
        try:
            made = cls(exported.graphs, runtime="openvino-bf16")
        except (UserError, RuntimeError, OSError) as error:  # of its libraries too
            log.info("openvino  computes in float32: in bf16, %s", first_line(error))
            return []
        made.name += " (bf16 arithmetic)"
        return [made] if made.precision == "bf16" else []

    def __init__(
        self,
        files: dict[str, Path],
        settings: dict[str, Any] | None = None,
        runtime: str = "openvino",
    ) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise UserError("OpenVINO is not installed: pip install openvino") from error

        core = openvino.Core()
        self.precision = inference_precision(core, runtime)
        settings = {"INFERENCE_PRECISION_HINT": self.precision} | (settings or {})
        self.models = {}
        for graph, path in files.items():
            with _signal_stack_kept():
                try:
                    self.models[graph] = core.compile_model(str(path), "CPU", settings)
                except RuntimeError as error:
                    raise UserError(
                        f"{self.name}: graph '{graph}': {one_line([str(error)])}"
                    ) from error

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        request = self.models[graph].create_infer_request()
        places = range(len(self.models[graph].outputs))

        def call() -> None:
            try:
                request.infer(feeds, share_inputs=True, share_outputs=True)
            except RuntimeError as error:
                raise UserError(
                    f"{self.name}: graph '{graph}': {one_line([str(error)])}"
                ) from error

        return Bound(
            call, lambda: [request.get_output_tensor(place).data.copy() for place in places]
        )

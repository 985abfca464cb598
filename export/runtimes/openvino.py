"""OpenVINO on the CPU."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contract.errors import UserError, one_line
from export.runtimes.base import Bound, Exported, Outputs, Runtime, on_cpu


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

    `settings` are the CPU plugin's; the default computes in float32.
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

    def __init__(self, files: dict[str, Path], settings: dict[str, Any] | None = None) -> None:
        try:
            import openvino
        except ModuleNotFoundError as error:
            raise UserError("OpenVINO is not installed: pip install openvino") from error

        core = openvino.Core()
        # by itself the plugin may compute float32 graphs in bf16; parity is of the graph
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if settings is None else settings
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

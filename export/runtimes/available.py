"""The runtimes that check an export on this machine."""

from pathlib import Path

from contract.manifest import Precision
from export.runtimes.base import Exported, Runtime
from export.runtimes.cast import TorchRuntime
from export.runtimes.engine import EngineRuntime
from export.runtimes.onnx import CudaRuntime, OnnxRuntime
from export.runtimes.openvino import OpenVINO

RUNTIMES: tuple[type[Runtime], ...] = (
    OnnxRuntime,
    OpenVINO,
    CudaRuntime,
    TorchRuntime,
    EngineRuntime,
)


def runtimes_here(exported: Exported) -> list[Runtime]:
    """Every runtime that checks the graphs and engines of an export on this machine.

    Graphs: a CPU runtime always and, where there is a GPU, onnxruntime's CUDA provider. Engines:
    where there is a GPU that they were built for.
    """
    return [runtime for kind in RUNTIMES for runtime in kind.checking(exported)]


def cpu_runtime(files: dict[str, Path], precision: Precision) -> Runtime:
    """The runtime that checks graphs of a precision on the CPU; raises UserError where it is not
    installed.
    """
    exported = Exported(precision, graphs=files)
    (runtime,) = (*OnnxRuntime.checking(exported), *OpenVINO.checking(exported))
    return runtime

"""The cast student in torch on the CPU, rounded as a GPU rounds.

onnxruntime and OpenVINO compute fp16 and bf16 graphs in float32 on the CPU, where nothing overflows
and nothing is rounded between two layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from contract.manifest import Precision
from contract.signature import FUSED
from export.modules import Part
from export.runtimes.base import Bound, Exported, Outputs, Runtime

_HALF = (torch.float16, torch.bfloat16)
_PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution")
}


class _WideSums(TorchDispatchMode):
    """Sums products of half-precision matrices in float32 and rounds once, as tensor cores do.

    torch's own CPU kernels do the same but take ten times as long.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        halves = [
            value.dtype
            for value in args
            if isinstance(value, torch.Tensor) and value.dtype in _HALF
        ]
        if function.overloadpacket not in _PRODUCTS or not halves:
            return function(*args, **(kwargs or {}))
        wide = (value.float() if isinstance(value, torch.Tensor) else value for value in args)
        return function(*wide, **(kwargs or {})).to(halves[0])


class TorchRuntime(Runtime):
    """Modules of the cast student on the CPU, except `fused`, which consists of the others."""

    @classmethod
    def checking(cls, exported: Exported) -> list[Runtime]:
        if not exported.parts or exported.precision not in ("fp16", "bf16"):
            return []
        return [cls(exported.parts, exported.precision)]

    def __init__(self, parts: Sequence[Part], precision: Precision) -> None:
        self.name = f"torch-{precision}-cpu"
        self.modules = {
            part.signature.graph: part.module.eval()
            for part in parts
            if part.signature.graph != FUSED
        }

    def has(self, graph: str) -> bool:
        return graph in self.modules

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        inputs = [torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values()]
        outputs: list[torch.Tensor] = []

        def call() -> None:
            outputs[:] = _compute(self.modules[graph], inputs)

        return Bound(call, lambda: [value.numpy() for value in outputs])


def _compute(module: Callable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A module's outputs, its attention step by step as in its graph and at its precision."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        # no_grad: under inference_mode attention reaches _WideSums as one operator
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _WideSums():
            result = module(*inputs)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return list(result) if isinstance(result, tuple) else [result]

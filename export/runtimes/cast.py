"""The cast student in torch on the CPU, number for number as a GPU computes it: onnxruntime and
OpenVINO compute fp16 and bf16 graphs in float32 there, where nothing overflows and nothing is
rounded between two layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from contract.manifest import Precision
from contract.signature import FUSED
from export.graph import Part
from export.runtimes.runtime import Bound, Outputs, Runtime

HALF = (torch.float16, torch.bfloat16)
PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution")
}


class WideSums(TorchDispatchMode):
    """Products of half matrices are summed in float32 and rounded once, as tensor cores do.

    (torch's own on a CPU sum so too, and take ten times as long.)
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one operator."""
        halves = [
            value.dtype for value in args if isinstance(value, torch.Tensor) and value.dtype in HALF
        ]
        if function.overloadpacket not in PRODUCTS or not halves:
            return function(*args, **(kwargs or {}))
        wide = (value.float() if isinstance(value, torch.Tensor) else value for value in args)
        return function(*wide, **(kwargs or {})).to(halves[0])


class TorchRuntime(Runtime):
    """Modules of the cast student on the CPU, but for `fused`, which is made of the others."""

    def __init__(self, parts: Sequence[Part], precision: Precision) -> None:
        self.name = f"torch-{precision}-cpu"
        self.modules = {
            part.signature.graph: part.module.eval()
            for part in parts
            if part.signature.graph != FUSED
        }

    def has(self, graph: str) -> bool:
        """Whether a graph is run here."""
        return graph in self.modules

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """A module and its inputs, in the order of its signature."""
        inputs, message = (
            [torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values()],
            [],
        )

        def call() -> None:
            message[:] = computed(self.modules[graph], inputs)

        return Bound(call, lambda: [value.numpy() for value in message])


def computed(module: Callable, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A module's outputs, its attention step by step as in its graph and at its precision."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        # no_grad: in inference mode operators reach WideSums whole, attention among them
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), WideSums():
            result = module(*inputs)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return list(result) if isinstance(result, tuple) else [result]


def cast_runtimes(parts: Sequence[Part], precision: Precision) -> list[Runtime]:
    """What computes in `precision` itself where the CPU's runtimes of graphs do not."""
    return [TorchRuntime(parts, precision)] if precision in ("fp16", "bf16") else []

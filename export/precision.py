"""Precision lives in the graph: a cast before tracing (fp16, bf16), or Q/DQ nodes after calibration (int8)."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from distill.errors import UserError
from distill.preprocess import Preprocess
from distill.targets import FeatureNormalizer
from export.graph import DPT, Student

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CALIBRATION = {
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
    "minmax": CalibrationMethod.MinMax,
}

QUANTIZED = ["MatMul", "Gemm", "Conv"]
"""Where int8 pays. Quantising norms, softmax or GELU costs accuracy and saves nothing."""

SMALLEST = 16
"""Matrices with fewer rows or columns stay in float: kernels have no use for them."""


def cast_student(student: Student, precision: str) -> Student:
    """A copy whose network, interaction and heads compute in `precision`.

    What goes in and comes out stays float32, as do the picture's normalisation, the way back to the teachers' units and
    the task heads, all of them tiny but DPT's, which is cast too.
    """
    if precision not in ("fp16", "bf16"):
        return student
    deployment = copy.deepcopy(student.deployment).to(DTYPES[precision])
    for module in deployment.modules():
        if isinstance(module, Preprocess | FeatureNormalizer):
            module.float()
    heads = tuple(
        replace(head, module=copy.deepcopy(head.module).to(DTYPES[precision])) if head.kind == DPT else head
        for head in student.heads
    )
    return replace(student, deployment=deployment, heads=heads)


class Feeds(CalibrationDataReader):
    """Calibration inputs, one after the other, in the ranges that are asked for."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds
        self.items: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with these."""
        self.items = iter(self.feeds[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next inputs, None after the last."""
        return next(self.items, None)


def quantize(source: Path, target: Path, feeds: list[dict[str, np.ndarray]], method: str) -> None:
    """Write an int8 copy of a float32 graph, its ranges taken from `feeds`: symmetric s8s8 Q/DQ, one file for all runtimes.

    Biases stay in float: TensorRT refuses onnxruntime's 32-bit ones. Raises UserError without feeds.
    """
    if not feeds:
        raise UserError("int8 needs pictures to calibrate on: give --calibration DIR")
    model = onnx.load(source)
    # onnxruntime's own shape inference trips over the exporter's
    del model.graph.value_info[:]
    small = [
        node.name for node in model.graph.node if node.op_type in QUANTIZED and smallest_side(model, node) < SMALLEST
    ]
    onnx.save(model, target)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises steps that do not apply to graphs of torch's exporter, and prints
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            quantize_static(
                str(target), str(target), Feeds(feeds), quant_format=QuantFormat.QDQ, op_types_to_quantize=QUANTIZED,
                per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, nodes_to_exclude=small,
                calibrate_method=CALIBRATION[method],
                extra_options={
                    "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
                    # one picture at a time: otherwise every activation of all of them is held at once
                    "CalibStridedMinMax": 1,
                },
            )  # fmt: skip
        finally:
            logging.disable(before)


def smallest_side(model: onnx.ModelProto, node: onnx.NodeProto) -> int:
    """The smallest side of a node's constant matrix or kernel (output and input channels), a large number without one."""
    for tensor in model.graph.initializer:
        if tensor.name in node.input[1:2]:
            # runtimes take no scale per channel for a stack of matrices (grouped maps): those stay in float too
            return 0 if node.op_type == "MatMul" and len(tensor.dims) > 2 else min(tensor.dims[:2])
    return 1 << 30

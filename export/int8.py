"""int8: ranges of activations from photographs, then Q/DQ nodes in every graph.

Static symmetric s8s8 with one scale per channel of weights: one file for all runtimes, and a
picture's result does not depend on its batch. Biases stay in float because TensorRT refuses
onnxruntime's 32-bit ones.
"""

import contextlib
import io
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import HistogramCollector, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from PIL import Image

from contract.errors import Failure
from contract.signature import IMAGE
from contract.views import SQUASH, ViewPolicy
from export.modules import Part
from export.photographs import shown
from export.runtimes.base import Outputs
from export.runtimes.onnx import OnnxRuntime
from export.to_onnx import OPSET, check, save

log = logging.getLogger(__name__)

_QUANTIZED = ["MatMul", "Gemm", "Conv"]
"""Where int8 pays. Quantizing norms, softmax or GELU costs accuracy and saves nothing."""

SMALLEST = 16
"""Matrices with fewer rows or columns stay in float: int8 kernels do not speed them up."""

METHODS = {
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
    "minmax": CalibrationMethod.MinMax,
}
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    # a product is added to, normalised or activated before it is read again: quantizing it in
    # between only costs accuracy
    "OpTypesToExcludeOutputQuantization": _QUANTIZED,
}


class Ranges(HistogramCollector):
    """Ranges of tensors over pictures, as onnxruntime finds them: `collect` the tensors of each
    picture, then `compute`.
    """

    def __init__(self, method: str) -> None:
        # entropy tries every range beyond 128 bins, in Python
        bins = 2048 if method == "percentile" else 512
        super().__init__(method, method == "percentile", bins, 128, 99.999, "same")
        self.seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def collect(self, name_to_arr: Outputs) -> None:
        """Add the values of one picture; raises Failure for values that are not finite."""
        for name, values in name_to_arr.items():
            low, high = values.min(), values.max()
            if not np.isfinite(high - low):
                raise Failure(f"int8: tensor '{name}' is not finite on a calibration picture")
            before = self.seen.get(name, (low, high))
            self.seen[name] = (min(low, before[0]), max(high, before[1]))
        if self.method != "minmax":
            with _quiet():
                super().collect(name_to_arr)

    def collect_absolute_value(self, name_to_arr: Outputs) -> None:
        # onnxruntime's own method sorts the magnitudes, which takes longer than the network
        for name, values in name_to_arr.items():
            magnitudes = np.abs(values).ravel()
            low, high = self.seen[name]
            top = max(float(magnitudes.max()), 1e-30)
            counts, edges = self.histogram_dict.get(name, (np.zeros(0, np.int64), np.zeros(1)))[:2]
            if top > 8 * edges[-1]:  # the first picture, or one of another order
                bins, width = self.num_bins, top / self.num_bins
            else:
                width = float(edges[-1]) / len(counts)
                bins = max(len(counts), math.ceil(top / width))
            before = np.bincount((edges[:-1] / width + 0.5).astype(np.int64), counts, bins).astype(
                np.int64
            )
            result = np.bincount(
                np.minimum((magnitudes / np.float32(width)).astype(np.int64), bins - 1),
                minlength=bins,
            )
            result += before
            edges = (np.arange(bins + 1) * width).astype(values.dtype)
            self.histogram_dict[name] = (result, edges, np.asarray(low), np.asarray(high))

    def merge_histogram(
        self, old_histogram: tuple, data_arr: np.ndarray, new_min, new_max, new_threshold
    ) -> tuple:
        # onnxruntime's own method keeps the width of the bins and would make millions of them
        counts, edges, low, high, threshold = old_histogram
        if new_threshold <= 8 * threshold:
            return super().merge_histogram(old_histogram, data_arr, new_min, new_max, new_threshold)
        result, wider = np.histogram(data_arr, self.num_bins, range=(-new_threshold, new_threshold))
        result += np.histogram((edges[:-1] + edges[1:]) / 2, wider, weights=counts)[0].astype(
            result.dtype
        )
        return result, wider, min(low, new_min), max(high, new_max), new_threshold

    def compute(self) -> TensorsData:
        result = self.seen
        if self.method != "minmax" and result:
            with _quiet():
                result = self.compute_collection_result()
        ranges = {
            n: TensorData(lowest=np.asarray(r[0]), highest=np.asarray(r[1]))
            for n, r in result.items()
        }
        return TensorsData(METHODS[self.method], ranges)


def quantize_graphs(
    parts: Sequence[Part], paths: dict[str, Path], method: str, images: Sequence[np.ndarray]
) -> None:
    """Quantize the graphs of `parts` at their `paths`, with ranges measured on `images`, uint8
    [1, H, W, 3] each.
    """
    models = {part.signature.graph: onnx.load(paths[part.signature.graph]) for part in parts}
    for model in models.values():
        del model.graph.value_info[:]  # onnxruntime's own shape inference trips over the exporter's
    ranges = _calibrate(parts, models, method, images)
    for part in parts:
        begun = time.perf_counter()
        graph = part.signature.graph
        model = insert(models[graph], ranges[graph].compute())
        path = paths[graph]
        for old in (path, path.with_name(path.name + ".data")):
            old.unlink(missing_ok=True)
        save(model, path)
        check(model, path, part.signature, OPSET["int8"])
        log.info(
            "int8      %-16s %6.1f MB  %4.1f s",
            graph,
            path.stat().st_size / 1e6,
            time.perf_counter() - begun,
        )


def _calibrate(
    parts: Sequence[Part],
    models: dict[str, onnx.ModelProto],
    method: str,
    images: Sequence[np.ndarray],
) -> dict[str, Ranges]:
    """Ranges of the inputs of every graph's matrices and kernels, by graph; each graph is fed by
    those before it.
    """
    begun = time.perf_counter()
    ranges, watched = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for part in parts:
            graph = part.signature.graph
            ranges[graph], watched[graph] = Ranges(method), activations(models[graph])
            files[graph] = Path(folder) / f"{graph}.onnx"
            model = onnx.ModelProto()
            model.CopyFrom(models[graph])
            ports = {value.name for value in (*model.graph.input, *model.graph.output)}
            model.graph.output.extend(
                onnx.ValueInfoProto(name=name) for name in watched[graph] if name not in ports
            )
            save(model, files[graph])
        runtime = OnnxRuntime(files)
        names = {
            graph: [o.name for o in session.get_outputs()]
            for graph, session in runtime.sessions.items()
        }
        for image in images:
            known: Outputs = {IMAGE: image}
            for part in parts:
                graph = part.signature.graph
                feeds = {port.name: known[port.name] for port in part.signature.inputs}
                result = feeds | dict(zip(names[graph], runtime.run(graph, feeds), strict=True))
                ranges[graph].collect({name: result[name] for name in watched[graph]})
                known |= {port.name: result[port.name] for port in part.signature.outputs}
    log.info("int8      %d pictures  %4.1f s", len(images), time.perf_counter() - begun)
    return ranges


def activations(model: onnx.ModelProto) -> list[str]:
    """Inputs of the nodes to be quantized, weights excluded."""
    weights, left_out = {tensor.name for tensor in model.graph.initializer}, set(left_alone(model))
    return sorted(
        {
            name
            for node in model.graph.node
            if node.op_type in _QUANTIZED and node.name not in left_out
            for name in node.input[:2]
            if name not in weights
        }
    )


def insert(model: onnx.ModelProto, ranges: TensorsData) -> onnx.ModelProto:
    """A graph with Q/DQ nodes before the quantized nodes, and nowhere else."""
    left_out = left_alone(model)
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            # Weights of seven bits: without VNNI, x86 CPUs add pairs of products in 16 bits, which
            # eight bits overflow (least cosine of UMT's spaces in onnxruntime: 0.97).
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=left_out,
            op_types_to_quantize=_QUANTIZED,
            extra_options=dict(_OPTIONS),
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    result = quantizer.model.model
    _spare(result, left_out)
    del result.graph.value_info[:]
    return result


def _spare(model: onnx.ModelProto, left_out: Sequence[str]) -> None:
    """Give all but the quantized nodes the float tensor back: onnxruntime hands rounded ones to
    every reader, which would send a CNN's shortcuts through int8 block after block.
    """
    exact = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    rounded = {
        node.output[0]: exact[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in exact
    }
    for node in model.graph.node:
        if node.op_type not in _QUANTIZED or node.name in left_out:
            node.input[:] = [rounded.get(name, name) for name in node.input]


@contextlib.contextmanager
def _quiet():
    # onnxruntime advises steps that do not apply to graphs of torch's exporter, and prints
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def left_alone(model: onnx.ModelProto) -> list[str]:
    """Names of nodes that stay in float: their matrix or kernel is too small, they compute the same
    for every picture of a size, or a norm over a picture's own channels follows, which makes the
    rounding of a channel that hardly varies as large as any signal.
    """
    normed = _normed(model)
    sides = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    seen, result = {value.name for value in model.graph.input}, []
    for node in model.graph.node:
        depends = not seen.isdisjoint(node.input)
        if depends and node.op_type not in ("Shape", "Size"):
            seen.update(node.output)
        if node.op_type in _QUANTIZED and (
            not depends
            or smallest_side(node, sides) < SMALLEST
            or not normed.isdisjoint(node.output)
        ):
            result.append(node.name)
    return result


def _normed(model: onnx.ModelProto) -> set[str]:
    """Tensors that instance norms read (a group norm is one, between changes of shape)."""
    result: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type == "InstanceNormalization" or (
            node.op_type == "Reshape" and not result.isdisjoint(node.output)
        ):
            result.add(node.input[0])
    return result


def smallest_side(node: onnx.NodeProto, sides: dict[str, Sequence[int]]) -> int:
    """Smallest side of a node's constant matrix or kernel (output and input channels); a large
    number without one.
    """
    dims = next((sides[name] for name in node.input[1:2] if name in sides), None)
    if dims is None:
        return 1 << 30
    # runtimes take no scale per channel for a stack of matrices (grouped maps): those stay in float
    # too
    return 0 if node.op_type == "MatMul" and len(dims) > 2 else min(dims[:2])


def prepare(
    photos: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], view: ViewPolicy = SQUASH
) -> list[np.ndarray]:
    """Pictures as graphs read them, uint8 [1, H, W, 3] each, with `sizes` (height, width) in
    turn.
    """
    return [shown(photo, sizes[n % len(sizes)], view)[None] for n, photo in enumerate(photos)]

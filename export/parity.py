"""Does every graph say what the torch student says? On real photographs, several batches and sizes, in real runtimes."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.methods.deployment import BACKBONE
from export.bundle import ParityRecord, Precision
from export.graph import DPT, Part, Student
from export.runtimes import Outputs, Runtime
from export.signature import FEATURES, FEATURES_GLOBAL, FUSED, IMAGE, layer_names

TOLERANCE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
"""Least cosine between a graph's output and the student's, on every picture."""


def run_chain(runtime: Runtime, parts: Sequence[Part], image: np.ndarray) -> dict[str, Outputs]:
    """Outputs of every graph, each fed from those before it as in a server."""
    known: Outputs = {IMAGE: image}
    found: dict[str, Outputs] = {}
    for part in parts:
        signature = part.signature
        feeds = {port.name: known[port.name] for port in signature.inputs}
        found[signature.graph] = dict(
            zip((port.name for port in signature.outputs), runtime.run(signature.graph, feeds), strict=True)
        )
        if signature.graph != FUSED:
            known |= found[signature.graph]
    return found


@torch.inference_mode()
def reference(student: Student, parts: Sequence[Part], image: Tensor) -> Outputs:
    """What the student itself says of uint8 [B, H, W, 3], by output name: from `Deployment`, not from the graphs' modules."""
    deployment = student.deployment
    predictions = deployment(image.permute(0, 3, 1, 2).float() / 255)
    found: Outputs = {}
    for label, prediction in predictions.items():
        flat = prediction.patches.flatten(1, 2)
        if label == BACKBONE:
            found["backbone_global"], found["backbone_patches"] = prediction.token.numpy(), flat.numpy()
            found[FEATURES] = prediction.patches.numpy()
            found[FEATURES_GLOBAL] = prediction.token.unsqueeze(1).numpy()
            continue
        if prediction.token is not None:
            found[f"{label}_token"] = prediction.token.numpy()
        found[f"{label}_patches"] = flat.numpy()
    if student.layer_strides:
        layers = student.encoder.layers(image.permute(0, 3, 1, 2))
        values = (value for summary, patches in layers for value in (patches, summary.unsqueeze(1)))
        found |= {name: value.numpy() for name, value in zip(layer_names(len(layers)), values, strict=True)}
    for head in student.heads:
        seen = predictions[head.about["reads"]]
        match head.task:
            case "classification":
                vector = seen.summary if seen.token is None else seen.token
                found["classification_logits"] = head.module(vector).numpy()
            case "segmentation":
                found["segmentation_logits"] = head.module(seen.patches).flatten(2).transpose(1, 2).numpy()
            case "depth":
                found["depth"] = head.module(layers if head.kind == DPT else seen.patches).flatten(1).numpy()
    return found


def compare(got: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine [B] and largest absolute difference [B] of each picture's output; NaN counts as cosine -1."""
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (got, wanted))
    whole = np.isfinite(a).all(1)
    a = np.where(whole[:, None], a, 0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
    largest = np.where(whole, np.abs(a - b).max(1, initial=0), np.finfo(np.float64).max)
    return np.where(whole, cosine, -1.0), largest


def check_sizes(stride: int, sizes: Sequence[tuple[int, int]], dynamic: bool) -> list[tuple[int, int]]:
    """Sizes (height, width) to compare at: those asked for and, if sizes vary, two that a fixed embedding would get wrong.

    One is not square; one has as many positions as the first size, in another aspect ratio.
    """
    found = list(dict.fromkeys(sizes))
    if dynamic:
        rows, columns = found[0][0] // stride, found[0][1] // stride
        found.append((rows * stride, (columns + 1) * stride))
        divisor = next((n for n in range(2, rows + 1) if rows % n == 0), 1)
        found.append((rows // divisor * stride, columns * divisor * stride))
    return list(dict.fromkeys(found))


def engine_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes (height, width) to compare engines at: those asked for and all corners of the profile they make."""
    ends = [(min(sides), max(sides)) for sides in zip(*sizes, strict=True)]
    return list(dict.fromkeys([*sizes, *itertools.product(*ends)]))


def measure(
    student: Student, parts: Sequence[Part], runtimes: Sequence[Runtime], photos: Sequence[tuple[str, Image.Image]],
    batches: Sequence[int], sizes: Sequence[tuple[int, int]], precision: Precision,
) -> list[ParityRecord]:  # fmt: skip
    """Compare every output of every graph in all runtimes at all batches and sizes."""
    rows = []
    for height, width in sizes:
        for batch in batches:
            chosen = [photos[n % len(photos)] for n in range(batch)]
            pixels = np.stack(
                [np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)) for _, photo in chosen]
            )
            wanted = reference(student, parts, torch.from_numpy(pixels))
            compared = [
                (runtime.name, graph, output, got)
                for runtime in runtimes
                for graph, outputs in run_chain(runtime, parts, pixels).items()
                for output, got in outputs.items()
                if output in wanted  # `spaces` lives between graphs; what heads make of it is compared
            ]
            for runtime_name, graph, output, got in compared:
                cosine, largest = compare(got, wanted[output])
                worst = int(cosine.argmin())
                rows.append(ParityRecord(
                    graph=graph, output=output, runtime=runtime_name, batch=batch, height=height, width=width,
                    cosine=float(cosine[worst]), max_abs=float(largest.max()), worst_image=chosen[worst][0],
                    passed=bool(cosine[worst] >= TOLERANCE[precision]),
                ))  # fmt: skip
    return rows

"""Agreement of a detector's graphs with torch, on maps that the student predicts of photographs.

The order of boxes is that of near-equal scores, which rounding changes: boxes are compared with
those they are nearest to.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from contract.detection import probabilities, text_inputs
from contract.errors import Failure, UserError
from contract.parity_record import ParityRecord
from contract.signature import DETECTOR, TEXT_DETECTOR
from contract.views import ViewPolicy
from distill.models.grounding_dino import TextSide
from export.agreement import agreement
from export.detector import Detector, DetectorGraph
from export.graph import Student
from export.modules import Part
from export.parity import reference
from export.photographs import shown
from export.runtimes.base import Exported, Outputs, Runtime
from export.runtimes.onnx import CudaRuntime, OnnxRuntime

TOLERANCE = 1e-3
"""Of a probability, of a box's place as a share of the picture, and of a token's features as a
share of their length.
"""

_MOST_SPARE = 10 * TOLERANCE
"""Added to it, at most, where float32 of torch is not exact itself."""

_LABELS = (
    ("cat",),
    ("person", "traffic light", "dog", "cup", "chair", "car", "bird", "horse", "tree", "building"),
)
"""A short and a long prompt."""

_GRAPHS = {"text": TEXT_DETECTOR, "logits": DETECTOR, "boxes": DETECTOR}
"""By output."""


def compare_detector(
    detector: Detector,
    student: Student,
    parts: Sequence[Part],
    graphs: tuple[Part, Part],
    paths: dict[str, Path],
    photos: Sequence[tuple[str, Image.Image]],
    size: tuple[int, int],
    max_batch: int,
) -> list[ParityRecord]:
    """Compare both `graphs` with torch, on pictures of `size` (height, width), in onnxruntime on
    the CPU, which serves them, and on a GPU where there is one.

    Where float32 of torch is further than the tolerance from a graph, both are compared with
    float64: the graph may be twice as far from it as torch is, up to a limit. What is not finite
    never agrees. Raises UserError for a vocabulary without letters, Failure where torch itself
    returns NaN or infinity.
    """
    exported = Exported("fp32", graphs=paths)
    runtimes = [*OnnxRuntime.checking(exported), *CudaRuntime.checking(exported)]
    rows = []
    for labels, batch in zip(_LABELS, (1, min(2, max_batch)), strict=True):
        chosen = photos[:batch]
        known = reference(
            student, parts, _images([photo for _, photo in chosen], size, student.view)
        )
        try:
            prompt = text_inputs(labels, detector.tokenizer)
        except ValueError as error:
            raise UserError(f"--detector {detector.source}: {error}") from error
        for name, value in prompt._asdict().items():
            known[name] = np.repeat(value, len(chosen), axis=0)
        known["text_mask"] = np.ones_like(known["ids"], dtype=bool)
        maps = [port.name for port in graphs[1].signature.inputs[: len(graphs[1].module.grids)]]
        feeds = [known[name] for name in (*maps, "text_mask", "self_mask", "position_ids", "ids")]
        wanted = _in_torch(graphs, feeds, torch.float32)
        for name, value in wanted.items():
            if not (value < np.inf).all() or (name != "logits" and not np.isfinite(value).all()):
                raise Failure(
                    f"--detector {detector.source}: its own '{name}' holds NaN or infinity on a "
                    "photograph: check its weights"
                )
        for runtime in runtimes:
            got = _nearest(_in_runtime(runtime, graphs, known), wanted)
            apart = _distances(got, wanted)
            noise = dict.fromkeys(apart, 0.0)
            if max(apart.values()) > TOLERANCE:
                exact = _in_torch(graphs, feeds, torch.float64)
                apart = _distances(_nearest(got, exact), exact)
                noise = _distances(_nearest(wanted, exact), exact)
            for name in apart:
                problem = judge(apart[name], noise[name])
                rows.append(_record(runtime, name, got, wanted, problem, size, chosen))
    return rows


def judge(distance: float, noise: float) -> str:
    """What is wrong with an output that is `distance` from what it is compared with, from which
    float32 of torch is `noise`; "" if nothing is.
    """
    if not math.isfinite(noise):
        return "torch's own answer is not finite, in float32 or in float64"
    allowed = TOLERANCE + min(2 * noise, _MOST_SPARE)
    if math.isfinite(distance) and distance <= allowed:
        return ""
    return f"off by {distance:.3g}, at most {allowed:.3g} is allowed"


def _images(photos: Sequence[Image.Image], size: tuple[int, int], view: ViewPolicy) -> torch.Tensor:
    return torch.from_numpy(np.stack([shown(photo, size, view) for photo in photos]))


@torch.inference_mode()
def _in_torch(
    graphs: tuple[Part, Part], feeds: Sequence[np.ndarray], dtype: torch.dtype
) -> Outputs:
    """All outputs as torch has them; `feeds` are the maps, then three masks and the tokens."""
    text_side: TextSide = graphs[0].module
    rest: DetectorGraph = graphs[1].module
    if dtype != torch.float32:
        text_side, rest = (copy.deepcopy(module).to(dtype) for module in (text_side, rest))
    *maps, text_mask, self_mask, position_ids, ids = (torch.from_numpy(feed) for feed in feeds)
    text = text_side(ids, self_mask, position_ids)
    logits, boxes = rest(
        *(level.to(dtype) for level in maps), text, text_mask, self_mask, position_ids
    )
    return {"text": text.numpy(), "logits": logits.numpy(), "boxes": boxes.numpy()}


def _in_runtime(runtime: Runtime, graphs: tuple[Part, Part], known: Outputs) -> Outputs:
    """All outputs of the graphs, the second fed from the first as in a server."""
    known = dict(known)
    for graph in graphs:
        signature = graph.signature
        feeds = {port.name: known[port.name] for port in signature.inputs}
        names = (port.name for port in signature.outputs)
        known |= dict(zip(names, runtime.run(signature.graph, feeds), strict=True))
    return {name: known[name] for name in _GRAPHS}


def _nearest(got: Outputs, wanted: Outputs) -> Outputs:
    """`got` with its boxes in the order of those of `wanted` that they are nearest to."""
    result = {name: value.copy() for name, value in got.items()}
    for row in range(len(wanted["boxes"])):
        both = [
            np.nan_to_num(
                np.concatenate([one["boxes"][row], probabilities(one["logits"])[row]], axis=1),
                nan=9.0,
                posinf=9.0,
                neginf=-9.0,
            )
            for one in (wanted, got)
        ]
        order = linear_sum_assignment(cdist(*both, metric="chebyshev"))[1]
        for name in ("boxes", "logits"):
            result[name][row] = got[name][row][order]
    return result


def _distances(got: Outputs, wanted: Outputs) -> dict[str, float]:
    """The largest distance of each output, infinite where one is finite and the other is not."""
    ends = np.isneginf(got["logits"]) == np.isneginf(wanted["logits"])
    logits = np.abs(probabilities(got["logits"]) - probabilities(wanted["logits"])).max()
    lengths = np.linalg.norm(wanted["text"], axis=-1)
    text = np.linalg.norm(got["text"] - wanted["text"], axis=-1) / lengths
    distances = {
        "text": float(text.max()),
        "logits": float(logits) if ends.all() else float("inf"),
        "boxes": float(np.abs(got["boxes"] - wanted["boxes"]).max()),
    }
    return {
        name: value if np.isfinite(value) else float("inf") for name, value in distances.items()
    }


def _record(
    runtime: Runtime,
    output: str,
    got: Outputs,
    wanted: Outputs,
    problem: str,
    size: tuple[int, int],
    chosen: Sequence[tuple[str, Image.Image]],
) -> ParityRecord:
    """What the manifest says of one output; of logits those of the text alone."""
    tokens = wanted["text"].shape[1]
    a, b = (
        one[output][..., :tokens] if output == "logits" else one[output] for one in (got, wanted)
    )
    result = agreement(a, b, None)
    return ParityRecord(
        graph=_GRAPHS[output],
        output=output,
        runtime=runtime.name,
        batch=len(chosen),
        height=size[0],
        width=size[1],
        pictures=len({name for name, _ in chosen}),
        cosine=float(result.cosine.min()),
        max_abs=float(result.largest.max()),
        relative=float(result.relative.max()),
        centred=None,
        deviation=0.0,
        position_cosine=None,
        worst_image=chosen[int(result.cosine.argmin())][0],
        passed=not problem,
        problem=problem,
    )

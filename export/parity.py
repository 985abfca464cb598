"""Parity of every graph with the torch student: on photographs, at several batches and sizes, in
real runtimes.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from contract.errors import Failure
from contract.manifest import ParityRecord, Precision
from contract.signature import (
    FEATURES,
    FEATURES_GLOBAL,
    FUSED,
    IMAGE,
    MAP_OF_STRIDE,
    SPACES,
    further_names,
    layer_names,
)
from contract.tasks import TASKS
from distill.methods.deployment import BACKBONE
from export.graph import DPT, UPERNET, Student
from export.modules import Part, flatten_positions
from export.runtimes.base import Outputs, Runtime

TOLERANCE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
"""Least cosine between a graph's output and the student's, for every picture."""

RELATIVE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.05, "int8": 0.15}
"""Largest error over the length of the student's output, for every picture: cosine does not notice
another scale.
"""

_CENTRED = 0.5
_TELLING: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.05, "int8": 0.1}
"""Outputs can be similar for all pictures (a student that has learnt little); another picture's
output, or a constant, then has a high cosine too. So the outputs are also compared without their
mean over pictures: that cosine must be at least `_CENTRED` for every picture that differs from the
mean by this fraction of its length. Where pictures differ less, the rounding of the precision
(about 1e-5, 2e-3, 2e-2 and 6e-2 of the length) is as large as the difference, and the cosine is
only recorded.
"""

_OWN = 5.0
"""Where float32 itself is not exact (attention to far places multiplies its rounding), a graph of
float32 is compared with the student in float64, and may be this many times as far from it as torch
is in float32: the order of sums differs. In no case may it be further than one of half precision.
"""

_GROUP = 8
"""Least number of pictures whose outputs are centred on their common mean, and held at once."""


def run_chain(runtime: Runtime, parts: Sequence[Part], image: np.ndarray) -> dict[str, Outputs]:
    """Outputs of every graph, each fed from those before it as in a server."""
    known: Outputs = {IMAGE: image}
    result: dict[str, Outputs] = {}
    for part in parts:
        signature = part.signature
        if not runtime.has(signature.graph):
            continue
        feeds = {port.name: known[port.name] for port in signature.inputs}
        result[signature.graph] = dict(
            zip(
                (port.name for port in signature.outputs),
                runtime.run(signature.graph, feeds),
                strict=True,
            )
        )
        if signature.graph != FUSED:
            known |= result[signature.graph]
    return result


@torch.inference_mode()
def reference(student: Student, parts: Sequence[Part], image: Tensor) -> Outputs:
    """The student's own outputs for uint8 [B, H, W, 3], by output name: from `Deployment`, not
    from the graphs' modules.
    """
    deployment, coupled = student.deployment, []
    listening = deployment.coupling.register_forward_hook(
        lambda module, inputs, output: coupled.append(output)
    )
    try:
        pixels = image.permute(0, 3, 1, 2).to(deployment.preprocess.mean.dtype) / 255
        predictions = deployment(pixels)
    finally:
        listening.remove()
    result: Outputs = {SPACES: coupled[0].numpy()} if isinstance(coupled[0], Tensor) else {}
    for label, prediction in predictions.items():
        flat = prediction.patches.flatten(1, 2)
        if label == BACKBONE:
            result["backbone_global"], result["backbone_patches"] = (
                prediction.token.numpy(),
                flat.numpy(),
            )
            result[FEATURES] = prediction.patches.numpy()
            result[FEATURES_GLOBAL] = prediction.token.unsqueeze(1).numpy()
            if prediction.second is not None:
                result["backbone_second"] = prediction.second.numpy()
            for stride, level in zip(deployment.student.map_strides, prediction.maps, strict=True):
                result[f"backbone_s{stride}"] = level.flatten(1, 2).numpy()
                result[f"{MAP_OF_STRIDE}{stride}"] = level.numpy()
            continue
        if prediction.token is not None:
            result[f"{label}_token"] = prediction.token.numpy()
        result[f"{label}_patches"] = flat.numpy()
        further = further_names(label, deployment.shipped[label].strides[1:])
        for name, level in zip(further, prediction.maps, strict=True):
            result[name] = level.flatten(1, 2).numpy()
    if student.layer_strides:
        layers = student.encoder.layers(image.permute(0, 3, 1, 2))
        values = (value for summary, patches in layers for value in (patches, summary.unsqueeze(1)))
        result |= {
            name: value.numpy()
            for name, value in zip(layer_names(len(layers)), values, strict=True)
        }
    for head in student.heads:
        task, seen = TASKS[head.task], predictions[head.about["reads"]]
        if head.kind == DPT:
            value = layers
        elif head.kind == UPERNET:
            value = seen.maps
        elif task.dense:
            value = seen.patches
        else:
            value = seen.summary if seen.token is None else seen.token
        result[task.output] = flatten_positions(head.module(value)).numpy()
    return result


def compare(got: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine [B] and largest absolute difference [B] of each picture's output; NaN has cosine
    -1.
    """
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (got, wanted))
    whole = np.isfinite(a).all(1)
    a = np.where(whole[:, None], a, 0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
    largest = np.where(whole, np.abs(a - b).max(1, initial=0), np.finfo(np.float64).max)
    return np.where(whole, cosine, -1.0), largest


def engine_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes (height, width) to compare engines at: `sizes` and all corners of the profile they
    make.
    """
    ends = [(min(sides), max(sides)) for sides in zip(*sizes, strict=True)]
    return list(dict.fromkeys([*sizes, *itertools.product(*ends)]))


def check_sizes(
    stride: int, sizes: Sequence[tuple[int, int]], dynamic: bool
) -> list[tuple[int, int]]:
    """Sizes (height, width) to compare graphs at: `sizes` and, if they vary, those that show
    mistakes.

    These are the corners of the declared range and, as far as they lie inside it, a size that is
    not square and one with as many positions as the first in another aspect ratio: a fixed position
    embedding would get both wrong.
    """
    if not dynamic:
        return list(dict.fromkeys(sizes))
    result = engine_sizes(sizes)
    heights, widths = (
        range(min(sides), max(sides) + 1, stride) for sides in zip(*sizes, strict=True)
    )
    between = [size for size in itertools.product(heights, widths) if size != sizes[0]]
    oblong = [size for size in between if size[0] != size[1]]
    equal = [(h, w) for h, w in between if h * w == sizes[0][0] * sizes[0][1]]
    return list(dict.fromkeys([*result, *oblong[:1], *equal[:1]]))


class Agreement(NamedTuple):
    """How an output agrees with the student's, for every picture [B]; values that are not finite
    never agree.
    """

    cosine: np.ndarray
    largest: np.ndarray
    """Absolute difference."""
    relative: np.ndarray
    """Length of the difference over the length of the student's output."""
    centred: np.ndarray
    """Cosine without the mean over pictures; NaN without a mean, or without a difference from
    it.
    """
    deviation: np.ndarray
    """Distance of the student's output from that mean, over its own length."""
    position: np.ndarray
    """Least cosine of any position of a map; NaN for outputs that are not maps."""
    own: np.ndarray
    """Largest error over length of the student in float32 on any picture of the batch, where the
    rest compares with it in float64; else 0."""


def agreement(got: np.ndarray, wanted: np.ndarray, mean: np.ndarray | None) -> Agreement:
    """Compare [B, …] with the student's; `mean` is the student's over some pictures, without B."""
    cosine, largest = compare(got, wanted)
    whole = np.isfinite(got.reshape(len(got), -1)).all(1)
    a, b = (
        np.where(whole[:, None], v.reshape(len(v), -1), 0).astype(np.float64) for v in (got, wanted)
    )
    length, most = np.linalg.norm(b, axis=1), np.finfo(np.float64).max
    error = np.linalg.norm(a - b, axis=1)
    relative = np.where(
        length > 0, error / np.where(length > 0, length, 1), np.where(error > 0, most, 0)
    )
    unknown = np.full(len(got), np.nan)
    centred, deviation, position = unknown, np.zeros(len(got)), unknown
    if mean is not None:
        a0, b0 = a - mean.reshape(1, -1), b - mean.reshape(1, -1)
        apart = np.linalg.norm(b0, axis=1)
        norms = apart * np.linalg.norm(a0, axis=1)
        centred = np.where(apart > 0, (a0 * b0).sum(1) / np.where(norms > 0, norms, 1), np.nan)
        deviation = apart / np.where(length > 0, length, 1)
    if got.ndim > 2:
        rows = (values.reshape(-1, got.shape[-1]) for values in (a, b))
        position = compare(*rows)[0].reshape(len(got), -1).min(1)
    return Agreement(
        cosine,
        largest,
        np.where(whole, relative, most),
        np.where(whole, centred, -1.0),
        deviation,
        np.where(whole, position, -1.0) if got.ndim > 2 else position,
        np.zeros(len(got)),
    )


def judge(result: Agreement, precision: Precision) -> tuple[int, str]:
    """The picture that agrees least, and what is wrong with it, "" if nothing is."""
    spare = np.minimum(_OWN * result.own, RELATIVE["fp16"])
    # the cosine of a small error at a right angle to the output, where it shows most
    enough = np.minimum(TOLERANCE[precision], 1 - spare**2 / 2)
    worst = int((result.cosine - enough).argmin())
    if not result.cosine[worst] >= enough[worst]:
        odd = " (NaN or infinity)" if result.largest[worst] == np.finfo(np.float64).max else ""
        return (
            worst,
            f"cosine {result.cosine[worst]:.6f}{odd}, at least {enough[worst]:.6g} is required",
        )
    most = np.maximum(RELATIVE[precision], spare)
    largest = int((result.relative - most).argmax())
    if not result.relative[largest] <= most[largest]:
        return (
            largest,
            f"off by {result.relative[largest]:.3g} of its length, at most {most[largest]:.3g} "
            "is allowed",
        )
    differs = result.deviation >= np.maximum(_TELLING[precision], spare)
    telling = np.where(differs, result.centred, 1.0)
    least = int(telling.argmin())
    if telling[least] < _CENTRED:
        return (
            least,
            f"cosine {telling[least]:.3f} without the mean over pictures, at least {_CENTRED} is "
            "required",
        )
    return worst, ""


def measure(
    student: Student,
    parts: Sequence[Part],
    runtimes: Sequence[Runtime],
    photos: Sequence[tuple[str, Image.Image]],
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    precision: Precision,
) -> list[ParityRecord]:
    """Compare every output of every graph in all runtimes.

    At the first size: all pictures in batches of the largest size, then the other batch sizes. At
    every other size: the smallest and the largest batch, on pictures in turn. Raises Failure if the
    student itself returns NaN or infinity.
    """
    largest, turn, rows = max(batches), itertools.cycle(photos), []
    whole = -(-len(photos) // largest) * largest
    plan = [
        (sizes[0], largest, whole),
        *((sizes[0], batch, batch) for batch in batches if batch != largest),
    ]
    plan += [
        (size, batch, batch) for size in sizes[1:] for batch in sorted({min(batches), largest})
    ]
    corner = tuple(max(sides) for sides in zip(*sizes, strict=True))
    for size, batch, count in plan:
        # at the largest size the first pictures, which are the golden set
        first = size == corner != sizes[0] and batch == largest
        chosen = list(itertools.islice(itertools.cycle(photos) if first else turn, count))
        agreed: dict[tuple[str, str, str], list[Agreement]] = {}
        for key, result in _compared(
            student, parts, runtimes, [photo for _, photo in chosen], batch, size, precision
        ):
            agreed.setdefault(key, []).append(result)
        for (runtime, graph, output), parted in agreed.items():
            result = Agreement(*(np.concatenate(values) for values in zip(*parted, strict=True)))
            worst, problem = judge(result, precision)
            rows.append(
                ParityRecord(
                    graph=graph,
                    output=output,
                    runtime=runtime,
                    batch=batch,
                    height=size[0],
                    width=size[1],
                    pictures=len({name for name, _ in chosen}),
                    cosine=float(result.cosine.min()),
                    max_abs=float(result.largest.max()),
                    relative=float(result.relative.max()),
                    centred=least(result.centred),
                    deviation=float(result.deviation.max()),
                    position_cosine=least(result.position),
                    worst_image=chosen[worst][0],
                    passed=not problem,
                    problem=problem,
                )
            )
    return rows


def least(values: np.ndarray) -> float | None:
    return float(np.nanmin(values)) if not np.isnan(values).all() else None


def _compared(
    student: Student,
    parts: Sequence[Part],
    runtimes: Sequence[Runtime],
    photos: Sequence[Image.Image],
    batch: int,
    size: tuple[int, int],
    precision: Precision,
) -> Iterator[tuple[tuple[str, str, str], Agreement]]:
    """Yield (runtime, graph, output) and how it agrees, one batch after the other."""
    pixels = [np.asarray(photo.resize(size[::-1], Image.Resampling.BICUBIC)) for photo in photos]
    images = [np.stack(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
    doubled: Student | None = None
    for group in np.array_split(np.arange(len(images)), max(1, len(photos) // max(_GROUP, batch))):
        wanted = [reference(student, parts, torch.from_numpy(images[n])) for n in group]
        for name, value in ((name, value) for values in wanted for name, value in values.items()):
            if not np.isfinite(value).all():
                raise Failure(
                    f"the student's own '{name}' holds NaN or infinity on a photograph: train the "
                    "student, or check its weights"
                )
        means: Outputs = {}
        if len({picture.tobytes() for n in group for picture in images[n]}) > 1:
            means = {
                name: np.mean([values[name].mean(0) for values in wanted], axis=0)
                for name in wanted[0]
            }
        for n, expected in zip(group, wanted, strict=True):
            exact: Outputs = {}
            for runtime in runtimes:
                for graph, outputs in run_chain(runtime, parts, images[n]).items():
                    for name, got in outputs.items():
                        result = agreement(got, expected[name], means.get(name))
                        if precision == "fp32" and judge(result, precision)[1]:
                            doubled = doubled or _in_float64(student)
                            exact = exact or reference(doubled, parts, torch.from_numpy(images[n]))
                            result = _from_float64(
                                result, got, expected[name], exact.get(name), means.get(name)
                            )
                        yield (runtime.name, graph, name), result


def _in_float64(student: Student) -> Student:
    """A copy that computes in float64, without heads that read layers."""
    heads = [head for head in student.heads if head.kind != DPT]
    return replace(
        student,
        deployment=copy.deepcopy(student.deployment).double(),
        heads=tuple(replace(h, module=copy.deepcopy(h.module).double()) for h in heads),
        layer_strides=(),
    )


def _from_float64(
    result: Agreement,
    got: np.ndarray,
    wanted: np.ndarray,
    exact: np.ndarray | None,
    mean: np.ndarray | None,
) -> Agreement:
    """How an output agrees with the float64 student's; the `result` there is for one that this does
    not have.
    """
    if exact is None:
        return result
    # of small maps one picture may be right by luck
    own = agreement(wanted, exact, mean).relative.max()
    return agreement(got, exact, mean)._replace(own=np.full(len(got), own))

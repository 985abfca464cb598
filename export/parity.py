"""Parity of every graph with the torch student: on photographs, at several batches and sizes, in
real runtimes.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from contract.errors import Failure
from contract.manifest import Precision
from contract.parity_record import ParityRecord
from contract.signature import (
    FEATURES,
    FEATURES_GLOBAL,
    FUSED,
    IMAGE,
    INTERACTION,
    MAP_OF_STRIDE,
    SPACES,
    further_names,
    layer_names,
)
from contract.tasks import TASKS
from contract.views import ViewPolicy
from distill.heads import DECODER
from distill.methods.deployment import BACKBONE
from export.agreement import (
    MOST,
    Agreement,
    agreement,
    exact_agreement,
    judge,
    position_bounds,
)
from export.graph import DPT, UPERNET, Student
from export.modules import Part, flatten_positions
from export.neighbours import crops, judge_neighbours, neighbours, summaries
from export.photographs import shown
from export.runtimes.base import Outputs, Runtime

_Key = tuple[str, str, str]
"""Runtime, graph and output."""
_Pairs = dict[_Key, list[tuple[np.ndarray, np.ndarray]]]
"""Outputs of a graph and of the student, batch after batch."""

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
    shared = next((p.module.coupling for p in parts if p.signature.graph == INTERACTION), None)
    # a folded one hands over what the last cross-space block of the trained one does
    source = getattr(shared, "counterpart", lambda coupling: coupling)(deployment.coupling)
    listening = source.register_forward_hook(lambda module, inputs, output: coupled.append(output))
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
        elif head.kind == DECODER:
            answer = head.module(seen.patches, seen.token)
            result[task.output] = flatten_positions(answer).numpy()
            continue
        elif head.kind == UPERNET:
            value = seen.maps
        elif task.dense:
            value = seen.patches
        else:
            value = seen.summary if seen.token is None else seen.token
        result[task.output] = flatten_positions(head.module(value)).numpy()
    return result


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
    every other size: the smallest and the largest batch, on pictures in turn. What stands for a
    whole picture is also asked for its neighbours, among all pictures and crops of them. Raises
    Failure if the student itself returns NaN or infinity.
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
    named = {part.signature.graph: summaries(part.signature.outputs) for part in parts}
    for size, batch, count in plan:
        # at the largest size the first pictures, which are the golden set
        first = size == corner != sizes[0] and batch == largest
        chosen = list(itertools.islice(itertools.cycle(photos) if first else turn, count))
        agreed: dict[_Key, list[Agreement]] = {}
        pairs: _Pairs = {}
        for key, result, got, wanted in _compared(
            student, parts, runtimes, [photo for _, photo in chosen], batch, size, precision
        ):
            agreed.setdefault(key, []).append(result)
            if not rows and key[2] in named[key[1]]:
                pairs.setdefault(key, []).append((got, wanted))
        pairs = {key: _first(len(photos), of) for key, of in pairs.items()}
        if len(photos) > 1:
            pictures = [photo for _, photo in photos]
            _add_crops(pairs, student, parts, runtimes, pictures, batch, size)
        rows += [
            _record(
                key,
                Agreement(*(np.concatenate(values) for values in zip(*parted, strict=True))),
                pairs.get(key),
                chosen,
                batch,
                size,
                precision,
            )
            for key, parted in agreed.items()
        ]
    return rows


def _first(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list:
    """The outputs for the first `count` pictures, after which they repeat."""
    return [tuple(np.concatenate(values)[:count] for values in zip(*pairs, strict=True))]


def _add_crops(
    pairs: _Pairs,
    student: Student,
    parts: Sequence[Part],
    runtimes: Sequence[Runtime],
    photos: Sequence[Image.Image],
    batch: int,
    size: tuple[int, int],
) -> None:
    """Add the outputs of `pairs` for crops of all photographs, where it has any."""
    if not pairs:
        return
    for image in _batches(list(crops(photos)), batch, size, student.view):
        wanted = reference(student, parts, torch.from_numpy(image))
        for runtime in runtimes:
            for graph, outputs in run_chain(runtime, parts, image).items():
                for name, got in outputs.items():
                    if (key := (runtime.name, graph, name)) in pairs:
                        pairs[key].append((got, wanted[name]))


def _batches(
    photos: Sequence[Image.Image], batch: int, size: tuple[int, int], view: ViewPolicy
) -> list[np.ndarray]:
    """Pictures as graphs read them, uint8 [B, H, W, 3] each; the last may be fewer."""
    pixels = [shown(photo, size, view) for photo in photos]
    return [np.stack(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]


def _record(
    key: _Key,
    result: Agreement,
    pairs: list[tuple[np.ndarray, np.ndarray]] | None,
    chosen: Sequence[tuple[str, Image.Image]],
    batch: int,
    size: tuple[int, int],
    precision: Precision,
) -> ParityRecord:
    """What the manifest says of one output in one runtime."""
    runtime, graph, output = key
    worst, problem = judge(result, precision)
    near = None
    if pairs:
        got, wanted = (np.concatenate(values) for values in zip(*pairs, strict=True))
        near = neighbours(got, wanted, precision)
        # where float32 of torch is not exact, its neighbours are not either
        bound: Precision = "fp16" if result.own.any() else precision
        problem = problem or (judge_neighbours(near, bound) if near else "")
    is_map = result.errors.shape[1] > 0
    beyond = (result.errors > position_bounds(result, precision).near).sum(1)
    return ParityRecord(
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
        position_error=min(float(result.errors.max()), MOST) if is_map else None,
        positions_beyond=int(beyond.max()) if is_map else None,
        positions=result.errors.shape[1] if is_map else None,
        neighbours_of=near.pictures if near else None,
        nearest=near.nearest if near else None,
        ranked=near.ranked if near else None,
        worst_image=chosen[worst][0],
        passed=not problem,
        problem=problem,
    )


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
) -> Iterator[tuple[_Key, Agreement, np.ndarray, np.ndarray]]:
    """Yield (runtime, graph, output), how it agrees, it and the student's, one batch after the
    other.
    """
    images = _batches(photos, batch, size, student.view)
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
                        known = expected[name], means.get(name), name
                        result = agreement(got, *known)
                        if precision == "fp32" and judge(result, precision)[1]:
                            doubled = doubled or _in_float64(student)
                            exact = exact or reference(doubled, parts, torch.from_numpy(images[n]))
                            if name in exact:
                                result = exact_agreement(got, known[0], exact[name], *known[1:])
                        yield (runtime.name, graph, name), result, got, expected[name]


def _in_float64(student: Student) -> Student:
    """A copy that computes in float64, without heads that read layers, and without decoders, whose
    code may know float32 alone.
    """
    heads = [head for head in student.heads if head.kind not in (DPT, DECODER)]
    return replace(
        student,
        deployment=copy.deepcopy(student.deployment).double(),
        heads=tuple(replace(h, module=copy.deepcopy(h.module).double()) for h in heads),
        layer_strides=(),
    )

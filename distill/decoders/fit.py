"""How a decoder fits between a student's grid and a task's output: found by calling it."""

import logging
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from contract.errors import UserError
from contract.tasks import CLASSES, POSITIONS, Task
from distill.decoders.decoder import Reads, TeacherDecoder, sample_decoder, try_decoder
from distill.decoders.sources import Source
from distill.features import Features, scaled

log = logging.getLogger(__name__)


def fit_decoder(
    source: Source,
    task: Task,
    reads: Reads,
    features: Features,
    rows: int,
    names: list[str] | None,
) -> tuple[TeacherDecoder, dict[str, Any]]:
    """The head of a decoder, and what its file says of it.

    `features` are what the student predicts of the teacher for two pictures, on a square grid;
    `rows` those of the grid that the decoder gets in its place; `names` of the classes, None for
    their numbers. Raises UserError for a decoder that fails on them, and for an answer that is not
    the task's.
    """
    side = features.patches.shape[1]
    token = None if reads == "patches" else features.summary

    def make(**further: object) -> TeacherDecoder:
        return TeacherDecoder(
            source.reference,
            source.kwargs,
            reads,
            features.patches.shape[-1],
            None if token is None else token.shape[-1],
            side,
            single=task.dense and len(task.axes) == 1,
            ratio=str(Fraction(rows, side) if reads != "token" else Fraction(1)),
            built=source.module,
            **further,
        )

    bare = make()
    answer = try_decoder(bare, features.patches, token, own=False)
    count = _check_answer(answer, task, source.reference)
    if names is not None and len(names) != count:
        raise UserError(
            f"--classes has {len(names)} names, but {source.reference} gives {count} classes"
        )
    measured = _measure(bare, answer, token, source.reference) if task.dense else {}
    module = make(classes=count, **measured)
    about: dict[str, Any] = {"sample": sample_decoder(module)}
    if CLASSES in task.axes:
        about["classes"] = names or [f"class {number}" for number in range(count)]
    shape = list(try_decoder(module, features.patches, token, own=False).shape[1:])
    log.info("gives     %s %s", task.output, shape)
    return module, about


def _check_answer(answer: object, task: Task, reference: str) -> int:
    """How many values a decoder gives at a position or for a picture; raises UserError for an
    answer that is not the task's.
    """
    axes = [axis for axis in task.axes if axis != POSITIONS]
    needed = ["B", *(str(axis) for axis in axes), *(["H", "W"] if task.dense else [])]
    if not isinstance(answer, torch.Tensor):
        raise UserError(
            f"{reference} gives a value of type {type(answer).__name__}; {task.name} needs a "
            f"tensor [{', '.join(needed)}]"
        )
    shape = list(answer.shape)
    wrong = answer.ndim != len(needed) or shape[0] != 2 or min(shape) < 1
    wrong = wrong or any(
        axis != size for axis, size in zip(axes, shape[1:], strict=False) if isinstance(axis, int)
    )
    if wrong:
        raise UserError(
            f"{reference} gives {shape} for a batch of 2; {task.name} needs [{', '.join(needed)}]"
        )
    if not torch.isfinite(answer).all():
        raise UserError(f"{reference} gives NaN or infinity on a photograph: check its weights")
    if CLASSES in task.axes and shape[1] < 2:
        raise UserError(f"{reference} gives one class; {task.name} needs two or more")
    return shape[1] if axes else 1


def _measure(
    module: TeacherDecoder,
    answer: Tensor,
    token: Tensor | None,
    reference: str,
) -> dict[str, Any]:
    """How fine a decoder's answer is, and whether it runs on other grids; raises UserError for an
    answer that is stretched.
    """
    side = module.side
    rows, columns = answer.shape[-2:]
    if rows != columns:
        raise UserError(f"{reference} gives {rows}x{columns} values for a square grid of {side}")
    scale = Fraction(rows, side)
    other = torch.zeros(2, side + 1, side + 2, module.width)
    try:
        with torch.no_grad():
            sizes = tuple(module(other, token).shape[-2:])
    # whatever code for one grid raises from within
    except Exception:
        log.info("note      it runs on %d patches a side alone: export that size", side)
        return {"scale": str(scale), "fixed": True}
    inner = [scaled(cells, module.ratio) * scale / module.ratio for cells in (side + 1, side + 2)]
    if any(abs(size - wanted) >= 1 for size, wanted in zip(sizes, inner, strict=True)):
        log.info("note      it is for %d patches a side alone: export that size", side)
        return {"scale": str(scale), "fixed": True}
    exact = [scaled(cells, scale) for cells in (side + 1, side + 2)]
    uneven = module.ratio != 1 or scale.denominator != 1
    return {"scale": str(scale), "resize": uneven or list(sizes) != exact}

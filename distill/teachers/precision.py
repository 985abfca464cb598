"""What `teacher_runtime.precision: auto` means in a run: bf16 on CUDA, and on a CPU with bf16
arithmetic for every teacher whose features it keeps.

bf16 has the range of float32 and 8 significant bits. How much of a network's features they cost
differs: on photographs DINOv2's ViT-S keeps a cosine of 0.9999, MobileNetV2 0.98. A run decides
once, before its first step; checkpoints and caches of features keep what was decided.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from contract.errors import first_line, out_of_memory
from contract.tables import entry
from distill.data.crops import centre_crop
from distill.data.pictures import PackagedPhotos
from distill.distributed import Ranks
from distill.teachers import Teacher

log = logging.getLogger(__name__)

_LEAST = 0.9999
"""Least cosine, with float32, of every output of every photograph as one vector."""

_EVERY = 3
"""Of the packaged photographs every third is compared, seven in all: seconds for a ViT-L."""


class _Choice(NamedTuple):
    precision: str
    cosine: str = ""
    """What was found, in words."""


def settle_precisions(
    teachers: Sequence[Teacher],
    saved: Mapping[str, Any] | None,
    cache: Path | None,
    ranks: Ranks,
) -> dict[str, str]:
    """Decide what `auto` means for each teacher, the same on every rank, and log why.

    A resumed run keeps what its checkpoint `saved` records, and features in the folder `cache` are
    continued as they were made. Returns the precision of every teacher by its label, for
    checkpoints.
    """
    undecided = [teacher for teacher in teachers if teacher.runtime.precision == "auto"]
    on_cpu = ranks.device.type == "cpu"
    able = on_cpu and bool(undecided) and all(ranks.gather(has_bf16()))
    choices: dict[str, str] = {}
    if ranks.first and undecided:
        before, origin = _recorded(undecided, saved, cache, on_cpu)
        if before:
            choices, line = before, f"{_listed({k: _Choice(v) for k, v in before.items()})}{origin}"
            if on_cpu and not able and "bf16" in before.values():
                line += "; this processor has no bf16 arithmetic, and emulates it slowly"
        elif able:
            checked = _check_all(undecided)
            choices = {label: choice.precision for label, choice in checked.items()}
            line = _listed(checked)
        else:
            choices = {t.label: t.precision_on(ranks.device.type) for t in undecided}
            line = "fp32 for the teachers: no bf16 arithmetic here (AVX-512-bf16 or AMX)"
        if before or on_cpu:
            log.info("%s", entry("precision", line))
    choices = ranks.gather(choices)[0]
    for teacher in undecided:
        teacher.settled = choices[teacher.label]
    return {teacher.label: teacher.precision_on(ranks.device.type) for teacher in teachers}


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 itself. oneDNN emulates it elsewhere, at a third of
    float32's speed.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _recorded(
    teachers: Sequence[Teacher],
    saved: Mapping[str, Any] | None,
    cache: Path | None,
    on_cpu: bool,
) -> tuple[dict[str, str], str]:
    """What was decided earlier, and where, in words; empty where nothing was."""
    labels = [teacher.label for teacher in teachers]
    if saved:
        # before there was a record, auto was this
        usual = dict.fromkeys(labels, "fp32" if on_cpu else "bf16")
        record = usual | saved.get("teacher_precision", {})
        return {label: record[label] for label in labels}, ", as the run began"
    manifest = cache / "manifest.json" if cache else None
    if manifest and manifest.is_file():
        try:
            held = json.loads(manifest.read_text())
        except (OSError, ValueError):  # the cache says so itself
            held = {}
        record = {label: held.get(f"{label}.precision") for label in labels}
        if set(record.values()) <= {"fp32", "bf16"}:
            return record, f", as the features in {cache} were made"
    return {}, ""


def _check_all(teachers: Sequence[Teacher]) -> dict[str, _Choice]:
    packaged = PackagedPhotos()
    photographs = [packaged.load(number) for number in range(0, len(packaged), _EVERY)]
    return {teacher.label: _check(teacher, photographs) for teacher in teachers}


@torch.inference_mode()
def _check(teacher: Teacher, photographs: Sequence[Image.Image]) -> _Choice:
    """bf16 for a teacher whose outputs keep their direction on photographs, else fp32."""
    crops = [centre_crop(photograph, teacher.image_size) for photograph in photographs]
    pixels = teacher.preprocess(torch.stack(crops))
    # not what torch.compile made of it: one of both would be compiled for nothing
    exact = teacher.encode(pixels).named()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = teacher.encode(pixels).named()
        cosines = {name: _cosine(rounded[name], exact[name]) for name in exact}
    # whatever a network's own code makes of values in bf16
    except Exception as error:
        if out_of_memory(error):
            raise
        return _Choice("fp32", f"bf16 fails: {first_line(error)}")
    name = min(cosines, key=lambda name: (cosines[name] >= _LEAST, cosines[name]))
    if cosines[name] >= _LEAST:
        return _Choice("bf16", f"cosine {cosines[name]:.5f}")
    return _Choice("fp32", f"in bf16 the cosine of its {name} is {cosines[name]:.5f} < {_LEAST}")


def _cosine(rounded: Tensor, exact: Tensor) -> float:
    """Cosine of two outputs of the photographs, the lowest of any of them; NaN if one is."""
    pair = (tensor.flatten(1).double() for tensor in (rounded, exact))
    return F.cosine_similarity(*pair, dim=1).min().item()


def _listed(choices: Mapping[str, _Choice]) -> str:
    """Which teachers run in which precision, and why."""
    parts = []
    for precision in ("bf16", "fp32"):
        labels = [
            f"{label} ({choice.cosine})" if choice.cosine else label
            for label, choice in choices.items()
            if choice.precision == precision
        ]
        parts += [f"{precision} for {', '.join(labels)}"] if labels else []
    return "; ".join(parts)

"""The golden photographs of a bundle (contract/golden.py), and the outputs of the torch student for
them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contract.golden import GOLDEN, Golden
from contract.manifest import Precision
from contract.parity_record import ParityRecord
from contract.signature import FUSED
from export.agreement import POSITIONS, RELATIVE, TOLERANCE
from export.graph import Student
from export.modules import Part
from export.parity import reference
from export.photographs import shown

TF32 = 0.01
"""Relative error that a server may have in any case: onnxruntime on a GPU multiplies float32 in
TF32 unless configured otherwise.
"""
PICTURES = 3
"""Photographs that are kept, at most."""


def write_golden(
    folder: Path,
    student: Student,
    parts: Sequence[Part],
    photos: Sequence[tuple[str, Image.Image]],
    size: tuple[int, int],
    max_batch: int,
    precision: Precision,
    parity: Sequence[ParityRecord],
) -> None:
    """Write the student's own outputs for at most `max_batch` pictures, few enough for one
    request: every output of `fused`.

    The bounds are those that `precision` allows on every picture; `allowed` has others for outputs
    that did not keep to them in `parity` and were let through.
    """
    chosen = photos[: min(PICTURES, max_batch)]
    image = np.stack([shown(photo, size, student.view) for _, photo in chosen])
    wanted = reference(student, parts, torch.from_numpy(image))
    outputs = [
        port.name
        for part in parts
        if part.signature.graph == FUSED
        for port in part.signature.outputs
    ]
    most = max(RELATIVE[precision], TF32)
    golden = Golden(
        image=image,
        outputs={name: wanted[name] for name in outputs},
        # an error at a right angle to an output turns it by so much
        bounds=(min(TOLERANCE[precision], 1 - most**2 / 2), most),
        # packaged photographs have plain names; of a user's only the file's name leaves the machine
        pictures=tuple(Path(name).name for name, _ in chosen),
        allowed=let_through(parity, precision),
        inexact=not_exact(parity, precision),
        precision=precision,
        # TF32 has the mantissa of fp16
        positions=POSITIONS["fp16" if precision == "fp32" else precision],
    )
    (folder / GOLDEN).write_bytes(golden.to_bytes())


def let_through(
    parity: Sequence[ParityRecord], precision: Precision
) -> dict[str, tuple[float, float]]:
    """Least cosine and largest relative error for a server's outputs that failed at export: as
    measured, and half as far again.

    (The golden pictures need not be the worst, and a server's runtime may round otherwise.)
    """
    failed = {row.output for row in parity if not row.passed}
    return {
        name: (
            round(max(1 - 1.5 * (1 - min(cosine, TOLERANCE[precision])), -1.0), 6),
            float(f"{1.5 * min(max(relative, RELATIVE[precision], TF32), 1e6):.3g}"),
        )
        for name, (cosine, relative) in _worst(parity).items()
        if name in failed
    }


def not_exact(
    parity: Sequence[ParityRecord], precision: Precision
) -> dict[str, tuple[float, float]]:
    """The same for outputs that agree with the student in float64 and not in float32, of which the
    recorded outputs are: both may be as far from float64 as was measured, on opposite sides.
    """
    result = {}
    failed = {row.output for row in parity if not row.passed}
    for name, (cosine, relative) in _worst(parity).items():
        beyond = cosine < TOLERANCE[precision] or relative > RELATIVE[precision]
        if beyond and name not in failed:
            most = float(f"{max(3 * relative, TF32):.3g}")
            result[name] = round(max(1 - most**2 / 2, -1.0), 6), most
    return result


def _worst(parity: Sequence[ParityRecord]) -> dict[str, tuple[float, float]]:
    """Least cosine and largest relative error of every output."""
    worst: dict[str, tuple[float, float]] = {}
    for row in parity:
        cosine, relative = worst.get(row.output, (1.0, 0.0))
        worst[row.output] = min(row.cosine, cosine), max(row.relative, relative)
    return worst

"""The golden photographs of a bundle (contract/golden.py), and the outputs of the torch student for
them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contract.golden import GOLDEN, Golden
from contract.manifest import ParityRecord, Precision
from contract.signature import FUSED
from export.graph import Student
from export.modules import Part
from export.parity import RELATIVE, TOLERANCE, reference

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
    height, width = size
    chosen = photos[: min(PICTURES, max_batch)]
    image = np.stack(
        [np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)) for _, photo in chosen]
    )
    wanted = reference(student, parts, torch.from_numpy(image))
    outputs = [
        port.name
        for part in parts
        if part.signature.graph == FUSED
        for port in part.signature.outputs
    ]
    golden = Golden(
        image=image,
        outputs={name: wanted[name] for name in outputs},
        bounds=(TOLERANCE[precision], max(RELATIVE[precision], TF32)),
        # packaged photographs have plain names; of a user's only the file's name leaves the machine
        pictures=tuple(Path(name).name for name, _ in chosen),
        allowed=let_through(parity, precision),
        precision=precision,
    )
    (folder / GOLDEN).write_bytes(golden.to_bytes())


def let_through(
    parity: Sequence[ParityRecord], precision: Precision
) -> dict[str, tuple[float, float]]:
    """Least cosine and largest relative error for a server's outputs that broke their bounds: as
    measured, and half as far again.

    (The golden pictures need not be the worst, and a server's runtime may round otherwise.)
    """
    worst: dict[str, tuple[float, float]] = {}
    for row in parity:
        cosine, relative = worst.get(row.output, (1.0, 0.0))
        worst[row.output] = min(row.cosine, cosine), max(row.relative, relative)
    return {
        name: (
            round(max(1 - 1.5 * (1 - min(cosine, TOLERANCE[precision])), -1.0), 6),
            float(f"{1.5 * min(max(relative, RELATIVE[precision], TF32), 1e6):.3g}"),
        )
        for name, (cosine, relative) in worst.items()
        if cosine < TOLERANCE[precision] or relative > RELATIVE[precision]
    }

"""A few photographs and what the torch student says of them, kept in the bundle: a server compares itself with this.

A rollout asks the new version for these pictures before the switch, and canaries ask again while it serves; both only need
numpy and safetensors (`serve/golden.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save

from export.bundle import Precision
from export.graph import Part, Student
from export.parity import TOLERANCE, reference
from export.signature import FUSED, IMAGE

GOLDEN = "golden.safetensors"
PICTURES = 3
"""Photographs that are kept, at most."""


def write_golden(
    folder: Path, student: Student, parts: Sequence[Part], photos: Sequence[tuple[str, Image.Image]],
    size: tuple[int, int], max_batch: int, precision: Precision,
) -> None:  # fmt: skip
    """Write `image` uint8 [n, H, W, 3] and, for every output of `fused`, float32 [n, …] of the student itself.

    n is small enough for one request. `cosine` in the metadata is the least that `precision` allows on every picture.
    """
    height, width = size
    chosen = photos[: min(PICTURES, max_batch)]
    image = np.stack([np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)) for _, photo in chosen])
    wanted = reference(student, parts, torch.from_numpy(image))
    outputs = [port.name for part in parts if part.signature.graph == FUSED for port in part.signature.outputs]
    tensors = {IMAGE: image} | {name: np.ascontiguousarray(wanted[name], np.float32) for name in outputs}
    # packaged photographs have plain names; of a user's only the file's name leaves the machine
    names = "\n".join(Path(name).name for name, _ in chosen)
    metadata = {"format": "1", "cosine": str(TOLERANCE[precision]), "precision": precision, "pictures": names}
    (folder / GOLDEN).write_bytes(in_order(save(tensors, metadata)))


def in_order(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: the library writes metadata in another order every time."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + length :]

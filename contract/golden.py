"""A bundle's golden photographs and the torch student's outputs for them: export writes them, a
server compares itself with them.

A rollout sends the new version these pictures before the switch. Needs numpy and safetensors only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors.numpy import save

from contract.engine_record import first_problem
from contract.errors import UserError, first_line
from contract.names import Name
from contract.signature import IMAGE
from contract.untrusted import parse_json, read_tensors

GOLDEN = "golden.safetensors"
_FORMAT = 2
_Bounds = tuple[Annotated[float, Field(ge=-1, le=1)], Annotated[float, Field(ge=0, le=1e9)]]
_Picture = Annotated[str, StringConstraints(max_length=255)]


@dataclass(frozen=True)
class Golden:
    """`image` uint8 [n, H, W, 3], `outputs` float32 [n, …] by name, the pictures' names.

    `bounds`: the least cosine and the largest error over an output's length (a cosine does not see
    another scale); `allowed` has others for outputs that the export let through although they do
    not agree with the student.
    """

    image: np.ndarray
    outputs: dict[str, np.ndarray]
    bounds: tuple[float, float]
    pictures: tuple[str, ...]
    allowed: dict[str, tuple[float, float]] = field(default_factory=dict)
    precision: str = ""
    """Of the graphs that the bounds are for."""

    def to_bytes(self) -> bytes:
        """golden.safetensors, to the byte.

        Metadata: JSON under one key, for safetensors writes several in random order.
        """
        about = {
            "format": _FORMAT,
            "precision": self.precision,
            "bounds": self.bounds,
            "allowed": self.allowed,
            "pictures": self.pictures,
        }
        tensors = {IMAGE: self.image} | {
            name: np.ascontiguousarray(values, np.float32) for name, values in self.outputs.items()
        }
        return save(tensors, {"golden": json.dumps(about, sort_keys=True)})


class _About(BaseModel):
    """The JSON of a golden set's metadata."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    precision: Annotated[str, Field(max_length=100)]
    bounds: _Bounds
    allowed: dict[Name, _Bounds]
    pictures: Annotated[tuple[_Picture, ...], Field(min_length=1)]


def read_golden(path: Path, data: bytes | None = None) -> Golden:
    """Read golden.safetensors, or its bytes where they were read already; raises UserError for a
    file of something else.
    """
    metadata, tensors = read_tensors(path, data, "export again")
    try:
        about = parse_json(metadata["golden"]) if "golden" in metadata else metadata
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            version = about.get("format") if isinstance(about, dict) else None
            raise UserError(
                f"{path} is of format {version!r:.20}, this version reads {_FORMAT}: export again"
            )
        known = _About.model_validate(about)
        image = tensors.pop(IMAGE)
    except ValidationError as error:
        raise UserError(
            f"{path} is not a golden set ({first_problem(error)}): export again"
        ) from error
    except (KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a golden set ({first_line(error)}): export again"
        ) from error
    rows = {len(tensor) if tensor.ndim else 0 for tensor in (image, *tensors.values())}
    if image.dtype != np.uint8 or image.ndim != 4 or rows != {len(known.pictures)}:
        raise UserError(
            f"{path} is not a golden set (its tensors are not of {len(known.pictures)} pictures): "
            "export again"
        )
    return Golden(image, tensors, known.bounds, known.pictures, known.allowed, known.precision)


def compare(golden: Golden, answers: Mapping[str, np.ndarray | None]) -> list[str]:
    """What is wrong with a server's answers to `golden.image`, a sentence an output; an empty list
    if nothing is.

    An output is wrong if it is missing, of another shape, not finite, or breaks a bound on any
    picture.
    """
    return [
        message
        for name, wanted in golden.outputs.items()
        if (message := _problem(golden, name, wanted, answers.get(name)))
    ]


def _problem(golden: Golden, name: str, wanted: np.ndarray, got: np.ndarray | None) -> str:
    """What is wrong with one output, "" if nothing is."""
    if got is None:
        return f"output '{name}' is missing"
    if got.shape != wanted.shape:
        return f"output '{name}' is {list(got.shape)}, recorded {list(wanted.shape)}"
    if not np.isfinite(got).all():
        return f"output '{name}' holds NaN or infinity{_let_through(golden, name)}"
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (got, wanted))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # a picture of zeros has no direction: it must be zeros again
    cosine = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
    length = np.linalg.norm(b, axis=1)
    relative = np.linalg.norm(a - b, axis=1) / np.where(length > 0, length, 1)
    least, most = golden.allowed.get(name, golden.bounds)
    low, far = int(cosine.argmin()), int(relative.argmax())
    if cosine[low] < least:
        message = f"cosine {cosine[low]:.6f} on {golden.pictures[low]}, at least {least} is wanted"
    elif relative[far] > most:
        message = (
            f"off by {relative[far]:.3g} of its length on {golden.pictures[far]}, at most {most} "
            "is allowed"
        )
    else:
        return ""
    return f"output '{name}' is not what was recorded: {message}{_let_through(golden, name)}"


def _let_through(golden: Golden, name: str) -> str:
    """That an output was wrong when it was exported, "" if it was not."""
    return " (the export let it through: --allow-parity-failure)" if name in golden.allowed else ""

"""A bundle's golden photographs and the torch student's outputs for them: export writes them, a
server compares itself with them.

A start sends them before clients are let in, a rollout before the switch. Needs numpy and
safetensors only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from contract.engine_record import first_problem
from contract.errors import UserError, first_line, printable
from contract.names import Name
from contract.positions import PositionBounds, map_problem, rows_of
from contract.signature import IMAGE
from contract.untrusted import parse_json, read_tensors

GOLDEN = "golden.safetensors"
_FORMAT = 2
_Bounds = tuple[Annotated[float, Field(ge=-1, le=1)], Annotated[float, Field(ge=0, le=1e9)]]
_Picture = Annotated[str, Field(max_length=255), AfterValidator(printable)]
"""Its name is printed, and may be any file's: what it says must not steer a terminal."""

NEAR, WORSE = 0.8, 3.0
"""Within its bounds an output is conspicuous that uses so much of what they allow, or whose error
is so many times what it was at export.
"""
_FAINT = 0.05
"""Share of what the bounds allow below which an error is not compared with that at export: other
instructions round otherwise, and an error of 1e-6 may well become one of 1e-5.
"""


@dataclass(frozen=True)
class Golden:
    """`image` uint8 [n, H, W, 3], `outputs` float32 [n, …] by name, the pictures' names.

    `bounds`: the least cosine and the largest error over an output's length (a cosine does not see
    another scale); `allowed` has others for outputs that the export let through although they do
    not agree with the student, `inexact` for those that agree with it in float64, of which float32
    is off itself.
    """

    image: np.ndarray
    outputs: dict[str, np.ndarray]
    bounds: tuple[float, float]
    pictures: tuple[str, ...]
    allowed: dict[str, tuple[float, float]] = field(default_factory=dict)
    inexact: dict[str, tuple[float, float]] = field(default_factory=dict)
    precision: str = ""
    """Of the graphs that the bounds are for."""
    positions: PositionBounds | None = None
    """Of single positions of maps; None in a set of an earlier version."""
    measured: dict[str, float] = field(default_factory=dict)
    """Largest error over an output's length in the comparison at export, by output, as far as it is
    known.
    """

    def to_bytes(self) -> bytes:
        """golden.safetensors, to the byte.

        Metadata: JSON under one key, for safetensors writes several in random order.
        """
        about = {
            "format": _FORMAT,
            "precision": self.precision,
            "bounds": self.bounds,
            "allowed": self.allowed,
            "inexact": self.inexact,
            "measured": self.measured,
            "pictures": self.pictures,
            "positions": self.positions,
        }
        tensors = {IMAGE: self.image} | {
            name: np.ascontiguousarray(values, np.float32) for name, values in self.outputs.items()
        }
        return save(tensors, {"golden": json.dumps(about, sort_keys=True)})


class _About(BaseModel):
    """The JSON of a golden set's metadata."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    precision: Annotated[str, Field(max_length=100), AfterValidator(printable)]
    bounds: _Bounds
    allowed: dict[Name, _Bounds]
    inexact: dict[Name, _Bounds] = Field(default_factory=dict)
    pictures: Annotated[tuple[_Picture, ...], Field(min_length=1)]
    positions: PositionBounds | None = None
    measured: dict[Name, float] = Field(default_factory=dict)


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
    if not tensors:
        raise UserError(f"{path} is not a golden set (it has no outputs): export again")
    if image.dtype != np.uint8 or image.ndim != 4 or rows != {len(known.pictures)}:
        raise UserError(
            f"{path} is not a golden set (its tensors are not of {len(known.pictures)} pictures): "
            "export again"
        )
    return Golden(image, tensors, **{name: value for name, value in known})


@dataclass(frozen=True)
class Deviation:
    """How far one output of a server is from what was recorded, on its worst picture."""

    output: str
    problem: str = ""
    """Why it is outside its bounds, "" if it is within them."""
    note: str = ""
    """What is conspicuous about one that is within them, "" if nothing is."""
    share: float = 0.0
    """Of what its bounds allow; above 1 outside."""


def compare(golden: Golden, answers: Mapping[str, np.ndarray | None]) -> list[str]:
    """What is wrong with a server's answers to `golden.image`, a sentence an output; an empty list
    if nothing is.
    """
    return [one.problem for one in measure(golden, answers) if one.problem]


def measure(golden: Golden, answers: Mapping[str, np.ndarray | None]) -> list[Deviation]:
    """Every recorded output against a server's answers to `golden.image`.

    An output is wrong if it is missing, of another shape, not finite, or breaks a bound on any
    picture.
    """
    return [
        _deviation(golden, name, wanted, answers.get(name))
        for name, wanted in golden.outputs.items()
    ]


def _deviation(golden: Golden, name: str, wanted: np.ndarray, got: np.ndarray | None) -> Deviation:
    if got is None:
        return _outside(name, f"output '{name}' is missing")
    if got.shape != wanted.shape:
        shapes = f"{list(got.shape)}, recorded {list(wanted.shape)}"
        return _outside(name, f"output '{name}' is {shapes}")
    let_through = _let_through(golden, name)
    if not np.isfinite(got).all():
        return _outside(name, f"output '{name}' holds NaN or infinity{let_through}")
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (got, wanted))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # a picture of zeros has no direction: it must be zeros again
    cosine = np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), (a == b).all(1))
    length = np.linalg.norm(b, axis=1)
    relative = np.linalg.norm(a - b, axis=1) / np.where(length > 0, length, 1)
    bounds = golden.inexact.get(name, golden.bounds)
    least, most = golden.allowed.get(name, bounds)
    low, far = int(cosine.argmin()), int(relative.argmax())
    turned = f"cosine {cosine[low]:.6f} on {golden.pictures[low]}, at least {least} is wanted"
    off = (
        f"off by {relative[far]:.3g} of its length on {golden.pictures[far]}, at most {most} "
        "is allowed"
    )
    shares = _share(1 - cosine[low], 1 - least), _share(relative[far], most)
    share = max(shares)
    if cosine[low] < least or relative[far] > most:
        message = turned if cosine[low] < least else off
        return _outside(
            name, f"output '{name}' is not what was recorded: {message}{let_through}", share
        )
    if message := _far_position(golden, name, wanted, got):
        return _outside(name, f"output '{name}' is not what was recorded: {message}{let_through}")
    before = golden.measured.get(name)
    if before is not None and shares[1] > _FAINT and relative[far] > WORSE * before:
        times = f", {relative[far] / before:.1f} times" if before > 0 else ", and was 0"
        note = f"output '{name}' is {off}{times} at export"
    elif share > NEAR:
        note = f"output '{name}' is near its bound: {turned if shares[0] == share else off}"
    else:
        note = ""
    return Deviation(name, note=note, share=share)


def _outside(output: str, problem: str, share: float = np.inf) -> Deviation:
    return Deviation(output, problem=problem, share=share)


def _share(error: float, most: float) -> float:
    """What part of the allowed an error is; rounding of a cosine of 1 is none."""
    return float(error / most) if most > 0 else float(np.inf if error > 1e-12 else 0)


def _far_position(golden: Golden, name: str, wanted: np.ndarray, got: np.ndarray) -> str:
    """What is wrong with single positions of a map, "" if nothing is, or if nobody promised."""
    rows = rows_of(name, wanted)
    if rows is None or golden.positions is None or name in golden.allowed:
        return ""
    picture, problem = map_problem(rows_of(name, got), rows, golden.positions)
    return f"{problem} (on {golden.pictures[picture]})" if problem else ""


def _let_through(golden: Golden, name: str) -> str:
    """That an output was wrong when it was exported, "" if it was not."""
    return " (the export let it through: --allow-parity-failure)" if name in golden.allowed else ""

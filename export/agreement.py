"""How an output agrees with the student's, and whether that is enough for a precision. Arrays only.

The bounds of positions and neighbours are from healthy exports of several families
(docs/results/export.md): `near` is 1.9 times or more, `worst` 2.7 times or more what the worst of
them was off by. Neither is below what the bounds on whole pictures let every position be off by.
"""

from typing import NamedTuple

import numpy as np

from contract.manifest import Precision
from contract.positions import (
    PositionBounds,
    far_positions,
    kept_problem,
    position_errors,
    rows_of,
    shift_problem,
    shifted,
    variation,
)

TOLERANCE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
"""Least cosine between a graph's output and the student's, for every picture."""

RELATIVE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.05, "int8": 0.15}
"""Largest error over the length of the student's output, for every picture: cosine does not notice
another scale.
"""

POSITIONS: dict[Precision, PositionBounds] = {
    "fp32": PositionBounds(worst=5e-3, near=2e-3, share=0.01, spread=2.5e-4),
    "fp16": PositionBounds(worst=0.1, near=0.07, share=0.01, spread=2.5e-3),
    "bf16": PositionBounds(worst=0.2, near=0.1, share=0.02, spread=0.0125),
    "int8": PositionBounds(worst=0.4, near=0.2, share=0.02, spread=0.025),
}
"""What a map may be off by at one position, and at how many, for every picture."""

NEAREST: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.98, "bf16": 0.95, "int8": 0.92}
"""Least share of the pictures that keep their nearest neighbour."""

_CENTRED = 0.5
TELLING: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.05, "int8": 0.1}
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

MOST = np.finfo(np.float64).max


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
    errors: np.ndarray
    """Of a map's positions [B, P] (contract/positions.py), [B, 0] for outputs that are not maps."""
    moved: np.ndarray
    """Whether a map is nearer to the student's of neighbouring positions."""
    kept: np.ndarray
    """Share of a map's variation over positions that is in the output, NaN where there is none."""
    spread: np.ndarray
    """That variation over the map's length; 0 for outputs that are not maps."""
    own: np.ndarray
    """Largest error over length of the student in float32 on any picture of the batch, where the
    rest compares with it in float64; else 0."""
    own_position: np.ndarray
    """The same of any position."""


def compare(got: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine [B] and largest absolute difference [B] of each picture's output; NaN has cosine
    -1.
    """
    result = agreement(got, wanted, None)
    return result.cosine, result.largest


def agreement(
    got: np.ndarray, wanted: np.ndarray, mean: np.ndarray | None, output: str = ""
) -> Agreement:
    """Compare [B, …] with the student's; `mean` is the student's over some pictures, without B,
    `output` the name.
    """
    count = len(got)
    a, b = (values.reshape(count, -1).astype(np.float64) for values in (got, wanted))
    whole = np.isfinite(a).all(1)
    a = np.where(whole[:, None], a, 0)
    apart = a - b
    length, error = np.linalg.norm(b, axis=1), np.linalg.norm(apart, axis=1)
    cosine = _cosine((a * b).sum(1), np.linalg.norm(a, axis=1) * length, (a == b).all(1))
    relative = np.where(
        length > 0, error / np.where(length > 0, length, 1), np.where(error > 0, MOST, 0)
    )
    unknown = np.full(count, np.nan)
    centred, deviation, position = unknown, np.zeros(count), unknown
    if mean is not None:
        a0, b0 = a - mean.reshape(1, -1), b - mean.reshape(1, -1)
        far = np.linalg.norm(b0, axis=1)
        norms = far * np.linalg.norm(a0, axis=1)
        centred = np.where(far > 0, (a0 * b0).sum(1) / np.where(norms > 0, norms, 1), np.nan)
        deviation = far / np.where(length > 0, length, 1)
    errors, moved, rows = np.zeros((count, 0)), np.zeros(count, bool), rows_of(output, wanted)
    kept, spread = unknown, np.zeros(count)
    if rows is not None:
        mine, rows = (rows_of(output, values.reshape(got.shape)) for values in (a, b))
        errors = np.where(whole[:, None], position_errors(mine, rows), np.inf)
        moved = shifted(mine, rows)
        kept, spread = variation(mine, rows)
        if got.ndim > 2:
            norms = np.linalg.norm(mine, axis=-1) * np.linalg.norm(rows, axis=-1)
            product = (mine * rows).sum(-1)
            same = (mine == rows).all(-1)
            position = np.where(whole, _cosine(product, norms, same).min(1), -1.0)
    return Agreement(
        np.where(whole, cosine, -1.0),
        np.where(whole, np.abs(apart).max(1, initial=0), MOST),
        np.where(whole, relative, MOST),
        np.where(whole, centred, -1.0),
        deviation,
        position,
        errors,
        moved,
        kept,
        spread,
        np.zeros(count),
        np.zeros(count),
    )


def _cosine(product: np.ndarray, norms: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Cosines from products and norms; what is zero agrees with zeros alone."""
    return np.where(norms > 0, product / np.where(norms > 0, norms, 1), same)


def exact_agreement(
    got: np.ndarray, wanted: np.ndarray, exact: np.ndarray, mean: np.ndarray | None, output: str
) -> Agreement:
    """Agreement with the student in float64, `exact`, from which `wanted` differs itself."""
    # of small maps one picture may be right by luck
    own = agreement(wanted, exact, mean, output)
    return agreement(got, exact, mean, output)._replace(
        own=np.full(len(got), own.relative.max()),
        own_position=np.full(len(got), own.errors.max(initial=0)),
    )


def judge(result: Agreement, precision: Precision) -> tuple[int, str]:
    """The picture that agrees least, and what is wrong with it, "" if nothing is."""
    spare = np.minimum(_OWN * result.own, RELATIVE["fp16"])
    # the cosine of a small error at a right angle to the output, where it shows most
    enough = np.minimum(TOLERANCE[precision], 1 - spare**2 / 2)
    worst = int((result.cosine - enough).argmin())
    if not result.cosine[worst] >= enough[worst]:
        odd = " (NaN or infinity)" if result.largest[worst] == MOST else ""
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
    bounds = position_bounds(result, precision)
    far, problem = far_positions(result.errors, bounds)
    far, problem = (far, problem) if problem else shift_problem(result.moved, far)
    if not problem:
        far, problem = kept_problem(result.kept, result.spread, bounds, far)
    if problem:
        return far, problem
    differs = result.deviation >= np.maximum(TELLING[precision], spare)
    telling = np.where(differs, result.centred, 1.0)
    least = int(telling.argmin())
    if telling[least] < _CENTRED:
        return (
            least,
            f"cosine {telling[least]:.3f} without the mean over pictures, at least {_CENTRED} is "
            "required",
        )
    return worst, ""


def position_bounds(result: Agreement, precision: Precision) -> PositionBounds:
    """The bounds of a precision, wider where float32 of torch is not exact itself."""
    bounds, half = POSITIONS[precision], POSITIONS["fp16"]
    spare = _OWN * float(result.own_position.max(initial=0))
    return bounds._replace(
        worst=max(bounds.worst, min(spare, half.worst)),
        near=max(bounds.near, min(spare, half.near)),
        spread=max(bounds.spread, spare),
    )

"""Maps compared position by position: one wrong position of a thousand hardly changes the cosine or
the length of a whole picture's output.

Export judges graphs by it (`export/agreement.py`), a server's answers are judged by the same bounds
(`contract/golden.py`). Needs numpy only.
"""

from typing import NamedTuple

import numpy as np

from contract.tasks import TASKS

_FLAT = frozenset(task.output for task in TASKS.values() if task.dense and len(task.axes) == 1)
"""Outputs [B, positions] with one number at every position."""


_EXACT = 1e-3
"""Error over length up to which a map is taken to be where it belongs."""

_NEARER = 0.7
"""A map is elsewhere if its error there is less than this part of the error here."""

_KEPT = 0.5
"""Least share of a map's variation over positions that must be in the output. Healthy exports keep
0.995 to 1.015 of it, int8 too: rounding does not go with the variation, however large it is beside
it. Of a map that is mirrored, turned or shuffled, next to nothing is left.
"""

_EXPLAINED = 2.0
"""A map in the wrong place is off by no more than this many times its variation. What is off by
more is so for another reason, and then the share says nothing.
"""

_OBLONG = 4
"""Sides of the grid of a map are fewer times apart, as far as shifts along columns are tried."""


class PositionBounds(NamedTuple):
    """What a map may be off by: `worst` at any position, and beyond `near` at no more than `share`
    of a picture's positions (one is always allowed).

    Without its own mean over positions a map is judged where it differs from that by `spread` of
    its length; None, as in golden sets of earlier versions: never.
    """

    worst: float
    near: float
    share: float
    spread: float | None = None


def rows_of(output: str, values: np.ndarray) -> np.ndarray | None:
    """A map [B, …, d] as [B, P, d], None for an output that is not a map."""
    if output in _FLAT and values.ndim == 2:
        return values[..., None]
    return values.reshape(len(values), -1, values.shape[-1]) if values.ndim > 2 else None


def map_problem(got: np.ndarray, wanted: np.ndarray, bounds: PositionBounds) -> tuple[int, str]:
    """The picture of [B, P, d] whose map agrees least, and what is wrong with it, "" if nothing
    is.
    """
    picture, problem = far_positions(position_errors(got, wanted), bounds)
    if not problem:
        picture, problem = shift_problem(shifted(got, wanted), picture)
    return (picture, problem) if problem else kept_problem(*variation(got, wanted), bounds, picture)


def variation(got: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [B, P, d] without the mean over positions of each picture: the share [B] of what is wanted
    that is in `got`, NaN where it has no variation or is off for another reason, and its length [B]
    over that of the whole.
    """
    a, b = (values - values.mean(1, keepdims=True) for values in (got, wanted))
    length, whole = np.linalg.norm(b, axis=(1, 2)), np.linalg.norm(wanted, axis=(1, 2))
    told = (length > 0) & (np.linalg.norm(a - b, axis=(1, 2)) <= _EXPLAINED * length)
    share = (a * b).sum((1, 2)) / np.where(length > 0, length, 1) ** 2
    return np.where(told, share, np.nan), length / np.where(whole > 0, whole, 1)


def kept_problem(
    kept: np.ndarray, spread: np.ndarray, bounds: PositionBounds, other: int
) -> tuple[int, str]:
    """The picture that has lost most of its `variation` over positions, and that it has; else the
    `other`, and "".
    """
    if bounds.spread is None:
        return other, ""
    judged = np.where((spread >= bounds.spread) & ~np.isnan(kept), kept, 1.0)
    picture = int(judged.argmin())
    if judged[picture] >= _KEPT:
        return other, ""
    return picture, (
        f"{judged[picture]:.2f} of its map's variation over positions is the student's, at least "
        f"{_KEPT} must be"
    )


def shift_problem(moved: np.ndarray, other: int) -> tuple[int, str]:
    """The first picture that is `moved` [B], or the `other`, and what is wrong with it."""
    if not moved.any():
        return other, ""
    return int(moved.argmax()), "its map is nearer to the student's of the positions beside"


def position_errors(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Errors [B, P] of [B, P, d]: length of the difference over the length of what is wanted there,
    or over the median length in the picture where that is larger.

    (A position of almost no length has no direction to be kept. The median, because a few tokens of
    large norm must not be what the others are measured by.) Infinite where `got` is not finite.
    """
    lengths = np.linalg.norm(wanted, axis=-1)
    scale = np.maximum(lengths, np.median(lengths, axis=1, keepdims=True))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(got - wanted, axis=-1)
    error = np.where(np.isfinite(error), error, np.inf)
    return np.where(
        scale > 0, error / np.where(scale > 0, scale, 1), np.where(error > 0, np.inf, 0)
    )


def shifted(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Pictures [B] of [B, P, d] whose map is that of the positions one or two beside: in a smooth
    map such an error is no larger than rounding.

    (Along rows and along columns, of every grid that has so many positions and no long side.) Where
    positions differ by less than the error no picture is.
    """
    count, result = wanted.shape[1], np.zeros(len(wanted), bool)
    if count < 2:
        return result
    error = np.linalg.norm(got - wanted, axis=(1, 2))
    suspect = error > _EXACT * np.linalg.norm(wanted, axis=(1, 2))
    steps = [step for width in (1, *_widths(count)) for step in (width, -width)]
    for picture in np.flatnonzero(suspect):
        least = _NEARER * error[picture]
        moved = (
            np.linalg.norm(got[picture] - np.roll(wanted[picture], times * step, 0)) < least
            for times in (1, 2)
            for step in steps
        )
        result[picture] = any(moved)
    return result


def _widths(count: int) -> list[int]:
    """Widths of the grids that `count` positions may lie in."""
    return [
        width
        for width in range(2, count)
        if count % width == 0 and 1 / _OBLONG < width * width / count < _OBLONG
    ]


def far_positions(errors: np.ndarray, bounds: PositionBounds) -> tuple[int, str]:
    """The picture of `errors` [B, P] with the worst position, and what is wrong with it, "" if
    nothing is.
    """
    worst = errors.max(1, initial=0)
    picture = int(worst.argmax())
    if worst[picture] > bounds.worst:
        place = int(errors[picture].argmax())
        return picture, (
            f"off by {worst[picture]:.3g} of its length at position {place} of {errors.shape[1]}, "
            f"at most {bounds.worst:.3g} is allowed"
        )
    beyond = (errors > bounds.near).sum(1)
    most = max(1, int(bounds.share * errors.shape[1]))
    crowded = int(beyond.argmax())
    if beyond[crowded] > most:
        return crowded, (
            f"{beyond[crowded]} of {errors.shape[1]} positions are off by more than "
            f"{bounds.near:.3g} of their length, at most {most} may be"
        )
    return picture, ""

"""Do an exported graph's features find the same neighbours? Every picture's nearest ones among the
comparison pictures and crops of them, by the graph's features and by the student's.

int8 can keep the cosine of every picture with the student's and still confuse pictures whose
features are near one another.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from contract.manifest import Precision
from contract.signature import Port
from contract.tasks import TASKS
from export.agreement import NEAREST, TELLING

_ENOUGH = 48
"""Pictures that are compared, with their crops, where there are at least 16 of them."""

_CROPS = ((0.0, 0.0, 0.6), (0.4, 0.4, 0.6), (0.25, 0.25, 0.5))
"""Left, top and side of crops, as shares of a picture's."""

_FEWEST = 8
"""Of fewer pictures neighbours say nothing."""

_RANKED = 5
"""Neighbours of each picture that are compared as a set."""

_TIE = 1e-5
"""Difference of cosines within which the student has no nearest neighbour itself: float32 rounds
them by 1e-6.
"""

_SCORES = frozenset(task.output for task in TASKS.values())


class Neighbours(NamedTuple):
    """`nearest`: share of the pictures that keep their nearest neighbour; `ranked`: share of the
    five nearest that are the same, on average; `telling`: whether the student's features differ
    from picture to picture by more than the rounding of the precision.
    """

    pictures: int
    nearest: float
    ranked: float
    telling: bool


def summaries(ports: Sequence[Port]) -> list[str]:
    """Outputs that are a vector for the picture, not scores."""
    return [port.name for port in ports if len(port.axes) == 2 and port.name not in _SCORES]


def crops(photos: Sequence[Image.Image]) -> Iterator[Image.Image]:
    """As many crops of every photograph as make enough pictures of them."""
    each = min(len(_CROPS), max(1, math.ceil(_ENOUGH / len(photos)) - 1))
    for photo in photos:
        for left, top, side in _CROPS[:each]:
            x, y, width, height = (
                round(share * of)
                for share, of in zip(
                    (left, top, side, side), (photo.width, photo.height) * 2, strict=True
                )
            )
            yield photo.crop((x, y, x + max(1, width), y + max(1, height)))


def neighbours(got: np.ndarray, wanted: np.ndarray, precision: Precision) -> Neighbours | None:
    """Compare features [n, d] with the student's; None where they are too few, or of one picture
    over and over.
    """
    # a picture that is there twice has no single nearest one
    kept = np.unique(wanted, axis=0, return_index=True)[1]
    got, wanted = got[kept].astype(np.float64), wanted[kept].astype(np.float64)
    if len(kept) < _FEWEST:
        return None
    near, mine = _cosines(got), _cosines(wanted)
    count = min(_RANKED, len(kept) - 2)
    order, own = (np.argsort(-values, axis=1, kind="stable")[:, :count] for values in (near, mine))
    rows = np.arange(len(kept))
    lost = mine[rows, own[:, 0]] - mine[rows, order[:, 0]]
    ranked = np.mean([len({*a} & {*b}) / count for a, b in zip(order, own, strict=True)])
    lengths = np.linalg.norm(wanted, axis=1)
    apart = np.linalg.norm(wanted - wanted.mean(0), axis=1) / np.where(lengths > 0, lengths, 1)
    return Neighbours(
        len(kept),
        float(np.mean(lost <= _TIE)),
        float(ranked),
        bool(np.median(apart) >= TELLING[precision]),
    )


def _cosines(features: np.ndarray) -> np.ndarray:
    """Cosines [n, n], below all others of a picture with itself; of what is not finite none."""
    features = np.where(np.isfinite(features).all(1)[:, None], features, 0)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.where(lengths > 0, lengths, 1)
    result = features @ features.T
    np.fill_diagonal(result, -2)
    return result


def judge_neighbours(result: Neighbours, precision: Precision) -> str:
    """What is wrong with the neighbours, "" if nothing is, or if rounding alone decides them."""
    wrong = round((1 - result.nearest) * result.pictures)
    allowed = math.ceil((1 - NEAREST[precision]) * result.pictures)
    if not result.telling or wrong <= allowed:
        return ""
    return (
        f"{wrong} of {result.pictures} pictures and crops have another nearest neighbour, at most "
        f"{allowed} may"
    )

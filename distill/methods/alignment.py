"""KPU's alignment of feature pyramids (Eq 1), which levels it compares, and the translators between
spaces.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.features import FeatureDims, Features
from distill.methods.losses import Prediction, similarity
from distill.methods.projectors import initialize, mlp
from distill.models.deformable import Grid

Levels = Literal["pick_and_fill", "pick", "every"]
"""What becomes of levels that are closest to no map of a teacher."""


class Pair(NamedTuple):
    """A level of the student that is compared with a map of a teacher, both by number."""

    level: int
    map: int


def choose_levels(
    students: Mapping[str, Sequence[Grid]],
    teachers: Mapping[str, Sequence[Grid]],
    kind: Levels,
) -> dict[str, list[Pair]]:
    """The pairs to compare, by teacher: first the level of closest size for each of its maps, then
    what gives the other levels something to learn from.

    `students` are the grids of the student's levels on the pictures that each teacher sees, with as
    many levels for all; `teachers` those of its maps. A level that no map picked is compared with
    the map of closest size of all teachers or, for "every", of each of them, or for "pick" with
    none. Of two equally close ones the first, that is the finer, is taken.
    """

    def apart(label: str, pair: Pair) -> float:
        level, own = students[label][pair.level], teachers[label][pair.map]
        return abs(math.log(math.prod(level) / math.prod(own)))

    count = len(next(iter(students.values())))
    chosen: dict[str, list[Pair]] = {}
    for label, maps in teachers.items():
        chosen[label] = [
            min((Pair(level, m) for level in range(count)), key=lambda p, at=label: apart(at, p))
            for m in range(len(maps))
        ]
    if kind == "pick":
        return chosen
    picked = {label: {pair.level for pair in pairs} for label, pairs in chosen.items()}
    groups = [[label] for label in chosen] if kind == "every" else [list(chosen)]
    for group in groups:
        for level in sorted(set(range(count)).difference(*(picked[label] for label in group))):
            label, pair = min(
                ((at, Pair(level, m)) for at in group for m in range(len(teachers[at]))),
                key=lambda candidate: apart(*candidate),
            )
            chosen[label].append(pair)
    return chosen


def align(
    vectors: tuple[Tensor, Tensor] | None,
    maps: Sequence[tuple[Tensor, Tensor]],
    weights: tuple[float, float, float],
) -> Tensor:
    """L_align of Eq 1, a number: `weights` of the cosine loss of two vectors [N, d], of that of two
    maps [N, h, w, d] and of their smooth L1; the latter two are averaged over pairs of maps. The
    first term is absent without vectors.
    """
    terms = []
    for first, second in maps:
        parts = similarity(exact(first), exact(second))
        terms.append(weights[1] * parts.cosine.mean() + weights[2] * parts.smooth_l1.mean())
    total = torch.stack(terms).mean()
    if vectors is None:
        return total
    first, second = vectors
    return total + weights[0] * similarity(exact(first), exact(second)).cosine.mean()


def exact(values: Tensor) -> Tensor:
    """At least float32, for sums over many positions and for resampling."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def levels_of(features: Features) -> tuple[Tensor | None, ...]:
    """The student's maps to be aligned, finest first: those of its pyramid, or else its patches."""
    return features.maps or (features.patches,)


def maps_of(features: Features) -> tuple[Tensor, ...]:
    """All maps of a teacher, finest first."""
    return (features.patches, *features.maps)


def grid_of(map_: Tensor) -> Grid:
    """Rows and columns of a map [N, h, w, d]."""
    return map_.shape[1], map_.shape[2]


class Translator(nn.Module):
    """MLPs of one hidden layer from one space into another: for the vector where `outside`, the
    teacher's widths, has one, and for each of the teacher's maps.

    One side of each is `width` wide, the student's; `into_student` says which.
    """

    def __init__(self, outside: FeatureDims, width: int, hidden: int, into_student: bool) -> None:
        super().__init__()

        def make(dim: int) -> nn.Sequential:
            return mlp((dim, hidden, width) if into_student else (width, hidden, dim))

        self.summary = None if outside.summary is None else make(outside.summary)
        self.maps = nn.ModuleList(make(dim) for dim in (outside.patches, *outside.maps))
        self.apply(initialize)


class TeacherHead(Translator):
    """A translator from the student's space into a teacher's, with the level that each of the
    teacher's maps is predicted from.
    """

    def __init__(self, outside: FeatureDims, width: int, hidden: int, levels: int) -> None:
        super().__init__(outside, width, hidden, into_student=False)
        count = len(self.maps)
        # until training says otherwise: stride 16 for a single map, as a ViT's, else finest first
        guess = [level + (2 if count == 1 else 1) for level in range(count)]
        guess = [min(level, levels - 1) for level in guess]
        # small numbers that average to themselves exactly, hence floating point
        self.register_buffer("levels", torch.tensor(guess, dtype=torch.float32))
        self._known: list[int] | None = None

    def remember(self, levels: list[int]) -> None:
        """Note the levels of the teacher's maps in the buffer that ships."""
        if levels != self._known:
            with torch.no_grad():
                self.levels.copy_(torch.tensor(levels, dtype=torch.float32))
            self._known = levels

    def shipped(self) -> "LevelHead":
        """The head on the levels that it was trained on."""
        return LevelHead(self.summary, self.maps, [round(level) for level in self.levels.tolist()])


class LevelHead(nn.Module):
    """Predicts a teacher's vector and maps, each on the grid of the level it reads."""

    def __init__(
        self, summary: nn.Module | None, maps: nn.ModuleList, levels: Sequence[int]
    ) -> None:
        super().__init__()
        self.summary, self.maps, self.levels = summary, maps, tuple(levels)

    def forward(self, features: Features) -> Prediction:
        """Translate the student's features."""
        levels = levels_of(features)
        patches, *further = (
            layer(levels[level]) for level, layer in zip(self.levels, self.maps, strict=True)
        )
        token = None if self.summary is None else self.summary(features.summary)
        return Prediction(token, patches, None, tuple(further))

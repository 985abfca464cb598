"""One feature type for teachers, students, losses and export, whatever the architecture."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What a vision backbone computes of a batch of images.

    `summary` [B, d_summary] is the image-level vector (class token, pooled map, or CLIP's projected
    embedding), None for a network without one (a detector's backbone); `patches` [B, h, w, d] is
    the spatial map, row-major, without class or register tokens; `maps` are further maps
    [B, h_l, w_l, d_l], finest first. The widths may differ (CLIP ViT-B/16: 512 and 768). `second`
    [B, d] is a second image-level vector where a student learns one (UDI's second class token).
    """

    summary: Tensor | None
    patches: Tensor
    maps: tuple[Tensor, ...] = ()
    second: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there: "summary", "patches", "maps.0", "maps.1", …, "second"."""
        named = {} if self.summary is None else {"summary": self.summary}
        named["patches"] = self.patches
        named |= {f"maps.{level}": map_ for level, map_ in enumerate(self.maps)}
        return named if self.second is None else named | {"second": self.second}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """The features with a function applied to every tensor."""
        return features_of({name: function(tensor) for name, tensor in self.named().items()})


def features_of(named: Mapping[str, Tensor]) -> Features:
    """Inverse of `Features.named`."""
    levels = sum(name.startswith("maps.") for name in named)
    maps = tuple(named[f"maps.{level}"] for level in range(levels))
    return Features(named.get("summary"), named["patches"], maps, named.get("second"))


class FeatureDims(NamedTuple):
    """Widths of a teacher's `Features`: all that is needed to rebuild a student without its
    teachers.
    """

    summary: int | None
    patches: int
    maps: tuple[int, ...] = ()


def resize_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a feature map [B, h, w, d] bilinearly to `grid` = (h', w'), antialiased when it
    shrinks.
    """
    if tuple(patches.shape[1:3]) == tuple(grid):
        return patches
    channels_first = patches.permute(0, 3, 1, 2)
    resized = F.interpolate(
        channels_first, size=grid, mode="bilinear", align_corners=False, antialias=True
    )
    return resized.permute(0, 2, 3, 1)


def scaled(side: int, scale: float) -> int:
    """`side * scale` rounded, halves up, at least 1; in whole numbers, so that a side may also be
    symbolic.
    """
    ratio = Fraction(scale).limit_denominator(1000)
    return torch.sym_max(
        1, (2 * ratio.numerator * side + ratio.denominator) // (2 * ratio.denominator)
    )

"""One feature type for teachers, students, losses and export, whatever the architecture."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What a vision backbone says of a batch of images.

    `summary` [B, d_summary] is the image-level vector (class token, pooled map, or CLIP's projected
    embedding); `patches` [B, h, w, d] is the spatial map, row-major, without class or register
    tokens. The two widths may differ (CLIP ViT-B/16: 512 and 768).
    """

    summary: Tensor
    patches: Tensor


class FeatureDims(NamedTuple):
    """Widths of a teacher's `Features`: all that is needed to rebuild a student without its
    teachers.
    """

    summary: int
    patches: int


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

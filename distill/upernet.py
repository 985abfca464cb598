"""UPerNet (Xiao et al. 2018, as in MMSegmentation): KPU's decoder for segmentation, on a pyramid of
maps.

Own code, although transformers has the same head: what ships needs no transformers, and its
adaptive pooling cannot be exported where the bins do not divide the map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BINS = (1, 2, 3, 6)
"""Sides of the pyramid pooling's grids."""

AUXILIARY_WEIGHT = 0.4


class UPerNet(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid of `width` channels over all of them,
    a classifier at the finest: maps [B, h_l, w_l, d_l], finest first, to logits [B, C, h_0, w_0].
    """

    def __init__(self, widths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.settings = {"widths": list(widths), "width": width, "classes": classes}
        *finer, coarsest = widths
        self.laterals = nn.ModuleList(_convolution(dim, width, 1) for dim in finer)
        self.pools = nn.ModuleList(_convolution(coarsest, width, 1) for _ in _BINS)
        self.bottleneck = _convolution(coarsest + len(_BINS) * width, width, 3)
        self.smooth = nn.ModuleList(_convolution(width, width, 3) for _ in finer)
        self.fuse = _convolution(len(widths) * width, width, 3)
        self.drop = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits at the finest map's resolution; resize them, not the labels."""
        *finer, coarsest = (map_.permute(0, 3, 1, 2) for map_ in maps)
        pooled = [
            _resize(pool(adaptive_mean(coarsest, bins)), coarsest)
            for bins, pool in zip(_BINS, self.pools, strict=True)
        ]
        top = self.bottleneck(torch.cat((coarsest, *pooled), dim=1))
        levels = [top]
        for map_, lateral in zip(reversed(finer), reversed(self.laterals), strict=True):
            side = lateral(map_)
            levels.insert(0, side + _resize(levels[0], side))
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)), top]
        whole = torch.cat([_resize(level, levels[0]) for level in levels], dim=1)
        return self.classify(self.drop(self.fuse(whole)))


class SupervisedUPerNet(nn.Module):
    """A UPerNet in training, with an auxiliary FCN head on the last map but one, s16 of a pyramid
    down to s32, whose loss counts `AUXILIARY_WEIGHT`.
    """

    def __init__(self, head: UPerNet) -> None:
        super().__init__()
        widths, width, classes = (head.settings[key] for key in ("widths", "width", "classes"))
        self.head = head
        self.auxiliary = nn.Sequential(
            _convolution(widths[-2], width // 2, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(width // 2, classes, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of both heads, each at its map's resolution."""
        return self.head(maps), self.auxiliary(maps[-2].permute(0, 3, 1, 2))


def adaptive_mean(map_: Tensor, bins: int) -> Tensor:
    """`F.adaptive_avg_pool2d` to [B, c, bins, bins] as two products of matrices, which every
    runtime knows, whatever the map's size.
    """
    rows, columns = (_averages(side, bins, map_) for side in map_.shape[-2:])
    return rows @ map_ @ columns.T


def _averages(side: int, bins: int, like: Tensor) -> Tensor:
    """[bins, side]: means of the stretches that overlap where `bins` does not divide `side`, which
    may be symbolic.
    """
    place = torch.arange(bins, device=like.device)[:, None]
    first, last = place * side // bins, ((place + 1) * side + bins - 1) // bins
    number = torch.arange(side, device=like.device)
    inside = (number >= first) & (number < last)
    return inside.to(like.dtype) / (last - first).to(like.dtype)


def _convolution(before: int, after: int, side: int) -> nn.Sequential:
    layer = nn.Conv2d(before, after, side, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


def _resize(map_: Tensor, like: Tensor) -> Tensor:
    """[B, c, h, w] at the height and width of another map."""
    return F.interpolate(map_, size=like.shape[-2:], mode="bilinear", align_corners=False)

"""Square windows that cover a picture of any shape, and the labels under them.

The shorter side becomes the window's side; along the longer one as many windows as it takes follow
each other, overlapping evenly. Heads learn from windows and are scored on whole pictures, overlaps
averaged.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distill.data.crops import take_crop
from distill.data.pictures import digest
from distill.evaluate.datasets import Pairs, read_matched, stamp
from distill.evaluate.maps import map_size

_MEMORY = 2 * 2**30
"""Bytes of label windows that are kept in memory instead of read again every step."""


@dataclass(frozen=True)
class Window:
    """Window of picture `picture`: its box in the picture's own pixels (left, top, right,
    bottom).
    """

    picture: int
    box: tuple[float, float, float, float]


def cut_windows(picture: int, width: int, height: int) -> list[Window]:
    """Windows of a picture, left to right or top to bottom."""
    short, long = min(width, height), max(width, height)
    count = math.ceil(long / short - 1e-6)
    starts = np.linspace(0, long - short, count).round()
    if width >= height:
        return [Window(picture, (float(s), 0.0, float(s + short), float(short))) for s in starts]
    return [Window(picture, (0.0, float(s), float(short), float(s + short))) for s in starts]


class WindowViews:
    """All windows of a split as uint8 [3, size, size], picture after picture."""

    def __init__(self, pairs: Pairs, size: int) -> None:
        self.pairs, self.size = pairs, size
        self.windows = [
            w for n, path in enumerate(pairs.maps) for w in cut_windows(n, *map_size(path))
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Tensor:
        window = self.windows[number]
        picture = read_matched(self.pairs, window.picture)
        return take_crop(picture, window.box, self.size, flip=False)

    def fingerprint(self) -> str:
        """Changes when the pictures, their windows or the size do; not with the kind of map."""
        boxes = digest((window.picture, window.box) for window in self.windows)
        return f"{stamp(self.pairs.root, self.pairs.pictures)} {boxes} windows {self.size}"

    def of_picture(self) -> list[list[int]]:
        """Numbers of every picture's windows."""
        numbers: list[list[int]] = [[] for _ in range(len(self.pairs))]
        for number, window in enumerate(self.windows):
            numbers[window.picture].append(number)
        return numbers


class WindowLabels:
    """Label maps under the windows, [points, points] each, taken by nearest neighbour.

    `read(picture number) -> array [H, W]` gives a picture's whole map.
    """

    def __init__(self, views: WindowViews, read, points: int) -> None:
        self.views, self.read, self.points = views, read, points
        self.keep = len(views) * points * points * 4 <= _MEMORY
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        window = self.views.windows[number]
        values = self.read(window.picture)
        image = Image.fromarray(values.astype(np.float32 if values.dtype.kind == "f" else np.int32))
        small = image.resize((self.points, self.points), Image.Resampling.NEAREST, box=window.box)
        result = torch.from_numpy(np.array(small))
        if self.keep:
            self._kept[number] = result
        return result


def merge_windows(maps: Tensor, windows: list[Window], width: int, height: int) -> Tensor:
    """Map [C, height, width] of a picture from the maps [n, C, h, w] of its windows, overlaps
    averaged.
    """
    if len(windows) == 1:
        return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)[0]
    total = torch.zeros(maps.shape[1], height, width, device=maps.device)
    count = torch.zeros(height, width, device=maps.device)
    for one, window in zip(maps, windows, strict=True):
        left, top = round(window.box[0]), round(window.box[1])
        side = min(width, height)
        total[:, top : top + side, left : left + side] += F.interpolate(
            one.unsqueeze(0), size=(side, side), mode="bilinear", align_corners=False
        )[0]
        count[top : top + side, left : left + side] += 1
    return total / count

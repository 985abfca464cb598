"""Square windows that cover a picture of any shape, and the labels under them; or the whole picture
in one piece.

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

from contract.errors import UserError
from contract.views import ViewPolicy
from distill.data.crops import take_crop, to_tensor
from distill.data.pictures import digest
from distill.evaluate.datasets import Pairs, read_matched, stamp
from distill.evaluate.maps import check_size, drawn_tag, map_size
from distill.evaluate.reading import read_every_view, upright_size

_LONGEST = 4
"""The longer side of a resized picture is at most this many times the size of the shorter one."""

_MEMORY = 2 * 2**30
"""Bytes of label windows that are kept in memory instead of read again every step."""


@dataclass(frozen=True)
class Window:
    """Window of picture `picture`: its box in the picture's own pixels (left, top, right,
    bottom).
    """

    picture: int
    box: tuple[float, float, float, float]


def scale_to(width: int, height: int, size: float) -> float:
    """The factor that makes a picture's shorter side `size` pixels, or its longer one four times
    as many (MMSegmentation's scale=(2048, 512)), whichever is less.
    """
    return size * min(1 / min(width, height), _LONGEST / max(width, height))


def cut_windows(picture: int, width: int, height: int, step: float = 1.0) -> list[Window]:
    """Windows of a picture, left to right or top to bottom, at most `step` times their side
    apart.
    """
    short, long = min(width, height), max(width, height)
    count = 1 + math.ceil((long / short - 1) / step - 1e-6)
    starts = np.linspace(0, long - short, count).round()
    if width >= height:
        return [Window(picture, (float(s), 0.0, float(s + short), float(short))) for s in starts]
    return [Window(picture, (0.0, float(s), float(short), float(s + short))) for s in starts]


class WindowViews:
    """All windows of a split as uint8 [3, size, size], picture after picture."""

    def __init__(self, pairs: Pairs, size: int, step: float = 1.0) -> None:
        self.pairs, self.size = pairs, size
        self.windows = [
            w for n, path in enumerate(pairs.maps) for w in cut_windows(n, *map_size(path), step)
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


class WholeViews:
    """Whole pictures of a split, the shorter side `size` pixels, padded with black at the right and
    the bottom to multiples of `stride`: uint8 [3, H, W].
    """

    def __init__(self, pairs: Pairs, size: int, stride: int) -> None:
        self.pairs, self.stride = pairs, stride
        self.inner: list[tuple[int, int]] = []
        """Height and width of every picture in its view, without the padding."""
        for path in pairs.maps:
            width, height = map_size(path)
            scale = scale_to(width, height, size)
            self.inner.append((max(1, round(height * scale)), max(1, round(width * scale))))

    def padded(self, number: int) -> tuple[int, int]:
        """Height and width of a view."""
        height, width = (-(-side // self.stride) * self.stride for side in self.inner[number])
        return height, width

    def shapes(self) -> set[tuple[int, int]]:
        """Height and width of all views."""
        return {self.padded(number) for number in range(len(self.inner))}

    def __getitem__(self, number: int) -> Tensor:
        height, width = self.inner[number]
        picture = read_matched(self.pairs, number)
        pixels = to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR))
        rows, columns = self.padded(number)
        return F.pad(pixels, (0, columns - width, 0, rows - height))

    def restore(self, maps: Tensor, number: int, width: int, height: int) -> Tensor:
        """Map [C, height, width] of a picture from the map [1, C, h, w] of its view."""
        rows, columns = self.inner[number]
        maps = F.interpolate(maps, self.padded(number), mode="bilinear", align_corners=False)
        maps = maps[:, :, :rows, :columns]
        return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0]


class SeenViews:
    """What a view policy shows of every picture of a split, read as clients and servers read files:
    uint8 [n, 3, size, size], one view a picture or its tiles. A picture whose map is drawn on its
    pixels as they are stored is seen as stored.
    """

    def __init__(self, pairs: Pairs, size: int, view: ViewPolicy) -> None:
        self.pairs, self.size, self.view = pairs, size, view

    def __getitem__(self, number: int) -> Tensor:
        try:
            views = self._read(number)
        except ValueError as error:
            raise UserError(f"{self.pairs.pictures[number]}: {error}") from error
        return torch.from_numpy(views).permute(0, 3, 1, 2)

    def _read(self, number: int) -> np.ndarray:
        file, path = self.pairs.pictures[number], self.pairs.maps[number]
        own = upright_size(file)
        if drawn_tag(own, file, path, self.pairs.exif) != 1:
            return self.view.every(read_matched(self.pairs, number), self.size, self.size)
        check_size(path, own)
        return read_every_view(file, self.view, self.size)

    def restore(self, maps: Tensor, number: int, width: int, height: int) -> Tensor:
        """Map [C, height, width] of a picture from the maps [n, C, h, w] of its views, NaN where
        they do not show it.
        """
        size = (self.size, self.size)
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        result = self.view.undo(maps.permute(0, 2, 3, 1).cpu().numpy(), (height, width))
        return torch.from_numpy(result).permute(2, 0, 1).to(maps.device)

    def shown(self, width: int, height: int) -> Tensor:
        """Which pixels [height, width] of a picture its views show."""
        views = len(self.view.places((height, width), (self.size, self.size)))
        blank = np.zeros((views, self.size, self.size), np.float32)
        return torch.from_numpy(~np.isnan(self.view.undo(blank, (height, width))))

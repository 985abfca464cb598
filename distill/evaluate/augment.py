"""Random windows of pictures with their maps, for heads that learn from augmented pictures.

A window is a pure function of (seed, step, picture): the picture is resized, a window cut out,
mirrored and its colours changed; its map goes through the same geometry by nearest neighbour.
Facts of MMSegmentation's pipelines, which the papers' configurations share.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.crops import to_tensor
from distill.evaluate.datasets import IGNORED, Pairs, read_matched
from distill.evaluate.windows import scale_to

_Colours = Callable[[Image.Image, np.random.Generator], Image.Image]
"""Changes an RGB window's colours; draws from the generator alone."""

_TRIES = 10
"""Further windows drawn where one class covers too much of the first."""


class _Placement(NamedTuple):
    """Where a window comes from: its box (left, top, right, bottom) in the picture's pixels, and
    its own size (width, height).
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]


class Style(NamedTuple):
    """What a task's augmentation has of its own: the label beyond the picture (and of pixels that
    do not count), the change of colours, and the share of a window from which on a single label
    makes it drawn again.
    """

    fill: int
    colours: _Colours | None = None
    cap: float | None = None


class AugmentedPairs:
    """Windows by (step, picture): uint8 [3, size, size], black beyond the picture, and labels
    [points, points]; `window` is (size, points).

    `read(pairs, number)` gives a picture's whole map [H, W]. The shorter side of the picture
    becomes `size` times a factor in `resize`.
    """

    keep = False
    """Nothing is kept in memory: processes may share the reading."""

    def __init__(
        self,
        pairs: Pairs,
        read: Callable[[Pairs, int], np.ndarray],
        window: tuple[int, int],
        resize: tuple[float, float],
        style: Style,
        seed: int,
    ) -> None:
        self.pairs, self.read, self.resize, self.style = pairs, read, resize, style
        self.size, self.points = window
        self.seed = seed % 2**64  # NumPy's seeds are not negative

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step, number = key
        entropy = np.random.SeedSequence([self.seed, step, number])
        rng = np.random.Generator(np.random.Philox(entropy))
        picture, labels = read_matched(self.pairs, number), self.read(self.pairs, number)
        kind = np.float32 if labels.dtype.kind == "f" else np.int32
        whole = Image.fromarray(labels.astype(kind))
        factor = rng.uniform(*self.resize)
        place = _draw_placement(picture.size, self.size, factor, rng)
        truth = _cut(whole, place, Image.Resampling.NEAREST)
        for _ in range(_TRIES if self.style.cap else 0):
            if _is_varied(np.asarray(truth), self.style.fill, self.style.cap):
                break
            place = _draw_placement(picture.size, self.size, factor, rng)
            truth = _cut(whole, place, Image.Resampling.NEAREST)
        flip = rng.random() < 0.5
        window = _cut(picture, place, Image.Resampling.BILINEAR)
        if flip:
            window, truth = (
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (window, truth)
            )
        if self.style.colours:
            window = self.style.colours(window, rng)
        width, height = place.size
        pixels = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        pixels[:, :height, :width] = to_tensor(window)
        padded = np.full((self.size, self.size), self.style.fill, kind)
        padded[:height, :width] = np.asarray(truth)
        if self.points != self.size:
            small = Image.fromarray(padded).resize((self.points,) * 2, Image.Resampling.NEAREST)
            padded = np.array(small)
        return pixels, torch.from_numpy(padded)


def _draw_placement(
    picture: tuple[int, int], size: int, factor: float, rng: np.random.Generator
) -> _Placement:
    """A window of at most `size` x `size` pixels, anywhere in a picture of (width, height) whose
    shorter side is resized to `factor` times `size`.
    """
    scale = scale_to(*picture, factor * size)
    resized = [max(1, round(side * scale)) for side in picture]
    own = [min(size, side) for side in resized]
    first = [int(rng.integers(side - part + 1)) for side, part in zip(resized, own, strict=True)]
    # as a box of the picture itself, so that it is resampled once
    low = [start * side / new for start, side, new in zip(first, picture, resized, strict=True)]
    high = [
        (start + part) * side / new
        for start, part, side, new in zip(first, own, picture, resized, strict=True)
    ]
    return _Placement((*low, *high), (own[0], own[1]))


def _cut(image: Image.Image, place: _Placement, how: Image.Resampling) -> Image.Image:
    return image.resize(place.size, how, box=place.box)


def _is_varied(labels: np.ndarray, fill: int, cap: float) -> bool:
    """Whether several labels are there and none covers `cap` of what is labelled."""
    counts = np.bincount(labels[labels != fill].ravel())
    return np.count_nonzero(counts) > 1 and counts.max() < cap * counts.sum()


# ---- colours ----------------------------------------------------------------------------------


def _segmentation_colours(window: Image.Image, rng: np.random.Generator) -> Image.Image:
    """MMSegmentation's photometric distortion: brightness +-32, contrast and saturation by 0.5 to
    1.5, hue +-36 degrees, each at even odds; contrast comes second or last.
    """
    if rng.random() < 0.5:
        window = _linear(window, 1.0, rng.uniform(-32, 32))
    last = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    if not last:
        window = _linear(window, contrast, 0.0)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-36, 36) if rng.random() < 0.5 else 0.0
    window = _hsv(window, hue, saturation, 0.0, 0.0)
    return _linear(window, contrast, 0.0) if last else window


def _depth_colours(window: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness and contrast by +-0.2, gamma 0.8 to 1.2, hue +-40 degrees with saturation +-30 and
    value +-20 of 255, each at even odds (Proteus's configuration, Albumentations' defaults).
    """
    if rng.random() < 0.5:
        window = _linear(window, 1 + rng.uniform(-0.2, 0.2), 255 * rng.uniform(-0.2, 0.2))
    if rng.random() < 0.5:
        gamma = rng.uniform(0.8, 1.2)
        window = window.point([round(255 * (level / 255) ** gamma) for level in range(256)] * 3)
    if rng.random() < 0.5:
        hue, saturation, value = rng.uniform((-40, -30, -20), (40, 30, 20))
        window = _hsv(window, hue, 1.0, saturation, value)
    return window


def _linear(window: Image.Image, factor: float, offset: float) -> Image.Image:
    """Every level times a factor plus an offset, kept in 0 to 255."""
    levels = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8).tolist()
    return window.point(levels * 3)


def _hsv(
    window: Image.Image, hue: float, factor: float, saturation: float, value: float
) -> Image.Image:
    """Turn the hue by degrees, scale the saturation by a factor, then add to saturation and value
    (of 255).
    """
    if (hue, factor, saturation, value) == (0.0, 1.0, 0.0, 0.0):
        return window
    levels = np.arange(256)
    turned = (levels + round(hue * 256 / 360)) % 256
    scaled = np.clip(levels * factor + saturation, 0, 255)
    lighter = np.clip(levels + value, 0, 255)
    tables = np.concatenate((turned, scaled, lighter)).astype(np.uint8).tolist()
    return window.convert("HSV").point(tables).convert("RGB")


SEGMENTATION = Style(IGNORED, _segmentation_colours, 0.75)
"""MMSegmentation's ADE20K pipeline; its `cat_max_ratio` is 0.75."""

DEPTH = Style(0, _depth_colours)
"""Proteus's NYUv2 pipeline, without its DepthMix."""

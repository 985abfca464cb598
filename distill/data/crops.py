"""From pictures to crops: every crop is a pure function of (seed, picture, view, crop).

A method declares the `View`s it needs; the student and the teachers that use a view resize and
normalise its crops themselves, on the device.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from contract.errors import UserError, raise_trouble
from contract.images import UnreadableImage
from distill.config import DataConfig
from distill.data.masks import BlockMask, WindowCells
from distill.data.photometric import photometric
from distill.data.pictures import Pictures
from distill.data.pixels import Box, Crop, resize_crop, to_image, to_tensor

MAIN = "main"
"""The stream whose batch size is `train.batch_size`."""

IMAGE = "image"
"""Name of the view of methods that need only one."""

_FeaturesOf = Callable[[str, int, int], Tensor]

Skipped = tuple[str, str]
"""Name of an unreadable picture and the reason."""


def random_crop(
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A box (left, top, right, bottom) covering a random share of a picture of `size` = (width,
    height).

    The share of the area is uniform in `scale` and the aspect ratio log-uniform in `ratio`; after
    ten misses the largest centred box of a legal ratio is taken (the random resized crop of
    Inception).
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def surrounding(boxes: Sequence[Box]) -> Box:
    """The smallest box around some boxes."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def shift_towards(box: Box, anchor: Box) -> Box:
    """Move a box as little as possible until it overlaps `anchor`, in each direction, by at least
    half of the smaller of both sides (UDI, Su & Ji 2024).
    """
    left, right = _shift(box[0], box[2], anchor[0], anchor[2])
    top, bottom = _shift(box[1], box[3], anchor[1], anchor[3])
    return left, top, right, bottom


def _shift(low: float, high: float, anchor_low: float, anchor_high: float) -> tuple[float, float]:
    wanted = min(high - low, anchor_high - anchor_low) / 2
    missing = wanted - (min(high, anchor_high) - max(low, anchor_low))
    if missing <= 0:
        return low, high
    move = missing if low + high < anchor_low + anchor_high else -missing
    return low + move, high + move


def take_crop(image: Image.Image, box: Box, side: int, flip: bool) -> Tensor:
    """`resize_crop` as uint8 [3, side, side]."""
    return to_tensor(resize_crop(image, box, side, flip))


def centre_crop(image: Image.Image, side: int) -> Tensor:
    """The largest centred square of an RGB image as uint8 [3, side, side]."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return take_crop(image, (left, top, left + short, top + short), side, flip=False)


class View(NamedTuple):
    """What the data stage makes of one picture: `crops` random crops of `size` x `size` pixels."""

    name: str
    """Key of the view's tensor in `Batch.views`."""
    size: int | None = None
    """Side in pixels; None: `data.image_size`, by default the largest input of the student and of
    the teachers that see the view. In a stream of a teacher's own the student's input is that of
    `student_size`."""
    crops: int = 1
    """Crops of a picture; a batch holds them crop by crop: uint8 [crops * B, 3, size, size]."""
    scale: tuple[float, float] | None = None
    """Range of a crop's share of the picture's area; None: `data.crop_scale`."""
    photometric: tuple[str, ...] = ()
    """Names in `photometric.RECIPES`, one for each crop or one for all."""
    boxes: bool = False
    """Whether `Batch.views` also has "<name>.box" float32 [crops * B, 4]: left, top, right and
    bottom over the picture's width and height, left > right where the crop is mirrored."""
    mask: BlockMask | None = None
    """Adds "<name>.mask" bool [crops * B, grid, grid]: patches to hide."""
    cells: WindowCells | None = None
    """Adds "<name>.cells" int64 [B, cells]: cells of the grid, the same ones in all crops of a
    picture."""
    plain: bool = False
    """Adds "<name>.plain": the crops without their photometric augmentation."""
    near: str | None = None
    """A view whose crops it overlaps by at least half of the smaller side. Its own name: every crop
    overlaps its first; another view's, listed before it: the box around all of that view's."""
    stream: str = MAIN
    """The stream of pictures it is cut from; views of one stream share their pictures."""

    def shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor of the view in a batch; its size must be resolved."""
        count = self.crops * batch
        pixels = ((count, 3, self.size, self.size), torch.uint8)
        shapes = {self.name: pixels}
        if self.plain:
            shapes[plain_name(self.name)] = pixels
        if self.boxes:
            shapes[f"{self.name}.box"] = ((count, 4), torch.float32)
        if self.mask:
            shapes[f"{self.name}.mask"] = ((count, self.mask.grid, self.mask.grid), torch.bool)
        if self.cells:
            shapes[f"{self.name}.cells"] = ((batch, self.cells.cells), torch.int64)
        return shapes


def plain_name(view: str) -> str:
    """Key of a view's crops without photometric augmentation, for `Method.teacher_views`."""
    return f"{view}.plain"


def view_of(key: str) -> str:
    """Name of the view that a key of `Method.teacher_views` belongs to."""
    return key.removesuffix(".plain")


class Sample(NamedTuple):
    """The crops of one picture of one stream: `views` by name, each [crops, …]; the picture and the
    number of the view that were requested; what had to be skipped; what `CropDataset.features` has.
    """

    stream: str
    views: dict[str, Tensor]
    picture: int
    view: int
    skipped: tuple[Skipped, ...]
    features: Tensor | None


class _Plan(NamedTuple):
    """Crop number `place` of a view, and the generator that goes on to its augmentation."""

    view: View
    place: int
    rng: np.random.Generator
    crop: Crop


class CropDataset(Dataset):
    """Samples addressed by (stream, picture, view number). An unreadable picture is replaced by the
    next readable one.

    `views` must have their sizes and scales (see `resolve_views`). `features(stream, picture, view
    number)` may give bytes that a sample carries along: rows of a cache.
    """

    TRIES = 32

    def __init__(
        self, pictures: Pictures, config: DataConfig, views: Sequence[View], seed: int
    ) -> None:
        self.pictures, self.config, self.views, self.seed = pictures, config, tuple(views), seed
        self.features: _FeaturesOf | None = None

    def __getitem__(self, key: tuple[str, int, int]) -> Sample:
        """Cut every view of `key` = (stream, picture, view number); raises UserError after too many
        unreadable pictures in a row, and where not the picture but the machine is at fault.
        """
        stream, picture, number = key
        skipped: list[Skipped] = []
        for offset in range(min(self.TRIES, len(self.pictures))):
            plans: list[_Plan] = []
            pixels: list[Tensor] = []
            here = (picture + offset) % len(self.pictures)
            try:
                opened = self.pictures.open(here)
                for view in self.views:
                    if view.stream == stream:
                        own = self._plan(view, opened.size, picture, number, plans)
                        # view by view: another view changes none of its pixels
                        pixels += opened.crops([plan.crop for plan in own])
                        plans += own
            except (UnreadableImage, MemoryError) as error:
                raise_trouble(self.pictures.name(here), error)
                skipped.append((error.name, error.reason))
                continue
            tensors = self._tensors(stream, picture, number, opened.size, plans, pixels)
            features = self.features(*key) if self.features else None
            return Sample(stream, tensors, picture, number, tuple(skipped), features)
        name, reason = skipped[0]
        raise UserError(
            f"data: {len(skipped)} pictures in a row are unreadable, the first {name} ({reason})"
        )

    def _plan(
        self,
        view: View,
        size: tuple[int, int],
        picture: int,
        number: int,
        before: Sequence["_Plan"],
    ) -> list["_Plan"]:
        """Draw the crops of a view of a picture of `size`; `before` has those of other views."""
        plans: list[_Plan] = []
        for crop in range(view.crops):
            rng = self._generator(view, picture, number, crop)
            box = random_crop(size, rng, view.scale, self.config.crop_ratio)
            others = [plan.crop.box for plan in (*before, *plans) if plan.view.name == view.near]
            if others:
                anchors = others[:1] if view.near == view.name else others
                box = shift_towards(box, surrounding(anchors))
            flip = bool(rng.random() < self.config.flip)
            plans.append(_Plan(view, crop, rng, Crop(box, view.size, flip)))
        return plans

    def _tensors(
        self,
        stream: str,
        picture: int,
        number: int,
        size: tuple[int, int],
        plans: Sequence["_Plan"],
        pixels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """All tensors of the views of a stream, from the pixels of their crops."""
        parts: dict[str, list[Tensor]] = {}
        width, height = size
        for (view, place, rng, crop), values in zip(plans, pixels, strict=True):
            if view.plain:
                parts.setdefault(plain_name(view.name), []).append(values)
            if view.photometric:
                name = view.photometric[place if len(view.photometric) > 1 else 0]
                values = to_tensor(photometric(to_image(values), name, rng))
            parts.setdefault(view.name, []).append(values)
            if view.boxes:
                left, top, right, bottom = crop.box
                sides = (right, left) if crop.flip else (left, right)
                share = [sides[0] / width, top / height, sides[1] / width, bottom / height]
                parts.setdefault(f"{view.name}.box", []).append(torch.tensor(share))
            if view.mask:
                mask = torch.from_numpy(view.mask.draw(rng))
                parts.setdefault(f"{view.name}.mask", []).append(mask)
        tensors = {
            name: torch.stack(values) if len(values) > 1 else values[0][None]
            for name, values in parts.items()
        }
        for view in self.views:
            if view.stream == stream and view.cells:
                rng = self._generator(view, picture, number, view.crops)
                tensors[f"{view.name}.cells"] = torch.from_numpy(view.cells.draw(rng))[None]
        return tensors

    def _generator(self, view: View, picture: int, number: int, crop: int) -> np.random.Generator:
        entropy = [self.seed, picture, number]
        if (view.stream, view.name) != (MAIN, IMAGE):
            # the shared view of UMT and plain keeps the seeds that it had when it was the only one
            entropy.insert(1, zlib.crc32(f"{view.stream}/{view.name}".encode()))
        if crop:
            entropy.append(crop)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

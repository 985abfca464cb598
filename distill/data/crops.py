"""From pictures to crops: every crop is a pure function of (seed, picture, view, crop).

A method declares the `View`s it needs; the student and the teachers that use a view resize and
normalise its crops themselves, on the device.
"""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from contract.errors import UserError
from contract.images import UnreadableImage
from distill.config import DataConfig
from distill.data.photometric import photometric
from distill.data.pictures import Pictures

MAIN = "main"
"""The stream whose batch size is `train.batch_size`."""

IMAGE = "image"
"""Name of the view of methods that need only one."""

Skipped = tuple[str, str]
"""Name of an unreadable picture and the reason."""


def random_crop(
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
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


def take_crop(
    image: Image.Image, box: tuple[float, float, float, float], side: int, flip: bool
) -> Tensor:
    """Resize a box of an RGB image to uint8 [3, side, side], mirrored if `flip`."""
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = np.asarray(crop)
    if flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


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
    the teachers that see the view."""
    crops: int = 1
    """Crops of a picture; a batch holds them crop by crop: uint8 [crops * B, 3, size, size]."""
    scale: tuple[float, float] | None = None
    """Range of a crop's share of the picture's area; None: `data.crop_scale`."""
    photometric: tuple[str, ...] = ()
    """Names in `photometric.RECIPES`, one for each crop or one for all."""
    boxes: bool = False
    """Whether `Batch.views` also has "<name>.box" float32 [crops * B, 4]: left, top, right and
    bottom over the picture's width and height, left > right where the crop is mirrored."""
    stream: str = MAIN
    """The stream of pictures it is cut from; views of one stream share their pictures."""


class Sample(NamedTuple):
    """The crops of one picture of one stream: `views` by name, each [crops, …]; the picture and the
    number of the view that were requested; what had to be skipped.
    """

    stream: str
    views: dict[str, Tensor]
    picture: int
    view: int
    skipped: tuple[Skipped, ...]


class CropDataset(Dataset):
    """Samples addressed by (stream, picture, view number). An unreadable picture is replaced by the
    next readable one.

    `views` must have their sizes and scales (see `resolve_views`).
    """

    TRIES = 32

    def __init__(
        self, pictures: Pictures, config: DataConfig, views: Sequence[View], seed: int
    ) -> None:
        self.pictures, self.config, self.views, self.seed = pictures, config, tuple(views), seed

    def __getitem__(self, key: tuple[str, int, int]) -> Sample:
        """Cut every view of `key` = (stream, picture, view number); raises UserError after too many
        unreadable pictures in a row.
        """
        stream, picture, number = key
        skipped: list[Skipped] = []
        for offset in range(min(self.TRIES, len(self.pictures))):
            try:
                image = self.pictures.load((picture + offset) % len(self.pictures))
            except UnreadableImage as error:
                skipped.append((error.name, error.reason))
                continue
            tensors: dict[str, Tensor] = {}
            for view in self.views:
                if view.stream == stream:
                    tensors |= self._cut(image, view, picture, number)
            return Sample(stream, tensors, picture, number, tuple(skipped))
        name, reason = skipped[0]
        raise UserError(
            f"data: {len(skipped)} pictures in a row are unreadable, the first {name} ({reason})"
        )

    def _cut(self, image: Image.Image, view: View, picture: int, number: int) -> dict[str, Tensor]:
        crops, boxes = [], []
        for crop in range(view.crops):
            rng = self._generator(view, picture, number, crop)
            box = random_crop(image.size, rng, view.scale, self.config.crop_ratio)
            flip = rng.random() < self.config.flip
            pixels = take_crop(image, box, view.size, flip)
            if view.photometric:
                name = view.photometric[crop if len(view.photometric) > 1 else 0]
                pixels = photometric(pixels, name, rng)
            crops.append(pixels)
            left, top, right, bottom = box
            sides = (right, left) if flip else (left, right)
            width, height = image.size
            boxes.append([sides[0] / width, top / height, sides[1] / width, bottom / height])
        tensors = {view.name: torch.stack(crops)}
        return tensors | ({f"{view.name}.box": torch.tensor(boxes)} if view.boxes else {})

    def _generator(self, view: View, picture: int, number: int, crop: int) -> np.random.Generator:
        entropy = [self.seed, picture, number]
        if (view.stream, view.name) != (MAIN, IMAGE):
            # the shared view of UMT and plain keeps the seeds that it had when it was the only one
            entropy.insert(1, zlib.crc32(f"{view.stream}/{view.name}".encode()))
        if crop:
            entropy.append(crop)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

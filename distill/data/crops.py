"""From pictures to crops: every crop is a pure function of (seed, picture, view).

One geometric crop is shared by the student and all teachers; each resizes and normalises it for
itself, on the device.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from contract.errors import UserError
from contract.images import UnreadableImage
from distill.config import DataConfig
from distill.data.pictures import Pictures

Skipped = tuple[str, str]
"""Name of an unreadable picture and the reason."""


class Sample(NamedTuple):
    """One crop: uint8 [3, S, S], the picture and view asked for, and what had to be skipped on the
    way.
    """

    image: Tensor
    picture: int
    view: int
    skipped: tuple[Skipped, ...]


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


class CropDataset(Dataset):
    """Samples addressed by (picture, view). An unreadable picture is replaced by the next readable
    one.
    """

    TRIES = 32

    def __init__(self, pictures: Pictures, config: DataConfig, image_size: int, seed: int) -> None:
        self.pictures, self.config, self.image_size, self.seed = pictures, config, image_size, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Crop `key` = (picture, view); raises UserError after too many unreadable pictures in a
        row.
        """
        picture, view = key
        skipped: list[Skipped] = []
        for offset in range(min(self.TRIES, len(self.pictures))):
            try:
                image = self.pictures.load((picture + offset) % len(self.pictures))
            except UnreadableImage as error:
                skipped.append((error.name, error.reason))
                continue
            rng = np.random.Generator(
                np.random.Philox(np.random.SeedSequence((self.seed, picture, view)))
            )
            box = random_crop(image.size, rng, self.config.crop_scale, self.config.crop_ratio)
            crop = take_crop(image, box, self.image_size, flip=rng.random() < self.config.flip)
            return Sample(crop, picture, view, tuple(skipped))
        name, reason = skipped[0]
        raise UserError(
            f"data: {len(skipped)} pictures in a row are unreadable, the first {name} ({reason})"
        )

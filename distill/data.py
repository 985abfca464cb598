"""From pictures to batches: one random crop a view, in an order that depends on nothing but the seed.

Every sample is a pure function of (seed, picture, view) and every batch of (seed, step), whatever the number of workers
or ranks and wherever a run was interrupted. One geometric crop is shared by the student and all teachers; each
resizes and normalises it for itself, on the device.
"""

import logging
import math
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distill.config import DataConfig
from distill.errors import UserError
from distill.images import UnreadableImage
from distill.pictures import Pictures

log = logging.getLogger(__name__)

Skipped = tuple[str, str]
"""Name of an unreadable picture and the reason."""


class Sample(NamedTuple):
    """One crop: uint8 [3, S, S], the picture and view asked for, and what had to be skipped on the way."""

    image: Tensor
    picture: int
    view: int
    skipped: tuple[Skipped, ...]


class Batch(NamedTuple):
    """uint8 images [B, 3, S, S], the pictures [B] and views [B] asked for, and what was skipped."""

    images: Tensor
    pictures: Tensor
    views: Tensor
    skipped: list[Skipped]


def random_crop(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) covering a random share of a picture of `size` = (width, height).

    The share of the area is uniform in `scale` and the aspect ratio log-uniform in `ratio`; after ten misses the
    largest centred box of a legal ratio is taken (the random resized crop of Inception).
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


def take_crop(image: Image.Image, box: tuple[float, float, float, float], side: int, flip: bool) -> Tensor:
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
    """Samples addressed by (picture, view). An unreadable picture is replaced by the next readable one."""

    TRIES = 32

    def __init__(self, pictures: Pictures, config: DataConfig, image_size: int, seed: int) -> None:
        self.pictures, self.config, self.image_size, self.seed = pictures, config, image_size, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Crop `key` = (picture, view); raises UserError after too many unreadable pictures in a row."""
        picture, view = key
        skipped: list[Skipped] = []
        for offset in range(min(self.TRIES, len(self.pictures))):
            try:
                image = self.pictures.load((picture + offset) % len(self.pictures))
            except UnreadableImage as error:
                skipped.append((error.name, error.reason))
                continue
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, picture, view))))
            box = random_crop(image.size, rng, self.config.crop_scale, self.config.crop_ratio)
            crop = take_crop(image, box, self.image_size, flip=rng.random() < self.config.flip)
            return Sample(crop, picture, view, tuple(skipped))
        name, reason = skipped[0]
        raise UserError(f"data: {len(skipped)} pictures in a row are unreadable, the first {name} ({reason})")


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.picture for sample in samples]),
        torch.tensor([sample.view for sample in samples]),
        [entry for sample in samples for entry in sample.skipped],
    )


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (picture, view) of every micro-batch of this rank, from optimizer step `start` up to `steps`.

    Epoch e is one permutation of all pictures x repeats; what is left after the last whole batch is dropped. Repeat r
    of a picture in epoch e is its view e * repeats + r, taken modulo `views` if that is not 0. The batch of a step is
    cut into `accumulate` micro-batches, and each of those over the ranks.
    """

    def __init__(
        self,
        pictures: int,
        repeats: int,
        batch_size: int,
        steps: int,
        start: int,
        rank: int,
        world: int,
        accumulate: int,
        seed: int,
        views: int,
    ) -> None:
        if pictures * repeats < batch_size:
            raise UserError(
                f"train.batch_size = {batch_size} is more than {pictures} pictures x data.repeats = {repeats}: set "
                f"data.repeats={math.ceil(batch_size / pictures)} or train.batch_size={pictures * repeats}"
            )
        if batch_size % (world * accumulate):
            unit = world * accumulate
            raise UserError(
                f"train.batch_size = {batch_size} does not divide over {world} processes x train.accumulate = "
                f"{accumulate}: use {max(1, round(batch_size / unit)) * unit}"
            )
        self.pictures, self.repeats, self.batch_size = pictures, repeats, batch_size
        self.steps, self.start, self.rank, self.world = steps, start, rank, world
        self.accumulate, self.seed, self.views = accumulate, seed, views
        self.steps_per_epoch = pictures * repeats // batch_size

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        micro = self.batch_size // self.accumulate
        for step in range(self.start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            first = (step % self.steps_per_epoch) * self.batch_size
            for part in range(self.accumulate):
                begin = first + part * micro
                yield [self._entry(epoch, int(i)) for i in order[begin + self.rank : begin + micro : self.world]]

    def _order(self, epoch: int) -> Tensor:
        # Two words of entropy mixed into one seed, so that neighbouring seeds and epochs share no permutation
        mixed = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
        return torch.randperm(self.pictures * self.repeats, generator=generator)

    def _entry(self, epoch: int, index: int) -> tuple[int, int]:
        picture, repeat = index % self.pictures, index // self.pictures
        view = epoch * self.repeats + repeat
        return picture, view % self.views if self.views else view


def prepare_worker(worker: int) -> None:
    """One thread a worker; Ctrl-C is the parent's to answer, SIGTERM means what it always does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_loader(dataset: CropDataset, batches: Sampler | Iterable, workers: int, pin_memory: bool) -> DataLoader:
    """Decode and crop in `workers` processes ahead of the training step (0: in this process)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        # An iterator draws a seed for its workers. Drawn from the global stream, that draw would shift stochastic depth
        # after a resume; nothing here uses it.
        generator=torch.Generator(),
        prefetch_factor=4 if workers else None,
        # decoded photographs are shared with forked workers; they never touch CUDA
        multiprocessing_context="fork" if workers else None,
    )


class CorruptLedger:
    """Counts unreadable pictures by name, logs each once, and stops the run where there are too many."""

    def __init__(self, pictures: int, max_fraction: float) -> None:
        self.pictures, self.max_fraction = pictures, max_fraction
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Note skipped pictures; raises UserError once more than `max_fraction` of all are unreadable."""
        for name, reason in skipped:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("skipped %s: %s", name, reason)
        if len(self.reasons) > self.max_fraction * self.pictures:
            name, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{len(self.reasons)} of {self.pictures} pictures are unreadable, more than data.max_corrupt_fraction = "
                f"{self.max_fraction:g}; the first is {name} ({reason}): mend them or raise the limit"
            )

"""From pictures to batches: one random crop a view, in an order that depends on nothing but the
seed.

Every sample is a pure function of (seed, picture, view) and every batch of (seed, step), whatever
the number of workers or ranks and wherever a run was interrupted. One geometric crop is shared by
the student and all teachers; each resizes and normalises it for itself, on the device.
"""

import logging
import math
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from contract.errors import UserError
from distill.data.crops import CropDataset, Sample, Skipped

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """uint8 images [B, 3, S, S], the pictures [B] and views [B] asked for, and what was skipped."""

    images: Tensor
    pictures: Tensor
    views: Tensor
    skipped: list[Skipped]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.picture for sample in samples]),
        torch.tensor([sample.view for sample in samples]),
        [entry for sample in samples for entry in sample.skipped],
    )


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (picture, view) of every micro-batch of this rank, from optimizer step `start` up to
    `steps`.

    Epoch e is one permutation of all pictures x repeats; what is left after the last whole batch is
    dropped. Repeat r of a picture in epoch e is its view e * repeats + r, taken modulo `views` if
    that is not 0. The batch of a step is cut into `accumulate` micro-batches, and each of those
    over the ranks.
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
                f"train.batch_size = {batch_size} is more than {pictures} pictures x data.repeats "
                f"= {repeats}: set data.repeats={math.ceil(batch_size / pictures)} or "
                f"train.batch_size={pictures * repeats}"
            )
        if batch_size % (world * accumulate):
            unit = world * accumulate
            raise UserError(
                f"train.batch_size = {batch_size} does not divide over {world} processes x "
                f"train.accumulate = {accumulate}: use {max(1, round(batch_size / unit)) * unit}"
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
                yield [
                    self._entry(epoch, int(i))
                    for i in order[begin + self.rank : begin + micro : self.world]
                ]

    def _order(self, epoch: int) -> Tensor:
        # Two words of entropy mixed into one seed, so that neighbouring seeds and epochs share no
        # permutation
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


def make_loader(
    dataset: CropDataset, batches: Sampler | Iterable, workers: int, pin_memory: bool
) -> DataLoader:
    """Decode and crop in `workers` processes ahead of the training step (0: in this process)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        # An iterator draws a seed for its workers. Drawn from the global stream, that draw would
        # shift stochastic depth after a resume; nothing here uses it.
        generator=torch.Generator(),
        prefetch_factor=4 if workers else None,
        # decoded photographs are shared with forked workers; they never touch CUDA
        multiprocessing_context="fork" if workers else None,
    )


class CorruptLedger:
    """Counts unreadable pictures by name, logs each once, and stops the run where there are too
    many.
    """

    def __init__(self, pictures: int, max_fraction: float) -> None:
        self.pictures, self.max_fraction = pictures, max_fraction
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Note skipped pictures; raises UserError once more than `max_fraction` of all are
        unreadable.
        """
        for name, reason in skipped:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("skipped %s: %s", name, reason)
        if len(self.reasons) > self.max_fraction * self.pictures:
            name, reason = next(iter(self.reasons.items()))
            raise UserError(
                f"{len(self.reasons)} of {self.pictures} pictures are unreadable, more than "
                f"data.max_corrupt_fraction = {self.max_fraction:g}; the first is {name} "
                f"({reason}): mend them or raise the limit"
            )

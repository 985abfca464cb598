"""From pictures to batches, in an order that depends on nothing but the seed.

Every sample is a pure function of (seed, picture, view, crop) and every batch of (seed, step),
whatever the number of workers or ranks and wherever a run was interrupted. A stream is an endless
order of pictures with a batch size of its own; all streams of a run share one source of pictures.
"""

import logging
import math
import os
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from contract.errors import UserError
from distill.data.crops import MAIN, CropDataset, Sample, Skipped, View
from distill.launch import local_world

log = logging.getLogger(__name__)

_Key = tuple[str, int, int]
"""Stream, picture, number of the view: what `CropDataset` is indexed by."""


class Batch(NamedTuple):
    """`views` by name: uint8 [crops * B, 3, S, S], crop by crop, and what else a view requests;
    `pictures` and `numbers` [B] (which view of them) by stream; what was skipped; and, by stream,
    rows of the teacher cache, if there is one: uint8 [B, bytes].
    """

    views: dict[str, Tensor]
    pictures: dict[str, Tensor]
    numbers: dict[str, Tensor]
    skipped: list[Skipped]
    features: dict[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        views = {name: view.to(device, non_blocking=True) for name, view in self.views.items()}
        features = {s: rows.to(device, non_blocking=True) for s, rows in self.features.items()}
        return self._replace(views=views, features=features)


def collate(samples: Sequence[Sample]) -> Batch:
    views, pictures, numbers, features = {}, {}, {}, {}
    for stream in dict.fromkeys(sample.stream for sample in samples):
        own = [sample for sample in samples if sample.stream == stream]
        pictures[stream] = torch.tensor([sample.picture for sample in own])
        numbers[stream] = torch.tensor([sample.view for sample in own])
        for name in own[0].views:
            # [crops, B, …]: the first crop of every picture, then the second
            views[name] = torch.stack([sample.views[name] for sample in own], dim=1).flatten(0, 1)
        if own[0].features is not None:
            features[stream] = torch.stack([sample.features for sample in own])
    skipped = [entry for sample in samples for entry in sample.skipped]
    return Batch(views, pictures, numbers, skipped, features)


class StreamBatches(Sampler[list[_Key]]):
    """The keys of every micro-batch of this rank, from optimizer step `start` up to `steps`.

    Epoch e of a stream is one permutation of all pictures x repeats; what is left after the last
    whole batch is dropped. Repeat r of a picture in epoch e is its view e * repeats + r, taken
    modulo `views` if that is not 0. The batch of a step is cut into `accumulate` micro-batches, and
    each of those over the ranks. A micro-batch holds the samples of all streams, one after another.

    `batch_sizes`: pictures of an optimizer step over all ranks, by stream.
    """

    def __init__(
        self,
        pictures: int,
        repeats: int,
        batch_sizes: Mapping[str, int],
        steps: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        views: int = 0,
    ) -> None:
        for stream, size in batch_sizes.items():
            check_batch_size(stream, size, pictures, repeats, world, accumulate)
        self.pictures, self.repeats, self.batch_sizes = pictures, repeats, dict(batch_sizes)
        self.steps, self.start, self.rank, self.world = steps, start, rank, world
        self.accumulate, self.seed, self.views = accumulate, seed, views
        self._epoch_orders: dict[str, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[_Key]]:
        for step in range(self.start, self.steps):
            for part in range(self.accumulate):
                yield [key for stream in self.batch_sizes for key in self._keys(stream, step, part)]

    def _keys(self, stream: str, step: int, part: int) -> Iterator[_Key]:
        size = self.batch_sizes[stream]
        epoch, within = divmod(step, self.pictures * self.repeats // size)
        if self._epoch_orders.get(stream, (None,))[0] != epoch:
            self._epoch_orders[stream] = (epoch, self._order(stream, epoch))
        order, micro = self._epoch_orders[stream][1], size // self.accumulate
        begin = within * size + part * micro
        for index in order[begin + self.rank : begin + micro : self.world].tolist():
            view = epoch * self.repeats + index // self.pictures
            yield stream, index % self.pictures, view % self.views if self.views else view

    def _order(self, stream: str, epoch: int) -> Tensor:
        entropy = [self.seed, epoch]
        if stream != MAIN:
            entropy.insert(1, zlib.crc32(stream.encode()))
        # Two words of entropy mixed into one seed, so that neighbouring seeds and epochs never have
        # the same permutation
        mixed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
        return torch.randperm(self.pictures * self.repeats, generator=generator)


def check_batch_size(
    stream: str, size: int, pictures: int, repeats: int, world: int, accumulate: int
) -> None:
    """Raise UserError, with a size that does, if the batch of a stream does not fit `pictures` or
    does not divide over `world` processes and accumulations.
    """
    key = "train.batch_size" if stream == MAIN else f"batch_size of teacher '{stream}'"
    if pictures * repeats < size:
        example = "" if stream != MAIN else f" or train.batch_size={pictures * repeats}"
        raise UserError(
            f"{key} = {size} is more than {pictures} pictures x data.repeats = {repeats}: set "
            f"data.repeats={math.ceil(size / pictures)}{example}"
        )
    unit = world * accumulate
    if size % unit:
        raise UserError(
            f"{key} = {size} does not divide over {world} processes x train.accumulate = "
            f"{accumulate}: use {max(1, round(size / unit)) * unit}"
        )


def _prepare_worker(worker: int) -> None:
    """Use one thread per worker, leave Ctrl-C to the parent and keep the default SIGTERM."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


_SHARED_MEMORY = Path("/dev/shm")
"""Where workers leave their batches."""


def batch_bytes(views: Iterable[View], sizes: Mapping[str, int]) -> int:
    """Bytes of a batch of so many pictures of each stream."""
    shapes = (shape for view in views for shape in view.shapes(sizes[view.stream]).values())
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def prefetch_factor(batch_bytes: int, workers: int, wanted: int = 4) -> int | None:
    """Batches that each of `workers` may prepare, at most `wanted`, so that all fit into this
    process's share of shared memory; None without workers.

    Raises UserError where not even one does: a worker would be killed by a bus error.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return wanted if workers else None
    about = os.statvfs(_SHARED_MEMORY)
    together = local_world()
    free = about.f_bavail * about.f_frsize // together
    most = (free // max(1, batch_bytes) - 1) // workers  # one more is being used
    if most < 1:
        each = f" for each of {together} processes" if together > 1 else ""
        raise UserError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free{each}, but {workers} workers need "
            f"{(workers + 1) * batch_bytes / 1e6:.0f} MB for a batch each: enlarge it (docker run "
            "--shm-size), or lower the number of workers or the batch size"
        )
    return min(wanted, most)


def worker_options(workers: int, batch_bytes: int, wanted: int = 4) -> dict:
    """What a DataLoader with so many workers is made with, `prefetch_factor` among it."""
    return {
        "num_workers": workers,
        "prefetch_factor": prefetch_factor(batch_bytes, workers, wanted),
        "worker_init_fn": _prepare_worker,
        # decoded photographs are shared with forked workers; they never touch CUDA
        "multiprocessing_context": "fork" if workers else None,
    }


def item_bytes(item: object) -> int:
    """Bytes of the tensors in an item of a data set, which may lie in tuples."""
    if isinstance(item, Tensor):
        return item.nbytes
    return sum(map(item_bytes, item)) if isinstance(item, tuple) else 0


def make_loader(
    dataset: CropDataset,
    batches: Sampler | Iterable,
    workers: int,
    pin_memory: bool,
    batch_bytes: int,
) -> DataLoader:
    """Decode and crop in `workers` processes ahead of the training step (0: in this process), as
    far ahead as shared memory has room for batches of `batch_bytes` (see there; of no account
    without workers).
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pin_memory,
        # An iterator draws a seed for its workers. Drawn from the global stream, that draw would
        # shift stochastic depth after a resume; nothing here uses it.
        generator=torch.Generator(),
        **worker_options(workers, batch_bytes),
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
                f"({reason}): repair them or raise the limit"
            )

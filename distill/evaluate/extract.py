"""One pass of a frozen network over a data set, kept on disk, resumed where it stopped.

Views are cut into shards; a shard is one array of summaries and one of patches (float16), and a
marker with their sha256, written last. Shards that exist and match
their hashes are not computed again.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from contract.errors import UserError, raise_trouble
from contract.files import file_sha256, write_atomically
from distill.data.batches import worker_options
from distill.data.crops import take_crop
from distill.data.open_files import Pool
from distill.evaluate.config import ExtractConfig
from distill.evaluate.datasets import Labelled
from distill.evaluate.encoder import Encoder
from distill.teachers import AUTOCAST

log = logging.getLogger(__name__)

_SUMMARIES_A_SHARD = 8
"""How many times more views a shard of summaries alone holds than one with patches."""


class Views(Protocol):
    """Pictures of one size, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    def fingerprint(self) -> str:
        """Changes when the views do."""
        ...


class CentreViews:
    """The centre of every picture of a labelled split: `crop` of its shorter side, resized to
    `size` pixels.
    """

    def __init__(self, split: Labelled, size: int, crop: float) -> None:
        self.split, self.size, self.crop = split, size, crop

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Tensor:
        return centre_view(self.split.picture(number), self.size, self.crop)

    def fingerprint(self) -> str:
        return f"{self.split.fingerprint()} centre {self.size} {self.crop}"


def centre_view(picture, size: int, crop: float) -> Tensor:
    """The centred square of `crop` times the shorter side, as uint8 [3, size, size]."""
    side = min(picture.size) * crop
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return take_crop(picture, (left, top, left + side, top + side), size, flip=False)


class Extracted:
    """Features of `n` views on disk: `summaries()` all at once, `patches(numbers)` row by row."""

    def __init__(self, folder: Path, n: int, shard_size: int) -> None:
        self.folder, self.n, self.shard_size = folder, n, shard_size
        self._maps: Pool[np.ndarray] = Pool()

    def __len__(self) -> int:
        return self.n

    def summaries(self) -> Tensor:
        """float32 [n, d]."""
        result = None
        for shard in range(-(-self.n // self.shard_size)):
            part = torch.from_numpy(np.load(_shard_path(self.folder, shard, "summary")))
            # filled in place: ImageNet's are 4 GB, and joining a list of parts would need twice
            # that
            result = torch.empty(self.n, part.shape[1]) if result is None else result
            result[shard * self.shard_size :][: len(part)] = part
        return result

    def patches(self, numbers: Sequence[int]) -> Tensor:
        """float32 [len(numbers), h, w, d] of the requested views."""
        rows = []
        for number in numbers:
            shard, row = divmod(int(number), self.shard_size)
            path = _shard_path(self.folder, shard, "patches")
            file = self._maps.get(shard, partial(np.load, path, mmap_mode="r"))
            rows.append(np.array(file[row]))  # a view would keep its file open
        return torch.from_numpy(np.stack(rows)).float()


def extract(
    encoder: Encoder,
    views: Views,
    cache: Path,
    config: ExtractConfig,
    patches: bool = False,
    what: str = "features",
) -> Extracted:
    """Compute the encoder's features of `views` that `cache` lacks; `patches` keeps the maps too.

    Raises UserError for features that are not finite or exceed float16, and for pictures that
    cannot be read.
    """
    precision = precision_on(encoder.device, config)
    # summaries are small: with as few files as patches need, a GPU would wait for the disk's
    # confirmations
    size = config.shard_size if patches else _SUMMARIES_A_SHARD * config.shard_size
    key = hashlib.sha256()
    for part in (encoder.fingerprint(), views.fingerprint(), str(patches), precision, str(size)):
        key.update(part.encode())
    folder = cache / f"{encoder.name}-{encoder.read_out}-{key.hexdigest()[:16]}"
    if patches:
        kinds = ("patches",) if encoder.dims.summary is None else ("summary", "patches")
    else:
        encoder.need_summary(what)
        kinds = ("summary",)
    shards = -(-len(views) // size)
    missing = [shard for shard in range(shards) if not whole(folder, shard, kinds)]
    result = Extracted(folder, len(views), size)
    if not missing:
        log.info("%s: all %d views of %s are in the cache", what, len(views), encoder.name)
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder}: {error.strerror} (choose another --output)"
        ) from error
    numbers = [n for shard in missing for n in _shard_range(shard, len(views), size)]
    start, done = time.perf_counter(), 0
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    queue = iter(missing)
    shard = next(queue)
    for batch in _follow(
        _batches(encoder, views, numbers, kinds, precision, size, config),
        len(numbers),
        f"{what}, {encoder.name}",
    ):
        for kind in kinds:
            parts[kind].append(_fits(batch[kind], kind, encoder.name))
        done += len(batch[kinds[0]])
        # the loader's batches never straddle two shards
        if sum(len(part) for part in parts[kinds[0]]) == len(_shard_range(shard, len(views), size)):
            _keep(folder, shard, {kind: np.concatenate(parts[kind]) for kind in kinds})
            parts = {kind: [] for kind in kinds}
            shard = next(queue, None)
    rate = done / (time.perf_counter() - start)
    log.info("%s: %d of %d views of %s, %.1f a second", what, done, len(views), encoder.name, rate)
    return result


def precision_on(device: torch.device, config: ExtractConfig) -> str:
    """`extract.precision`, with what `auto` means on a device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def cast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which a network runs in a precision."""
    if precision not in AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST[precision])


def _batches(
    encoder: Encoder,
    views: Views,
    numbers: list[int],
    kinds: Sequence[str],
    precision: str,
    size: int,
    config: ExtractConfig,
):
    """The given kinds of features of the requested views, as dicts of tensors on the CPU, batch by
    batch.

    A batch never straddles two shards of `size` views. Patches leave the device in half precision,
    as they are kept.
    """
    cuts: list[list[int]] = []
    for number in numbers:
        if not cuts or len(cuts[-1]) == config.batch_size or number // size != cuts[-1][0] // size:
            cuts.append([])
        cuts[-1].append(number)
    device = encoder.device
    workers = min(config.workers, len(cuts))
    room = views[0].nbytes * config.batch_size if workers else 0
    loader = DataLoader(
        views,
        batch_sampler=cuts,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        **worker_options(workers, room, wanted=2),
    )
    for images in loader:
        # entered again for every batch: a mode held across a yield would leak into the caller
        with torch.inference_mode(), cast(device, precision):
            features = encoder(images.to(device, non_blocking=True))
            result = {kind: getattr(features, kind) for kind in kinds}
            bad = {kind: ~torch.isfinite(values).all() for kind, values in result.items()}
            result = {
                kind: values.half() if kind == "patches" else values.float()
                for kind, values in result.items()
            }
        for kind, verdict in bad.items():
            if verdict:
                raise UserError(
                    f"{encoder.name}: its {kind} features contain NaN or infinity: check its "
                    "weights (and extract.precision)"
                )
        yield {kind: values.cpu() for kind, values in result.items()}


def _fits(values: Tensor, kind: str, name: str) -> np.ndarray:
    """The array to keep; raises UserError for patches that float16 cannot hold (they were finite
    before).
    """
    if kind == "patches" and torch.isinf(values).any():
        raise UserError(
            f"{name}: its patches exceed float16's maximum of 65504: standardise the network's "
            "output"
        )
    return values.numpy()


def _shard_range(shard: int, views: int, size: int) -> range:
    return range(shard * size, min(views, (shard + 1) * size))


def _shard_path(folder: Path, shard: int, kind: str) -> Path:
    return folder / f"shard_{shard:06d}.{kind}.npy"


def _keep(folder: Path, shard: int, arrays: dict[str, np.ndarray]) -> None:
    hashes = {}
    for kind, array in arrays.items():
        path = _shard_path(folder, shard, kind)
        write_atomically(path, lambda temporary, a=array: _save_array(temporary, a))
        hashes[kind] = file_sha256(path)
    # written last: a shard without its marker does not count
    marker = folder / f"shard_{shard:06d}.json"
    write_atomically(marker, lambda temporary: temporary.write_text(json.dumps(hashes)))


def _save_array(path: Path, array: np.ndarray) -> None:
    # a file object: given a path, np.save appends .npy to it
    with open(path, "wb") as file:
        np.save(file, array)


def whole(folder: Path, shard: int, kinds: Sequence[str]) -> bool:
    """Whether a shard's files are there and match their hashes."""
    try:
        hashes = json.loads((folder / f"shard_{shard:06d}.json").read_text())
        good = all(file_sha256(_shard_path(folder, shard, kind)) == hashes[kind] for kind in kinds)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_trouble(folder, error)
        good = False
    if not good:
        log.warning(
            "features: shard %d in %s does not match its sha256: computed again", shard, folder
        )
    return good


def _follow(items, total: int, what: str):
    """Pass batches through with a progress bar of pictures on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(bar, len(next(iter(item.values()))))

"""One pass of a frozen network over a data set, kept on disk, resumed where it stopped.

Views are cut into shards; a shard is one array of summaries and one of patches (float16), and a
marker with their sha256, written last. Shards that exist and match their hashes are not computed
again. Several processes divide the batches evenly; where that cuts a shard, its parts are files
that one of them joins.
"""

import hashlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from contract.errors import UserError, raise_trouble
from contract.files import file_sha256, write_atomically
from contract.views import ViewPolicy
from distill.data.batches import worker_options
from distill.data.open_files import Pool
from distill.evaluate.config import ExtractConfig
from distill.evaluate.datasets import Labelled
from distill.evaluate.encoder import Encoder
from distill.evaluate.shared_files import wait_for
from distill.teachers import AUTOCAST

log = logging.getLogger(__name__)

_SUMMARIES_A_SHARD = 8
"""How many times more views a shard of summaries alone holds than one with patches."""


_LEFT = 24 * 3600.0
"""Seconds after which the part of a shard is one that a killed job has left."""


class Views(Protocol):
    """Pictures of one size, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    def fingerprint(self) -> str:
        """Changes when the views do."""
        ...


class PolicyViews:
    """What a view policy shows of every picture of a labelled split, at `size` x `size` pixels."""

    def __init__(self, split: Labelled, size: int, view: ViewPolicy) -> None:
        if view.kind == "tiles":
            raise UserError(
                f"view {view}: tiles are for maps (dense.test=view), a picture's tiles have no "
                "image-level vector: set extract.view=centre-crop:0.875 or letterbox"
            )
        self.split, self.size, self.view = split, size, view

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> Tensor:
        return as_tensor(self.split.shown(number, self.view, self.size))

    def fingerprint(self) -> str:
        # "scaled": caches of before hold features of JPEGs that were decoded whole
        return f"{self.split.fingerprint()} {self.size} {self.view} scaled"


def seen(picture: Image.Image, size: int, view: ViewPolicy) -> Tensor:
    """What a view policy shows of a picture, as uint8 [3, size, size]."""
    return as_tensor(view.pixels(picture, size, size))


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [H, W, 3] as [3, H, W]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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
    """Compute the encoder's features of `views` that `cache` lacks, a part in each of the encoder's
    processes, which all get them; `patches` keeps the maps too.

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
    shards, ranks = -(-len(views) // size), encoder.ranks
    # reading them takes time, so each process checks its own part
    lacking = [shard for shard in ranks.deal(range(shards)) if not whole(folder, shard, kinds)]
    missing = sorted(shard for part in ranks.gather(lacking) for shard in part)
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
    start = time.perf_counter()
    # jobs that fill the same cache at the same time leave each other's parts alone
    job = ranks.gather(secrets.token_hex(4))[0]
    segments = _divide(_cuts(numbers, size, config.batch_size), size, ranks.world, job)
    pieces = Counter(segment.shard for segment in segments)
    mine = [segment for segment in segments if segment.rank == ranks.rank]
    cuts = [cut for segment in mine for cut in segment.cuts]
    batches = _follow(
        _batches(encoder, views, cuts, kinds, precision, config),
        sum(map(len, cuts)),
        f"{what}, {encoder.name}",
        ranks.draws,
    )
    with closing(batches):
        for segment in mine:
            parts: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
            for batch in islice(batches, len(segment.cuts)):
                for kind in kinds:
                    parts[kind].append(_fits(batch[kind], kind, encoder.name))
            arrays = {kind: np.concatenate(parts[kind]) for kind in kinds}
            if pieces[segment.shard] == 1:
                _keep(folder, segment.shard, arrays)
            else:
                _keep_pieces(folder, segment, arrays)
    ranks.barrier()
    for _, group in groupby(segments, lambda segment: segment.shard):
        of_shard = list(group)
        if len(of_shard) > 1 and of_shard[0].rank == ranks.rank:
            _join_pieces(folder, of_shard, kinds)
    ranks.barrier()
    if ranks.world > 1:
        wait_for([_marker(folder, shard) for shard in missing])
    if ranks.first:
        _remove_pieces(folder, job)
    rate = len(numbers) / (time.perf_counter() - start)
    log.info(
        "%s: %d of %d views of %s, %.1f a second",
        *(what, len(numbers), len(views), encoder.name, rate),
    )
    return result


class _Segment(NamedTuple):
    """Batches of one shard that one process computes: all of the shard's, or some."""

    rank: int
    shard: int
    cuts: list[list[int]]
    job: str

    def path(self, folder: Path, kind: str) -> Path:
        """Where a part of a shard waits for the others."""
        return folder / f"shard_{self.shard:06d}.from_{self.cuts[0][0]}.{self.job}.{kind}.npy"


def _cuts(numbers: Sequence[int], size: int, batch_size: int) -> list[list[int]]:
    """Batches of views, none of which straddles two shards of `size` views."""
    cuts: list[list[int]] = []
    for number in numbers:
        if not cuts or len(cuts[-1]) == batch_size or number // size != cuts[-1][0] // size:
            cuts.append([])
        cuts[-1].append(number)
    return cuts


def _divide(cuts: list[list[int]], size: int, world: int, job: str) -> list[_Segment]:
    """Batches of shards of `size` views, divided evenly among processes: what is computed together
    is what one process would.
    """
    numbered = [(number * world // len(cuts), cut) for number, cut in enumerate(cuts)]
    groups = groupby(numbered, lambda entry: (entry[0], entry[1][0] // size))
    return [
        _Segment(rank, shard, [cut for _, cut in group], job) for (rank, shard), group in groups
    ]


def _keep_pieces(folder: Path, segment: _Segment, arrays: dict[str, np.ndarray]) -> None:
    for kind, array in arrays.items():
        path = segment.path(folder, kind)
        write_atomically(path, lambda temporary, a=array: _save_array(temporary, a))


def _join_pieces(folder: Path, segments: Sequence[_Segment], kinds: Sequence[str]) -> None:
    """Keep a shard whose parts several processes have left in `folder`; raises UserError for parts
    that never come.
    """
    paths = {kind: [segment.path(folder, kind) for segment in segments] for kind in kinds}
    wait_for([path for kind in kinds for path in paths[kind]])
    arrays = {kind: np.concatenate([np.load(p) for p in paths[kind]]) for kind in kinds}
    _keep(folder, segments[0].shard, arrays)


def _remove_pieces(folder: Path, job: str) -> None:
    """Remove the parts of a job, whose shards are kept, and what killed ones left long ago."""
    for path in list(folder.glob("shard_*.from_*.npy")):
        with suppress(FileNotFoundError):  # another job has removed it
            if f".{job}." in path.name or time.time() - path.stat().st_mtime > _LEFT:
                path.unlink()


def summaries(encoder: Encoder, views: Views, config: ExtractConfig) -> Tensor:
    """The encoder's image-level vectors of `views`, float32 [n, d] on the CPU, computed anew:
    nothing is kept on disk.

    Raises UserError for features that are not finite.
    """
    encoder.need_summary("features")
    precision = precision_on(encoder.device, config)
    cuts = _cuts(range(len(views)), len(views), config.batch_size)
    batches = _batches(encoder, views, cuts, ("summary",), precision, config)
    return torch.cat([batch["summary"] for batch in batches])


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
    cuts: list[list[int]],
    kinds: Sequence[str],
    precision: str,
    config: ExtractConfig,
):
    """The given kinds of features of batches of views, as dicts of tensors on the CPU.

    Patches leave the device in half precision, as they are kept.
    """
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


def _marker(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:06d}.json"


def _keep(folder: Path, shard: int, arrays: dict[str, np.ndarray]) -> None:
    hashes = {}
    for kind, array in arrays.items():
        path = _shard_path(folder, shard, kind)
        write_atomically(path, lambda temporary, a=array: _save_array(temporary, a))
        hashes[kind] = file_sha256(path)
    # written last: a shard without its marker does not count
    write_atomically(
        _marker(folder, shard), lambda temporary: temporary.write_text(json.dumps(hashes))
    )


def _save_array(path: Path, array: np.ndarray) -> None:
    # a file object: given a path, np.save appends .npy to it
    with open(path, "wb") as file:
        np.save(file, array)


def whole(folder: Path, shard: int, kinds: Sequence[str]) -> bool:
    """Whether a shard's files are there and match their hashes."""
    try:
        hashes = json.loads(_marker(folder, shard).read_text())
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


def _follow(items, total: int, what: str, draws: bool):
    """Pass batches through; `draws`: with a progress bar of pictures."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not draws) as progress:
        bar = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(bar, len(next(iter(item.values()))))

"""Teacher features computed once, over K fixed augmented views a picture; later epochs cost only
the student.

Slot p * K + k has each teacher's features of view k of picture p, all crops of it. Slots are cut
into shards; a shard is one float16 array per teacher and kind of feature (or int8, with a scale for
every vector), and a marker, written last, that makes it count. Shards are always computed whole and
in the same small chunks, so the content of a slot does not depend on interruptions. The slots of a
picture that cannot be decoded have the features of the one that stands in for it in training, the
next that can; where its file is mended later, the cache no longer fits and is refused.

The loader's workers read the rows of a sample beside its crops; they travel to the device as they
are stored and are widened there.
"""

import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contract.errors import UserError, first_line, raise_trouble
from contract.files import write_atomically
from distill.config import Recipe
from distill.data.batches import Batch, CorruptLedger, batch_bytes, make_loader
from distill.data.crops import IMAGE, CropDataset, View, plain_name, view_of
from distill.data.open_files import Pool
from distill.distributed import Ranks
from distill.features import Features, features_of
from distill.teachers import Teacher

log = logging.getLogger(__name__)

_CHUNK = 16
"""Views a forward pass of the teachers while filling."""

_FORMAT = 2
"""Version of the key. 2: all settings of a teacher, and how it is read."""

_ComputeFeatures = Callable[[Batch], dict[str, Features]]


class Spec(NamedTuple):
    """What is kept of one teacher: the view it sees, and the shapes of its features of one crop, by
    kind (`Features.named`).
    """

    view: View
    shapes: dict[str, tuple[int, ...]]


class _Array(NamedTuple):
    """One array of a shard: the end of its file's name, and what it has for a slot."""

    ending: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def header(self, slots: int) -> bytes:
        """What numpy writes in front of the array of so many slots."""
        file = io.BytesIO()
        about = {"descr": self.dtype, "fortran_order": False, "shape": (slots, *self.shape)}
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue()


def _arrays(label: str, kind: str, spec: Spec, dtype: str) -> list[_Array]:
    """What is kept of one kind of a teacher's features."""
    crops = (spec.view.crops,) if spec.view.crops > 1 else ()
    shape = (*crops, *spec.shapes[kind])
    if dtype == "float16":
        return [_Array(f"{label}.{kind}.npy", "<f2", shape)]
    scale = _Array(f"{label}.{kind}.scale.npy", "<f2", (*shape[:-1], 1))
    return [_Array(f"{label}.{kind}.npy", "|i1", shape), scale]


def bytes_a_slot(specs: Mapping[str, Spec], dtype: str) -> int:
    """Bytes on disk of all teachers' features of one view of a picture."""
    return sum(
        array.nbytes
        for label, spec in specs.items()
        for kind in spec.shapes
        for array in _arrays(label, kind, spec, dtype)
    )


class TeacherCache:
    """The cache in one folder, for teachers by label; `dtype` float16 or int8."""

    def __init__(
        self,
        folder: Path,
        views: int,
        slots: int,
        shard_size: int,
        specs: dict[str, Spec],
        dtype: str = "float16",
    ) -> None:
        self.folder, self.views, self.slots = folder, views, slots
        self.shard_size, self.specs, self.dtype = shard_size, specs, dtype
        self._files: Pool[int] = Pool()
        self._errors: dict[str, np.ndarray] = {}

    @property
    def shards(self) -> int:
        return -(-self.slots // self.shard_size)

    def size_of(self, shard: int) -> int:
        """Slots in a shard; the last may be short."""
        return min(self.shard_size, self.slots - shard * self.shard_size)

    def missing(self) -> list[int]:
        return [shard for shard in range(self.shards) if not self._path(shard, "ok").exists()]

    def claim(self, key: dict) -> None:
        """Make the folder for features that `key` describes; raises UserError if it has others,
        naming what differs.
        """
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            held = json.loads(manifest.read_text())
            different = [name for name in key | held if held.get(name) != key.get(name)]
            if different:
                name = different[0]
                raise UserError(
                    f"teacher cache {self.folder} was made with {name} = {held.get(name)}, but "
                    f"this run has {key.get(name)}: set another teacher_cache.path, or delete the "
                    "folder"
                )
            return
        self._write(manifest, lambda file: file.write(json.dumps(key, indent=2).encode()))

    def fill(
        self, dataset: CropDataset, compute: _ComputeFeatures, ranks: Ranks, workers: int
    ) -> None:
        """Compute missing shards, every rank its share, and log the hit rate; `compute` gives a
        batch's features.

        Raises UserError where too many pictures are unreadable (`data.max_corrupt_fraction`), and
        where shards disappear meanwhile.
        """
        listed = self.missing() if ranks.first else None
        if ranks.first:
            self._check_room(listed)
        ranks.barrier()
        # One list for all: another run may fill the cache at the same time, and of two lists of
        # different lengths the shares would leave shards out.
        missing = ranks.gather(listed)[0]
        start = time.perf_counter()
        mine = missing[ranks.rank :: ranks.world]
        streams = list(dict.fromkeys(spec.view.stream for spec in self.specs.values()))
        chunks = [
            [
                (stream, *divmod(slot, self.views))
                for stream in streams
                for slot in range(
                    first, min(first + _CHUNK, shard * self.shard_size + self.size_of(shard))
                )
            ]
            for shard in mine
            for first in range(
                shard * self.shard_size, shard * self.shard_size + self.size_of(shard), _CHUNK
            )
        ]
        views = [view for view in dataset.views if view.stream in streams]
        room = batch_bytes(views, dict.fromkeys(streams, _CHUNK))
        batches = iter(make_loader(dataset, chunks, workers, False, room))
        ledger = CorruptLedger(len(dataset.pictures), dataset.config.max_corrupt_fraction)
        for done, shard in enumerate(mine, start=1):
            self._fill_shard(shard, batches, compute, ledger)
            spent = time.perf_counter() - start
            log.info(
                "teacher cache: shard %d of %d, %.0f s left",
                done,
                len(mine),
                spent / done * (len(mine) - done),
            )
        ranks.barrier()
        self._check_whole(mine, missing, ranks)
        computed = sum(self.size_of(shard) for shard in missing)
        log.info(
            "teacher cache: %d of %d views present (%.0f %% hits), computed %d in %.1f s",
            self.slots - computed,
            self.slots,
            100 * (self.slots - computed) / self.slots,
            computed,
            time.perf_counter() - start,
        )
        for name, (wrong, right) in self._errors.items():
            share = 100 * math.sqrt(wrong / right) if right else 0.0
            log.info("teacher cache: int8 changes %s by %.2f %% (root mean square)", name, share)

    def _check_whole(self, mine: list[int], missing: list[int], ranks: Ranks) -> None:
        """Raise UserError, on all ranks, for shards that are missing after all were filled."""
        # a network folder may show the files of another machine only after a while
        others = set(missing) - set(mine)
        gone = sorted(set().union(*ranks.gather(set(self.missing()) - others)))
        if gone:
            raise UserError(
                f"teacher cache {self.folder}: shard {gone[0]} ({len(gone)} of {self.shards}) "
                "disappeared while the others were computed: let nothing else delete its files, "
                "and start again"
            )

    def _check_room(self, missing: list[int]) -> None:
        """Log the size of the cache; raise UserError where what is missing does not fit."""
        a_slot = bytes_a_slot(self.specs, self.dtype)
        wanted = a_slot * sum(self.size_of(shard) for shard in missing)
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        log.info(
            "teacher cache: %s of %s in %s, %.2f GB in all, %.2f GB to be computed",
            f"{self.slots:,} views",
            self.dtype,
            self.folder,
            a_slot * self.slots / 1e9,
            wanted / 1e9,
        )
        if wanted > free:
            raise UserError(
                f"teacher cache {self.folder} needs {wanted / 1e9:.2f} GB more, but "
                f"{free / 1e9:.2f} GB are free: set another teacher_cache.path, fewer "
                "teacher_cache.views or teacher_cache.dtype=int8"
            )

    def _fill_shard(
        self,
        shard: int,
        batches: Iterator[Batch],
        compute: _ComputeFeatures,
        ledger: CorruptLedger,
    ) -> None:
        rows: dict[tuple[str, str], list[np.ndarray]] = {}
        for _ in range(-(-self.size_of(shard) // _CHUNK)):
            batch = next(batches)
            ledger.add(batch.skipped)
            for label, features in compute(batch).items():
                for kind, values in features.named().items():
                    half = self._by_slot(label, values).half()
                    if torch.isinf(half).any():
                        raise UserError(
                            f"teacher '{label}': its {kind} exceed float16's maximum of 65504 and "
                            "cannot be cached: set teacher_cache.views=0"
                        )
                    rows.setdefault((label, kind), []).append(half.cpu().numpy())
        for (label, kind), parts in rows.items():
            values = self._stored(f"{label}.{kind}", np.concatenate(parts))
            arrays = _arrays(label, kind, self.specs[label], self.dtype)
            for array, stored in zip(arrays, values, strict=True):
                self._write(
                    self._path(shard, array.ending), lambda file, v=stored: np.save(file, v)
                )
        self._write(self._path(shard, "ok"), lambda file: file.write(b"{}"))

    def _stored(self, name: str, half: np.ndarray) -> list[np.ndarray]:
        """float16 values [n, …, d] as they are kept, adding to the error of int8."""
        if self.dtype == "float16":
            return [half]
        values = half.astype(np.float32)
        scale = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float16)
        wide = np.maximum(scale.astype(np.float32), 1e-12)
        small = np.clip(np.rint(values / wide), -127, 127).astype(np.int8)
        wrong = np.square(small * scale.astype(np.float32) - values).sum(dtype=np.float64)
        sums = np.array([wrong, np.square(values).sum(dtype=np.float64)])
        self._errors[name] = self._errors.get(name, 0) + sums
        return [small, scale]

    def rows(self, stream: str, picture: int, number: int) -> Tensor:
        """What is kept of view `number` of a picture by the teachers of a stream, as it is stored:
        uint8, one array after another.
        """
        shard, row = divmod(picture * self.views + number, self.shard_size)
        arrays = [array for _, _, arrays in self._layout(stream) for array in arrays]
        result = np.empty(sum(array.nbytes for array in arrays), np.uint8)
        start = 0
        for array in arrays:
            self._read_row(shard, row, array, result[start : start + array.nbytes])
            start += array.nbytes
        return torch.from_numpy(result)

    def read(self, batch: Batch) -> dict[str, Features]:
        """Features of a batch's slots, float32, on the device that the batch is on."""
        named: dict[str, dict[str, Tensor]] = {}
        for stream, rows in batch.features.items():
            start = 0
            for label, kind, arrays in self._layout(stream):
                parts = []
                for array in arrays:
                    # a copy: alone in its batch, a row of odd length would keep its odd place
                    part = rows[:, start : start + array.nbytes].clone(
                        memory_format=torch.contiguous_format
                    )
                    dtype = torch.int8 if array.dtype == "|i1" else torch.float16
                    parts.append(part.view(dtype).unflatten(1, array.shape).float())
                    start += array.nbytes
                values = parts[0] * parts[1] if len(parts) == 2 else parts[0]
                if self.specs[label].view.crops > 1:  # a batch holds them crop by crop
                    values = values.transpose(0, 1).flatten(0, 1)
                named.setdefault(label, {})[kind] = values
        return {label: features_of(named[label]) for label in self.specs}

    def _layout(self, stream: str) -> list[tuple[str, str, list[_Array]]]:
        """Label, kind and arrays in the order of a row's bytes."""
        return [
            (label, kind, _arrays(label, kind, spec, self.dtype))
            for label, spec in self.specs.items()
            if spec.view.stream == stream
            for kind in spec.shapes
        ]

    def _by_slot(self, label: str, values: Tensor) -> Tensor:
        """[crops * n, …], crop by crop, as [n, crops, …]; a single crop has no axis."""
        crops = self.specs[label].view.crops
        return values if crops == 1 else values.unflatten(0, (crops, -1)).transpose(0, 1)

    def _read_row(self, shard: int, row: int, array: _Array, into: np.ndarray) -> None:
        """Read one slot of an array; raises UserError where its file is damaged or cannot be
        read.
        """
        path = self._path(shard, array.ending)
        header = array.header(self.size_of(shard))

        def open_checked() -> int:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            whole = len(header) + self.size_of(shard) * array.nbytes
            if os.fstat(file).st_size == whole and os.pread(file, len(header), 0) == header:
                return file
            os.close(file)
            raise EOFError("it has another size or shape than was written")

        try:
            # not mapped: a map would end the process where the disk fails
            file = self._files.get(path, open_checked)
            if os.preadv(file, [into], len(header) + row * array.nbytes) != array.nbytes:
                raise EOFError("it ends too early")
        except (EOFError, FileNotFoundError) as error:
            why = "it is missing" if isinstance(error, FileNotFoundError) else first_line(error)
            raise UserError(
                f"teacher cache: {path} is damaged ({why}): delete "
                f"{self._path(shard, 'ok').name} beside it, and this shard is computed again"
            ) from error
        except OSError as error:
            raise_trouble(path, error)
            raise UserError(f"teacher cache: cannot read {path}: {first_line(error)}") from error

    def _path(self, shard: int, ending: str) -> Path:
        return self.folder / f"shard_{shard:06d}.{ending}"

    def _write(self, path: Path, write: Callable) -> None:
        # A name of its own for every process: two runs may fill one cache at the same time, with
        # equal results.
        def write_file(temporary: Path) -> None:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)

        write_atomically(path, write_file, remedy="set another teacher_cache.path")


def cache_folder(recipe: Recipe, folder: Path) -> Path:
    """Where the cache of a run in `folder` lies."""
    path = recipe.teacher_cache.path
    return Path(path) if path else folder / "teacher_cache"


def open_cache(
    recipe: Recipe,
    folder: Path,
    dataset: CropDataset,
    teachers: Sequence[Teacher],
    teacher_views: Mapping[str, str],
    compute: _ComputeFeatures,
    ranks: Ranks,
) -> TeacherCache:
    """Open the recipe's cache (by default inside the run folder), refuse a foreign one, and fill
    what is missing.
    """
    config = recipe.teacher_cache
    views = {view.name: view for view in dataset.views}
    specs = {}
    for teacher in teachers:
        key = teacher_views[teacher.label]
        view = views[view_of(key)]
        if key == plain_name(view.name):
            view = view._replace(photometric=())
        specs[teacher.label] = Spec(view, teacher.shapes)
    for label, spec in specs.items():
        if any(name != "none" for name in spec.view.photometric):
            log.info(
                "teacher cache: '%s' sees %d fixed photometric augmentations of each picture",
                label,
                config.views,
            )
    slots = len(dataset.pictures) * config.views
    place = cache_folder(recipe, folder)
    cache = TeacherCache(place, config.views, slots, config.shard_size, specs, config.dtype)
    if ranks.first:
        kept = {"dtype": "int8"} if config.dtype == "int8" else {}
        cache.claim(_cache_key(recipe, dataset, teachers, specs) | kept)
    ranks.barrier()
    cache.fill(dataset, compute, ranks, recipe.data.workers)
    return cache


def _cache_key(
    recipe: Recipe,
    dataset: CropDataset,
    teachers: Sequence[Teacher],
    specs: Mapping[str, Spec],
) -> dict:
    """Everything the cached features depend on."""
    key: dict = {
        "format": _FORMAT,
        "pictures": dataset.pictures.fingerprint(),
        "seed": dataset.seed,
        "crop_ratio": list(recipe.data.crop_ratio),
        "flip": recipe.data.flip,
        "views": recipe.teacher_cache.views,
        "shard_size": recipe.teacher_cache.shard_size,
        "teachers": [teacher.label for teacher in teachers],
    }
    for teacher in teachers:
        label, view = teacher.label, specs[teacher.label].view
        # the single view of UMT and plain keeps the names of caches from before there were several
        prefix = "" if view.name == IMAGE else f"{label}."
        key |= {f"{prefix}image_size": view.size, f"{prefix}crop_scale": list(view.scale)}
        if view != View(IMAGE, view.size, scale=view.scale):
            key[f"{prefix}view"] = f"{view.crops} x {view.name} of stream {view.stream}"
            key[f"{prefix}photometric"] = list(view.photometric)
            if view.near:
                key[f"{prefix}near"] = view.near
        key |= {f"{label}.{name}": value for name, value in teacher.identity().items()}
        key[f"{label}.weights"] = teacher.fingerprint()
    return key

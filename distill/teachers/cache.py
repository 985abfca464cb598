"""Teacher features computed once, over K fixed augmented views a picture; later epochs cost only
the student.

Slot p * K + k has each teacher's features of view k of picture p, all crops of it. Slots are cut
into shards; a shard is one memory-mapped float16 array per teacher and kind of feature, and a
marker, written last, that makes it count. Shards are always computed whole and in the same small
chunks, so the content of a slot does not depend on interruptions.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from contract.errors import UserError
from contract.files import write_atomically
from distill.config import Recipe
from distill.data.batches import Batch, make_loader
from distill.data.crops import IMAGE, CropDataset, View, plain_name, view_of
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


class TeacherCache:
    """The cache in one folder, for teachers by label."""

    def __init__(
        self, folder: Path, views: int, slots: int, shard_size: int, specs: dict[str, Spec]
    ) -> None:
        self.folder, self.views, self.slots, self.shard_size, self.specs = (
            folder,
            views,
            slots,
            shard_size,
            specs,
        )
        self._maps: dict[tuple[int, str, str], np.ndarray] = {}

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
        """
        missing = self.missing()
        # All ranks must have listed what is missing before the first of them fills something.
        ranks.barrier()
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
        batches = iter(make_loader(dataset, chunks, workers, False))
        for done, shard in enumerate(mine, start=1):
            self._fill_shard(shard, batches, compute)
            spent = time.perf_counter() - start
            log.info(
                "teacher cache: shard %d of %d, %.0f s left",
                done,
                len(mine),
                spent / done * (len(mine) - done),
            )
        ranks.barrier()
        computed = sum(self.size_of(shard) for shard in missing)
        log.info(
            "teacher cache: %d of %d views present (%.0f %% hits), computed %d in %.1f s",
            self.slots - computed,
            self.slots,
            100 * (self.slots - computed) / self.slots,
            computed,
            time.perf_counter() - start,
        )

    def _fill_shard(self, shard: int, batches, compute: _ComputeFeatures) -> None:
        rows: dict[tuple[str, str], list[np.ndarray]] = {}
        for _ in range(-(-self.size_of(shard) // _CHUNK)):
            for label, features in compute(next(batches)).items():
                for kind, values in features.named().items():
                    half = self._by_slot(label, values).half()
                    if torch.isinf(half).any():
                        raise UserError(
                            f"teacher '{label}': its {kind} exceed float16's maximum of 65504 and "
                            "cannot be cached: set teacher_cache.views=0"
                        )
                    rows.setdefault((label, kind), []).append(half.cpu().numpy())
        for (label, kind), parts in rows.items():
            self._write(
                self._path(shard, f"{label}.{kind}.npy"),
                lambda file, p=parts: np.save(file, np.concatenate(p)),
            )
        self._write(self._path(shard, "ok"), lambda file: file.write(b"{}"))

    def read(self, batch: Batch) -> dict[str, Features]:
        """Features of a batch's slots, float32, on the device of its views."""
        return {label: self._read(label, spec, batch) for label, spec in self.specs.items()}

    def _read(self, label: str, spec: Spec, batch: Batch) -> Features:
        stream, device = spec.view.stream, batch.views[spec.view.name].device
        slots = (batch.pictures[stream] * self.views + batch.numbers[stream]).tolist()
        named = {}
        for kind in spec.shapes:
            rows = [
                self._map(slot // self.shard_size, label, kind)[slot % self.shard_size]
                for slot in slots
            ]
            values = torch.from_numpy(np.stack(rows)).float()
            if spec.view.crops > 1:  # a batch holds them crop by crop
                values = values.transpose(0, 1).flatten(0, 1)
            named[kind] = values.to(device)
        return features_of(named)

    def _by_slot(self, label: str, values: Tensor) -> Tensor:
        """[crops * n, …], crop by crop, as [n, crops, …]; a single crop has no axis."""
        crops = self.specs[label].view.crops
        return values if crops == 1 else values.unflatten(0, (crops, -1)).transpose(0, 1)

    def _map(self, shard: int, label: str, kind: str) -> np.ndarray:
        key = (shard, label, kind)
        if key not in self._maps:
            path = self._path(shard, f"{label}.{kind}.npy")
            view, shapes = self.specs[label]
            crops = (view.crops,) if view.crops > 1 else ()
            shape = (self.size_of(shard), *crops, *shapes[kind])
            try:
                loaded = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"teacher cache: {path} is missing or damaged: delete {self.folder}"
                ) from error
            if loaded.shape != shape:
                raise UserError(
                    f"teacher cache: {path} has shape {loaded.shape}, expected {shape}: delete "
                    f"{self.folder}"
                )
            self._maps[key] = loaded
        return self._maps[key]

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
    place = Path(config.path) if config.path else folder / "teacher_cache"
    cache = TeacherCache(place, config.views, slots, config.shard_size, specs)
    if ranks.first:
        cache.claim(_cache_key(recipe, dataset, teachers, specs))
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

"""Labelled data on disk: class folders, and pictures paired with masks or depth maps.

`--data PATH` is one root for all tasks; a task family's own subfolder (`classification`, `dense`,
`retrieval`, `video`, `robustness`) is used instead of the root itself if it exists.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from contract.errors import UserError
from contract.images import IMAGE_SUFFIXES
from contract.picture_files import Names, picture_files, size_and_time, subfolders
from contract.views import ViewPolicy
from distill.data.pictures import digest
from distill.evaluate.maps import (
    Exif,
    Ignored,
    WrongLabel,
    as_drawn,
    check_size,
    dropped_labels,
    read_map,
    stored_bits,
)
from distill.evaluate.reading import read_picture, read_view

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "test")}
"""Folder names that stand for the two splits."""

_PICTURES = ("images", "image", "rgb")
_MASKS = ("masks", "annotations", "labels")
_DEPTHS = ("depth", "depths")

_ADE_NAMES = "objectInfo150.txt"
"""ADE20K's table of classes: its layout alone says nothing, many data sets lie so."""


def family_root(data: Path, family: str) -> Path:
    """`data/family` if it exists, else `data`; raises UserError if `data` is not a folder."""
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder")
    own = data / family
    return own if own.is_dir() else data


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split below `root`, by any of its usual names."""
    return next((root / name for name in _SPLITS[split] if (root / name).is_dir()), None)


def _files_below(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Every picture below a folder by the rule of training, or file with one of the suffixes,
    sorted; raises UserError for one that is a link to nothing.
    """
    return [_existing(Path(path)) for path in picture_files(folder, suffixes)]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} is a link to nothing, or not a file: restore or remove it, as scores need "
            "every picture"
        )
    return path


def stamp(root: Path, files: Sequence[Path | str]) -> str:
    """Hex digest that changes when files are added, removed, resized or rewritten."""
    return digest((os.path.relpath(path, root), *size_and_time(path)) for path in files)


# ---- class folders ----------------------------------------------------------------------------


class Labelled(Protocol):
    """One split of labelled pictures: their labels [n] int64, and the classes' names."""

    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def picture(self, number: int) -> Image.Image:
        """RGB picture `number`; raises UserError for one that cannot be read."""
        ...

    def shown(self, number: int, view: ViewPolicy, size: int) -> np.ndarray:
        """What a view policy, but tiles, shows of it: uint8 [size, size, 3]."""
        ...

    def fingerprint(self) -> str:
        """Changes when the pictures do."""
        ...


@dataclass(frozen=True)
class ClassFolders:
    """One split of a data set with a folder per class: files, their labels [n], and the classes'
    names.

    Files are `Names`: a million objects would be copied into every worker.
    """

    root: Path
    files: Names
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, number: int) -> Image.Image:
        """Decode picture `number`; raises UserError as `read_picture` does."""
        return read_picture(self.files[number])

    def shown(self, number: int, view: ViewPolicy, size: int) -> np.ndarray:
        """Read what `view` shows of picture `number`; raises UserError as `read_picture` does."""
        return read_view(self.files[number], view, size)

    def fingerprint(self) -> str:
        return stamp(self.root, self.files)


def open_classes(
    data: Path, split: Literal["train", "val"], classes: Sequence[str] | None = None
) -> ClassFolders:
    """Open `DATA/split/CLASS/*`; `classes` fixes the numbering (that of the training split,
    say).

    Raises UserError for a missing or empty split, one class only, or a class that is not in
    `classes`.
    """
    root = family_root(data, "classification")
    folder = split_folder(root, split)
    if folder is None:
        raise UserError(f"--data {root} has no {split} split: create {root / split}/CLASS/*.jpg")
    names = [path.name for path in subfolders(folder)]
    if classes is not None:
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise UserError(
                f"{folder / unknown[0]}: the training split has no class '{unknown[0]}' (remove "
                "the folder, or add it to the training split)"
            )
    numbering = tuple(classes or names)
    if len(numbering) < 2:
        raise UserError(
            f"{folder} has {len(numbering)} class folders: classification needs at least two"
        )
    files, labels = [], []
    for name in names:
        pictures = _files_below(folder / name)
        files += map(str, pictures)
        labels += [numbering.index(name)] * len(pictures)
    if not files:
        raise UserError(
            f"{folder} is empty: no {', '.join(IMAGE_SUFFIXES[:3])} … below its class folders"
        )
    present = len(set(labels))
    if split == "train" and present < 2:
        raise UserError(
            f"{folder} has pictures of only {present} class: classification needs at least two"
        )
    return ClassFolders(root, Names(files), np.array(labels, np.int64), numbering)


def open_folder(root: Path) -> ClassFolders:
    """Every picture of `root/CLASS/*`, or of a folder without class folders as one class.

    Raises UserError for a folder without pictures.
    """
    names = [path.name for path in subfolders(root)]
    found = {name: _files_below(root / name) for name in names}
    found = {name: files for name, files in found.items() if files} or {
        root.name: _files_below(root)
    }
    files = [str(path) for here in found.values() for path in here]
    if not files:
        raise UserError(
            f"--data {root} has no pictures: give a folder of CLASS/*.jpg, or a layout of "
            "distill.evaluate --list"
        )
    labels = np.repeat(np.arange(len(found)), [len(here) for here in found.values()])
    return ClassFolders(root, Names(files), labels.astype(np.int64), tuple(found))


@dataclass(frozen=True)
class Some:
    """Some pictures of a split, by their `numbers` there."""

    split: Labelled
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def labels(self) -> np.ndarray:
        return self.split.labels[list(self.numbers)]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.split.classes

    def picture(self, number: int) -> Image.Image:
        return self.split.picture(self.numbers[number])

    def shown(self, number: int, view: ViewPolicy, size: int) -> np.ndarray:
        return self.split.shown(self.numbers[number], view, size)

    def fingerprint(self) -> str:
        return f"{self.split.fingerprint()} {digest((number,) for number in self.numbers)}"


# ---- pictures with maps -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """One split of pictures with a mask or depth map each. `ade` says that it is ADE20K (label 0:
    unlabelled), `exif` whether maps are turned as pictures with an EXIF tag are.
    """

    root: Path
    pictures: tuple[Path, ...]
    maps: tuple[Path, ...]
    ade: bool
    exif: Exif = "auto"

    def __len__(self) -> int:
        return len(self.pictures)


def open_pairs(
    data: Path,
    split: Literal["train", "val"],
    kind: Literal["masks", "depth"],
    exif: Exif = "auto",
) -> Pairs:
    """Open one split of a dense data set, in any of these layouts:

    - `SPLIT/images/*` with `SPLIT/masks/*` or `SPLIT/depth/*`
    - `images/SPLIT/*` with `annotations/SPLIT/*` (ADE20K, if objectInfo150.txt lies beside them) or
      `depth/SPLIT/*`
    - `SPLIT/SCENE/rgb_*.jpg` with `SPLIT/SCENE/sync_depth_*.png` (NYUv2's official splits)

    A map has its picture's name, with .png or .npy. Raises UserError for a missing split or
    unmatched files.
    """
    root = family_root(data, "dense")
    map_folders = _MASKS if kind == "masks" else _DEPTHS
    folder = split_folder(root, split)
    for above, below in ((folder, None), (root, split)):
        if above is None:
            continue
        pictures = _subfolder(above, _PICTURES, below)
        maps = _subfolder(above, map_folders, below)
        if pictures and maps:
            ade = below is not None and (root / _ADE_NAMES).is_file()
            return _match(root, pictures, maps, ade, exif)
    if folder and kind == "depth" and (pictures := _rgb_below(folder)):
        maps = [
            path.with_name(path.name.replace("rgb_", "sync_depth_")).with_suffix(".png")
            for path in pictures
        ]
        missing = [path for path in maps if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing: every rgb_* needs its sync_depth_*.png")
        return Pairs(root, tuple(pictures), tuple(maps), ade=False, exif=exif)
    raise UserError(
        f"--data {root} has no {split} split of pictures with {kind}: create "
        f"{root / split}/images/* and {root / split}/{map_folders[0]}/*.png"
    )


def _rgb_below(folder: Path) -> list[Path]:
    return [path for path in _files_below(folder) if path.name.startswith("rgb_")]


def _subfolder(above: Path, names: Sequence[str], split: str | None) -> Path | None:
    """The first of several folder names (and its split folder, if `split` is given) that exists."""
    for name in names:
        folder = above / name
        if folder.is_dir():
            return folder if split is None else split_folder(folder, split)
    return None


def _by_name(folder: Path, files: Sequence[Path]) -> dict[Path, list[Path]]:
    """Files by their names below a folder, without suffix."""
    result: dict[Path, list[Path]] = {}
    for path in files:
        result.setdefault(path.relative_to(folder).with_suffix(""), []).append(path)
    return result


def _match(root: Path, pictures: Path, maps: Path, ade: bool, exif: Exif) -> Pairs:
    """Pair files of two folders by their relative names without suffix."""
    files = _files_below(pictures)
    if not files:
        raise UserError(f"{pictures} is empty: no {', '.join(IMAGE_SUFFIXES[:3])} … in it")
    by_name = _by_name(maps, _files_below(maps, (".png", ".npy", ".tif")))
    named = _by_name(pictures, files)
    for one in named:
        for several in (named[one], by_name.get(one, [])):
            if len(several) > 1:
                raise UserError(
                    f"{several[0]} and {several[1].name} have one name, so it is open which of "
                    "them belongs to what: remove or rename one"
                )
    matches = [by_name.get(one, [None])[0] for one in named]
    unmatched = [path for path, other in zip(files, matches, strict=True) if other is None]
    if unmatched:
        raise UserError(
            f"{unmatched[0]} has no map of the same name in {maps} (.png or .npy): "
            f"{len(unmatched)} of {len(files)} are missing"
        )
    return Pairs(root, tuple(files), tuple(matches), ade, exif)


def label_names(pairs: Pairs, classes: int) -> list[str]:
    """Names of the labels from `classes.txt` (a line each) or ADE20K's objectInfo150.txt in the
    data root, else numbers.

    Raises UserError if the number of names is not the number of classes.
    """
    for name in ("classes.txt", _ADE_NAMES):
        path = pairs.root / name
        if not path.is_file():
            continue
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        names = [line.strip() for line in lines]
        if (
            name == _ADE_NAMES
        ):  # a header, then columns of which the last is "wall" or "building, edifice"
            names = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
        if len(names) != classes:
            raise UserError(
                f"{path} names {len(names)} classes, but the masks have {classes}: correct it, or "
                "set segmentation.classes"
            )
        return names
    return [str(number) for number in range(classes)]


def read_matched(pairs: Pairs, number: int) -> Image.Image:
    """Picture `number`, turned as its map is; raises UserError if its size differs from its map's,
    or nothing says whether the map is turned (see `maps.as_drawn`).
    """
    file, path = pairs.pictures[number], pairs.maps[number]
    picture = as_drawn(read_picture(file), file, path, pairs.exif)
    check_size(path, picture.size)
    return picture


IGNORED = -1
"""Label of ignored pixels after reading, whatever their label in the file."""


def read_mask(
    pairs: Pairs, number: int, shift: bool, classes: int | None, ignore: Ignored
) -> np.ndarray:
    """Labels [H, W] int64, `IGNORED` where the file has one of `ignore`; with `shift` also where it
    has 0, and one less elsewhere (ADE20K).

    Raises UserError for labels that are not integers, WrongLabel for negative ones and those not
    below `classes`.
    """
    path = pairs.maps[number]
    values = read_map(path)
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
        raise UserError(f"{path} has {values.dtype} values: labels must be integers")
    stored = values.astype(np.int64)
    dropped = np.isin(stored, dropped_labels(ignore, path, shift, classes)) | (
        stored == 0 if shift else False
    )
    labels = np.where(dropped, IGNORED, stored - shift)
    wrong = labels[~dropped & ((labels < 0) | (labels >= (classes or np.inf)))]
    if len(wrong):
        raise WrongLabel(f"{path} has label {wrong[0] + shift}")
    return labels


def depth_scale(splits: Sequence[Pairs], scale: float | None) -> float:
    """Units a metre of integer depth maps: `scale`, or by default the 1,000 of 16-bit files.

    Raises UserError for maps of 8 bits, which cannot hold millimetres, unless `scale` is given, and
    for 8 bits beside 16, which have no scale in common.
    """
    bits = {path: stored_bits(path) for pairs in splits for path in pairs.maps}
    small = next((path for path, count in bits.items() if count == 8), None)
    large = next((path for path, count in bits.items() if count > 8), None)
    if small and large:
        raise UserError(
            f"{small} is an 8-bit depth map, but {large} has {bits[large]} bits: no depth.scale "
            "holds for both, convert the maps to one kind"
        )
    if small and scale is None:
        raise UserError(
            f"{small} is an 8-bit depth map, which has no customary scale (in millimetres it would "
            "end at 0.255 m): set depth.scale, the units of a metre (25.5 where 255 is 10 m)"
        )
    return scale or 1000.0


def read_depth(pairs: Pairs, number: int, scale: float, largest: float) -> np.ndarray:
    """Depth [H, W] float32 in metres, 0 where unknown.

    Integer files have metres times `scale`, float files metres. Raises UserError for a map without
    any depth in (0, largest].
    """
    values = read_map(pairs.maps[number])
    metres = values.astype(np.float32) / (scale if np.issubdtype(values.dtype, np.integer) else 1)
    metres = np.nan_to_num(metres, nan=0.0, posinf=0.0, neginf=0.0)
    if not ((metres > 0) & (metres <= largest)).any():
        what = (
            "is all zeros"
            if not metres.any()
            else f"has no depth in (0, {largest:g}] m (largest {metres.max():g} m)"
        )
        raise UserError(
            f"{pairs.maps[number]} {what}: correct or remove it, or set depth.scale (units per "
            "metre) or depth.max_depth"
        )
    return metres

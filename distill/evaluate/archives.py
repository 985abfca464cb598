"""Labelled data sets in the layouts of their authors' archives: CIFAR-10 and -100 (Krizhevsky
2009), Flowers-102 (Nilsback & Zisserman 2008) and Oxford-IIIT Pets (Parkhi et al. 2012).

SeFA's transfer tables read these four (its appendix B.2). Every split is the authors': the training
pictures (of Flowers and Pets with the validation ones) against the test pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from contract.errors import UserError, first_line, raise_trouble
from contract.picture_files import Names
from contract.views import ViewPolicy
from distill.evaluate.datasets import (
    ClassFolders,
    Labelled,
    family_root,
    open_classes,
    split_folder,
    stamp,
)
from distill.evaluate.plain_pickle import read_pickle

_Split = Literal["train", "val"]

_SIDE = 32
"""Side of CIFAR's pictures in pixels."""


@dataclass(frozen=True)
class PixelArrays:
    """One split of pictures that lie in arrays: `pixels` [n, 32, 32, 3] uint8 and `labels` [n] from
    `files` in `root`.
    """

    root: Path
    files: tuple[Path, ...]
    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, number: int) -> Image.Image:
        """RGB picture `number`."""
        return Image.fromarray(self.pixels[number])

    def shown(self, number: int, view: ViewPolicy, size: int) -> np.ndarray:
        """What `view` shows of picture `number`."""
        return view.pixels(self.picture(number), size, size)

    def fingerprint(self) -> str:
        return stamp(self.root, self.files)


def open_labelled(data: Path, split: _Split, classes: Sequence[str] | None = None) -> Labelled:
    """Open a split below `data` (or its folder `classification`): an archive's, or class folders.

    `classes` fixes the numbering of class folders; an archive has its own. Raises UserError for a
    layout that is incomplete or files that are damaged, and as `open_classes` does.
    """
    root = family_root(data, "classification")
    kind = archive_of(root)
    return open_classes(data, split, classes) if kind is None else ARCHIVES[kind].open(root, split)


def archive_of(root: Path) -> str | None:
    """Which of `ARCHIVES` a folder is, by its files or its name; None for class folders and
    anything else.
    """
    if split_folder(root, "train") is not None:
        return None
    for kind, archive in ARCHIVES.items():
        if root.name == archive.folder or any((root / mark).is_file() for mark in archive.marks):
            return kind
    return None


def _need(root: Path, names: Sequence[str], remedy: str) -> None:
    """Raise UserError, ending with the remedy, where files or folders are missing in `root`."""
    missing = [name for name in names if not (root / name).exists()]
    if missing:
        raise UserError(f"{root} lacks {', '.join(missing)}: {remedy}")


# ---- CIFAR ------------------------------------------------------------------------------------


class _Cifar(NamedTuple):
    """Where a CIFAR archive keeps what."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    meta: str
    names: str
    labels: str
    remedy: str


_CIFAR_10 = _Cifar(
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    "label_names",
    "labels",
    "unpack cifar-10-python.tar.gz again",
)
_CIFAR_100 = _Cifar(
    ("train",),
    ("test",),
    "meta",
    "fine_label_names",
    "fine_labels",
    "unpack cifar-100-python.tar.gz again",
)


def _open_cifar(root: Path, split: _Split, layout: _Cifar) -> PixelArrays:
    """Pictures [n, 3072] of a split's files, plane by plane in red, green and blue."""
    _need(root, (layout.meta, *layout.train, *layout.val), layout.remedy)
    names = _entry(root / layout.meta, _read_dict(root / layout.meta, layout), layout.names, layout)
    names = tuple(_text(name) for name in names)
    files = tuple(root / name for name in getattr(layout, split))
    pixels, labels = [], []
    for path in files:
        content = _read_dict(path, layout)
        data = _entry(path, content, "data", layout)
        here = _entry(path, content, layout.labels, layout)
        if (
            not isinstance(data, np.ndarray)
            or data.dtype != np.uint8
            or data.shape != (len(here), 3 * _SIDE**2)
        ):
            raise UserError(
                f"{path} does not hold {len(here)} pictures of {_SIDE}x{_SIDE} pixels, one to a "
                f"label: {layout.remedy}"
            )
        wrong = [label for label in here if label not in range(len(names))]
        if wrong:
            raise UserError(
                f"{path} has label {wrong[0]!r:.20}, but {layout.meta} names {len(names)} classes: "
                f"{layout.remedy}"
            )
        pixels.append(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
        labels += list(here)
    return PixelArrays(root, files, np.concatenate(pixels), np.array(labels, np.int64), names)


def _read_dict(path: Path, layout: _Cifar) -> dict[str, Any]:
    """The dict of a pickled file, whose keys Python 2 wrote as strings and others write as
    bytes.
    """
    content = read_pickle(path, arrays=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dict: {layout.remedy}")
    return {_text(key): value for key, value in content.items()}


def _entry(path: Path, content: dict[str, Any], key: str, layout: _Cifar) -> Any:
    """A sequence in a file's dict."""
    if not isinstance(content.get(key), list | np.ndarray) or not len(content[key]):
        raise UserError(f"{path} has no {key}: {layout.remedy}")
    return content[key]


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


# ---- Flowers-102 ------------------------------------------------------------------------------

_FLOWERS = "unpack 102flowers.tgz, and put imagelabels.mat and setid.mat beside jpg"


def _open_flowers(root: Path, split: _Split) -> ClassFolders:
    """`jpg/image_00001.jpg` …, labelled from 1 in imagelabels.mat; setid.mat has each split's
    picture numbers, from 1.
    """
    _need(root, ("jpg", "imagelabels.mat", "setid.mat"), _FLOWERS)
    numbering = _read_mat(root / "imagelabels.mat", ("labels",))
    sets = _read_mat(root / "setid.mat", ("trnid", "valid", "tstid"))
    of_all = numbering["labels"]
    if of_all.min() < 1:
        raise UserError(
            f"{root / 'imagelabels.mat'} has label {of_all.min()}: labels count from 1 (download "
            "it again)"
        )
    parts = ("trnid", "valid") if split == "train" else ("tstid",)
    numbers = np.sort(np.concatenate([sets[part] for part in parts]))
    if numbers.min() < 1 or numbers.max() > len(of_all):
        wrong = numbers.min() if numbers.min() < 1 else numbers.max()
        raise UserError(
            f"{root / 'setid.mat'} has picture {wrong}, but imagelabels.mat has labels of "
            f"{len(of_all)}: download both again"
        )
    files = [root / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
    classes = tuple(str(label) for label in range(1, of_all.max() + 1))
    return _listed(root, files, of_all[numbers - 1] - 1, classes, _FLOWERS)


def _read_mat(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole numbers [n] from a MATLAB file."""
    try:
        content = scipy.io.loadmat(path)
    # A damaged file fails in any way its fields can
    except Exception as error:
        raise_trouble(path, error)
        raise UserError(
            f"{path} is not a MATLAB file ({first_line(error)}): download it again"
        ) from error
    result = {}
    for key in keys:
        values = content.get(key)
        if values is None or not values.size or not np.issubdtype(values.dtype, np.number):
            raise UserError(f"{path} has no numbers {key}: download it again")
        result[key] = values.ravel().astype(np.int64)
    return result


def _listed(
    root: Path, files: Sequence[Path], labels: np.ndarray, classes: tuple[str, ...], remedy: str
) -> ClassFolders:
    """A split of listed files; raises UserError where one is missing."""
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, one of {len(missing)}: {remedy}")
    return ClassFolders(root, Names(map(str, files)), labels, classes)


# ---- Oxford-IIIT Pets -------------------------------------------------------------------------

_PETS = "unpack images.tar.gz and annotations.tar.gz side by side"


def _open_pets(root: Path, split: _Split) -> ClassFolders:
    """`images/NAME.jpg`, with class numbers in annotations/trainval.txt and test.txt; a class
    is called what its pictures are: NAME without its number.
    """
    lists = {"train": "annotations/trainval.txt", "val": "annotations/test.txt"}
    _need(root, ("images", *lists.values()), _PETS)
    rows = {name: _read_list(root / path) for name, path in lists.items()}
    classes = {number: name.rpartition("_")[0] for name, number in rows["train"]}
    order = {number: label for label, number in enumerate(sorted(classes))}
    for name, number in rows[split]:
        if classes.get(number) != name.rpartition("_")[0]:
            raise UserError(
                f"{root / lists[split]}: {name} has class {number}, which in "
                f"{Path(lists['train']).name} is {classes.get(number, 'no class')}: unpack "
                "annotations.tar.gz again"
            )
    files = [root / "images" / f"{name}.jpg" for name, _ in rows[split]]
    labels = np.array([order[number] for _, number in rows[split]], np.int64)
    return _listed(root, files, labels, tuple(classes[number] for number in order), _PETS)


def _read_list(path: Path) -> list[tuple[str, int]]:
    """Name and class number of every line `NAME CLASS SPECIES BREED`."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) < 2 or not words[1].isdecimal():
            raise UserError(
                f"{path}: '{line:.60}' is not a line of NAME CLASS SPECIES BREED: unpack "
                "annotations.tar.gz again"
            )
        rows.append((words[0], int(words[1])))
    if not rows:
        raise UserError(f"{path} lists no picture: unpack annotations.tar.gz again")
    return rows


class _Archive(NamedTuple):
    """`folder` is its usual name, `marks` are files of which any shows it."""

    folder: str
    marks: tuple[str, ...]
    open: Callable[[Path, _Split], Labelled]


ARCHIVES = {
    "CIFAR-10": _Archive(
        "cifar-10-batches-py",
        ("batches.meta", "data_batch_1", "test_batch"),
        lambda root, split: _open_cifar(root, split, _CIFAR_10),
    ),
    "CIFAR-100": _Archive(
        "cifar-100-python",
        ("meta", "train", "test"),
        lambda root, split: _open_cifar(root, split, _CIFAR_100),
    ),
    "Flowers-102": _Archive("flowers-102", ("imagelabels.mat", "setid.mat"), _open_flowers),
    "Pets": _Archive(
        "oxford-iiit-pet",
        ("annotations/trainval.txt", "annotations/test.txt", "annotations/list.txt"),
        _open_pets,
    ),
}
"""The layouts by the data set's name, in the order of the paper's appendix B.2."""

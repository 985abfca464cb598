"""Small data sets in the very layouts of their authors' archives: CIFAR's as Python 2 pickled them,
Flowers-102 with MATLAB files, Oxford-IIIT Pets with its lists.
"""

import struct
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

FLOWERS = {"trnid": (1, 5, 9), "valid": (2, 6, 10), "tstid": (3, 4, 7, 8, 11, 12)}
"""Picture numbers of each split, of twelve pictures in three classes."""


def picture(label: int, number: int, side: int = 40) -> np.ndarray:
    """Noise about a colour that tells up to eight labels apart."""
    colour = 60 + 130 * np.array([label & 1, label >> 1 & 1, label >> 2 & 1])
    noise = np.random.default_rng(100 * label + number).normal(0, 12, (side, side, 3))
    return (colour + noise).clip(0, 255).astype(np.uint8)


def _string(value: str | bytes) -> bytes:
    """A Python 2 string in a pickle."""
    raw = value if isinstance(value, bytes) else value.encode("latin1")
    return b"T" + struct.pack("<i", len(raw)) + raw


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _list(items: list[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _array(values: np.ndarray) -> bytes:
    """A uint8 array, as numpy 1 pickled it."""
    shape = b"(" + b"".join(map(_number, values.shape)) + b"t"
    rest = b"".join(map(_number, (-1, -1, 0)))
    dtype = b"cnumpy\ndtype\n" + _string("u1") + _number(0) + _number(1) + b"\x87R"
    dtype += b"(" + _number(3) + _string("|") + b"NNN" + rest + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _number(0) + b"\x85"
    made += _string("b") + b"\x87R"
    return made + b"(" + _number(1) + shape + dtype + b"\x89" + _string(values.tobytes()) + b"tb"


def python2_pickle(content: dict) -> bytes:
    """A dict of strings, whole numbers, lists of either, and uint8 arrays."""
    out = b"\x80\x02}("
    for key, value in content.items():
        out += _string(key)
        if isinstance(value, np.ndarray):
            out += _array(value)
        elif isinstance(value, list):
            out += _list([_string(v) if isinstance(v, str) else _number(v) for v in value])
        else:
            out += _string(value) if isinstance(value, str) else _number(value)
    return out + b"u."


def _planes(labels: list[int], first: int) -> np.ndarray:
    """Pictures of 32 px as rows of a red, a green and a blue plane."""
    rows = [
        picture(label, first + i, 32).transpose(2, 0, 1).ravel() for i, label in enumerate(labels)
    ]
    return np.stack(rows)


def write_cifar10(root: Path, classes: int = 3, each: int = 2) -> Path:
    """Five batches and a test batch of `classes` * `each` pictures each."""
    root.mkdir(parents=True)
    labels = list(range(classes)) * each
    names = [f"class_{label}" for label in range(classes)]
    meta = {"label_names": names, "num_cases_per_batch": len(labels), "num_vis": 3072}
    (root / "batches.meta").write_bytes(python2_pickle(meta))
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        content = {
            "batch_label": name,
            "labels": labels,
            "data": _planes(labels, number * len(labels)),
            "filenames": [f"{i}.png" for i in range(len(labels))],
        }
        (root / name).write_bytes(python2_pickle(content))
    (root / "readme.html").write_text("<a>about</a>")
    return root


def write_cifar100(root: Path, classes: int = 4, each: int = 3) -> Path:
    """A training and a test file; fine labels 0 … and coarse ones, of which there are half."""
    root.mkdir(parents=True)
    labels = list(range(classes)) * each
    meta = {
        "fine_label_names": [f"fine_{i}" for i in range(classes)],
        "coarse_label_names": [f"coarse_{i}" for i in range(classes // 2)],
    }
    (root / "meta").write_bytes(python2_pickle(meta))
    for number, name in enumerate(("train", "test")):
        content = {
            "filenames": [f"{i}.png" for i in range(len(labels))],
            "batch_label": name,
            "fine_labels": labels,
            "coarse_labels": [label // 2 for label in labels],
            "data": _planes(labels, number * len(labels)),
        }
        (root / name).write_bytes(python2_pickle(content))
    (root / "file.txt~").write_text("")
    return root


def write_flowers(root: Path) -> Path:
    """Twelve pictures: numbers 1-4 are of class 1, 5-8 of class 2, 9-12 of class 3."""
    (root / "jpg").mkdir(parents=True)
    for number in range(1, 13):
        pixels = picture((number - 1) // 4, number)
        Image.fromarray(pixels).save(root / "jpg" / f"image_{number:05d}.jpg", quality=95)
    labels = np.repeat(np.arange(1, 4, dtype=np.uint8), 4)[None]
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    sets = {key: np.array([numbers], np.uint16) for key, numbers in FLOWERS.items()}
    scipy.io.savemat(root / "setid.mat", sets)
    return root


def write_pets(root: Path) -> Path:
    """Three breeds, of which one has an underscore in its name: four pictures to learn from, two to
    score on.
    """
    for folder in ("images", "annotations/xmls", "annotations/trimaps"):
        (root / folder).mkdir(parents=True)
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for label, breed in enumerate(("Abyssinian", "american_bulldog", "Bengal")):
        for number in range(1, 7):
            name = f"{breed}_{number}"
            pixels = picture(label + 3, number)
            Image.fromarray(pixels).save(root / "images" / f"{name}.jpg", quality=95)
            species = 2 if breed[0].islower() else 1
            row = f"{name} {label + 1} {species} {1 + label // 2}"
            lists["trainval" if number <= 4 else "test"].append(row)
    (root / "images" / f"{name}.mat").write_bytes(b"not a picture")
    for key, rows in lists.items():
        (root / "annotations" / f"{key}.txt").write_text("\n".join(rows) + "\n")
    rows = ["#Image CLASS-ID SPECIES BREED ID", *lists["trainval"], *lists["test"]]
    (root / "annotations" / "list.txt").write_text("\n".join(rows))
    return root


def write_class_folders(root: Path) -> Path:
    """Two classes in plain folders: three pictures to learn from, two to score on."""
    for label, name in enumerate(("dark", "red")):
        for number in range(5):
            path = root / ("train" if number < 3 else "test") / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(label, number)).save(path)
    return root

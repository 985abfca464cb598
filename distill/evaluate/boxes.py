"""Pictures with labelled boxes, as COCO has them: one JSON file, and a folder of pictures."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from contract.errors import UserError, raise_trouble
from distill.evaluate.datasets import family_root
from distill.evaluate.reading import read_picture

_FIRST = "instances_"


class Boxes(NamedTuple):
    """Objects of a picture: `edges` [n, 4] (left, upper, right, lower) in pixels, `labels` [n],
    `areas` [n] in pixels, which COCO takes from the outlines, and `crowd` [n] bool.
    """

    edges: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class BoxedPictures:
    """Pictures (`files`, with (width, height) in `sizes`), their boxes, and the names of the
    labels. `source` is the file that says so.
    """

    source: Path
    files: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    boxes: tuple[Boxes, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, number: int) -> Image.Image:
        """RGB picture `number`; raises UserError if it cannot be read, or has another size than its
        boxes are for.
        """
        picture = read_picture(self.files[number])
        if picture.size != self.sizes[number]:
            width, height = self.sizes[number]
            raise UserError(
                f"{self.files[number]} is {picture.width}x{picture.height}, but {self.source.name} "
                f"has {width}x{height}: correct one of them"
            )
        return picture


def open_boxes(data: Path, name: str | None = None) -> BoxedPictures:
    """Open `annotations/instances_SPLIT.json` with the pictures in `SPLIT/`, `images/SPLIT/` or
    `images/`; `name` is the file's where there are several and not one validation split.

    Raises UserError for a missing or damaged file, and for missing pictures.
    """
    root = family_root(data, "detection")
    source = _choose(root, name)
    content = _read(source)
    try:
        images, classes, boxes = _parse(content)
    except _Wrong as error:
        raise UserError(f"{source}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{source} is not in COCO's format: {what}") from error
    folder = _picture_folder(root, source)
    files = [folder / image["file_name"] for image in images]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing: {len(missing)} of the {len(files)} pictures of "
            f"{source.name} are not there"
        )
    sizes = tuple((image["width"], image["height"]) for image in images)
    return BoxedPictures(source, tuple(files), sizes, boxes, classes)


def _choose(root: Path, name: str | None) -> Path:
    """The file of annotations below a root."""
    folder = root / "annotations"
    if name is not None:
        if not (folder / name).is_file():
            raise UserError(f"detection.annotations = {name}: {folder / name} is missing")
        return folder / name
    known = sorted(folder.glob(f"{_FIRST}*.json"))
    chosen = [path for path in known if path.name.startswith(f"{_FIRST}val")] or known
    if not known:
        raise UserError(
            f"--data {root} has no annotations/{_FIRST}*.json: give a folder in COCO's layout "
            f"(annotations/{_FIRST}val2017.json with the pictures in val2017/)"
        )
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen[:4])
        raise UserError(f"{folder} has {names}: set detection.annotations to one of them")
    return chosen[0]


def _picture_folder(root: Path, source: Path) -> Path:
    split = source.stem.removeprefix(_FIRST)
    places = (root / split, root / "images" / split, root / "images")
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{root} has no pictures for {source.name}: put them in {places[0]} or {places[1]}"
    )


class _Wrong(ValueError):
    """What a file of annotations must not say, in a sentence."""


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise_trouble(path, error)
        raise UserError(f"{path} is damaged ({error}): write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not in COCO's format: it has no images")
    return content


def _parse(
    content: Mapping[str, Any],
) -> tuple[list[Mapping], tuple[str, ...], tuple[Boxes, ...]]:
    """Images, names of the classes, and boxes of every image."""
    names = {row["id"]: str(row["name"]).strip() for row in content["categories"]}
    if not names or "" in names.values():
        raise _Wrong("its categories need names, which are what a detector is asked for")
    if len(names) < len(content["categories"]):
        raise _Wrong("two of its categories have one id")
    images = sorted(content["images"], key=lambda image: image["id"])
    numbers = {image["id"]: number for number, image in enumerate(images)}
    if not images or len(numbers) < len(images):
        raise _Wrong("two of its images have one id" if images else "it has no images")
    for image in images:
        # a file that others made must not make us read outside of its folder
        path = Path(image["file_name"])
        if path.is_absolute() or ".." in path.parts:
            raise _Wrong(f"file_name {str(path)!r} leaves the folder of pictures")
        if not all(
            isinstance(image[side], int) and image[side] > 0 for side in ("width", "height")
        ):
            raise _Wrong(f"image {image['id']} has no size")
    rows: dict[int, list[tuple]] = defaultdict(list)
    order = {key: number for number, key in enumerate(names)}
    for row in content["annotations"]:
        if row["image_id"] not in numbers or row["category_id"] not in order:
            raise _Wrong(f"annotation {row['id']} is of an image or category that it does not have")
        x, y, width, height = map(float, row["bbox"])
        area = float(row.get("area", width * height))
        if not all(map(math.isfinite, (x, y, width, height, area))) or min(width, height) < 0:
            raise _Wrong(f"annotation {row['id']} has box {row['bbox']}: x, y, width, height")
        box = ((x, y, x + width, y + height), order[row["category_id"]], area)
        rows[numbers[row["image_id"]]].append((*box, bool(row.get("iscrowd", False))))
    if not rows:
        raise _Wrong("it has no boxes")
    boxes = tuple(_stack(rows[number]) for number in range(len(images)))
    return images, tuple(names.values()), boxes


def _stack(rows: Sequence[tuple]) -> Boxes:
    edges, labels, areas, crowd = zip(*rows, strict=True) if rows else ((),) * 4
    return Boxes(
        np.array(edges, np.float64).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(areas, np.float64),
        np.array(crowd, bool),
    )

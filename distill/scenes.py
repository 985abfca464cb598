"""Procedural scenes with exact labels: textured solids on a floor, with class, mask, metric
depth and boxes.

`python -m distill.scenes --output DIR` writes them. They serve to train dense heads and to test
dense tasks without labelled photographs. They are drawings: results need real data.

Every scene is a pure function of (seed, number, size). One ray a sample, cast from a camera 1.2-1.8
m above the floor; the ray's parameter is the depth along the optical axis, in metres, as depth
cameras report it.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.files import new_folder

CLASSES = ("ball", "box", "cone", "cylinder", "ring")
"""Kinds of solids: the class of a picture is that of its largest solid."""

MASK_NAMES = ("wall", "floor", *CLASSES)
"""Labels of a mask, from 0."""

MAX_DEPTH = 10.0
"""Metres; every wall stands nearer."""

_DEPTH_SCALE = 1000
"""Depth files hold millimetres, 16 bit."""

_Hit = tuple[np.ndarray, np.ndarray]
"""Distance along each ray [n] (infinite where it misses) and the surface normal [n, 3], in the
solid's own frame.
"""


class Box(NamedTuple):
    """What is seen of one solid: its class, an index into CLASSES; x, y, width and height of the
    pixels that show it; how many they are.
    """

    label: int
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Scene:
    """image uint8 [S, S, 3]; mask uint8 [S, S], an index into MASK_NAMES; depth float32 [S, S],
    metres; label; the boxes of all solids that are seen.
    """

    image: np.ndarray
    mask: np.ndarray
    depth: np.ndarray
    label: int
    boxes: tuple[Box, ...]


# ---- solids: unit size, standing on y = 0 about the y axis ------------------------------------


def _nearest(distances: Sequence[np.ndarray], normals: Sequence[np.ndarray]) -> _Hit:
    """The first of several candidate hits of every ray."""
    stacked = np.stack(distances)
    stacked = np.where(stacked > 1e-4, stacked, np.inf)
    first = stacked.argmin(0)
    rays = np.arange(stacked.shape[1])
    return stacked[first, rays], np.stack(normals)[first, rays]


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both solutions of a t^2 + 2 b t + c = 0, infinite where there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        under = b * b - a * c
        root = np.sqrt(np.where(under >= 0, under, np.nan))
        result = (-b - root) / a, (-b + root) / a
    return tuple(np.where(np.isfinite(t), t, np.inf) for t in result)


def _at(origin: np.ndarray, rays: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points on the rays, with misses far away instead of infinite."""
    return origin + rays * np.where(np.isfinite(t), t, 1e6)[:, None]


def _hit_ball(o: np.ndarray, d: np.ndarray) -> _Hit:
    """A ball of radius 0.5."""
    centred = o - (0, 0.5, 0)
    distances = _roots((d * d).sum(1), (centred * d).sum(1), (centred * centred).sum(1) - 0.25)
    return _nearest(distances, [(_at(centred, d, t)) / 0.5 for t in distances])


def _hit_box(o: np.ndarray, d: np.ndarray) -> _Hit:
    """A box 0.8 wide and 0.8 high."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (np.array([-0.4, 0, -0.4]) - o) / d, (np.array([0.4, 0.8, 0.4]) - o) / d
    entry, leave = np.minimum(low, high), np.maximum(low, high)
    axis = entry.argmax(1)
    t = entry.max(1)
    normal = np.eye(3)[axis] * -np.sign(d[np.arange(len(d)), axis])[:, None]
    return np.where((t < leave.min(1)) & (t > 1e-4), t, np.inf), normal


def _disc(o: np.ndarray, d: np.ndarray, height: float, radius: float) -> _Hit:
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (height - o[:, 1]) / d[:, 1]
    point = _at(o, d, t)
    inside = point[:, 0] ** 2 + point[:, 2] ** 2 <= radius**2
    return np.where(inside, t, np.inf), np.broadcast_to((0.0, 1.0, 0.0), d.shape)


def _hit_cylinder(o: np.ndarray, d: np.ndarray) -> _Hit:
    """A cylinder of radius 0.35 and height 1."""
    flat_o, flat_d = o * (1, 0, 1), d * (1, 0, 1)
    sides = _roots((flat_d**2).sum(1), (flat_o * flat_d).sum(1), (flat_o**2).sum(1) - 0.35**2)
    sides = [
        np.where((_at(o, d, t)[:, 1] >= 0) & (_at(o, d, t)[:, 1] <= 1), t, np.inf) for t in sides
    ]
    cap, up = _disc(o, d, 1.0, 0.35)
    return _nearest([*sides, cap], [*(_at(o, d, t) * (1, 0, 1) / 0.35 for t in sides), up])


def _hit_cone(o: np.ndarray, d: np.ndarray) -> _Hit:
    """A cone of base radius 0.5 and height 1.1."""
    slope = 0.5 / 1.1
    top = o - (0, 1.1, 0)
    sign = np.array((1, -(slope**2), 1))
    sides = _roots((sign * d * d).sum(1), (sign * top * d).sum(1), (sign * top * top).sum(1))
    sides = [
        np.where((_at(o, d, t)[:, 1] >= 0) & (_at(o, d, t)[:, 1] <= 1.1), t, np.inf) for t in sides
    ]
    normals = []
    for t in sides:
        point = _at(o, d, t)
        outward = np.stack(
            [point[:, 0], slope * np.hypot(point[:, 0], point[:, 2]), point[:, 2]], axis=1
        )
        normals.append(outward / np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-9))
    return _nearest(sides, normals)


def _hit_ring(o: np.ndarray, d: np.ndarray) -> _Hit:
    """A flat ring standing upright, radii 0.5 and 0.28."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = -o[:, 2] / d[:, 2]
    point = _at(o, d, t)
    radius = np.hypot(point[:, 0], point[:, 1] - 0.5)
    normal = np.zeros_like(d)
    normal[:, 2] = -np.sign(d[:, 2])
    return np.where((radius <= 0.5) & (radius >= 0.28) & (t > 1e-4), t, np.inf), normal


SOLIDS: dict[str, Callable[[np.ndarray, np.ndarray], _Hit]] = {
    "ball": _hit_ball,
    "box": _hit_box,
    "cone": _hit_cone,
    "cylinder": _hit_cylinder,
    "ring": _hit_ring,
}


@dataclass(frozen=True)
class _Solid:
    """One solid in the world: what, where on the floor (metres), how large, turned how far, painted
    how.
    """

    kind: str
    place: tuple[float, float]
    size: float
    turn: float
    paint: Callable[[np.ndarray], np.ndarray]

    def hit(
        self, origin: np.ndarray, rays: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance [n], normal [n, 3] and colour [n, 3] where rays meet the solid."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        rotation = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        o = ((origin - (self.place[0], 0, self.place[1])) @ rotation) / self.size
        d = (rays @ rotation) / self.size
        o = np.broadcast_to(o, d.shape)
        t, normal = SOLIDS[self.kind](o, d)
        return t, normal @ rotation.T, self.paint(_at(o, d, t))


def _random_paint(rng: np.random.Generator, plain: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A solid texture of two colours: stripes, checks, blobs or a gradient, or (`plain`) its first
    colour alone; a function of points [n, 3].
    """
    first, second = rng.uniform(0.1, 0.95, 3), rng.uniform(0.1, 0.95, 3)
    kind = rng.choice(["stripes", "checks", "blobs", "gradient"])
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    frequency, phase = rng.uniform(4, 14), rng.uniform(0, 6.28)
    waves, shifts = rng.normal(size=(3, 6)) * frequency, rng.uniform(0, 6.28, 6)

    def paint(points: np.ndarray) -> np.ndarray:
        if plain:
            return np.broadcast_to(first, points.shape)
        if kind == "stripes":
            mix = np.sin(points @ direction * frequency + phase) > 0
        elif kind == "checks":
            mix = (np.floor(points * frequency / 3 + 1e-3).sum(1) % 2) > 0
        elif kind == "blobs":
            mix = np.clip(np.sin(points @ waves + shifts).mean(1) + 0.5, 0, 1)
        else:
            mix = np.clip(points @ direction * 0.8 + 0.5, 0, 1)
        return first + (second - first) * np.asarray(mix, float)[:, None]

    return paint


def render(seed: int, number: int, size: int, plain: bool = False) -> Scene:
    """Draw scene `number` of `seed` at `size` x `size` pixels, textured or in `plain` colours; four
    rays a pixel for the image, one for the labels.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
    label = int(rng.integers(len(CLASSES)))
    wall = rng.uniform(4.5, 8.5)
    camera = np.array([0.0, rng.uniform(1.2, 1.8), 0.0])
    solids = [
        _Solid(
            CLASSES[label],
            (rng.uniform(-0.5, 0.5), rng.uniform(2.3, 3.2)),
            rng.uniform(1.1, 1.6),
            rng.uniform(-0.7, 0.7),
            _random_paint(rng, plain),
        )
    ]
    for side in rng.permutation([-1, 1])[: rng.integers(3)]:
        kind = CLASSES[rng.integers(len(CLASSES))]
        place = (side * rng.uniform(1.2, 2.0), rng.uniform(3.2, wall - 0.6))
        solids.append(
            _Solid(
                kind,
                place,
                rng.uniform(0.5, 0.9),
                rng.uniform(-0.7, 0.7),
                _random_paint(rng, plain),
            )
        )
    surfaces = [_random_paint(rng, plain), _random_paint(rng, plain)]
    light = np.array([rng.uniform(-1, 1), rng.uniform(1.0, 2.0), rng.uniform(-1.2, -0.3)])
    light /= np.linalg.norm(light)

    side = 2 * size
    pitch = rng.uniform(0.1, 0.25)
    step = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(0.62 * step, -0.62 * step)
    rays = np.stack(
        [x, y * np.cos(pitch) - np.sin(pitch), np.cos(pitch) + y * np.sin(pitch)], axis=-1
    ).reshape(-1, 3)
    origin = np.broadcast_to(camera, rays.shape)

    with np.errstate(divide="ignore", invalid="ignore"):
        to_wall, to_floor = (
            wall / rays[:, 2],
            np.where(rays[:, 1] < 0, -camera[1] / rays[:, 1], np.inf),
        )
    depth, kind = np.minimum(to_wall, to_floor), (to_floor < to_wall).astype(np.uint8)
    points = _at(origin, rays, depth)
    colour = np.where(kind[:, None] == 1, surfaces[1](points * 0.5), surfaces[0](points * 0.5))
    normal = np.where(kind[:, None] == 1, (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
    owner = np.full(len(rays), -1)
    for index, solid in enumerate(solids):
        t, n, c = solid.hit(camera, rays)
        nearer = t < depth
        depth = np.where(nearer, t, depth)
        colour, normal = np.where(nearer[:, None], c, colour), np.where(nearer[:, None], n, normal)
        kind[nearer], owner[nearer] = MASK_NAMES.index(solid.kind), index
    points = _at(origin, rays, depth) + 1e-3 * normal
    toward = np.broadcast_to(light, rays.shape)
    shadow = np.zeros(len(rays), bool)
    for solid in solids:
        shadow |= np.isfinite(solid.hit(points, toward)[0])
    lit = np.clip(normal @ light, 0, None) * np.where(shadow, 0.15, 1.0)
    shade = (
        np.clip(colour * (0.35 + 0.65 * lit[:, None]), 0, 1)
        .reshape(size, 2, size, 2, 3)
        .mean((1, 3))
    )
    noise = rng.normal(scale=0.015, size=shade.shape)
    image = (np.clip(shade + noise, 0, 1) * 255).round().astype(np.uint8)
    mask, metres, owner = (a.reshape(side, side)[::2, ::2] for a in (kind, depth, owner))
    return Scene(
        image,
        np.ascontiguousarray(mask),
        np.ascontiguousarray(metres, np.float32),
        label,
        _boxes(owner, [CLASSES.index(solid.kind) for solid in solids]),
    )


def _boxes(owner: np.ndarray, labels: Sequence[int]) -> tuple[Box, ...]:
    """Tight boxes of what is seen of solids; `owner` [S, S] numbers the solid at each pixel."""
    boxes = []
    for index, label in enumerate(labels):
        rows, columns = np.nonzero(owner == index)
        if len(rows):  # not hidden behind the others
            x, y = int(columns.min()), int(rows.min())
            size = int(columns.max()) + 1 - x, int(rows.max()) + 1 - y
            boxes.append(Box(label, (x, y, *size), len(rows)))
    return tuple(boxes)


# ---- on disk ----------------------------------------------------------------------------------

EPILOG = """\
examples:
  python -m distill.scenes --output runs/scenes
  python -m distill.scenes --output runs/scenes --train 2000 --val 500 --seed 3

writes:
  DIR/classification/{train,val}/CLASS/*.png
      the class is the largest solid
  DIR/dense/{train,val}/{images,masks,depth}/*.png
      the same pictures, masks (0-6) and depth in millimetres (16 bit)
  DIR/detection/{train2017,val2017}/*.png,
  DIR/detection/annotations/instances_*.json
      the same pictures in COCO's layout, with a box around what is seen of
      every solid
  DIR/dense/classes.txt
      names of the labels, one per line
  DIR/scenes.json
      names of classes and labels, seed and size
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.scenes",
        description="Draw procedural scenes with class, mask, depth and boxes.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where to write; must not exist"
    )
    parser.add_argument(
        "--train", type=int, default=400, metavar="N", help="training scenes (default: 400)"
    )
    parser.add_argument(
        "--val", type=int, default=100, metavar="N", help="validation scenes (default: 100)"
    )
    parser.add_argument(
        "--size", type=int, default=224, metavar="PIXELS", help="side of a picture (default: 224)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the scenes (default: 0)"
    )
    parser.add_argument(
        "--plain", action="store_true", help="one colour for each surface, without texture"
    )
    args = parser.parse_args(arguments)
    return exit_status(
        lambda: write(args.output, args.train, args.val, args.size, args.seed, args.plain)
    )


def write(folder: Path, train: int, val: int, size: int, seed: int, plain: bool = False) -> None:
    """Draw `train` + `val` scenes into `folder`; raises UserError for counts or sizes below their
    minimum.
    """
    for name, value, least in (
        ("--train", train, 1),
        ("--val", val, 1),
        ("--size", size, 16),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value} is too small: use {least} or more")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already has files: choose another --output")
    with new_folder(folder, f"--output {folder}") as aside:
        for split, numbers in (("train", range(train)), ("val", range(train, train + val))):
            boxes = {}
            for number in track(
                numbers, description=f"scenes {split}", disable=not sys.stdout.isatty()
            ):
                scene = render(seed, number, size, plain)
                name = f"{number:06d}.png"
                picture = Image.fromarray(scene.image)
                save(picture, aside / "classification" / split / CLASSES[scene.label] / name)
                save(picture, aside / "dense" / split / "images" / name)
                save(Image.fromarray(scene.mask), aside / "dense" / split / "masks" / name)
                millimetres = (scene.depth * _DEPTH_SCALE).round().astype(np.uint16)
                save(Image.fromarray(millimetres), aside / "dense" / split / "depth" / name)
                save(picture, aside / "detection" / f"{split}2017" / name)
                boxes[number] = scene.boxes
            labels = aside / "detection" / "annotations" / f"instances_{split}2017.json"
            labels.parent.mkdir(exist_ok=True)
            labels.write_text(json.dumps(coco(boxes, size)))
        (aside / "dense" / "classes.txt").write_text("".join(f"{name}\n" for name in MASK_NAMES))
        about = {
            "classes": CLASSES,
            "masks": MASK_NAMES,
            "size": size,
            "seed": seed,
            "train": train,
            "val": val,
            **({"plain": True} if plain else {}),
        }
        (aside / "scenes.json").write_text(
            json.dumps({"made_by": "distill.scenes", **about}, indent=2)
        )
    print(f"scenes    {folder} ({train} + {val} drawings of {size} px)")


def coco(boxes: Mapping[int, Sequence[Box]], size: int) -> dict[str, list[dict]]:
    """Labels of scenes, by their number, of `size` x `size` pixels in COCO's format."""
    pictures = [
        {"id": number, "file_name": f"{number:06d}.png", "width": size, "height": size}
        for number in boxes
    ]
    all_boxes = [(number, box) for number, own in boxes.items() for box in own]
    annotations = [
        {
            "id": id_,
            "image_id": number,
            "category_id": box.label + 1,
            "bbox": box.box,
            "area": box.area,
            "iscrowd": 0,
        }
        for id_, (number, box) in enumerate(all_boxes, start=1)  # COCO's tools take 0 for no match
    ]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": pictures, "annotations": annotations, "categories": categories}


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, making its folder; light compression, as reading speed matters more than
    size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)


if __name__ == "__main__":
    sys.exit(main())

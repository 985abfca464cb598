"""The view policy: how a picture of any shape becomes pixels of a model's size, and how maps and
boxes of those become the picture's again. Evaluation, export, clients and, copied, the server share
this file.

A policy is written as one text, `KIND[:VALUE][,bilinear][,no-antialias]`:

    squash              the whole picture, its sides resized each by itself
    centre-crop:0.875   the centre: the shorter side becomes side / 0.875 (256 for 224)
    letterbox:7c7468    the whole picture, its shape kept, on a ground of that colour; without one,
                        of the mean colour that the network subtracts
    tiles:0.25          squares over all of it, neighbours sharing at least a quarter of their side

Needs numpy and Pillow only. The pixels are those of timm's evaluation transforms (crop_mode
`squash`, `center`, `border`), bit for bit, where timm has the policy.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

Kind = Literal["squash", "centre-crop", "letterbox", "tiles"]
Interpolation = Literal["bicubic", "bilinear"]
Size = tuple[int, int]
"""Height and width."""

UNSEEN = -1
"""Class of pixels outside a centre crop: no class has it (255 may be one). Where values are no
classes, it is NaN."""

MOST_TILES = 16
"""Of one picture: each costs as much as a picture."""

_DEFAULTS = {"squash": 1.0, "centre-crop": 0.875, "letterbox": 1.0, "tiles": 0.0}
_MEAN = (0.485, 0.456, 0.406)  # ImageNet's
_LARGE = 16
"""A resized picture of more than so many times the model's pixels is not made whole."""


class Place(NamedTuple):
    """Where the model's pixels lie in the resized picture, in whole pixels: `top` and `left` are
    negative where it is padded.
    """

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True)
class ViewPolicy:
    """A view policy; raises ValueError, in one line, for values that cannot be."""

    kind: Kind = "squash"
    share: float = 1.0
    """centre-crop: share of the shorter side that is kept; tiles: least overlap over their side."""
    interpolation: Interpolation = "bicubic"
    antialias: bool = True
    fill: tuple[int, int, int] | None = None
    """letterbox: the ground; None: ImageNet's mean colour (see `on`)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"view '{self.kind}': choose {', '.join(get_args(Kind))}")
        least, most = {"centre-crop": (0.05, 1.0), "tiles": (0.0, 0.75)}.get(self.kind, (1.0, 1.0))
        if not least <= self.share <= most:
            if least == most:
                raise ValueError(f"view {self.kind}:{self.share:g}: {self.kind} takes no number")
            raise ValueError(
                f"view {self.kind}:{self.share:g}: give a share from {least:g} to {most:g}"
            )
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(f"view {self.kind},{self.interpolation}: choose bicubic or bilinear")

    @classmethod
    def parse(cls, text: str) -> "ViewPolicy":
        """The policy of a text; raises ValueError."""
        first, *rest = (part.strip() for part in str(text).split(","))
        kind, colon, value = first.partition(":")
        values: dict = {"kind": kind, "share": _DEFAULTS.get(kind, 1.0)}
        if colon and kind == "letterbox":
            if not re.fullmatch("[0-9a-fA-F]{6}", value):
                raise ValueError(f"view {first}: give the ground as six hexadecimal digits")
            values["fill"] = tuple(bytes.fromhex(value))
        elif colon:
            try:
                values["share"] = float(value)
            except ValueError:
                raise ValueError(f"view {first}: '{value}' is not a number") from None
        for word in rest:
            if word in get_args(Interpolation):
                values["interpolation"] = word
            elif word in ("antialias", "no-antialias"):
                values["antialias"] = word == "antialias"
            else:
                raise ValueError(
                    f"view {text}: '{word}' is not known: add bicubic or bilinear, antialias or "
                    "no-antialias"
                )
        return cls(**values)

    def __str__(self) -> str:
        value = ""
        if self.kind == "letterbox" and self.fill:
            value = ":" + bytes(self.fill).hex()
        elif self.kind in ("centre-crop", "tiles"):
            value = f":{float(self.share)!r}".removesuffix(".0")
        smooth = "" if self.antialias else ",no-antialias"
        return (
            self.kind
            + value
            + f",{self.interpolation}" * (self.interpolation != "bicubic")
            + smooth
        )

    def on(self, mean: Sequence[float]) -> "ViewPolicy":
        """The policy for a network that subtracts `mean` (of RGB in [0, 1]): the ground of a
        letterbox is that colour, unless it is set.
        """
        if self.kind != "letterbox" or self.fill:
            return self
        return replace(self, fill=tuple(round(255 * value) for value in mean))

    def reads(self, height: int, width: int) -> Size | None:
        """The (height, width) that a picture is resized to at least, for decoders that can make a
        smaller one at once; None where they must not: no-antialias samples the picture's own
        pixels.
        """
        if not self.antialias:
            return None
        share = self.share if self.kind == "centre-crop" else 1.0
        return math.floor(height / share), math.floor(width / share)

    def places(self, picture: Size, model: Size) -> list[Place]:
        """Where the model's pixels lie; raises ValueError for a picture of too many tiles."""
        (h, w), (height, width) = picture, model
        if self.kind == "squash":
            return [Place(height, width, 0, 0)]
        if self.kind == "letterbox":
            ratio = max(h / height, w / width)
            rows, columns = (max(1, round(side / ratio)) for side in picture)
            return [Place(rows, columns, -((height - rows) // 2), -((width - columns) // 2))]
        share = self.share if self.kind == "centre-crop" else 1.0
        rows, columns = _covering(picture, (math.floor(height / share), math.floor(width / share)))
        rows, columns = max(rows, height), max(columns, width)
        if self.kind == "centre-crop":
            # as torchvision rounds it
            top, left = int(round((rows - height) / 2.0)), int(round((columns - width) / 2.0))
            return [Place(rows, columns, top, left)]
        down, across = _steps(rows, height, self.share), _steps(columns, width, self.share)
        if down * across > MOST_TILES:
            raise ValueError(
                f"a picture of {w}x{h} takes {down * across:,} tiles, at most {MOST_TILES} are "
                "made: choose view letterbox, or crop it"
            )
        return [
            Place(rows, columns, round(top), round(left))
            for top in np.linspace(0, rows - height, down)
            for left in np.linspace(0, columns - width, across)
        ]

    def pixels(self, picture: Image.Image, height: int, width: int) -> np.ndarray:
        """What the model sees of a picture, uint8 [height, width, 3]; tiles have `every`."""
        if self.kind == "tiles":
            raise ValueError("view tiles makes several views of a picture: choose another here")
        return self.every(picture, height, width)[0]

    def every(
        self, picture: Image.Image, height: int, width: int, own: Size | None = None
    ) -> np.ndarray:
        """All views of a picture, uint8 [n, height, width, 3]: one but for tiles. `own`: the
        picture's own (height, width), where it was decoded to a smaller one. Raises ValueError for
        a picture of too many tiles.
        """
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        places = self.places(own or (picture.height, picture.width), (height, width))
        resample = Image.Resampling[self.interpolation.upper()]
        first = places[0]
        if not self.antialias:
            views = [self._sampled(picture, place, (width, height), resample) for place in places]
        elif first.height * first.width > _LARGE * height * width:
            across, down = picture.width / first.width, picture.height / first.height
            left, top = first.left * across, first.top * down
            right = min(picture.width, left + width * across)
            bottom = min(picture.height, top + height * down)
            box = left, top, right, bottom
            views = [picture.resize((width, height), resample, box=box)]
        else:
            resized = picture.resize((first.width, first.height), resample)
            views = [self._cut(resized, place, (width, height)) for place in places]
        return np.stack([np.asarray(view) for view in views])

    def _cut(self, resized: Image.Image, place: Place, size: tuple[int, int]) -> Image.Image:
        if resized.size == size:
            return resized
        if place.top < 0 or place.left < 0 or self.kind == "letterbox":
            ground = Image.new("RGB", size, self._ground)
            ground.paste(resized, (-place.left, -place.top))
            return ground
        return resized.crop((place.left, place.top, place.left + size[0], place.top + size[1]))

    def _sampled(
        self,
        picture: Image.Image,
        place: Place,
        size: tuple[int, int],
        resample: Image.Resampling,
    ) -> Image.Image:
        """Without antialiasing: the picture's own pixels around each point."""
        across, down = picture.width / place.width, picture.height / place.height
        affine = (across, 0, place.left * across, 0, down, place.top * down)
        return picture.transform(
            size, Image.Transform.AFFINE, affine, resample, fillcolor=self._ground
        )

    @property
    def _ground(self) -> tuple[int, int, int]:
        return self.on(_MEAN).fill or (0, 0, 0)

    def undo(
        self,
        maps: Iterable[np.ndarray],
        picture: Size,
        nearest: bool = False,
        scores: bool = False,
    ) -> np.ndarray:
        """Maps [n, H, W, …] of a picture's views as one map [h, w, …] of the picture's own size
        (height, width): a letterbox's ground is cut off, tiles are averaged where they overlap, and
        what a centre crop does not see is `UNSEEN` in whole numbers and NaN in others. An iterator
        of maps [H, W, …] is taken one by one, so that they need not exist together.

        `nearest`: values are taken as they are, as of classes. `scores`: the maps are scores
        [n, H, W, C], and the result is the class of the highest, int32 [h, w]. Raises ValueError
        for classes of several tiles, which cannot be averaged as their scores can.
        """
        views = iter(maps)
        values = next(views, None)
        if values is None:
            raise ValueError("no maps of a picture that has views")
        places = self.places(picture, values.shape[:2])
        first = places[0]
        if len(places) > 1:
            if not scores and (nearest or not np.issubdtype(values.dtype, np.floating)):
                raise ValueError("classes of tiles cannot be averaged: give their scores")
            views, values = chain([values], views), None  # not held while the others are made
            values = _stitched(views, places)
            first = Place(first.height, first.width, 0, 0)
        if next(views, None) is not None:
            raise ValueError(f"more maps than the {len(places)} views of the picture")
        if scores:
            values, nearest = values.argmax(-1).astype(np.int32), True
        rows = _Axis(picture[0], first.height, first.top, values.shape[0])
        columns = _Axis(picture[1], first.width, first.left, values.shape[1])
        result = (
            values[rows.nearest][:, columns.nearest]
            if nearest
            else columns.blend(rows.blend(values, 0), 1)
        )
        if not (rows.seen.all() and columns.seen.all()):
            unseen = UNSEEN if np.issubdtype(result.dtype, np.integer) else np.nan
            result[~rows.seen] = unseen
            result[:, ~columns.seen] = unseen
        return result

    def region(self, picture: Size, model: Size) -> tuple[float, float, float, float]:
        """Left, upper, right and lower edge of what the one view shows, in shares of the picture;
        a letterbox's are beyond it.
        """
        (place,) = self.places(picture, model)
        return (
            place.left / place.width,
            place.top / place.height,
            (place.left + model[1]) / place.width,
            (place.top + model[0]) / place.height,
        )

    def boxes(self, boxes: np.ndarray, picture: Size, model: Size) -> np.ndarray:
        """Boxes [n, 4] (left, upper, right and lower edge, in shares of the view) in shares of the
        picture, cut at its edges.
        """
        left, top, right, bottom = self.region(picture, model)
        scale, shift = np.array([right - left, bottom - top] * 2), np.array([left, top] * 2)
        return (boxes * scale + shift).clip(0, 1).astype(boxes.dtype)


SQUASH = ViewPolicy()
"""What was served before policies were recorded."""

EVALUATED = ViewPolicy("centre-crop", 0.875)
"""What scores are taken with unless another is set: 224 of 256 pixels, as the papers have it."""


def _covering(picture: Size, target: Size) -> Size:
    """Size of the smallest picture of the same shape that covers `target`, rounded as torchvision
    does for squares and timm for others.
    """
    (h, w), (height, width) = picture, target
    if height != width:
        ratio = min(h / height, w / width)
        return round(h / ratio), round(w / ratio)
    if w <= h:
        return int(height * h / w), height
    return height, int(height * w / h)


def _steps(length: int, side: int, overlap: float) -> int:
    """How many tiles cover a length."""
    return 1 + max(0, math.ceil((length - side) / (side * (1 - overlap)) - 1e-6))


def _stitched(maps: Iterator[np.ndarray], places: Sequence[Place]) -> np.ndarray:
    """Tiles [H, W, …] over the resized picture, overlaps averaged. Of the tiles one is held at a
    time, and the mean takes the place of the sum: scores of many classes are gigabytes.
    """
    one = next(maps)
    height, width = one.shape[:2]
    total = np.zeros((places[0].height, places[0].width, *one.shape[2:]), np.float32)
    count = np.zeros(total.shape[:2] + (1,) * (total.ndim - 2), np.float32)
    for number, place in enumerate(places):
        if one is None:
            raise ValueError(f"{number} maps of a picture that has {len(places)} views")
        window = (
            slice(place.top, place.top + height),
            slice(place.left, place.left + width),
        )
        total[window] += one
        count[window] += 1
        one = None  # let go of, before the next is made
        if number + 1 < len(places):
            one = next(maps, None)
    total /= count
    return total


class _Axis:
    """One axis of a picture's own pixels on the view's: `own` pixels became `resized`, of which the
    view has `side` from `start`.
    """

    def __init__(self, own: int, resized: int, start: int, side: int) -> None:
        place = (np.arange(own) + 0.5) * resized / own - start
        # the view's pixels that are the picture's
        low, high = max(0, -start), min(side, resized - start)
        self.seen = (place >= 0) & (place < side)
        self.nearest = np.clip(np.floor(place).astype(int), low, high - 1)
        centre = np.clip(place - 0.5, low, high - 1)
        self._left = np.floor(centre).astype(int)
        self._right = np.minimum(self._left + 1, high - 1)
        self._weight = (centre - self._left).astype(np.float32)

    def blend(self, values: np.ndarray, axis: int) -> np.ndarray:
        """Values at the picture's pixels, linear between the centres of the view's."""
        shape = [1] * values.ndim
        shape[axis] = -1
        weight = self._weight.reshape(shape)
        left, right = (values.take(index, axis) for index in (self._left, self._right))
        return left * (1 - weight) + right * weight
